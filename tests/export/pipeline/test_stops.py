"""A build that is stopped, fails or is refused leaves what was there."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
from folders import copy_tree, leftovers
from tiny_builds import fitted_model, options, quiet_build

import saae_export.pipeline.build as build_module
import saae_export.pipeline.fit as fit_module
import saae_export.pipeline.graphs as graphs_module
import saae_export.pipeline.measure as quality_module
import saae_export.pipeline.verdicts as verdicts_module
from saae_export.pipeline.left_out import LeftOutCalibrator
from saae_runtime import open_bundle
from saae_runtime.errors import (
    CalibrationError,
    ConfigError,
    DataError,
    StorageError,
)
from saae_runtime.locks import alone
from saae_train.model.checkpoint import load_checkpoint

STOPS = {
    "find images": (build_module, "find_images"),
    "check images": (build_module, "check"),
    "fit": (fit_module, "fit"),
    "export": (graphs_module, "write_graphs"),
    "calibrate": (LeftOutCalibrator, "__call__"),
    "parity": (graphs_module, "compare_artefact"),
    "engines": (graphs_module, "build_engine"),
    "evaluate": (verdicts_module, "evaluate"),
    "self-test": (quality_module, "selftest"),
    "latency": (quality_module, "measure"),
    "bundle": (build_module, "write_bundle"),
    "reference frames": (build_module, "write_reference"),
    "heatmaps": (build_module, "write_heatmaps"),
    "report": (build_module, "write_report"),
}


@pytest.mark.parametrize("stage", STOPS)
def test_ctrl_c_at_every_stage_is_clean(stage: str, again: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_bundle(again / "bundle").manifest

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(*STOPS[stage], stop)
    with pytest.raises(KeyboardInterrupt):
        quiet_build(
            options(
                data,
                again,
                precisions=("fp32",),
                refit=stage == "fit",
                engines=("tensorrt",) if stage == "engines" else ("none",),
                measure_latency=stage == "latency",
                self_test=stage == "self-test",
            )
        )
    assert open_bundle(again / "bundle", verify=True).manifest == before
    assert leftovers(again) == []
    assert [path.name for path in (again / "runs" / "weave").iterdir()] == ["models"]
    load_checkpoint(fitted_model(again))


@pytest.mark.parametrize("stage", ["export", "calibrate"])
def test_an_error_leaves_no_graphs_behind(stage: str, again: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the graphs are written, as a full disk or a NaN would."""
    real = graphs_module.write_graphs

    def fail(*arguments: object, **keywords: object) -> object:
        if stage == "export":
            real(*arguments, **keywords)  # type: ignore[arg-type]
        raise CalibrationError("A score is not finite.")

    monkeypatch.setattr(*STOPS[stage], fail)
    with pytest.raises(CalibrationError):
        quiet_build(options(data, again, precisions=("fp32",)))
    assert [path.name for path in (again / "runs" / "weave").iterdir()] == ["models"]


def test_a_full_disk_keeps_the_old_bundle(again: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_bundle(again / "bundle").manifest
    copyfile = shutil.copyfile

    def full(source: Path, target: Path, **keywords: object) -> object:
        if ".bundle." in str(target):
            Path(target).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return copyfile(source, target, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(StorageError, match="disk is full"):
        quiet_build(options(data, again, precisions=("fp32",)))
    assert open_bundle(again / "bundle", verify=True).manifest == before
    assert leftovers(again) == []


def test_a_folder_that_is_no_bundle_is_refused_before_the_work(data: Path, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "holiday.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not a bundle"):
        quiet_build(options(data, tmp_path))
    assert not (tmp_path / "runs" / "weave").exists()
    assert (tmp_path / "bundle" / "holiday.txt").read_text() == "mine"


def test_two_builds_do_not_share_a_work_folder(again: Path, data: Path) -> None:
    """Their graphs and thresholds would be mixed without a word."""
    before = (again / "bundle" / "manifest.json").read_bytes()
    lock = again / "runs" / ".weave.lock"
    with alone(lock, "A build", ""), pytest.raises(ConfigError, match="A build of weave is already running") as caught:
        quiet_build(options(data, again))
    assert "--work" in caught.value.cure
    assert (again / "bundle" / "manifest.json").read_bytes() == before


def test_bad_images_are_listed_before_any_fitting(data: Path, tmp_path: Path) -> None:
    broken = copy_tree(data, tmp_path / "data")
    good = sorted((broken / "weave" / "train" / "good").iterdir())
    good[0].write_bytes(good[0].read_bytes()[:200])
    good[1].write_bytes(b"")
    with pytest.raises(DataError) as caught:
        quiet_build(options(broken, tmp_path))
    assert len(caught.value.problems) == 2
    assert not (tmp_path / "runs").exists()


def test_too_few_images(data: Path, tmp_path: Path) -> None:
    few = copy_tree(data, tmp_path / "data")
    for path in sorted((few / "weave" / "train" / "good").iterdir())[1:]:
        path.unlink()
    with pytest.raises(DataError, match="too few"):
        quiet_build(options(few, tmp_path))
