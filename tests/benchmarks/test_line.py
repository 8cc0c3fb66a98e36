"""The benchmark of the line service counts what it says, and its result becomes one table."""

from __future__ import annotations

from pathlib import Path

import pytest
from needs import skips_without
from tiny_bundle import make_tiny_bundle

from benchmarks.line_figures import line_figures

pytest_pycollect_makemodule = skips_without("onnx", "onnxruntime", "paho", "fastapi", "uvicorn")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bundle(tmp_path_factory.mktemp("line") / "tiny")


def test_soak_and_stop_account_for_every_frame(tiny: Path) -> None:
    from benchmarks.line import soak, stop

    found = soak(tiny, 200, 1)
    assert (found["order_kept"], found["all_accounted"]) == (True, True)
    assert found["counts"]["OK"] + found["counts"]["NG"] == 200
    assert {name: number for name, number in found["delivered"].items() if name != "mqtt"} == {
        "jsonl": 200,
        "csv": 200,
        "sqlite": 200,
    }
    assert len(found["rss_mib"]) == 3
    ended = stop(tiny, 1, runs=1)
    assert ended["all_accounted"]
    table = dict(line_figures({"rows": [found, ended]}))
    assert table["order kept, every part in every file"] == "yes, yes"
    assert table["every frame accounted for at the stop"] == "yes"


def test_posts_are_counted_and_no_part_waits_for_ever(tiny: Path) -> None:
    from benchmarks.line_posts import posts

    found = posts(tiny, (64, 96), 3, 20, 1)
    assert found["sent"] == found["judged"] + found["refused"] + found["failed"] > 0
    assert found["failed"] == 0
    assert len(found["alone_ms"]) == len(found["posted_ms"]) == 3
    assert "20 posts a second" in line_figures({"rows": [found]})[1][0]
