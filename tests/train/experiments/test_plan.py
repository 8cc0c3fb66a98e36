"""The tables' experiments: which there are, that none is run twice, and what becomes of those that fail."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from here_workers import Here
from tiny_sets import write_square_set

from saae_runtime.errors import ConfigError, FitError, WeightsError
from saae_train.cli.options import make_config
from saae_train.config import preset
from saae_train.experiments import plan as plan_module
from saae_train.experiments.experiment import Experiment
from saae_train.experiments.plan import COLUMNS, Plan, ResultFolder, RunResult, known_categories


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name in ("bottle", "tile", "part"):
        write_square_set(tmp_path / "data", name, train=6, good=1, bad=1)
    return tmp_path / "data"


class Runner:
    """Stands for the fit: remembers what it was asked for, and fails where it is told to."""

    def __init__(self, **fails: BaseException) -> None:
        self.fails = fails
        self.ran: list[Experiment] = []

    def __call__(self, experiment: Experiment, report: Any) -> Mapping[str, Any]:
        self.ran.append(experiment)
        Path(str(experiment.cache)).mkdir(parents=True, exist_ok=True)
        if experiment.category in self.fails:
            raise self.fails[experiment.category]
        if experiment.config.backbone in self.fails:
            raise self.fails[experiment.config.backbone]
        metrics = {"pixel_roc_auc": {"value": 0.9}, "pro_auc": {"value": 0.8}}
        facts = {"latent": 30 + (experiment.config.layers or (0,))[-1]}
        return {**experiment.settings(), "overall": {"metrics": metrics}, "facts": facts}


def run_plan(*words: Any, room: int = 1, **options: Any) -> dict[tuple[str, str, int], RunResult]:
    return plan_module.run_plan(*words, workers=Here(room), **options)


def plan(data: Path, *names: str, **options: Any) -> Plan:
    return Plan.make(data, names or ("bottle",), options.pop("config", preset("paper")), **options)


def test_experiments_that_several_tables_share_are_run_once(data: Path, tmp_path: Path) -> None:
    everything, run = plan(data), Runner()
    folder = ResultFolder(tmp_path / "out", data)
    results = run_plan(everything, folder, run=run)
    assert {column for _, column, _ in results} == set(COLUMNS) - {"DFR"}
    assert len(run.ran) == 15  # Ours is f1:4; w/o ViT, w/o SAAE, f1 to f12
    assert len(list((tmp_path / "out/experiments").iterdir())) == 15
    again = Runner()
    assert run_plan(everything, folder, run=again) == results
    assert again.ran == []
    assert not list((tmp_path / "out/work").iterdir())  # what a fit went on from is gone


def test_a_result_file_in_the_earlier_folder_is_found(data: Path, tmp_path: Path) -> None:
    folder, chosen = ResultFolder(tmp_path, data), plan(data, tables=["2"])
    results = run_plan(chosen, folder, run=Runner())
    (tmp_path / "experiments").rename(tmp_path / "cells")
    run = Runner()
    assert run_plan(chosen, folder, run=run) == results
    assert run.ran == []


def test_columns_change_what_the_paper_changed(data: Path, tmp_path: Path) -> None:
    run = Runner()
    run_plan(plan(data), ResultFolder(tmp_path, data), run=run)
    configs = {(c.config.backbone, c.config.layers, c.config.transformer): c.config for c in run.ran}
    vit, vgg = "vit_base_patch16_384", "vgg19"
    assert (vit, (0, 1, 2, 3, 4), True) in configs
    assert (vit, (0, 1, 2, 3, 4), False) in configs
    assert configs[vgg, tuple(range(1, 13)), True].input_size == (256, 256)
    assert {(vit, (0, k), True) for k in range(1, 13)} < set(configs)
    # Section 4.4.1: V by PCA for layer 4, the same for every other.
    assert run.ran[0].config.layers == (0, 4)
    assert run.ran[0].config.latent is None
    assert {configs[vit, (0, k), True].latent for k in (1, 2, 3, 5, 12)} == {34}
    assert configs[vit, (0, 1, 2, 3, 4), True].latent is None


def test_one_layer_alone_still_takes_its_v_from_layer_4(data: Path, tmp_path: Path) -> None:
    run = Runner()
    results = run_plan(plan(data, tables=["5"], columns=["f7"]), ResultFolder(tmp_path, data), run=run)
    assert [(c.config.layers, c.config.latent) for c in run.ran] == [((0, 4), None), ((0, 7), 34)]
    run = Runner(bottle=FitError("no"))
    results = run_plan(plan(data, tables=["5"], columns=["f7"], seeds=[5]), ResultFolder(tmp_path, data), run=run)
    assert results["bottle", "f7", 5].reason == "not run: its V is that of f4 (failed: no)"
    run = Runner()
    run_plan(
        plan(data, tables=["5"], columns=["f7"], config=make_config("paper", latent=60)),
        ResultFolder(tmp_path, data),
        run=run,
    )
    assert [(c.config.layers, c.config.latent) for c in run.ran] == [((0, 7), 60)]


def test_a_failed_experiment_does_not_stop_the_others_and_is_tried_again(data: Path, tmp_path: Path) -> None:
    folder = ResultFolder(tmp_path, data)
    chosen = plan(data, "tile", "bottle", "part", tables=["2", "3"])
    results = run_plan(chosen, folder, run=Runner(bottle=FitError("The loss became nan.", "Too fast.")))
    assert results["bottle", "Ours", 0].reason == "failed: The loss became nan. Too fast."
    assert results["tile", "Ours", 0].row is not None
    assert results["part", "Ours", 0].row is not None
    record = json.loads(next((tmp_path / "experiments").glob("bottle-*")).read_text())
    assert record["reason"] == results["bottle", "Ours", 0].reason
    assert list((tmp_path / "work").iterdir())  # what the failed fit may go on from
    run = Runner()
    assert all(result.row for result in run_plan(chosen, folder, run=run).values())
    assert [experiment.category for experiment in run.ran] == ["bottle"]


def test_missing_weights_are_asked_for_once_a_backbone(data: Path, tmp_path: Path) -> None:
    run = Runner(vgg19=WeightsError("No weights of vgg19.", "The hub cannot be reached."))
    results = run_plan(plan(data, "bottle", "tile", tables=["4"]), ResultFolder(tmp_path, data), run=run)
    assert [experiment.config.backbone for experiment in run.ran].count("vgg19") == 1
    for category in ("bottle", "tile"):
        reason = "not run: no weights: No weights of vgg19. The hub cannot be reached."
        assert results[category, "w/o ViT", 0].reason == reason
        assert results[category, "w/o SAAE", 0].row is not None


def test_what_is_finished_survives_a_stop(data: Path, tmp_path: Path) -> None:
    folder, found = ResultFolder(tmp_path, data), {}
    chosen = plan(data, "bottle", "tile", tables=["2"])
    with pytest.raises(KeyboardInterrupt):
        run_plan(chosen, folder, run=Runner(tile=KeyboardInterrupt()), results=found)
    assert list(found) == [("bottle", "Ours", 0)]
    run = Runner()
    run_plan(chosen, folder, run=run)
    assert [experiment.category for experiment in run.ran] == ["tile"]


def test_other_images_settings_seeds_and_damaged_files_are_run(data: Path, tmp_path: Path) -> None:
    def ran(**options: Any) -> int:
        run = Runner()
        run_plan(plan(data, tables=["2"], **options), ResultFolder(tmp_path / "out", data), run=run)
        return len(run.ran)

    assert (ran(), ran()) == (1, 0)
    assert (ran(seeds=[0, 1, 2]), ran(seeds=[2])) == (2, 0)
    assert ran(config=make_config("paper", batch=8)) == 1
    assert ran(weights="random") == 1
    for path in (tmp_path / "out/experiments").iterdir():
        path.write_text("{")
    assert (ran(), ran()) == (1, 0)
    (data / "bottle/train/good/0.png").unlink()
    assert (ran(), ran()) == (1, 0)


def test_a_category_that_cannot_be_listed_fails_in_words(data: Path, tmp_path: Path) -> None:
    for path in (data / "tile/train/good").iterdir():
        path.unlink()
    results = run_plan(plan(data, "tile", "bottle", tables=["2"]), ResultFolder(tmp_path, data), run=Runner())
    assert "has no normal training images" in results["tile", "Ours", 0].reason
    assert results["bottle", "Ours", 0].row is not None


def test_a_file_of_weights_stays_with_its_backbone(data: Path) -> None:
    weights = {p.experiment.config.backbone: p.experiment.weights for p in plan(data, weights="vit.safetensors").runs}
    assert weights == {"vit_base_patch16_384": "vit.safetensors", "vgg19": None}
    assert {p.experiment.weights for p in plan(data, weights="random").runs} == {"random"}


def test_what_there_is_not_is_named(data: Path) -> None:
    with pytest.raises(ConfigError, match="no Table 6"):
        plan(data, tables=["6"])
    with pytest.raises(ConfigError, match="no column 'PaDiM'"):
        plan(data, columns=["PaDiM"])
    with pytest.raises(ConfigError, match="Table 2 has no column f4") as found:
        plan(data, tables=["2"], columns=["f4"])
    assert "Ours" in found.value.cure


def test_categories_come_in_the_papers_order() -> None:
    assert known_categories(["zipper", "part", "bottle", "wood", "cookie"]) == (
        "wood",
        "bottle",
        "zipper",
        "cookie",
        "part",
    )


@pytest.mark.parametrize("room", [2, 5, 40])
def test_several_at_once_give_the_same_and_wait_for_what_they_need(data: Path, tmp_path: Path, room: int) -> None:
    everything = plan(data, "bottle", "tile")
    one, several, workers = Runner(), Runner(), Here(room)
    expected = run_plan(everything, ResultFolder(tmp_path / "one", data), run=one)
    results = plan_module.run_plan(everything, ResultFolder(tmp_path / "more", data), run=several, workers=workers)
    assert results == expected
    assert workers.most > 1
    assert workers.closed
    assert len(several.ran) == len(one.ran) == 30  # Ours and f1:4 are one experiment, which ran once
    for path in (tmp_path / "one/experiments").iterdir():
        assert (tmp_path / "more/experiments" / path.name).read_bytes() == path.read_bytes()


def test_what_fails_among_several_stops_none_and_its_followers_say_so(data: Path, tmp_path: Path) -> None:
    run = Runner(tile=FitError("no"))
    chosen = plan(data, "bottle", "tile", tables=["5"], columns=["f4", "f7"])
    results = run_plan(chosen, ResultFolder(tmp_path, data), run=run, room=4)
    assert results["bottle", "f7", 0].row is not None
    assert results["tile", "f7", 0].reason == "not run: its V is that of f4 (failed: no)"
