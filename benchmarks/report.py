"""Write the tables of benchmarks/results into Markdown files, between comments.

    python benchmarks/report.py [FILE.md ...] [--results DIR] [--check]

A table's place in a document is

    <!-- table: NAME -->
    <!-- end of table -->

where NAME is a result file without `.json`. The text between is replaced; a second run changes nothing. --check writes
nothing and fails if a document is out of date. Without files: README.md, docs/*.md, benchmarks/README.md. A result file
that a document names and that is missing or damaged is an error.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from benchmarks.line_figures import line_figures
from saae_runtime.errors import DataError, SaaeError
from saae_runtime.files import write_text

Table = tuple[Sequence[str], Sequence[Sequence[object]]]
"""Headings and rows."""

_PLACE = re.compile(
    r"(?P<begin>^[ \t]*<!-- table: (?P<name>[^\s>]+) -->[ \t]*\n)(?P<old>.*?)(?P<end>^[ \t]*<!-- end of table -->)",
    re.DOTALL | re.MULTILINE,
)
_BEGIN = re.compile(r"^[ \t]*<!-- table: ", re.MULTILINE)
_FENCE = re.compile(r"^(```|~~~).*?^\1[ \t]*$", re.DOTALL | re.MULTILINE)
_SHOWN_VERSIONS = (
    "torch", "onnxruntime", "onnxruntime-gpu", "onnxruntime-ep-openvino", "openvino", "tensorrt", "tensorrt-rtx",
)  # fmt: skip


def render(data: Mapping[str, Any]) -> str:
    """A result as Markdown: its tables, then where, when and how it was measured."""
    tables = _TABLES.get(str(data["benchmark"]), _plain)
    parts = [f"{title}\n\n{markdown(*table)}" if title else markdown(*table) for title, table in tables(data)]
    return "\n\n".join([*parts, _origin(data)]) + "\n"


def markdown(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; the first column left, the others right; columns without any value are left out."""
    kept = [i for i in range(len(headings)) if any(row[i] is not None for row in rows)]
    lines = [[headings[i] for i in kept], ["---" if i == 0 else "---:" for i in kept]]
    lines += [[cell(row[i]) for i in kept] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value: object) -> str:
    """A value as text: floats with three significant digits, whole from 1,000 up; None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def updated(text: str, results: Path) -> tuple[str, int]:
    """The document with its tables rendered, and their number.

    Raises:
        DataError: a marker without an end, or a result file that is missing or damaged.
    """
    fences = [match.span() for match in _FENCE.finditer(text)]  # a marker in a code block is only an example

    def shown(position: int) -> bool:
        return any(start <= position < end for start, end in fences)

    count = 0

    def replace(match: re.Match[str]) -> str:
        nonlocal count
        if shown(match.start()):
            return match.group()
        if _BEGIN.search(match["old"]):
            raise _endless()
        count += 1
        return f"{match['begin']}\n{render(load(results / (match['name'] + '.json')))}\n{match['end']}"

    new = _PLACE.sub(replace, text)
    if count != sum(not shown(match.start()) for match in _BEGIN.finditer(text)):
        raise _endless()
    return new, count


def load(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        DataError: it is missing or not a result.
    """
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or not isinstance(data["rows"], list):
            raise ValueError("it has no rows")
        data["benchmark"], data["machine"], data["command"], data["created"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{path} is no result of a benchmark.",
            f"{type(error).__name__}: {error}",
            f"run the benchmark with --out {path}; benchmarks/README.md says how",
        ) from error
    return data


def _endless() -> DataError:
    return DataError("A table marker has no end.", "", "write <!-- end of table --> on a line of its own after it")


def _origin(data: Mapping[str, Any]) -> str:
    machine, versions = data["machine"], data.get("versions", {})
    where = [str(machine["cpu"]), f"{machine['cores']} core{'' if machine['cores'] == 1 else 's'}"]
    where += [gpu["name"] for gpu in machine.get("gpus", ())]
    settings = data.get("settings", {})
    if settings.get("threads"):
        where.append(f"{settings['threads']} thread{'' if settings['threads'] == 1 else 's'}")
    where += [f"{name}={value}" for name, value in settings.get("environment", {}).items()]
    libraries = [f"{name} {versions[name]}" for name in _SHOWN_VERSIONS if name in versions]
    sentences = [f"{', '.join(where)}; Python {machine['python']}" + "".join(f", {name}" for name in libraries)]
    if "model" in data:
        model = data["model"]
        shape = f"{model['backbone']} at {'x'.join(map(str, model['input_size']))}, layers {model['layers']}"
        sentences.append(f"{shape}, V = {model['latent']}; weights: {model['weights']}")
    sentences.append(f"{str(data['created'])[:10]}, `{data['command']}`")
    return "<sub>" + ". ".join(sentences) + ".</sub>"


# ---- one function per benchmark: (title, table) pairs -------------------------------------------------


def _fps(data: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    settings = data["settings"]
    camera, graph = ("x".join(map(str, settings[key])) for key in ("frame_size", "graph_size"))
    headings = [
        "backend",
        f"compute {graph}, ms",
        "p95",
        "p99",
        "times PyTorch",
        f"frame {camera} to result, ms",
        "p95",
        "p99",
        "times PyTorch",
        "stream, frames/s",
        "share of compute",
        "trigger to result, ms",
        "on the GPU, ms",
        "times whole",
        "times DFR",
        "energy, J a frame",
    ]
    for batch in settings["batches"]:
        rows = {(r["backend"], r["precision"], r["kind"]): r for r in data["rows"] if r["batch"] == batch}
        table = []
        for variant in data["variants"]:
            name = (variant["backend"], variant["precision"])
            compute, frame = (rows.get((*name, kind)) for kind in ("compute", "frame"))
            if compute is None:
                continue
            stream, alone = rows.get((*name, "stream"), {}), rows.get((*name, "stream graph"), {})
            line: list[object] = [" ".join(name) + (" (at 256x256)" if name[0] == "dfr" else "")]
            for row in (compute, frame):
                figures = row and [*(row["timing"][key] for key in ("median_ms", "p95_ms", "p99_ms")), row["ratio"]]
                line += figures or [None] * 4
            on_device = rows.get((*name, "device"))
            triggered = rows.get((*name, "trigger"))
            line += [stream.get("fps"), alone.get("share")]
            line += [triggered and triggered["timing"]["median_ms"]]
            line += [
                on_device and on_device["timing"]["median_ms"],
                compute.get("ratio_whole"),
                compute.get("ratio_dfr"),
                compute.get("joules"),
            ]
            table.append(line)
        yield (f"Batch {batch}:" if len(settings["batches"]) > 1 else ""), (headings, table)
    ratios = [(item["where"], item["ratio"]) for item in data.get("saae_to_dfr", ())]
    if ratios:
        yield "SAAE : DFR, both in PyTorch:", (["where", "frames a second, SAAE over DFR"], ratios)


def _study(data: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    from benchmarks.study import HEADINGS, table_rows

    yield "", (list(HEADINGS), table_rows(list(data["rows"])))


def _quality(data: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    from benchmarks import decisions
    from benchmarks.quality import table_rows

    headings = ["category", "method", "pixel ROC-AUC", "PRO-AUC", "pixel AP", "image ROC-AUC", "fit, s", "peak, GiB"]
    yield "", (headings, table_rows(list(data["rows"])))
    verdicts = decisions.table_rows(data["rows"])
    if verdicts:
        yield "Verdicts (`python benchmarks/decisions.py`):", (decisions.HEADINGS, verdicts)


def _peers(data: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    from benchmarks import peers

    yield "", (peers.HEADINGS, peers.table_rows(data["rows"]))


def _startup(data: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    rows = [
        (r["stage"], r.get("part_ms"), r["timing"]["median_ms"], r["timing"]["p95_ms"], r.get("cpu_ms"))
        for r in data["rows"]
    ]
    title = str(data["backend"]) + (f": a bundle of {data['bundle_mb']:.0f} MB" if "bundle_mb" in data else "")
    yield title, (["stage", "its part, ms", "until then, ms", "p95, ms", "processor time, ms"], rows)


def _memory(data: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    rows = [(row["call"], row["resident_mib"]) for row in (data["rows"][0], data["rows"][-1])]
    what = ": ".join(str(data[key]) for key in ("backend", "bundle") if key in data)
    yield what, (["call", "resident, MiB"], [*rows, ("largest growth in between", f"{100 * data['growth']:.2f} %")])


def _ladder(data: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    from benchmarks import ladder

    yield "", (ladder.HEADINGS, ladder.table(list(data["rows"])))


def _plain(data: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    """Any other benchmark: every scalar of a row, and the median and p95 of its timing."""
    keys = list(dict.fromkeys(k for row in data["rows"] for k, v in row.items() if not isinstance(v, (dict, list))))
    timed = any("timing" in row for row in data["rows"])
    rows = []
    for row in data["rows"]:
        timing = row.get("timing", {})
        rows.append([row.get(k) for k in keys] + ([timing.get("median_ms"), timing.get("p95_ms")] if timed else []))
    yield "", ([*(key.replace("_", " ") for key in keys), *(["median, ms", "p95, ms"] if timed else [])], rows)


def _drift(data: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    headings = ["calibrated on", "change", "alarms", "median delay, parts", "of the ramp", "scores at its end"]
    names = ("calibrated_on", "change", "alarms", "delay", "seen_at", "scores_at_its_end")
    yield "", (headings, [[row.get(name) for name in names] for row in data["rows"]])


def _line(data: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    yield "", (["figure", "value"], line_figures(data))


def _choices(data: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    from benchmarks import choices

    yield "", (choices.HEADINGS, choices.table_rows(data["rows"]))


def _promises(data: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    from benchmarks import promises

    yield "", (promises.HEADINGS, promises.table_rows(data["rows"]))


_TABLES: dict[str, Callable[[Mapping[str, Any]], Iterator[tuple[str, Table]]]] = {
    "fps": _fps,
    "quality": _quality,
    "peers": _peers,
    "study": _study,
    "startup": _startup,
    "memory": _memory,
    "line": _line,
    "drift": _drift,
    "ladder": _ladder,
    "choices": _choices,
    "promises": _promises,
}


def documents() -> list[Path]:
    """The documents that may hold tables."""
    return [
        common.ROOT / "README.md",
        *sorted((common.ROOT / "docs").glob("*.md")),
        common.ROOT / "benchmarks/README.md",
    ]


def main(
    files: Annotated[list[Path] | None, typer.Argument(help="Markdown files; default: the project's own")] = None,
    results: Annotated[Path, typer.Option(help="folder of the result files")] = common.RESULTS,
    check: Annotated[bool, typer.Option("--check", help="write nothing; fail where a document is out of date")] = False,
) -> None:
    """Render the tables of the documents."""
    stale = []
    try:
        for path in files or documents():
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{path} cannot be read.", str(error), "give Markdown files") from error
            try:
                new, count = updated(text, results)
            except DataError as error:
                raise DataError(f"{path}: {error.what}", error.why, error.cure) from error
            if new != text:
                stale.append(path)
                if not check:
                    write_text(path, new)
            print(f"{path}: {count} tables, {'up to date' if new == text else 'out of date' if check else 'rewritten'}")
    except SaaeError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(error.exit_code) from error
    if stale and check:
        print("Out of date; run: python benchmarks/report.py", file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
