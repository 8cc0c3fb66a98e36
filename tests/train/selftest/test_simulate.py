"""Simulated defects: the same every time, exactly where the mask says, visible, and on the product."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saae_runtime.errors import ConfigError, DataError
from saae_runtime.images import read_image
from saae_train.data.demo import write_demo
from saae_train.selftest.ground import find_ground
from saae_train.selftest.simulate import CONTRASTS, KINDS, MIN_SIDE, SIZES, contrast_class, simulate, size_class


def part(height: int, width: int, seed: int = 0, gray: bool = False, background: bool = False) -> np.ndarray:
    """uint8 height x width x 3: a product with structure at several scales, alone or on a plain ground."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    field = 120 + 45 * np.sin(14 * x + seed) * np.cos(11 * y) + 25 * np.sin(60 * y) + rng.normal(0, 6, (height, width))
    tint = np.ones(3) if gray else np.array([1.0, 0.8, 0.65])
    frame = field[:, :, None] * tint
    if background:
        inside = np.hypot(y - y.mean(), x - x.mean()) < 0.3
        frame = np.where(inside[:, :, None], 0.4 * frame, 225 + rng.normal(0, 1.5, (height, width, 1)))
    return np.clip(np.rint(frame), 0, 255).astype(np.uint8)


def check(before: np.ndarray, found: object) -> None:
    """Everything that holds for any simulated defect."""
    frame, mask = found.frame, found.mask  # type: ignore[attr-defined]
    assert frame.dtype == np.uint8
    assert frame.shape == before.shape
    assert mask.shape == before.shape[:2]
    changed = (frame != before).any(axis=2)
    assert not (changed & ~mask).any(), "pixels outside the mask were changed"
    assert changed[mask].mean() > 0.5, "most of the mask shows no change"
    assert found.area == mask.sum() >= 6  # type: ignore[attr-defined]
    difference = np.abs(frame.astype(float) - before)[mask].mean()
    assert found.contrast == pytest.approx(difference, rel=1e-6)  # type: ignore[attr-defined]
    rows, columns = np.nonzero(mask)
    box = math.hypot(np.ptp(rows) + 1, np.ptp(columns) + 1)
    extent = found.extent  # type: ignore[attr-defined]
    assert max(np.ptp(rows), np.ptp(columns)) + 0.9 <= extent <= box + 1
    assert found.relative == pytest.approx(extent / math.sqrt(mask.size))  # type: ignore[attr-defined]


@given(
    height=st.integers(MIN_SIDE, 150),
    width=st.integers(MIN_SIDE, 150),
    kind=st.sampled_from(KINDS),
    size=st.sampled_from(sorted(SIZES)),
    contrast=st.sampled_from(sorted(CONTRASTS)),
    seed=st.integers(0, 2**40),
    gray=st.booleans(),
    background=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_only_the_mask_changes(
    height: int, width: int, kind: str, size: str, contrast: str, seed: int, gray: bool, background: bool
) -> None:
    frame = part(height, width, seed % 5, gray, background)
    original = frame.copy()
    found = simulate(frame, kind, size, contrast, seed=seed, donor=part(width, height, 9, gray, background))
    assert np.array_equal(frame, original), "the caller's frame was changed"
    if found is None:
        return
    check(original, found)
    if gray:
        assert (found.frame[..., 0] == found.frame[..., 1]).all()
        assert (found.frame[..., 1] == found.frame[..., 2]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_again_and_another_with_another_seed(kind: str) -> None:
    frame, donor = part(200, 160), part(200, 160, 3)
    first = simulate(frame, kind, "large", "strong", seed=4, donor=donor)
    again = simulate(frame.copy(), kind, "large", "strong", seed=4, donor=donor.copy())
    other = simulate(frame, kind, "large", "strong", seed=5, donor=donor)
    assert first is not None
    assert again is not None
    assert other is not None
    assert np.array_equal(first.frame, again.frame)
    assert np.array_equal(first.mask, again.mask)
    assert not np.array_equal(first.frame, other.frame)


def test_another_image_gets_another_defect_from_the_same_seed() -> None:
    one = simulate(part(128, 128, 0), "spot", "medium", "strong", seed=1)
    two = simulate(part(128, 128, 1), "spot", "medium", "strong", seed=1)
    assert one is not None
    assert two is not None
    assert not np.array_equal(one.mask, two.mask)


def test_another_process_draws_the_same() -> None:
    """A bundle's numbers are compared with those of another day's build."""
    code = (
        "import hashlib, numpy as np; from saae_train.selftest.simulate import simulate;"
        "frame = np.add.outer(np.arange(64) * 2, np.arange(64)).astype(np.uint8)[:, :, None].repeat(3, axis=2);"
        "found = simulate(frame, 'spot', 'large', 'strong', seed=7);"
        "print(hashlib.sha256(found.frame.tobytes()).hexdigest())"
    )
    root = Path(__file__).resolve().parents[3]
    digests = set()
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(root)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        digests.add(done.stdout)
    assert len(digests) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", sorted(SIZES))
@pytest.mark.parametrize("shape", [(64, 64), (256, 320)])
def test_every_kind_is_visible_at_every_size(kind: str, size: str, shape: tuple[int, int]) -> None:
    """Over several seeds most are drawn, and those that are have the size that was asked for."""
    frames = [part(*shape, seed) for seed in range(4)]
    drawn = [simulate(frames[i], kind, size, "strong", seed=i, donor=frames[i - 1]) for i in range(4)]
    found = [item for item in drawn if item is not None]
    assert len(found) >= 3
    for item in found:
        assert item.contrast > 2
    # Masks of textures and blurs may be cut up by what happens to be alike; at 64 pixels none can be smaller than 8 %.
    if kind not in ("texture", "blur") and (size, shape) != ("small", (64, 64)):
        assert sum(item.size == size for item in found) >= len(found) - 1


@pytest.mark.parametrize("kind", ["scratch", "spot", "texture"])
@pytest.mark.parametrize("contrast", sorted(CONTRASTS))
def test_contrast_is_what_was_asked_for(kind: str, contrast: str) -> None:
    found = [simulate(part(256, 256, i), kind, "large", contrast, seed=i) for i in range(5)]
    classes = [item.strength for item in found if item is not None]
    assert classes.count(contrast) >= 4


def test_classes_split_the_drawn_ranges() -> None:
    for name, (low, high) in SIZES.items():
        assert size_class(low) == size_class(high) == name
    for name, (low, high) in CONTRASTS.items():
        assert contrast_class(low) == contrast_class(high) == name


def test_a_patch_of_the_same_is_no_defect() -> None:
    """One colour: nothing to paste, blur or miss; what brings its own colour can be drawn."""
    plain = np.full((96, 96, 3), 90, np.uint8)
    for kind in ("cut-paste", "blur", "missing part"):
        assert simulate(plain, kind, "large", "strong", donor=plain.copy()) is None
    for kind in ("scratch", "spot", "texture"):
        found = simulate(plain, kind, "large", "strong")
        assert found is not None
        check(plain, found)


def test_a_patch_of_the_same_noise_is_no_defect() -> None:
    """Every pixel differs, and yet nothing can be seen: only the mean over a neighbourhood tells."""
    rng = np.random.default_rng(0)
    noise = np.clip(rng.normal(128, 8, (192, 192, 1)), 0, 255).astype(np.uint8).repeat(3, axis=2)
    assert simulate(noise, "cut-paste", "large", "strong") is None
    assert simulate(noise, "blur", "large", "strong") is not None


@pytest.mark.parametrize("level", [0, 255])
@pytest.mark.parametrize("kind", ["scratch", "spot", "texture"])
def test_black_and_white_pictures_have_room_on_one_side(kind: str, level: int) -> None:
    frame = np.full((120, 90, 3), level, np.uint8)
    found = simulate(frame, kind, "large", "clear", seed=2)
    assert found is not None
    assert found.contrast > 10


def test_defects_lie_on_the_product() -> None:
    for seed in range(4):
        frame = part(160, 200, seed, background=True)
        ground = find_ground(frame)
        assert ground.surface is not None
        y, x = np.mgrid[:160, :200] / 200
        inside = np.hypot(y - y.mean(), x - x.mean()) < 0.3
        assert (ground.product == inside).mean() > 0.95
        for kind in KINDS:
            found = simulate(frame, kind, "medium", "strong", seed=seed)
            if found is not None:
                assert inside[found.mask].mean() > 0.5


def test_a_missing_part_shows_the_background() -> None:
    frame = part(160, 200, background=True)
    shown = []
    for seed in range(12):
        found = simulate(frame, "missing part", "medium", "strong", seed=seed)
        if found is not None:
            core = found.frame[found.mask].mean(axis=1)
            shown.append((core > 200).mean() > 0.5)
    assert sum(shown) >= 3


def test_a_texture_has_no_background() -> None:
    for seed in range(5):
        ground = find_ground(part(100, 140, seed))
        assert ground.surface is None
        assert ground.product.all()


def test_real_pictures(tmp_path: Path) -> None:
    """The drawn zipper, as the demo's build takes it: tape and chain, not the ground beside them."""
    category = write_demo(tmp_path, "zipper", size=(160, 160), train=3, test_good=1, per_defect=1)
    frames = [read_image(sample.path) for sample in category.train]
    ground = find_ground(frames[0])
    assert ground.surface is not None
    assert 0.3 < ground.product.mean() < 0.95
    for kind in KINDS:
        found = simulate(frames[0], kind, "large", "strong", seed=1, donor=frames[1])
        assert found is not None, kind
        check(frames[0], found)


@pytest.mark.parametrize("shape", [(MIN_SIDE - 1, 200), (8, 8), (200, 1)])
def test_too_small_to_draw_on(shape: tuple[int, int]) -> None:
    with pytest.raises(DataError, match="too small"):
        simulate(np.zeros((*shape, 3), np.uint8), "spot", "small", "faint")


@pytest.mark.parametrize("shape", [(MIN_SIDE, 600), (600, MIN_SIDE)])
def test_long_strips(shape: tuple[int, int]) -> None:
    """A large defect is longer than the short side: it is drawn as large as fits."""
    frame = part(*shape)
    for kind in ("scratch", "spot"):
        found = simulate(frame, kind, "large", "strong", seed=3)
        assert found is not None
        check(frame, found)


@pytest.mark.parametrize("wrong", [("dent", "small", "faint"), ("spot", "huge", "faint"), ("spot", "small", "loud")])
def test_unknown_words(wrong: tuple[str, str, str]) -> None:
    with pytest.raises(ConfigError, match="There is no simulated defect"):
        simulate(part(64, 64), *wrong)
