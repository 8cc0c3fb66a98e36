"""Near-copies in the order of the images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from saae_train.data.bursts import first_copies, sequence_reach
from saae_train.data.category import Sample, find_category


def write(folder: Path, frames: list[np.ndarray]) -> list[Sample]:
    found = []
    for number, frame in enumerate(frames):
        path = folder / f"{number:03}.png"
        Image.fromarray(np.clip(frame, 0, 255).astype(np.uint8)).save(path)
        found.append(Sample(path, "good", None, False))
    return found


def test_a_slow_pan_is_a_sequence(tmp_path: Path) -> None:
    scene = np.random.default_rng(0).normal(128, 60, (8, 60, 3))
    scene = np.asarray(Image.fromarray(np.clip(scene, 0, 255).astype(np.uint8)).resize((1200, 160)))
    noise = np.random.default_rng(1)
    frames = [scene[:, x : x + 160] + noise.normal(0, 3, (160, 160, 3)) for x in range(0, 1000, 10)]
    reach = sequence_reach(write(tmp_path, frames))
    assert 1 <= reach <= 20


def test_bursts_of_three(tmp_path: Path) -> None:
    generator = np.random.default_rng(2)
    frames = []
    for _ in range(20):
        scene = np.kron(generator.uniform(0, 255, (8, 8, 3)), np.ones((8, 8, 1)))
        frames += [scene + generator.normal(0, 4, scene.shape) for _ in range(3)]
    assert 1 <= sequence_reach(write(tmp_path, frames)) <= 3


def test_independent_images_are_none(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    base = generator.uniform(0, 255, (64, 64, 3))
    frames = [base + generator.normal(0, 20, base.shape) for _ in range(40)]
    assert sequence_reach(write(tmp_path, frames)) == 0


@pytest.mark.parametrize("name", ["bottle", "cookie", "magnetic_tile"])
def test_photographs_of_separate_parts_are_none(shared_data: Path, name: str) -> None:
    assert sequence_reach(find_category(shared_data, name).train[:120]) == 0


def parts(count: int, varied: float, noise: float, seed: int = 0) -> list[np.ndarray]:
    """Frames of one product: the parts differ by `varied`, and each frame has noise of its own."""
    generator = np.random.default_rng(seed)
    base = generator.uniform(40, 210, (8, 8, 3))
    found = []
    for _ in range(count):
        scene = np.kron(base + generator.normal(0, varied, base.shape), np.ones((16, 16, 1)))
        found.append(scene + generator.normal(0, noise, scene.shape))
    return found


@pytest.mark.parametrize("count", [3, 5, 40])
def test_a_picture_that_is_saved_again_is_a_copy(tmp_path: Path, count: int) -> None:
    samples = write(tmp_path, parts(count, 12, 3))
    for sample in samples[:2]:
        with Image.open(sample.path) as image:
            for name, again, options in (
                ("a.jpg", image, {"quality": 95}),
                ("b.png", image.resize((64, 64), Image.Resampling.BOX), {}),
            ):
                path = tmp_path / f"{sample.path.stem}{name}"
                again.save(path, **options)
                samples.append(Sample(path, "good", None, False))
    assert first_copies(samples) == [*range(count), 0, 0, 1, 1]


@pytest.mark.parametrize(("varied", "kinds"), [(0, 1), (12, 1), (0, 2), (0.2, 3)])
def test_pictures_of_a_product_that_hardly_varies_are_no_copies(tmp_path: Path, varied: float, kinds: int) -> None:
    """A part in a fixture, or some variants of it: all that differs is noise, and all are alike."""
    frames = [frame for seed in range(kinds) for frame in parts(24 // kinds, varied, 4, seed)]
    assert first_copies(write(tmp_path, frames)) == list(range(24))


@pytest.mark.parametrize("name", ["bottle", "cookie", "screw", "magnetic_tile"])
@pytest.mark.parametrize("count", [30, 100])
def test_of_photographs_only_copies_are_copies(shared_data: Path, tmp_path: Path, name: str, count: int) -> None:
    samples = list(find_category(shared_data, name).train[:count])
    assert first_copies(samples) == list(range(len(samples)))
    again = []
    for sample in samples[:5]:
        for quality in (95, 90):
            again.append(tmp_path / f"{sample.path.stem}-{quality}.jpg")
            with Image.open(sample.path) as image:
                image.convert("RGB").save(again[-1], quality=quality)
    every = samples + [Sample(path, "good", None, False) for path in again]
    assert first_copies(every) == [*range(len(samples)), *(place for place in range(5) for _ in range(2))]
