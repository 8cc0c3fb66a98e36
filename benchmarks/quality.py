"""Quality of a preset on real categories, beside the paper's figures and baselines on the same features.

    python benchmarks/quality.py --data MVTEC_TREE [--categories bottle,cookie] [--preset fast|paper]
                                 [--baseline pca,pca-raw,knn] [--set KEY=VALUE] [--out FILE] [--again]

Each cell (category and method) runs in a fresh process: split off the held-out normal images, fit on the others,
calibrate T on the held-out ones, evaluate on the test set at the images' own resolution. What is in the result file
already, with the same settings, is not run again.

  fit s      from the list of images to the fitted model, features included, with an empty cache (--cache keeps
             features between cells; fit times then hold no backbone where the row says so)
  peak GiB   resident high-water mark of the cell's process, evaluation included

Baselines (baselines.py) see the same images, backbone and layers, and their maps get the preset's smoothing too.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from benchmarks.baselines import BASELINES, baseline
from saae_runtime.errors import ConfigError, SaaeError
from saae_runtime.geometry import gaussian_matrix, resize_frames, upsample_map

if TYPE_CHECKING:
    from saae_train.backbone import ViTFeatures
    from saae_train.data import Sample
    from saae_train.presets import FitConfig

Score = Callable[[NDArray[np.uint8]], tuple[NDArray[np.float32], float]]

PAPER = {
    "carpet": (97.9, 93.1), "grid": (98.6, 96.4), "leather": (99.6, 98.7), "tile": (97.3, 92.7),
    "wood": (97.6, 95.4), "bottle": (97.9, 94.3), "cable": (96.8, 89.0), "capsule": (98.2, 92.9),
    "hazelnut": (98.5, 96.6), "metal_nut": (97.6, 91.7), "pill": (98.1, 97.1), "screw": (98.9, 94.6),
    "toothbrush": (98.7, 93.1), "transistor": (96.0, 88.2), "zipper": (96.9, 90.3),
}  # fmt: skip
"""Pixel ROC-AUC and PRO-AUC in percent, the paper's Tables 2 and 3, column "Ours"."""


@dataclass(frozen=True)
class Cell:
    """One thing to run. `method` is "saae" or a baseline's name; `changes` are FitConfig fields set by hand."""

    data: str
    category: str
    method: str
    preset: str = "fast"
    changes: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    cache: str | None = None

    def settings(self) -> dict[str, Any]:
        """What shapes the numbers: the key under which a finished cell is found again."""
        from saae_train.options import make_config

        config = make_config(self.preset, **self.changes).to_json()
        return {"category": self.category, "method": self.method, "config": config, "weights": self.weights}


def run_cell(cell: Cell) -> dict[str, Any]:
    """Fit, calibrate and evaluate one cell in this process; returns its row."""
    from saae_train.calibrate import OBJECT_FPR, TEXTURE_FPR, calibrate
    from saae_train.data import find_category, split_held_out
    from saae_train.evaluate import evaluate
    from saae_train.options import make_config
    from saae_train.presets import TEXTURES

    config = make_config(cell.preset, **cell.changes)
    category = find_category(cell.data, cell.category)
    fitted_on, held_out = split_held_out(category.train, config.held_out, seed=config.seed)
    with common.PeakMemory() as memory, tempfile.TemporaryDirectory(prefix="saae-quality-") as fresh:
        cache = Path(cell.cache or fresh)
        backbone = _backbone(config, cell.weights)
        fit = _fit_saae if cell.method == "saae" else _fit_baseline
        with common.stopwatch() as seconds:
            score, facts = fit(cell, backbone, fitted_on, config, cache)
        fit_seconds = seconds()
        fpr = TEXTURE_FPR if category.name in TEXTURES else OBJECT_FPR
        tables = calibrate(score, held_out, fpr)
        with common.stopwatch() as seconds:
            found = evaluate(
                lambda frame: score(frame)[::-1],
                category,
                threshold=tables.pixel.at(None),
                image_threshold=tables.image.at(None),
            )
    return {
        **cell.settings(),
        "fit_images": len(fitted_on),
        "held_out_images": len(held_out),
        "test_images": found.overall.images,
        "fit_seconds": round(fit_seconds, 1),
        "features_cached": cell.cache is not None,
        "evaluate_seconds": round(seconds(), 1),
        "peak_memory_gib": round(memory.gib, 2),
        "facts": facts,
        "overall": found.overall.to_json(),
        "by_type": [s.to_json() for s in found.by_type],
        "notes": list(found.notes),
    }


def _backbone(config: FitConfig, weights: str | None) -> ViTFeatures:
    from saae_train.backbone import build_backbone, choose_layers

    layers = config.layers or choose_layers(config.backbone)[0]
    return build_backbone(config.backbone, layers, config.input_size, weights)


def _fit_saae(
    cell: Cell, backbone: ViTFeatures, samples: tuple[Sample, ...], config: FitConfig, cache: Path
) -> tuple[Score, dict[str, Any]]:
    from saae_export.torch_reference import TorchReference
    from saae_train.checkpoint import discard_state
    from saae_train.fit import Reporter, fit

    with _bar(f"{cell.category} {cell.method}") as show:
        watch = Reporter(
            features=lambda done, total: show("features", done, total),
            steps=lambda done, total, loss: show(f"step, loss {loss:.4g}", done, total),
        )
        checkpoint = fit(backbone, samples, config, cell.category, cache=cache, reporter=watch)
    discard_state(checkpoint)  # the model is not kept, and the next run is to take the whole time again
    facts = {k: v for k, v in checkpoint.facts.items() if k in ("seconds_features", "seconds_fit", "bf16", "texture")}
    facts["latent"] = checkpoint.detector.saae.latent
    return TorchReference(checkpoint.detector, backbone.input_size), facts


def _fit_baseline(
    cell: Cell, backbone: ViTFeatures, samples: tuple[Sample, ...], config: FitConfig, cache: Path
) -> tuple[Score, dict[str, Any]]:
    import torch

    from saae_train.features import extract

    with _bar(f"{cell.category} {cell.method}") as show:
        features = extract(
            backbone,
            samples,
            cache,
            precision=config.precision,
            progress=lambda done, total: show("features", done, total),
        )
    model, change = baseline(cell.method, features.values)
    backbone.cpu()
    mean = torch.tensor(backbone.mean).view(3, 1, 1) * 255.0
    std = torch.tensor(backbone.std).view(3, 1, 1) * 255.0
    rows, columns = (gaussian_matrix(n, config.smoothing) for n in backbone.grid)

    def score(frame: NDArray[np.uint8]) -> tuple[NDArray[np.float32], float]:
        pixels = torch.tensor(resize_frames(frame, backbone.input_size)).permute(2, 0, 1).float()
        with torch.inference_mode():
            f = backbone(((pixels - mean) / std)[None])[0].numpy()
        a = rows @ model.score(change.apply(f)).reshape(backbone.grid) @ columns.T
        # The score is the largest value at the model's own size, as in the fused graph.
        return upsample_map(a, (frame.shape[0], frame.shape[1])), float(upsample_map(a, backbone.input_size).max())

    return score, {"patches": int(np.prod(features.values.shape[:2])), "channels": backbone.channels}


class _bar:
    """A progress bar on the terminal's error stream: `with _bar(title) as show: show(what, done, total)`."""

    def __init__(self, title: str) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._progress = Progress(console=Console(stderr=True), transient=True)
        self._title = title
        self._task = self._progress.add_task(title)

    def __enter__(self) -> Callable[[str, int, int], None]:
        self._progress.start()
        return lambda what, done, total: self._progress.update(
            self._task, description=f"{self._title}: {what}", completed=done, total=total
        )

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()


def _child(cell: Cell, out: str) -> None:
    try:
        outcome: dict[str, Any] = {"row": run_cell(cell)}
    except SaaeError as error:
        outcome = {"error": str(error), "exit_code": error.exit_code}
    Path(out).write_text(json.dumps(outcome, allow_nan=False), encoding="utf-8")


def run_fresh(cell: Cell) -> dict[str, Any]:
    """`run_cell` in a process of its own; raises SaaeError with the cell's own message when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        process = multiprocessing.get_context("spawn").Process(target=_child, args=(cell, str(out)))
        process.start()
        try:
            process.join()
        except KeyboardInterrupt:
            process.join()  # it has the same signal and cleans up after itself
            raise
        if not out.exists():
            raise SaaeError(
                f"The process of {cell.category} {cell.method} ended with code {process.exitcode}.",
                "A negative code is a signal; -9 usually means that memory ran out.",
                "run this category alone, with less in --set components=... or a smaller input size",
            )
        outcome = json.loads(out.read_text(encoding="utf-8"))
    if "error" in outcome:
        raise SaaeError(f"{cell.category} {cell.method} failed: {outcome['error']}")
    row: dict[str, Any] = outcome["row"]
    return row


def finished(out: Path) -> list[dict[str, Any]]:
    """The rows of a result file; none when it is not there or cannot be read."""
    try:
        rows: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return rows


def is_same(row: dict[str, Any], cell: Cell) -> bool:
    """Whether a finished row is this cell with the same settings."""
    settings = json.loads(json.dumps(cell.settings()))
    return all(row.get(key) == value for key, value in settings.items())


def table_rows(rows: list[dict[str, Any]]) -> list[list[object]]:
    """Rows for the terminal, numbers in percent, the paper's figures after each category."""
    table: list[list[object]] = []
    for category in dict.fromkeys(r["category"] for r in rows):
        for row in (r for r in rows if r["category"] == category):
            name = f"saae, {row['config']['preset']}" if row["method"] == "saae" else row["method"]
            table.append([category, name, *_percents(row), row["fit_seconds"], row["peak_memory_gib"]])
        if category in PAPER:
            pixel, pro = PAPER[category]
            table.append([category, "the paper", f"{pixel:.1f}", f"{pro:.1f}", None, None, None])
    return table


def _percents(row: dict[str, Any]) -> list[str | None]:
    found = [row["overall"]["metrics"][k]["value"] for k in ("pixel_roc_auc", "pro_auc", "image_roc_auc")]
    return [None if v is None else f"{100 * v:.2f}" for v in found]


def changes_of(words: list[str]) -> dict[str, Any]:
    """`KEY=VALUE` words as FitConfig fields; values are JSON, or text where they are none.

    Raises:
        ConfigError: not KEY=VALUE, or no such field.
    """
    from saae_train.presets import FitConfig

    found: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or key not in FitConfig.__dataclass_fields__:
            raise ConfigError(
                f"--set {word} is not possible.",
                "It takes KEY=VALUE with a field of FitConfig.",
                f"one of: {', '.join(FitConfig.__dataclass_fields__)}",
            )
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        found[key] = tuple(value) if isinstance(value, list) else value
    return found


def main(
    data: Annotated[Path, typer.Option(help="folder of categories (MVTec AD tree)")],
    categories: Annotated[str, typer.Option(help="comma-separated; default: all found")] = "",
    preset: Annotated[str, typer.Option(help="fast or paper")] = "fast",
    baselines: Annotated[str, typer.Option("--baseline", help=f"comma-separated: {', '.join(BASELINES)}")] = "",
    only_baselines: Annotated[bool, typer.Option(help="leave the SAAE out")] = False,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE of the configuration, repeatable")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="backbone weights: a file, cache, hub or packaged")] = None,
    cache: Annotated[Path | None, typer.Option(help="keep features here between cells")] = None,
    out: Annotated[Path | None, typer.Option(help="result file")] = None,
    again: Annotated[bool, typer.Option(help="run cells that are in the result file, too")] = False,
) -> None:
    """Measure quality; print and write the table after every cell."""
    from saae_train.data import list_categories

    common.print_machine()
    target = out or common.RESULTS / "quality.json"
    try:
        names = [n for n in categories.split(",") if n] or list_categories(data)
        chosen = [b for b in baselines.split(",") if b]
        for name in chosen:
            if name not in BASELINES:
                raise ConfigError(f"There is no baseline {name!r}.", "", f"one of: {', '.join(BASELINES)}")
        changes = changes_of(change or [])
        methods = ([] if only_baselines else ["saae"]) + chosen
        cells = [
            Cell(str(data), n, m, preset, changes, weights, None if cache is None else str(cache))
            for n in names
            for m in methods
        ]
        rows = finished(target)
        shown: list[dict[str, Any]] = []
        for cell in cells:
            old = next((r for r in rows if is_same(r, cell)), None)
            row = old if old is not None and not again else run_fresh(cell)
            if row is not old:
                rows = [r for r in rows if not is_same(r, cell)] + [row]
                common.write_result(
                    common.result(
                        "quality",
                        rows,
                        paper={"pixel_roc_auc_and_pro_auc_percent": PAPER},
                        inside="fit_seconds: list of images to fitted model, features included, fresh process, "
                        "empty cache unless features_cached",
                    ),
                    target,
                )
            shown.append(row)
            print(f"{cell.category} {cell.method}: {' / '.join(str(v) for v in _percents(row))}", file=sys.stderr)
    except SaaeError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(error.exit_code) from error
    common.print_table(
        "Quality: areas under the curve in percent (PRO up to 30 % FPR)",
        ["category", "method", "pixel ROC", "PRO", "image ROC", "fit s", "peak GiB"],
        table_rows(shown),
        [
            "The paper: ViT-B/16 at 384 pixels on the original images (Tables 2 and 3).",
            f"Written to {target}",
        ],
    )


if __name__ == "__main__":
    typer.run(main)
