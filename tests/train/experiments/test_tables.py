"""Ours beside the paper's: means, spreads, differences, and words wherever there is no number."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from saae_train.config import preset
from saae_train.experiments.paper import CLASSES, OBJECT_CLASSES
from saae_train.experiments.plan import Plan, RunResult
from saae_train.experiments.tables import (
    Figure,
    Table,
    csv_text,
    differences,
    fps_table,
    make_tables,
    markdown,
    measured_with,
    versions_text,
)

Key = tuple[str, str, int]


def row(value: float | None, reason: str = "no mask", **changes: Any) -> dict[str, Any]:
    """An experiment's row as far as the tables read it."""
    metric = {"value": value} if value is not None else {"value": None, "reason": reason}
    config = preset("paper").replace(layers=(0, 1, 2, 3, 4)).to_json()
    return {
        "config": config,
        "weights_source": "hub: timm/vit_base_patch16_384",
        "synthetic": False,
        "image_sizes": [[900, 900], [1024, 1024]],
        "overall": {"metrics": {"pixel_roc_auc": metric, "pro_auc": metric}},
        **changes,
    }


def tables(values: dict[Key, Any], names: tuple[str, ...], table: str = "2", seeds: tuple[int, ...] = (0,)) -> Table:
    plan = Plan.make(Path("data"), names, preset("paper"), tables=[table], seeds=seeds)
    results = {key: value if isinstance(value, RunResult) else RunResult(row(value)) for key, value in values.items()}
    (made,) = make_tables(plan, results)
    return made


def test_a_complete_table_has_the_papers_means() -> None:
    values = {(name, "Ours", 0): 0.90 + 0.001 * index for index, name in enumerate(CLASSES)}
    made = tables(values, CLASSES)
    assert made.rows == (*CLASSES[:5], "mean of textures", *CLASSES[5:], "mean of objects", "mean")
    mean = made.figures["mean", "Ours"]
    assert mean.ours == pytest.approx(90.7)
    assert (mean.paper, mean.note) == (97.9, "")
    assert made.figures["mean of textures", "Ours"].ours == pytest.approx(90.2)
    assert made.figures["mean of objects", "Ours"].paper == 97.8
    assert mean.difference == pytest.approx(90.7 - 97.9)
    assert made.also["mean"]["PaDiM"] == 97.5
    assert made.also["tile"]["Patch SVDD"] == 91.4


def test_with_classes_missing_both_means_are_over_those_that_are_there() -> None:
    values = {("bottle", "Ours", 0): 0.97, ("cable", "Ours", 0): 0.95, ("part", "Ours", 0): 0.5}
    made = tables(values, ("bottle", "cable", "part"))
    assert made.rows == ("bottle", "cable", "mean of objects", "mean", "part")  # no textures, no mean of them
    mean = made.figures["mean", "Ours"]
    assert mean.ours == pytest.approx(96.0)  # `part` is none of the paper's classes
    assert mean.paper == pytest.approx((97.9 + 96.8) / 2)
    assert mean.note.startswith("over 2 of 15 classes (without carpet, ")
    assert made.figures["part", "Ours"].paper is None
    assert "mean" not in made.also  # printed over all classes: not beside a mean over two
    failed = {**values, ("cable", "Ours", 0): RunResult(reason="failed: memory")}
    again = tables(failed, ("bottle", "cable"))
    assert again.figures["mean", "Ours"].ours == pytest.approx(97.0)
    assert again.figures["mean", "Ours"].paper == 97.9
    assert again.figures["cable", "Ours"].reason == "failed: memory"
    nothing = tables({("cable", "Ours", 0): RunResult(reason="failed: memory")}, ("cable",))
    assert nothing.figures["mean", "Ours"].reason == "no value: none of its classes has one"


def test_table_4_has_published_means_alone() -> None:
    columns = ("w/o ViT", "w/o SAAE", "Ours")
    some = tables({("bottle", column, 0): 0.9 for column in columns}, ("bottle",), "4")
    assert some.columns == columns
    assert some.figures["mean", "w/o ViT"].paper is None
    assert "the paper has only the mean over all, 96.5" in some.figures["mean", "w/o ViT"].note
    assert some.figures["mean", "Ours"].paper == 97.9  # Table 2 has the class
    every = tables({(name, column, 0): 0.9 for column in columns for name in CLASSES}, CLASSES, "4")
    assert every.figures["mean of objects", "w/o SAAE"].paper == 96.5


def test_several_seeds_have_mean_and_spread() -> None:
    values = {("bottle", "Ours", seed): 0.95 + 0.01 * seed for seed in range(3)}
    values |= {("cable", "Ours", seed): 0.97 - 0.01 * seed for seed in range(3)}
    made = tables(values, ("bottle", "cable"), seeds=(0, 1, 2))
    bottle, mean = made.figures["bottle", "Ours"], made.figures["mean", "Ours"]
    assert (bottle.ours, bottle.spread, bottle.seeds) == (pytest.approx(96), pytest.approx(1), 3)
    assert mean.ours == pytest.approx(96)
    assert mean.spread == pytest.approx(0, abs=1e-9)  # one goes up where the other goes down
    values["cable", "Ours", 1] = RunResult(reason="failed: x")
    made = tables(values, ("bottle", "cable"), seeds=(0, 1, 2))
    cable = made.figures["cable", "Ours"]
    assert (cable.seeds, cable.note) == (2, "over 2 of 3 seeds (seed 1: failed: x)")
    assert "96.00 ± 1.00" in markdown([made], "")


def test_what_has_no_number_has_words_everywhere() -> None:
    values = {
        ("bottle", "Ours", 0): None,
        ("cable", "Ours", 0): RunResult(reason="not run: no weights: No weights of it."),
        ("zipper", "Ours", 0): RunResult(row(0.9, synthetic=True)),
    }
    made = tables(values, ("bottle", "cable", "capsule", "zipper"))
    assert made.figures["bottle", "Ours"].reason == "no value: no mask"
    assert made.figures["capsule", "Ours"].reason == "not run: stopped before it"
    zipper = made.figures["zipper", "Ours"]
    assert (zipper.ours, zipper.paper) == (pytest.approx(90), None)
    assert "drawn" in zipper.note
    text = markdown([made], "made by a test")
    for words in ("no value [1]", "- [1] no value: no mask", "not run [2]", "No weights of it", "made by a test"):
        assert words in text
    assert "nan" not in text.lower().replace("mean", "")
    assert "| |" not in text.replace("  ", " ")
    lines = list(csv.DictReader(io.StringIO(csv_text([made]))))
    assert all(line["ours"] or line["reason"] for line in lines)
    assert {line["column"] for line in lines if line["row"] == "bottle"} >= {"Ours", "PaDiM", "AE L2"}
    assert json.loads(json.dumps(made.to_json(), allow_nan=False))["table"] == "2"
    with pytest.raises(ValueError, match="reason"):
        Figure("2", "a", "b", "%", None, None, 0, None)
    with pytest.raises(ValueError, match="finite"):
        Figure("2", "a", "b", "%", float("nan"), None, 1, None)


def test_many_columns_have_the_papers_figure_in_brackets() -> None:
    columns = ("f1:4", *(f"f{k}" for k in range(1, 13)))
    made = tables({("bottle", column, 0): 0.9 for column in columns}, ("bottle",), "5")
    heads, lines, _ = made.grid()
    assert heads == ["class", *columns]
    assert lines[0][:2] == ["bottle", "90.00 (97.9, -7.9)"]


def test_differences_name_what_is_not_the_papers() -> None:
    same = differences(row(0.9), "Ours")
    (held_out,) = same
    assert held_out.startswith("15 % of the normal images held out to set T, and fitted on as many fewer")
    config = preset("paper").replace(layers=(4, 5), steps=20, batch=16, standardise=True, latent=30).to_json()
    other = row(0.9, config=config, weights_source="random (no quality)", image_sizes=[[96, 80], [900, 900]])
    text = "; ".join(differences(other, "Ours"))
    for words in (
        "random weights",
        "layers 4 5 (paper: 0 1 2 3 4)",
        "standardise yes (paper: no)",
        "V 30 (paper: none)",
        "20 steps of 16 images a step (paper: 700 epochs of 32 images a step)",
        "images of 96 x 80 to 900 x 900 pixels (paper: 700 to 1024)",
    ):
        assert words in text
    assert any(words.startswith("fitted as the SAAE is") for words in differences(row(0.9), "DFR"))
    single = preset("paper").replace(layers=(0, 7), latent=30).to_json()
    assert differences(row(0.9, config=single), "f7") == same  # V from layer 4, as in the paper
    cae = preset("paper").replace(layers=(0, 1, 2, 3, 4), transformer=False).to_json()
    assert differences(row(0.9, config=cae), "w/o SAAE") == same


def test_set_ups_are_told_by_the_experiments_they_belong_to() -> None:
    values = {("bottle", "Ours", 0): 0.9, ("cable", "Ours", 0): RunResult(row(0.9, image_sizes=[[96, 96], [96, 96]]))}
    made = tables(values, ("bottle", "cable"))
    assert any(line.startswith("Ours of bottle: 15 %") for line in made.setup)
    assert any(line.startswith("Ours of cable: images of 96 x 96 pixels") for line in made.setup)
    assert any("hub: timm/vit_base_patch16_384 (paper: vit_base_patch16_384" in line for line in made.setup)


def test_columns_with_the_same_set_up_share_a_sentence() -> None:
    fast = {"steps": 20, "batch": 16}
    experiments = {
        ("bottle", "Ours", 0): {"layers": (0, 1, 2, 3, 4), **fast},
        ("bottle", "w/o SAAE", 0): {"layers": (0, 1, 2, 3, 4), "transformer": False, **fast},
    }
    results = {k: RunResult(row(0.9, config=preset("paper").replace(**v).to_json())) for k, v in experiments.items()}
    made = tables(results, ("bottle",), "4")
    assert made.setup[0].startswith("w/o SAAE, Ours: 20 steps of 16 images a step (paper: 700 epochs")
    assert len(made.setup) == 2  # and the weights


def test_frames_a_second_and_their_ratio() -> None:
    about = {"backbone": "vgg19", "layers": [1], "input_size": [256, 256], "latent": 300}
    models = {"SAAE": {**about, "fps": 40.0}, "DFR": {**about, "fps": 10.0}}
    made = fps_table({"device": "a CPU", "threads": 2, "models": models})
    ratio = made.figures["SAAE over DFR", "frames a second"]
    assert (ratio.ours, ratio.paper) == (4.0, pytest.approx(86 / 31))
    assert made.figures["DFR", "frames a second"].paper == 31
    made = fps_table({"device": "a CPU", "threads": 2, "models": {**models, "DFR": {"reason": "failed: no vgg19"}}})
    assert made.figures["DFR", "frames a second"].reason == "failed: no vgg19"
    assert made.figures["SAAE over DFR", "frames a second"].ours is None
    assert "failed: no vgg19" in markdown([made], "")


def test_objects_and_textures_are_fifteen() -> None:
    assert len(CLASSES) == 15
    assert len(OBJECT_CLASSES) == 10


def test_the_footer_has_the_versions_that_measured() -> None:
    def result(version: str | None) -> RunResult:
        return RunResult({} if version is None else {"tools": {"saae": "1.0", "torch": version}})

    one = {("bottle", "Ours", 0): result("2.1"), ("tile", "Ours", 0): result("2.1")}
    assert versions_text(measured_with(one)) == "saae 1.0, torch 2.1"
    more = {("grid", "DFR", 0): result("2.2"), ("wood", "DFR", 1): result(None), **one, ("a", "b", 0): RunResult()}
    text = versions_text(measured_with(more))
    assert text.index("torch 2.1 (Ours of bottle, seed 0; Ours of tile") < text.index("torch 2.2 (DFR of grid, seed 0)")
    assert "versions not recorded (DFR of wood, seed 1)" in text
    assert versions_text(measured_with({})) == "nothing measured"


def test_the_csv_quotes_the_paper_s_other_columns_and_says_so() -> None:
    made = tables({("bottle", "Ours", 0): 0.9}, ("bottle",), "2")
    rows = list(csv.DictReader(io.StringIO(csv_text([made]))))
    quoted = [line for line in rows if line["reason"] == "the paper's figure alone"]
    assert {(line["row"], line["column"]): float(line["paper"]) for line in quoted} == {
        (name, column): value for name, figures in made.also.items() for column, value in figures.items()
    }
    assert quoted
    assert all(line["ours"] == "" for line in quoted)
