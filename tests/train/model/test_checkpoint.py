"""Fitted models on disk: the same outputs after a round trip, and a named error for every kind of damage."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_models import noise_frames, tiny_detector

from saae_runtime.errors import CheckpointError, StorageError
from saae_runtime.files import sha256_file
from saae_train.config import FitConfig
from saae_train.model import checkpoint as module
from saae_train.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from saae_train.model.detector import Detector, FeatureSpace
from saae_train.model.left_out import LeftOut
from saae_train.model.saae import SAAE
from saae_train.model.vit import ViTFeatures, build_backbone
from saae_train.record import FitRecord

SIZE = (32, 48)
VARIANTS: dict[str, dict[str, Any]] = {
    "raw, l2": {"standardise": False},
    "components, joint": {"components": 24, "score": "joint", "smoothing": 0.7},
    "memory": {"components": 24, "score": "memory", "memory": 30, "smoothing": 0.5},
    "CAE, cosine": {"transformer": False, "score": "cosine"},
    "tiles": {"tiles": (2, 1), "size": (96, 48)},
    "registers": {"name": "vit_small_patch14_reg4_dinov2", "size": (28, 42), "layers": (0, 1)},
}


def make(**options: Any) -> Checkpoint:
    arguments = {"name": "test_vit2", "size": SIZE, "layers": (0, 2)} | options
    detector = tiny_detector(**arguments)
    config = FitConfig(
        backbone=arguments["name"],
        layers=arguments["layers"],
        input_size=detector.backbone.input_size,
        tiles=options.get("tiles"),
        score=detector.score,
        smoothing=detector.smoothing,
        components=options.get("components"),
        memory=options.get("memory"),
        held_out=0.0 if "memory" in options else 0.15,
    )
    record = FitRecord(images=7, loss=((1, 0.5), (2, 0.25)), held_out=("größer.png",))
    left_out = LeftOut(
        torch.rand(3, *detector.backbone.grid), ("a.png", "b.png", "ü_\udce4.png"), 1, ("0a", "1b", "2c")
    )
    return Checkpoint(detector, config, "zipper", record, left_out=left_out if "memory" in options else None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "fitted", make(components=24, score="cosine"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_gives_identical_outputs(tmp_path: Path, variant: str) -> None:
    before = make(**VARIANTS[variant])
    assert save_checkpoint(tmp_path / "c", before) == tmp_path / "c"
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["config.json", "model.safetensors"]
    after = load_checkpoint(tmp_path / "c")
    frames = torch.from_numpy(noise_frames(2, before.config.input_size)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        assert torch.equal(after.detector(frames), before.detector(frames))
    assert (after.config, after.category, after.record) == (before.config, before.category, before.record)
    assert after.detector.score == before.detector.score
    if before.left_out is None:
        assert after.left_out is None
    else:
        assert after.left_out is not None
        assert torch.equal(after.left_out.scores, before.left_out.scores)
        for name in ("names", "reach", "hashes"):
            assert getattr(after.left_out, name) == getattr(before.left_out, name)
    assert after.detector.smoothing == before.detector.smoothing
    assert after.detector.backbone.weights == before.detector.backbone.weights
    assert after.detector.backbone.grid == before.detector.backbone.grid
    assert after.detector.backbone.tiles == before.detector.backbone.tiles
    assert not any(module.training for module in after.detector.modules())
    for key, value in before.detector.state_dict().items():
        assert torch.equal(value, after.detector.state_dict()[key]), key


def test_a_memory_is_searched_as_it_was_fitted(tmp_path: Path) -> None:
    before = make(**VARIANTS["memory"])
    assert before.detector.memory is not None
    before.detector.memory.search = 7
    folder = save_checkpoint(tmp_path / "c", before)
    memory = load_checkpoint(folder).detector.memory
    assert memory is not None
    assert memory.search == 7
    record = json.loads((folder / "config.json").read_text())
    del record["memory"]["search"]  # as schema 3 has it
    record["schema"] = 3
    record["digest"] = module._digest(record)
    (folder / "config.json").write_text(json.dumps(record))
    memory = load_checkpoint(folder).detector.memory
    assert memory is not None
    assert memory.search == 24


def test_a_model_from_before_the_level_counted_scores_as_it_did(tmp_path: Path) -> None:
    before = make(**VARIANTS["memory"])
    folder = save_checkpoint(tmp_path / "c", before)
    tensors = load_file(folder / "model.safetensors")
    del tensors["memory.beta"]
    save_file(tensors, folder / "model.safetensors")
    record = json.loads((folder / "config.json").read_text())
    record |= {"schema": 4, "sha256": sha256_file(folder / "model.safetensors")}
    record["digest"] = module._digest(record)
    (folder / "config.json").write_text(json.dumps(record))
    memory = load_checkpoint(folder).detector.memory
    assert memory is not None
    assert float(memory.beta) == 0.0


def test_needs_no_other_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_weights(*_: Any, **__: Any) -> None:
        raise AssertionError("a checkpoint holds its backbone")

    monkeypatch.setattr("saae_train.model.vit.load_state_dict", no_weights)
    assert load_checkpoint(folder).category == "zipper"


def test_only_the_used_blocks_are_stored(folder: Path) -> None:
    blocks = {
        key.split(".")[2] for key in load_file(folder / "model.safetensors") if key.startswith("backbone.blocks.")
    }
    assert blocks == {"0", "1"}


def test_saving_over_an_older_checkpoint(folder: Path) -> None:
    other = make(seed=1)
    save_checkpoint(folder, other)
    found = load_checkpoint(folder).detector.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in other.detector.state_dict().items())


def test_a_folder_with_other_things_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(StorageError, match="not a checkpoint"):
        save_checkpoint(tmp_path, make())
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    save_checkpoint(tmp_path / "empty", make())
    assert load_checkpoint(tmp_path / "empty").category == "zipper"


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError, OSError(28, "No space left on device")])
def test_a_save_that_fails_keeps_the_old_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException] | OSError
) -> None:
    before = (folder / "model.safetensors").read_bytes()

    def fail(*_: Any) -> None:
        raise failure

    monkeypatch.setattr(module, "write_json", fail)
    with pytest.raises(StorageError if isinstance(failure, OSError) else failure):
        save_checkpoint(folder, make(seed=1))
    assert (folder / "model.safetensors").read_bytes() == before
    assert load_checkpoint(folder).category == "zipper"
    assert [path.name for path in folder.parent.iterdir()] == ["fitted"]


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
def test_one_byte_changed_anywhere(folder: Path, path: str) -> None:
    file = folder / path
    data = file.read_bytes()
    chosen = random.Random(0)
    for _ in range(60 if path == "config.json" else 15):
        place = chosen.randrange(len(data))
        changed = bytes([data[place] ^ (1 << chosen.randrange(8))])
        if data[place : place + 1].isspace() and changed.isspace():
            continue  # another blank between two values: the same JSON
        file.write_bytes(data[:place] + changed + data[place + 1 :])
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(folder)
        assert str(folder) in caught.value.what
        assert caught.value.cure
    file.write_bytes(data)
    load_checkpoint(folder)


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("keep", [0, 0.5])
def test_truncated(folder: Path, path: str, keep: float) -> None:
    os.truncate(folder / path, int((folder / path).stat().st_size * keep))
    with pytest.raises(CheckpointError):
        load_checkpoint(folder)


def test_missing(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="No checkpoint at") as caught:
        load_checkpoint(folder.parent / "elsewhere")
    assert "saae-train fit" in caught.value.cure
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="damaged or missing"):
        load_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="No checkpoint"):
        load_checkpoint(folder)
    with pytest.raises(CheckpointError):
        load_checkpoint(Path(__file__))  # a file


@pytest.mark.parametrize("text", ["[]", "null", "3", '"x"', "{}", '{"schema": null}', '{"schema": 1}', "[" * 100_000])
def test_foreign_json(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError):
        load_checkpoint(folder)


def test_newer_schema(folder: Path) -> None:
    record = json.loads((folder / "config.json").read_text())
    # Whatever else a newer version may have changed, its digest too.
    (folder / "config.json").write_text(json.dumps({"schema": 99, "saae_version": "9.9", "other": record}))
    with pytest.raises(CheckpointError, match=r"newer saae \(9\.9\)") as caught:
        load_checkpoint(folder)
    assert "--upgrade" in caught.value.cure


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    checkpoint = make()
    checkpoint.detector.saae.queries.data[0, 1, 2] = value
    save_checkpoint(tmp_path / "c", checkpoint)
    with pytest.raises(CheckpointError, match="NaN or infinite") as caught:
        load_checkpoint(tmp_path / "c")
    assert "saae.queries" in caught.value.why


def test_weights_of_another_model_with_a_fitting_hash(folder: Path) -> None:
    """Written by a tool, not damaged: every hash fits, the tensors do not."""
    tensors = load_file(folder / "model.safetensors")
    for name, change in (
        ("missing", lambda: tensors.pop("saae.queries")),
        ("shape", lambda: tensors.update({"saae.position": torch.zeros(1, 2, 3)})),
    ):
        change()
        save_file(tensors, folder / "model.safetensors")
        record = json.loads((folder / "config.json").read_text())
        record["sha256"] = module.sha256_file(folder / "model.safetensors")
        record["digest"] = module._digest(record)
        (folder / "config.json").write_text(json.dumps(record))
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            load_checkpoint(folder)
        assert name


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("backbone", {"name": "vit_nonsense"}),
        ("backbone", {"input_size": [31, 48]}),
        ("backbone", {"layers": []}),
        ("backbone", {"layers": [99]}),
        ("saae", {"latent": 7}),
        ("saae", {"extra": 7}),
        ("space", {"components": "many"}),
        ("config", {"loss": None, "extra": 1}),
    ],
)
def test_a_description_that_cannot_be_built(folder: Path, part: str, changes: dict[str, Any]) -> None:
    record = json.loads((folder / "config.json").read_text())
    record[part].update(changes)
    record["digest"] = module._digest(record)
    (folder / "config.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError):
        load_checkpoint(folder)


def test_distilled_and_other_prefixes_survive(tmp_path: Path) -> None:
    backbone = build_backbone("deit_tiny_distilled_patch16_224", (0, 1), (32, 32), "random")
    assert isinstance(backbone, ViTFeatures)
    space = FeatureSpace(torch.zeros(384), torch.ones(384))
    before = Detector(backbone, space, SAAE(384, 6, 4).eval())
    config = FitConfig(
        backbone=backbone.name,
        layers=(0, 1),
        input_size=(32, 32),
        score="l2",
        smoothing=0.0,
        memory=None,
        held_out=0.15,
    )
    save_checkpoint(tmp_path / "c", Checkpoint(before, config, "x"))
    x = torch.rand(1, 3, 32, 32) * 255
    with torch.inference_mode():
        assert torch.equal(load_checkpoint(tmp_path / "c").detector(x), before(x))


def test_another_librarys_model_folder_is_not_replaced(tmp_path: Path) -> None:
    """Theirs have a config.json and a model.safetensors, too."""
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["ViTModel"], "hidden_size": 768}')
    (folder / "model.safetensors").write_bytes(b"days of training")
    with pytest.raises(StorageError, match="not a checkpoint"):
        save_checkpoint(folder, make())
    assert (folder / "model.safetensors").read_bytes() == b"days of training"


def test_a_damaged_checkpoint_may_be_replaced(folder: Path) -> None:
    (folder / "config.json").write_text('{"schema": 1, "conf')
    save_checkpoint(folder, make())
    assert load_checkpoint(folder).category == "zipper"


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ("I/O error: No space left on device (os error 28)", "disk is full"),
        ("I/O error: Permission denied (os error 13)", "Permission denied"),
        ("something else", "something else"),
    ],
)
def test_a_failed_write_of_weights_gives_its_own_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, word: str
) -> None:
    def fail(*_: Any) -> None:
        raise SafetensorError(said)

    monkeypatch.setattr("saae_train.model.tensors.save_file", fail)
    with pytest.raises(StorageError, match=word):
        save_checkpoint(tmp_path / "c", make())


def test_a_checkpoint_whose_replacement_was_killed_loads(folder: Path) -> None:
    folder.rename(folder.with_name(f".{folder.name}.0123abcd.old"))
    assert load_checkpoint(folder).category == "zipper"
