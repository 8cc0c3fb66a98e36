"""anomalib's models beside our default on the same real category: one evaluator, one backend, the same threads.

    python benchmarks/peers.py --data MVTEC_TREE --categories cookie,bottle [--methods ours,PaDiM] [--threads 1]
                               [--work DIR] [--out FILE] [--again]

It installs nothing; if anomalib is missing, it says how to install it. Every method is fitted in a fresh process on all
normal training images and exported as an ONNX graph by its own tools. saae_train/evaluation evaluates that graph on
ONNX Runtime's CPU provider. A row of the same images and settings that is in the result file is not measured again.
--work keeps the graphs, so that a later call times them beside the new ones.

  fit s      from the list of images to the fitted model; the process has imported its libraries
  frame ms   a frame in memory to score and map at its size, all methods of a category interleaved in one process
  graph MB   the ONNX graph; for a memory of patches it grows with the images
  fit env,   installed files of the packages that fitting and running need, by their metadata: for running, anomalib's
  run env    graph needs onnxruntime and a few lines of code, and its own inferencer all of anomalib
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import numpy as np
import typer
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from benchmarks.anomalib_peers import BACKBONE, NOT_RUN, PEERS, GraphScorer, anomalib_version, fit_peer
from saae_runtime.errors import ConfigError, SaaeError
from saae_train.data.category import find_category
from saae_train.experiments.experiment import images_digest
from saae_train.experiments.jobs import Job, Jobs, Processes, Report

if TYPE_CHECKING:
    from saae_train.data.category import Category
    from saae_train.evaluation.evaluate import Evaluation

OURS = "ours"
METRICS = ("pixel_roc_auc", "pro_auc", "pixel_average_precision", "image_roc_auc")
HEADINGS = (
    "category", "method", "pixel ROC-AUC", "PRO-AUC", "pixel AP", "image ROC-AUC", "fit, s", "frame, ms", "graph, MB",
    "fit env, MB", "run env, MB", "its own inferencer, MB",
)  # fmt: skip
INSIDE = (
    "fit: list of images to fitted model, libraries imported before. frame: a frame in memory to score and map at its "
    "size, ONNX Runtime CPU, methods interleaved. env: installed files of all packages needed, by their metadata."
)


class FrameScorer(Protocol):
    """Scores a frame, uint8 H x W x 3."""

    def __call__(self, frame: NDArray[np.uint8], /) -> Any: ...


def measure(request: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """In a process of its own: fits a method, exports and evaluates it; a row without its latency.

    Raises:
        SaaeError: images, weights or fit are invalid.
    """
    category = find_category(request["data"], request["category"])
    place = Path(request["place"])
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    report("fit", 0, 0)
    fitted = _fit_ours if request["method"] == OURS else _fit_theirs
    seconds, note = fitted(request, category, place)
    report("evaluate", 0, 0)
    found = evaluated(open_scorer(request["method"], place, request["threads"]), category, report)
    return {
        "category": category.name,
        "method": request["method"],
        "note": note,
        "images": images_digest(category),
        "seed": request["seed"],
        "threads": request["threads"],
        "settings": settings_of(request),
        "fit_images": len(category.train),
        "test_images": found.overall.images,
        "fit_seconds": round(seconds, 1),
        "graph_mb": round(sum(path.stat().st_size for path in graph_files(request["method"], place)) / 1e6, 1),
        "metrics": {key: found.overall.to_json()["metrics"][key]["value"] for key in METRICS},
    }


def evaluated(scorer: FrameScorer, category: Category, report: Report) -> Evaluation:
    """What both sides are measured with: all pixels of all test images at their own resolution."""
    from saae_train.evaluation.evaluate import evaluate

    return evaluate(
        scorer, category, intervals=False, progress=lambda done, total, text="": report("evaluate", done, total)
    )


def _fit_ours(request: Mapping[str, Any], category: Category, place: Path) -> tuple[float, str]:
    from saae_train.cli.options import make_config
    from saae_train.data.split import split_for
    from saae_train.fitting.backbone import backbone_for
    from saae_train.fitting.fit import fit
    from saae_train.model.checkpoint import save_checkpoint

    config = make_config(request["preset"], seed=request["seed"], **request["changes"])
    started = time.perf_counter()
    split = split_for(config, category)
    backbone = backbone_for(config, split.fitting, request["weights"])
    checkpoint = fit(backbone, split.fitting, config, category.name, device="cpu", cache=place / "cache")
    seconds = time.perf_counter() - started
    save_checkpoint(place / "checkpoint", checkpoint)
    words = ["build", "--data", request["data"], "--category", category.name, "--checkpoint", place / "checkpoint"]
    words += ["--out", place / "bundle", "--work", place / "runs", "--cache", place / "cache", "--precision", "fp32"]
    words += ["--engine", "none", "--no-latency", "--no-selftest", "--allow-blind"]
    command = [sys.executable, "-m", "saae_export.cli", *map(str, words)]
    done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SaaeError("The export failed.", done.stderr.strip()[-2000:], " ".join(command))
    shutil.rmtree(place / "cache", ignore_errors=True)
    size = checkpoint.detector.backbone.input_size
    return seconds, f"preset {config.preset}, input {size[0]}x{size[1]}"


def _fit_theirs(request: Mapping[str, Any], category: Category, place: Path) -> tuple[float, str]:
    import torch

    from saae_train.model.weights import load_state_dict

    torch.set_num_threads(request["threads"])
    state, _ = load_state_dict(BACKBONE, request["weights"])
    import anomalib.engine  # noqa: F401  # before the clock starts, as ours

    folders = {sample.path.parent for sample in category.train}
    if len(folders) != 1:
        raise ConfigError(f"{category.name} has its normal images in {len(folders)} folders.", "", "another category")
    started = time.perf_counter()
    _, export = fit_peer(request["method"], folders.pop(), place, state, request["seed"])
    seconds = time.perf_counter() - started
    export()
    return seconds, PEERS[request["method"]].note


def graph_files(method: str, place: Path) -> list[Path]:
    """The files of the graph that a method is deployed as; none where it was not made here."""
    return sorted(place.glob("bundle/model.onnx" if method == OURS else "weights/onnx/*"))


def open_scorer(method: str, place: Path, threads: int) -> FrameScorer:
    """What scores frames with the deployed graph, on ONNX Runtime's CPU provider."""
    if method == OURS:
        from saae_runtime import Engine

        return Engine(place / "bundle", backend="onnxruntime:cpu", precision="fp32", threads=threads)
    return GraphScorer(place / "weights" / "onnx" / "model.onnx", threads)


def time_methods(request: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """In a process of its own: milliseconds of a frame by method, all interleaved."""
    from functools import partial

    from saae_runtime.images import read_image
    from saae_train.experiments.timing import Timing, interleaved, timed_calls

    common.use_threads(request["threads"])
    frame = np.ascontiguousarray(read_image(find_category(request["data"], request["category"]).test[0].path))
    turns = {}
    for method, place in request["places"].items():
        scorer = open_scorer(method, Path(place), request["threads"])
        turns[method] = partial(timed_calls, partial(scorer, frame))
    found = interleaved(turns, request["seconds"], progress=lambda done, total: report("latency", done, total))
    return {method: Timing.of(seconds).to_json() for method, seconds in found.items()}


def environment_mb(*requirements: str) -> float | None:
    """Size of the installed files of these distributions and everything that they need; None if one is not here.

    Args:
        requirements: as pip takes them, extras included.
    """
    from packaging.requirements import Requirement

    left = [Requirement(text) for text in requirements]
    seen: set[tuple[str, frozenset[str]]] = set()
    sizes: dict[str, int] = {}
    while left:
        wanted = left.pop()
        name, extras = wanted.name.lower().replace("_", "-"), frozenset(wanted.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            found = metadata.distribution(wanted.name)
        except metadata.PackageNotFoundError:
            if name in {Requirement(text).name for text in requirements}:
                return None
            continue  # an alternative that this environment does without
        sizes[name] = sum(_size(found.locate_file(file)) for file in found.files or ())
        for text in found.requires or ():
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                left.append(needed)
    return round(sum(sizes.values()) / 1e6)


def _size(path: Any) -> int:
    try:
        return int(Path(path).stat().st_size)
    except OSError:
        return 0


def environments(method: str) -> dict[str, float | None]:
    """Megabytes to fit, to run the graph, and to run it with what the project itself brings for that."""
    if method == OURS:
        run = environment_mb("onnxruntime", "numpy", "Pillow", "rich", "typer")  # saae[cpu], which is small itself
        return {"fit_mb": environment_mb("saae[demo]"), "run_mb": run, "own_mb": run}
    return {
        "fit_mb": environment_mb("anomalib", "torch", "torchvision", "onnxscript"),
        "run_mb": environment_mb("onnxruntime", "numpy"),
        "own_mb": environment_mb("anomalib", "torch", "torchvision", "openvino"),
    }


def table_rows(rows: Sequence[Mapping[str, Any]]) -> list[list[object]]:
    """Rows for the terminal and the documents: areas in percent."""
    table: list[list[object]] = []
    for row in rows:
        areas = [None if row["metrics"][key] is None else f"{100 * row['metrics'][key]:.2f}" for key in METRICS]
        latency = row.get("timing", {}).get("median_ms")
        envs = row.get("environment", {})
        sizes = [envs.get(key) and float(envs[key]) for key in ("fit_mb", "run_mb", "own_mb")]
        name = f"{row['method']} ({row['note']})"
        table.append([row["category"], name, *areas, float(row["fit_seconds"]), latency, row["graph_mb"], *sizes])
    return table


def kept_rows(out: Path) -> list[dict[str, Any]]:
    """The rows of a result file; none where it is missing or damaged."""
    try:
        rows: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return rows


def _fresh(name: str, task: Any, request: Mapping[str, Any], threads: int) -> dict[str, Any]:
    with Jobs(Processes(threads=threads), tries=1) as jobs:
        jobs.begin(None, Job(name, task, request), lambda what, done, total: None)
        _, found = jobs.next()
    if isinstance(found, SaaeError):
        raise type(found)(f"{name}: {found.what}", found.why, found.cure) from found
    return dict(found)


def main(
    data: Annotated[Path, typer.Option(help="folder of categories (MVTec AD tree)")],
    categories: Annotated[str, typer.Option(help="comma-separated")],
    methods: Annotated[str, typer.Option(help=f"comma-separated: {OURS}, {', '.join(PEERS)}; default: all")] = "",
    preset: Annotated[str, typer.Option(help="of ours")] = "fast",
    change: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of ours, repeatable")] = None,
    weights: Annotated[str | None, typer.Option(help="of the backbone, of all: a file, cache, hub or packaged")] = None,
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
    threads: Annotated[int, typer.Option(help="of fitting and of a frame")] = 1,
    seconds: Annotated[float, typer.Option(help="of timing for each method")] = 10.0,
    work: Annotated[Path, typer.Option(help="keeps the graphs")] = Path("runs/peers"),
    out: Annotated[Path | None, typer.Option(help="result file")] = None,
    again: Annotated[bool, typer.Option(help="make rows that are in the result file, too")] = False,
) -> None:
    """Measure the peers and ours; print and write the table after every method."""
    from saae_train.cli.options import parse_changes

    target = out or common.RESULTS / "peers.json"
    try:
        chosen = [name.strip() for name in methods.split(",") if name.strip()] or [OURS, *PEERS]
        for name in chosen:
            if name in NOT_RUN:
                raise ConfigError(f"{name} is not run.", f"It {NOT_RUN[name]}.", "another method")
            if name != OURS and name not in PEERS:
                raise ConfigError(f"There is no method {name!r}.", "", f"one of: {OURS}, {', '.join(PEERS)}")
        version = anomalib_version() if chosen != [OURS] else None
        common.print_machine()
        rows = kept_rows(target)
        shared = {"data": str(data.absolute()), "seed": seed, "threads": threads, "preset": preset, "weights": weights}
        shared["changes"] = parse_changes(change or [])
        failed: list[str] = []
        for name in [name.strip() for name in categories.split(",") if name.strip()]:
            images = images_digest(find_category(data, name))
            for method in chosen:
                place = work.absolute() / name / method.replace(" ", "-")
                request = {**shared, "category": name, "method": method, "place": str(place)}
                wanted = (images, seed, threads, settings_of(request))
                if not again and any(_is(row, name, method, *wanted) for row in rows):
                    continue
                try:
                    row = _fresh(f"{name} {method}", measure, request, threads)
                except SaaeError as error:  # the others go on
                    print(error, file=sys.stderr)
                    failed.append(f"{name} {method}")
                    continue
                row["environment"] = environments(method)
                rows = [r for r in rows if not _is(r, name, method)] + [row]
                print(f"{name} {method}: {row['fit_seconds']} s, {row['metrics']}", file=sys.stderr)
                _write(rows, target, version, threads)
            there = {r["method"]: str(work.absolute() / name / r["method"].replace(" ", "-")) for r in rows
                     if r["category"] == name}  # fmt: skip
            there = {method: place for method, place in there.items() if graph_files(method, Path(place))}
            request = {**shared, "category": name, "places": there, "seconds": seconds}
            timed = _fresh(f"{name} latency", time_methods, request, threads) if there else {}
            rows = [{**r, "timing": timed[r["method"]]} if r["category"] == name and r["method"] in timed else r
                    for r in rows]  # fmt: skip
            _write(rows, target, version, threads)
    except SaaeError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(error.exit_code) from error
    notes = [f"{name} was not run: it {reason}." for name, reason in NOT_RUN.items()]
    common.print_table("Beside the peers", HEADINGS, table_rows(rows), [*notes, f"Written to {target}"])
    if failed:
        print(f"Failed: {', '.join(failed)}", file=sys.stderr)
        raise typer.Exit(1)


def _is(row: Mapping[str, Any], category: str, method: str, *more: object) -> bool:
    """Whether a row is of this category and method, and where given of these images, seed, threads and settings."""
    same = (row.get("category"), row.get("method")) == (category, method)
    found = tuple(row.get(key) for key in ("images", "seed", "threads", "settings"))
    return same and (not more or found == more)


def settings_of(request: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of all; of ours also preset and changes, as JSON has them."""
    keys = ("preset", "changes", "weights") if request["method"] == OURS else ("weights",)
    found: dict[str, Any] = json.loads(json.dumps({key: request[key] for key in keys}))
    return found


def _write(rows: Sequence[Mapping[str, Any]], target: Path, version: str | None, threads: int) -> None:
    order = [OURS, *PEERS]
    known = sorted(rows, key=lambda row: (row["category"], order.index(row["method"])))
    more = {"inside": INSIDE, "settings": {"threads": threads}, "not_run": dict(NOT_RUN)}
    if version is not None:
        more["anomalib"] = version
    common.write_result(common.result("peers", known, **more), target)


if __name__ == "__main__":
    typer.run(main)
