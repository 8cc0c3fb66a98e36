"""Which fitted model a build takes: the one of an earlier build, one that is given, or a new one."""

from __future__ import annotations

import dataclasses
import io
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from folders import copy_tree
from rich.console import Console
from tiny_builds import Enough, fitted_model, options, quiet_build

import saae_export.pipeline.build as build_module
import saae_export.pipeline.fit as fit_module
import saae_export.pipeline.graphs as graphs_module
from saae_export.pipeline.build import BuildResult, build
from saae_export.pipeline.fit import FittedModel
from saae_export.pipeline.images import Request
from saae_runtime import open_bundle
from saae_runtime.errors import (
    ConfigError,
    SaaeError,
    StorageError,
    WeightsError,
)
from saae_train.data.category import Sample, find_category
from saae_train.data.split import Split, content_digest, content_hashes, split_held_out, split_of
from saae_train.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from saae_train.record import FitRecord


def test_building_again_reuses_the_model_and_replaces_the_bundle(again: Path, data: Path) -> None:
    before = open_bundle(again / "bundle").manifest
    weights = (fitted_model(again) / "model.safetensors").stat().st_mtime_ns
    _, text = quiet_build(options(data, again, precisions=("fp32",)))
    assert "reused" in text
    assert (fitted_model(again) / "model.safetensors").stat().st_mtime_ns == weights
    after = open_bundle(again / "bundle").manifest
    assert set(after.files) & {"model.onnx", "model.fp16.onnx"} == {"model.onnx"}
    assert after.thresholds["fp32"] == before.thresholds["fp32"]
    assert after.files["model.onnx"] == before.files["model.onnx"], "the same model gave other bytes"


def test_another_configuration_is_fitted_anew(again: Path, data: Path, until_export: list[object]) -> None:
    chosen = options(data, again)
    config = dataclasses.replace(chosen.config, steps=7)
    with pytest.raises(Enough):
        quiet_build(dataclasses.replace(chosen, config=config))
    assert len(list((again / "runs" / "weave" / "models").iterdir())) == 2


def test_a_texture_is_fitted_as_one(again: Path, data: Path, until_export: list[object]) -> None:
    """`weave` is one by its name; as an object it is another model, with another default FPR."""
    as_texture = load_checkpoint(fitted_model(again))
    with pytest.raises(Enough):
        quiet_build(options(data, again, texture=False))
    (other,) = {*(again / "runs" / "weave" / "models").iterdir()} - {_checkpoint_of(again, as_texture)}
    as_object = load_checkpoint(other)
    assert (as_texture.record.texture, as_object.record.texture) == (True, False)
    assert as_object.detector.saae.mlp_size == 2 * as_texture.detector.saae.mlp_size
    category = find_category(data, "weave")
    paper_texture, paper_object = (dataclasses.replace(model, left_out=None) for model in (as_texture, as_object))
    for checkpoint, texture, asked, expected in (
        (paper_texture, None, None, 0.0),
        (paper_object, None, None, 0.001),
        (paper_object, True, None, 0.0),
        (paper_texture, None, 0.01, 0.01),
        (as_texture, None, None, 0.001),
        (as_texture, None, 0.01, 0.01),
    ):
        chosen = options(data, again, texture=texture, pixel_fpr=asked)
        model = FittedModel(checkpoint, Path(), Split((), ()))
        assert build_module._pixel_fpr(chosen, model, category) == expected


def _checkpoint_of(folder: Path, checkpoint: Checkpoint) -> Path:
    models = folder / "runs" / "weave" / "models"
    return next(path for path in models.iterdir() if load_checkpoint(path).record == checkpoint.record)


def test_other_weights_under_the_same_name_are_another_model(data: Path, tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    category = find_category(data, "weave")
    chosen = options(data, tmp_path, weights=str(weights))
    keys = []
    for content in (b"one", b"two", b"one"):
        weights.write_bytes(content)
        keys.append(fit_module.model_key(chosen.config, category, category.train, str(weights), None))
    assert keys[0] == keys[2] != keys[1]
    copied = shutil.copyfile(weights, tmp_path / "other.safetensors")
    assert fit_module.model_key(chosen.config, category, category.train, str(copied), None) == keys[0]


def test_a_failed_save_loses_no_step(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise StorageError("The disk is full.")

    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "save_checkpoint", full)
        with pytest.raises(StorageError):
            quiet_build(options(data, tmp_path))
    monkeypatch.setattr(graphs_module, "write_graphs", full)
    console = Console(file=io.StringIO(), width=160)
    with pytest.raises(StorageError):
        build(options(data, tmp_path), console)
    assert isinstance(console.file, io.StringIO)
    assert "resuming at step 6 of 6" in console.file.getvalue()
    assert list((tmp_path / "cache" / "states").iterdir()) == []  # saved, so not needed any more
    load_checkpoint(fitted_model(tmp_path))


def test_a_given_model_is_calibrated_on_images_that_it_has_not_seen(data: Path, tmp_path: Path) -> None:
    """By content, in whatever names: unseen where there are any, and an is_unseen word where there are none."""
    images = copy_tree(data, tmp_path / "data")
    good = images / "weave" / "train" / "good"
    for number, path in enumerate(sorted(good.iterdir())):
        path.rename(good / f"x{number}.png")
    category = find_category(images, "weave")
    config = options(data, tmp_path).config.with_values({"seed": 3, "score": "cosine"})
    fitting, held_out = split_held_out(category.train, config.held_out, seed=3)

    def unseen(seen: Sequence[Sample], digest: str | None = None) -> tuple[set[Path], bool, str]:
        record = FitRecord(digest=digest) if digest else FitRecord(fitted_on=content_hashes(seen))
        found = split_of(record, config, category)
        assert not {sample.path for sample in found.fitting} & {sample.path for sample in found.held_out}
        return {sample.path for sample in found.held_out}, found.unseen, found.note

    wanted = {sample.path for sample in held_out}
    assert unseen(fitting) == (wanted, True, "")
    found, is_unseen, text = unseen([*fitting[3:], held_out[0]])
    assert (found, is_unseen) == ({s.path for s in (*fitting[:3], *held_out[1:])}, True)
    assert "has not seen" in text
    found, is_unseen, text = unseen(category.train)
    assert (found, is_unseen) == (wanted, False)
    assert f"{len(held_out)} of the {len(held_out)} images" in text
    # Checkpoints of earlier versions name no images, only the digest of them all.
    assert unseen((), digest=content_digest(fitting)) == (wanted, True, "")
    assert unseen((), digest="0" * 64)[1] is False


def test_a_bundle_says_that_its_images_were_fitted_on(
    held: tuple[BuildResult, Path], data: Path, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(fitted_model(held[1]))
    every = tuple(sorted(content_hashes(find_category(data, "weave").train)))
    record = dataclasses.replace(checkpoint.record, fitted_on=every)
    given = save_checkpoint(tmp_path / "given", dataclasses.replace(checkpoint, record=record))
    result, text = quiet_build(options(data, tmp_path, checkpoint=given, precisions=("fp32",)))
    assert result.bundle.manifest.calibration.held_out is False
    assert "FITTED ON" in text
    assert "normal, fitted on" in (tmp_path / "bundle" / "report.html").read_text()


def test_a_given_model_serves_other_images_but_leaves_out_none_of_its_own(
    built: tuple[BuildResult, str, Path], data: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(data, tmp_path / "data"))
    good = root / "weave/train/good"
    chosen = options(
        root,
        tmp_path,
        request=Request("weave", normal=(good,)),
        checkpoint=fitted_model(built[2]),
        precisions=("fp32",),
    )
    with pytest.raises(ConfigError, match=r"000\.png and 1 more cannot be excluded") as refused:
        quiet_build(dataclasses.replace(chosen, exclude=("00[01].png",)))
    assert "--checkpoint" in refused.value.cure
    assert not (tmp_path / "bundle").exists()
    shutil.copy(root / "weave/test/good/000.png", good / "-new.png")
    (good / "001.png").unlink()
    result, _ = quiet_build(chosen)
    before = built[0].bundle.manifest
    assert result.bundle.manifest.calibration.images == before.calibration.images == 10
    assert result.bundle.manifest.thresholds["fp32"].image.at() == pytest.approx(
        before.thresholds["fp32"].image.at(), rel=0.2
    )
    quiet_build(dataclasses.replace(chosen, exclude=("-new.png",)))


def test_a_damaged_model_is_fitted_again(again: Path, data: Path, until_export: list[object]) -> None:
    file = fitted_model(again) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-7] + b"damaged")
    with pytest.raises(Enough):
        quiet_build(options(data, again))
    load_checkpoint(fitted_model(again))
    assert file.read_bytes() == whole, "the same images, options and seed gave another model"


def test_a_reused_model_of_random_weights_is_refused_as_a_new_one_is(
    again: Path, data: Path, until_export: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SAAE_ALLOW_RANDOM")
    with pytest.raises(WeightsError, match="random"):
        quiet_build(options(data, again))
    assert until_export == []


def test_a_checkpoint_with_nan_is_refused(built: tuple[BuildResult, str, Path], data: Path, tmp_path: Path) -> None:
    found = load_checkpoint(fitted_model(built[2]))
    found.detector.saae.project.bias.data[0] = float("nan")
    bad = save_checkpoint(tmp_path / "bad", found)
    with pytest.raises(SaaeError, match=r"NaN|not finite"):
        quiet_build(options(data, tmp_path, checkpoint=bad))
