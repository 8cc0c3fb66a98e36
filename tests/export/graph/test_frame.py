"""The graph's resize against Pillow, its upsample against torch."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from saae_export.graph.frame import MIDDLE, Banded, FrameToPixels, ScoresToMap
from saae_runtime.geometry import gaussian_matrix, resize_matrix

sides = st.integers(1, 90)


@settings(max_examples=60, deadline=None)
@given(sides, sides, sides, sides, st.integers(0, 2**32 - 1))
def test_resize_is_pillows_to_within_its_rounding(high: int, wide: int, low: int, narrow: int, seed: int) -> None:
    frames = np.random.default_rng(seed).integers(0, 256, (2, high, wide, 3), dtype=np.uint8)
    found = FrameToPixels((high, wide), (low, narrow))(torch.from_numpy(frames)).numpy() + np.float32(MIDDLE)
    assert found.dtype == np.float32
    for frame, pixels in zip(frames, found, strict=True):
        expected = np.asarray(Image.fromarray(frame).resize((narrow, low), Image.Resampling.BILINEAR), np.float32)
        # Pillow rounds twice, once per axis: half a level each.
        assert np.abs(pixels - expected).max() <= 1.001


def test_frame_of_model_size_passes_unchanged() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (1, 24, 32, 3), dtype=np.uint8)
    stage = FrameToPixels((24, 32), (24, 32))
    assert not list(stage.buffers())
    assert np.array_equal(stage(torch.from_numpy(frame))[0].numpy(), frame[0] - np.float32(MIDDLE))
    assert torch.equal(stage(torch.from_numpy(frame)).bfloat16().float(), stage(torch.from_numpy(frame))), (
        "exact in bf16"
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), sides, sides, st.integers(0, 2**32 - 1))
def test_upsample_is_torchs(h: int, w: int, high: int, wide: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand((2, h, w), generator=generator)
    expected = F.interpolate(scores[:, None], (high, wide), mode="bilinear", align_corners=False)[:, 0]
    assert torch.allclose(ScoresToMap((h, w), (high, wide))(scores), expected, atol=3e-6)


def test_smoothing_is_folded_into_the_upsample() -> None:
    scores = torch.rand((2, 7, 9))
    rows, columns = torch.tensor(gaussian_matrix(7, 0.8)), torch.tensor(gaussian_matrix(9, 0.8))
    smooth = torch.matmul(torch.matmul(rows, scores), columns.T)
    expected = F.interpolate(smooth[:, None], (50, 70), mode="bilinear", align_corners=False)[:, 0]
    assert torch.allclose(ScoresToMap((7, 9), (50, 70), 0.8)(scores), expected, atol=3e-6)
    plain = ScoresToMap((7, 9), (50, 70))(scores)
    assert (plain - expected).abs().max() > 1e-3, "the smoothing did nothing"


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(1, 160), st.integers(0, 2**32 - 1))
def test_blocks_multiply_as_the_whole_matrix(n_in: int, n_out: int, seed: int) -> None:
    matrix = resize_matrix(n_in, n_out)
    x = torch.rand((2, n_in, 3), generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(Banded(matrix)(x), torch.tensor(matrix) @ x, atol=1e-5)


def test_a_large_frame_is_not_multiplied_by_zeros() -> None:
    matrix = resize_matrix(1024, 336)
    stage = Banded(matrix)
    assert stage.cost < matrix.size / 5
    assert stage.weights.numel() < matrix.size / 8
    assert Banded(resize_matrix(20, 10)).inputs is None  # too small for blocks
