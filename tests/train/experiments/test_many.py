"""Many categories: each is fitted once, as `fit` does; one that fails or is killed costs no other anything."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_jobs
import pytest
import torch
from here_workers import Here
from tiny_sets import TINY_CHANGES, write_square_set

from saae_runtime.errors import SaaeError, StorageError
from saae_train.cli.options import make_config
from saae_train.experiments import many
from saae_train.experiments.experiment import Experiment
from saae_train.experiments.jobs import Processes, Workers
from saae_train.experiments.many import CategoryFit, fit_many, kept_fit
from saae_train.model.checkpoint import load_checkpoint

pytestmark = pytest.mark.needs("timm")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name in ("bottle", "tile", "part"):
        write_square_set(tmp_path / "data", name, train=6, good=1, bad=1)
    return tmp_path / "data"


def fits(data: Path, out: Path, *names: str, **changes: Any) -> list[CategoryFit]:
    config = make_config("fast", **{**TINY_CHANGES, **changes})
    cache = str(out.parent / f"cache-{out.name}")
    return [
        CategoryFit(Experiment(str(data), name, config, weights="random", cache=cache, device="cpu"), str(out))
        for name in names
    ]


def ran(wanted: list[CategoryFit], workers: Workers | None = None) -> tuple[dict[str, Any], list[str]]:
    """What came out, and which were fitted now."""
    fresh: list[str] = []

    def done(name: str, outcome: Mapping[str, Any] | SaaeError, now: bool) -> None:
        if now:
            fresh.append(name)

    return fit_many(wanted, workers or Here(), done=done), fresh


def weights(out: Path, name: str) -> str:
    return json.loads((out / name / "checkpoint/config.json").read_text())["sha256"]


def test_each_is_fitted_once_and_again_when_something_changes(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found, fresh = ran(fits(data, out, "bottle", "tile"))
    assert fresh == ["bottle", "tile"]
    assert load_checkpoint(out / "tile/checkpoint").record.texture is True
    assert found["bottle"]["images"] == load_checkpoint(out / "bottle/checkpoint").record.images
    assert not list((tmp_path / "cache-out/states").iterdir())
    assert ran(fits(data, out, "bottle", "tile"))[1] == []
    assert ran(fits(data, out, "bottle", "tile", "part"))[1] == ["part"]
    shutil.rmtree(out / "tile/checkpoint")
    (out / "part/fit.json").write_text("{")
    assert ran(fits(data, out, "bottle", "tile", "part"))[1] == ["tile", "part"]
    (data / "bottle/train/good/0.png").unlink()
    assert ran(fits(data, out, "bottle", "tile"))[1] == ["bottle"]
    before = weights(out, "tile")
    assert ran(fits(data, out, "tile", seed=1))[1] == ["tile"]
    assert weights(out, "tile") != before
    assert ran([replace(fits(data, out, "tile", seed=1)[0], texture=False)])[1] == ["tile"]


def test_warnings_are_kept_with_the_fit(data: Path, tmp_path: Path) -> None:
    (data / "tile/train/good/notes.txt").write_text("camera 3")
    wanted = fits(data, tmp_path / "out", "tile")
    found, fresh = ran(wanted)
    assert fresh == ["tile"]
    (warning,) = found["tile"]["warnings"]
    assert str(data / "tile") in warning
    assert ".txt" in warning
    assert kept_fit(wanted[0]) == found["tile"]


def test_one_that_fails_stops_no_other_and_is_tried_again(data: Path, tmp_path: Path) -> None:
    path = data / "part/train/good/1.png"
    whole = path.read_bytes()
    path.write_bytes(b"no image")
    shutil.rmtree(data / "bottle/train/good")
    (data / "bottle/train/good").mkdir()
    wanted = fits(data, tmp_path / "out", "bottle", "part", "tile")
    found, _ = ran(wanted, Here(2))
    assert "no normal training images" in found["bottle"].what
    assert "1.png" in str(found["part"])
    assert kept_fit(wanted[2]) == found["tile"]
    assert not (tmp_path / "out/part").exists()
    path.write_bytes(whole)
    assert ran(wanted[1:])[1] == ["part"]


def test_a_checkpoint_that_is_not_seen_here_is_no_success(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def elsewhere(wanted: CategoryFit, report: Any) -> Mapping[str, Any]:
        return {"key": wanted.key()}

    monkeypatch.setattr(many, "fit_category", elsewhere)
    found, _ = ran(fits(data, tmp_path / "out", "tile"))
    assert isinstance(found["tile"], StorageError)
    assert "share" in found["tile"].cure


def test_killed_on_the_way_it_is_what_a_fit_at_one_go_makes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("bottle",)
    told: list[str] = []
    monkeypatch.setattr(many, "fit_category", fake_jobs.fit_killed_once)
    wanted = fits(data, tmp_path / "several", *names)
    found = fit_many(wanted, Processes(2, threads=1), died=lambda job, why: told.append(why))
    assert told == ["ended with code -9"]
    assert [kept_fit(item) for item in wanted] == [found[name] for name in names]
    monkeypatch.undo()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ran(fits(data, tmp_path / "one", *names))
    finally:
        torch.set_num_threads(threads)
    for name in names:
        assert weights(tmp_path / "several", name) == weights(tmp_path / "one", name)
