"""Features on disk: computed once, keyed by everything that shapes them, resumed after a stop."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import noise_frames

from saae_runtime.errors import FitError, ImageError, StorageError
from saae_runtime.geometry import resize_frames
from saae_train.data.category import Sample
from saae_train.fitting import features as module
from saae_train.fitting.features import cache_root, extract, feature_key, pick_device
from saae_train.model.vit import ViTFeatures, build_backbone

SIZE = (32, 48)


@pytest.fixture(scope="module")
def backbone() -> ViTFeatures:
    return build_backbone("test_vit2", (0, 2), SIZE, "random")


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """Nineteen images of several sizes: two whole batches and a rest."""
    found = []
    for index in range(19):
        path = tmp_path / "images" / f"{index:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(noise_frames(1, (30 + index, 50 - index), index)[0]).save(path)
        found.append(Sample(path, "good", None, False))
    return found


@pytest.fixture
def counted(backbone: ViTFeatures, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """How many images went through the backbone; `stop_after` batches, Ctrl-C."""
    state = SimpleNamespace(images=0, batches=0, stop_after=None)
    real = ViTFeatures.forward

    def forward(self: ViTFeatures, x: torch.Tensor) -> torch.Tensor:
        if state.stop_after is not None and state.batches >= state.stop_after:
            raise KeyboardInterrupt
        state.batches += 1
        state.images += len(x)
        return real(self, x)

    monkeypatch.setattr(ViTFeatures, "forward", forward)
    return state


def direct(backbone: ViTFeatures, samples: list[Sample]) -> np.ndarray:
    """The features image by image, without any of the module's machinery."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (backbone.mean, backbone.std))
    rows = []
    for sample in samples:
        frame = resize_frames(np.asarray(Image.open(sample.path)), SIZE)
        x = (torch.from_numpy(frame.copy()).permute(2, 0, 1) / 255 - mean) / std
        with torch.inference_mode():
            rows.append(backbone(x[None])[0].numpy())
    return np.stack(rows)


def test_values(backbone: ViTFeatures, samples: list[Sample], tmp_path: Path) -> None:
    calls = []
    found = extract(backbone, samples, tmp_path, precision="fp32", progress=lambda *call: calls.append(call))
    expected = direct(backbone, samples)
    assert len(found) == 19
    assert found.values.dtype == np.float16
    assert found.values.shape == (19, 2 * 3, 2 * 64)
    np.testing.assert_allclose(found.values, expected, rtol=2e-3, atol=2e-3)
    rows = found.rows(3, 5)
    assert rows.dtype == torch.float32
    np.testing.assert_array_equal(rows.numpy(), found.values[3:5].astype(np.float32))
    assert calls == [(0, 19), (8, 19), (16, 19), (19, 19)]
    assert isinstance(found.values, np.memmap)  # read as needed, not loaded


def test_a_second_time_costs_nothing(
    backbone: ViTFeatures, samples: list[Sample], tmp_path: Path, counted: SimpleNamespace
) -> None:
    first = extract(backbone, samples, tmp_path, precision="fp32")
    assert counted.images == 19
    calls = []
    second = extract(backbone, samples, tmp_path, precision="fp32", progress=lambda *call: calls.append(call))
    assert counted.images == 19
    assert second.key == first.key
    np.testing.assert_array_equal(second.values, first.values)
    assert calls == [(19, 19)]
    assert sorted(path.suffix for path in (tmp_path / "features").iterdir()) == [".npy"]


@pytest.mark.parametrize("stop_after", [0, 1, 2])
def test_goes_on_after_an_interruption(
    backbone: ViTFeatures, samples: list[Sample], tmp_path: Path, counted: SimpleNamespace, stop_after: int
) -> None:
    counted.stop_after = stop_after
    with pytest.raises(KeyboardInterrupt):
        extract(backbone, samples, tmp_path / "a", precision="fp32")
    assert not list((tmp_path / "a").rglob("*.npy"))  # half a set is never taken for a whole one
    counted.stop_after = None
    found = extract(backbone, samples, tmp_path / "a", precision="fp32")
    assert counted.images == 19  # none twice
    whole = extract(backbone, samples, tmp_path / "b", precision="fp32")
    np.testing.assert_array_equal(found.values, whole.values)
    assert [path.suffix for path in (tmp_path / "a" / "features").iterdir()] == [".npy"]


@pytest.mark.parametrize("damage", ["mark", "no mark", "part", "no part", "foreign part"])
def test_a_damaged_interruption_begins_again(
    backbone: ViTFeatures, samples: list[Sample], tmp_path: Path, counted: SimpleNamespace, damage: str
) -> None:
    counted.stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        extract(backbone, samples, tmp_path, precision="fp32")
    (part,), (mark,) = tmp_path.rglob("*.part"), tmp_path.rglob("*.json")
    if damage == "mark":
        mark.write_text('{"done": ')
    elif damage == "no mark":
        mark.unlink()
    elif damage == "part":
        os.truncate(part, part.stat().st_size // 2)
    elif damage == "no part":
        part.unlink()
    else:
        with part.open("wb") as stream:
            np.save(stream, np.zeros((3, 3), np.float16))
    counted.stop_after = None
    found = extract(backbone, samples, tmp_path, precision="fp32")
    np.testing.assert_allclose(found.values, direct(backbone, samples), rtol=2e-3, atol=2e-3)


def test_a_mark_that_outlives_its_part_is_not_believed(
    backbone: ViTFeatures, samples: list[Sample], tmp_path: Path, counted: SimpleNamespace
) -> None:
    counted.stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        extract(backbone, samples, tmp_path, precision="fp32")
    next(iter(tmp_path.rglob("*.part"))).unlink()
    with pytest.raises(KeyboardInterrupt):  # stopped again before the first batch is through
        extract(backbone, samples, tmp_path, precision="fp32")
    counted.stop_after = None
    found = extract(backbone, samples, tmp_path, precision="fp32")
    np.testing.assert_allclose(found.values, direct(backbone, samples), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("size", [0, 40, 2000])
def test_a_damaged_cache_file_is_computed_again(
    backbone: ViTFeatures, samples: list[Sample], tmp_path: Path, size: int
) -> None:
    first = np.array(extract(backbone, samples, tmp_path, precision="fp32").values)
    os.truncate(next(iter(tmp_path.rglob("*.npy"))), size)
    np.testing.assert_array_equal(extract(backbone, samples, tmp_path, precision="fp32").values, first)


def test_key_follows_everything_that_shapes_the_features(backbone: ViTFeatures, samples: list[Sample]) -> None:
    key = feature_key(backbone, samples, "fp32")
    assert feature_key(build_backbone("test_vit2", (2, 0), SIZE, "random"), samples, "fp32") == key
    others = {
        "weights": feature_key(build_backbone("test_vit2", (0, 2), SIZE, "random", seed=1), samples, "fp32"),
        "layers": feature_key(build_backbone("test_vit2", (0, 1), SIZE, "random"), samples, "fp32"),
        "size": feature_key(build_backbone("test_vit2", (0, 2), SIZE[::-1], "random"), samples, "fp32"),
        "model": feature_key(build_backbone("test_vit", (0, 2), SIZE, "random"), samples, "fp32"),
        "precision": feature_key(backbone, samples, "bf16"),
        "rounded products": feature_key(backbone, samples, "tf32"),
        "order": feature_key(backbone, samples[::-1], "fp32"),
        "fewer": feature_key(backbone, samples[:-1], "fp32"),
    }
    pixels = np.asarray(Image.open(samples[4].path)).copy()
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(samples[4].path)
    others["one bit of one image"] = feature_key(backbone, samples, "fp32")
    assert len({key, *others.values()}) == len(others) + 1


def test_a_changed_image_is_read_again(
    backbone: ViTFeatures, samples: list[Sample], tmp_path: Path, counted: SimpleNamespace
) -> None:
    extract(backbone, samples, tmp_path, precision="fp32")
    Image.fromarray(noise_frames(1, (40, 40), 99)[0]).save(samples[0].path)
    found = extract(backbone, samples, tmp_path, precision="fp32")
    assert counted.images == 38
    np.testing.assert_allclose(found.values, direct(backbone, samples), rtol=2e-3, atol=2e-3)


def test_where_the_cache_is(
    backbone: ViTFeatures, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SAAE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "saae"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SAAE_CACHE", "")
    assert cache_root() == tmp_path / "home" / ".cache" / "saae"
    monkeypatch.setenv("SAAE_CACHE", str(tmp_path / "mine"))
    assert cache_root() == tmp_path / "mine"
    extract(backbone, samples[:2], precision="fp32")
    assert len(list((tmp_path / "mine" / "features").glob("*.npy"))) == 1


def test_no_room(backbone: ViTFeatures, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(StorageError, match="features need") as caught:
        extract(backbone, samples, tmp_path, precision="fp32")
    assert "SAAE_CACHE" in caught.value.cure
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve room on a disk")
def test_an_interrupted_extraction_has_its_room_already(
    backbone: ViTFeatures,
    samples: list[Sample],
    tmp_path: Path,
    counted: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted.stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        extract(backbone, samples, tmp_path, precision="fp32")
    counted.stop_after = None
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    extract(backbone, samples, tmp_path, precision="fp32")
    assert counted.images == 19


def _extract(samples: list[Sample], cache: Path, seconds: float, told: Connection) -> None:
    """In a process of its own: an extraction whose images take `seconds` each to read."""
    real, steps = Sample.read, []
    Sample.read = lambda sample: (time.sleep(seconds), real(sample))[1]  # type: ignore[method-assign]
    backbone = build_backbone("test_vit2", (0, 2), SIZE, "random")
    read = [0]
    forward = ViTFeatures.forward
    ViTFeatures.forward = lambda self, x: (read.__setitem__(0, read[0] + len(x)), forward(self, x))[1]  # type: ignore[method-assign]
    told.send("begins")
    found = extract(backbone, samples, cache, precision="fp32", progress=lambda *step: steps.append(step))
    told.send((read[0], steps, np.array(found.values)))


def test_of_two_processes_one_computes_and_the_other_waits(
    backbone: ViTFeatures, samples: list[Sample], tmp_path: Path
) -> None:
    context = multiprocessing.get_context("spawn")
    ours, processes = [], []
    for seconds in (0.1, 0.1):
        mine, theirs = context.Pipe()
        ours.append(mine)
        processes.append(context.Process(target=_extract, args=(samples, tmp_path, seconds, theirs), daemon=True))
        processes[-1].start()
    assert [end.recv() for end in ours] == ["begins", "begins"]
    found = [end.recv() for end in ours]
    for process in processes:
        process.join()
    assert sorted(read for read, _, _ in found) == [0, 19]
    (waiting,) = (steps for read, steps, _ in found if not read)
    assert waiting[-1] == (19, 19)
    for _, _, values in found:
        np.testing.assert_allclose(values, direct(backbone, samples), rtol=2e-3, atol=2e-3)
    assert [path.suffix for path in (tmp_path / "features").iterdir()] == [".npy"]


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve room on a disk")
def test_disk_full_all_of_a_sudden(
    backbone: ViTFeatures, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "posix_fallocate", full)
    with pytest.raises(StorageError, match="disk is full"):
        extract(backbone, samples, tmp_path, precision="fp32")
    assert not list(tmp_path.rglob("*.part"))


def test_bad_images_and_bad_features(backbone: ViTFeatures, samples: list[Sample], tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(samples[0].path.read_bytes()[:99])
    with pytest.raises(ImageError, match=r"bad\.png"):
        extract(backbone, [*samples[:3], dataclasses.replace(samples[3], path=bad)], tmp_path, precision="fp32")
    for value in (float("nan"), 1e6):
        broken = build_backbone("test_vit2", (0,), SIZE, "random")
        broken.patch_embed.proj.bias.data[0] = value
        with pytest.raises(FitError, match="not usable"):
            extract(broken, samples[:3], tmp_path / str(value), precision="fp32")


def test_devices() -> None:
    assert pick_device("cpu").type == "cpu"
    assert pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("cuda:99", "abacus"):
        with pytest.raises(FitError, match=f"Device '{name}' cannot be used") as caught:
            pick_device(name)
        assert "--device cpu" in caught.value.cure
