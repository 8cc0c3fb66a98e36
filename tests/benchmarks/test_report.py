"""benchmarks/report.py: tables from result files, the same when made again, and out-of-date documents found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer import Typer
from typer.testing import CliRunner

from benchmarks import common, fps_table, report
from saae_runtime.errors import DataError

PLACE = "# Speed\n\nBefore.\n\n<!-- table: {} -->\n<!-- end of table -->\n\nAfter.\n"

app = Typer()
app.command()(report.main)


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def fps_result() -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for backend, factor in (("pytorch", 4.0), ("onnxruntime:cpu", 1.0), ("dfr", 12.0)):
        for kind in ("compute", "frame", *(("stream", "stream graph") if backend == "onnxruntime:cpu" else ())):
            timing = common.Timing.of([0.01 * factor, 0.012 * factor, 0.02 * factor])
            row = {"backend": backend, "precision": "fp32", "kind": kind, "batch": 1, "timing": timing.to_json()}
            rows.append({**row, "fps": timing.per_second})
    fps_table.add_ratios(rows)
    return common.result(
        "fps",
        rows,
        settings={"frame_size": [40, 56], "graph_size": [32, 48], "batches": [1], "threads": 2, "environment": {}},
        model={
            "backbone": "vit_x",
            "input_size": [32, 48],
            "layers": [0, 1],
            "latent": 12,
            "weights": "random",
            "preset": "paper",
        },
        variants=[{"backend": name, "precision": "fp32"} for name in ("pytorch", "onnxruntime:cpu", "dfr")],
        saae_to_dfr=fps_table.saae_to_dfr(rows, "vit_x"),
    )


@pytest.fixture
def results(tmp_path: Path) -> Path:
    common.write_result(fps_result(), tmp_path / "results" / "fps.json")
    rows = [
        {"way": "a | b", "value": 0.123456, "timing": common.Timing.of([0.5]).to_json()},
        {"way": "c", "none": None},
    ]
    common.write_result(common.result("other", rows, settings={}), tmp_path / "results" / "other.json")
    return tmp_path / "results"


def cells(text: str, first: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {first}"))
    return [part.strip() for part in line.strip("|").split(" | ")]


def test_a_run_without_camera_frames_has_no_columns_for_them(results: Path) -> None:
    data = report.load(results / "fps.json")
    data["rows"] = [row for row in data["rows"] if row["kind"] not in ("frame", "stream")]
    text = report.render(data)
    assert "to result" not in text
    assert "compute" in text


def test_fps_table_has_the_numbers_of_the_file(results: Path) -> None:
    text = report.render(report.load(results / "fps.json"))
    headings = cells(text, "backend")
    row = dict(zip(headings[:5], cells(text, "onnxruntime:cpu fp32")[:5], strict=True))
    assert row["compute 32x48, ms"] == "12"
    assert row["times PyTorch"] == "4"
    assert cells(text, "onnxruntime:cpu fp32")[-1] == "12"  # times DFR
    assert cells(text, "dfr fp32 (at 256x256)")[0].startswith("dfr")
    assert "on the GPU, ms" not in headings  # nothing was timed there
    assert cells(text, "the paper")[1] == "2.77"
    assert cells(text, "here, vit_x, compute, batch 1")[1] == "3"
    assert "weights: random" in text
    assert "2 threads" in text
    assert len({line.count("|") for line in text.split("\n\n")[0].splitlines()}) == 1


def test_any_other_benchmark_gets_a_table(results: Path) -> None:
    text = report.render(report.load(results / "other.json"))
    assert cells(text, "way") == ["way", "value", "median, ms", "p95, ms"]  # `none` holds nothing
    assert cells(text, "a ")[0] == "a \\| b"
    assert cells(text, "c") == ["c", "-", "-", "-"]


def test_making_again_changes_nothing_and_check_finds_changes(results: Path, tmp_path: Path) -> None:
    document = tmp_path / "doc.md"
    document.write_text(PLACE.format("fps") + PLACE.format("other"))
    assert run(document, "--results", results, "--check").exit_code == 1
    assert document.read_text() == PLACE.format("fps") + PLACE.format("other")
    assert run(document, "--results", results).exit_code == 0
    made = document.read_text()
    assert made.count("onnxruntime:cpu fp32") == 1
    assert made.startswith("# Speed\n\nBefore.\n")
    assert made.endswith("\nAfter.\n")
    assert run(document, "--results", results, "--check").exit_code == 0
    assert run(document, "--results", results).exit_code == 0
    assert document.read_text() == made
    document.write_text(made.replace("| 12 |", "| 11 |", 1))
    assert document.read_text() != made
    assert run(document, "--results", results, "--check").exit_code == 1
    assert run(document, "--results", results).exit_code == 0
    assert document.read_text() == made


def test_a_new_result_replaces_the_old_table(results: Path, tmp_path: Path) -> None:
    document = tmp_path / "doc.md"
    document.write_text(PLACE.format("fps"))
    run(document, "--results", results)
    data = json.loads((results / "fps.json").read_text())
    data["rows"][0]["timing"]["median_ms"] = 77.0
    (results / "fps.json").write_text(json.dumps(data))
    assert run(document, "--results", results, "--check").exit_code == 1
    run(document, "--results", results)
    assert "| pytorch fp32 | 77 |" in document.read_text()


def test_a_place_in_a_code_block_is_only_an_example(results: Path) -> None:
    text = "```\n" + PLACE.format("missing") + "```\n\n" + PLACE.format("other")
    new, count = report.updated(text, results)
    assert count == 1
    assert new.startswith("```\n" + PLACE.format("missing") + "```\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PLACE.format("missing"), "missing.json"),
        ("<!-- table: fps -->\n\nno end\n", "no end"),
        ("<!-- table: fps -->\n" + PLACE.format("fps"), "no end"),
    ],
)
def test_what_cannot_be_made_is_an_error_and_changes_nothing(
    results: Path, tmp_path: Path, text: str, expected: str
) -> None:
    document = tmp_path / "doc.md"
    document.write_text(text)
    done = run(document, "--results", results)
    assert done.exit_code == 2
    assert expected in done.output
    assert "doc.md" in done.output
    assert document.read_text() == text


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"rows": 1}', '{"rows": []}'])
def test_a_damaged_result_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"x\.json"):
        report.load(path)


def test_the_projects_documents_are_up_to_date() -> None:
    done = run("--check")
    assert done.exit_code == 0, done.output
