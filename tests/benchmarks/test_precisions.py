"""benchmarks/precisions.py: verdicts of each precision are counted against FP32's."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from tiny_bundle import make_tiny_bundle
from tiny_sets import write_square_set

from benchmarks.precisions import HEADINGS, compared, table
from saae_runtime import open_bundle
from saae_train.data.category import find_category


def test_an_image_judged_otherwise_in_fp16_is_counted(tmp_path: Path) -> None:
    samples = find_category(write_square_set(tmp_path / "data"), "part").test
    bundle = open_bundle(make_tiny_bundle(tmp_path / "bundle", size=(70, 64), precisions=("fp32", "fp16")))
    both = list(compared(bundle, samples, threads=1))
    assert {(row["precision"], row["same"], row["found"], row["rejected"]) for row in both} >= {
        ("fp32", 6, 3, both[0]["rejected"]),
        ("fp16", 6, 3, both[0]["rejected"]),
    }
    assert 0 < max(row["score_largest"] for row in both if row["precision"] == "fp16") < 1e-2
    blind = dataclasses.replace(bundle.manifest.thresholds["fp16"].image, threshold=(1e6, 1e6, 1e6, 1e6))
    thresholds = {
        **bundle.manifest.thresholds,
        "fp16": dataclasses.replace(bundle.manifest.thresholds["fp16"], image=blind),
    }
    object.__setattr__(bundle, "manifest", dataclasses.replace(bundle.manifest, thresholds=thresholds))
    rows = list(compared(bundle, samples, threads=1))
    clean = 6 - int(np.sum([rows[0]["found"], rows[0]["rejected"]]))
    assert {row["same"] for row in rows if row["precision"] == "fp16"} == {clean}
    assert {row["found"] for row in rows if row["precision"] == "fp16"} == {0}
    assert [len(line) for line in table(rows)] == [len(HEADINGS)] * len(rows)
