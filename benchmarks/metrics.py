"""Time the pixel metrics against plain ways to compute PRO, on 83 images of 900 x 900.

    python benchmarks/metrics.py [--images 83] [--size 900] [--out FILE]

Three ways, on the same maps and masks, in one process:

  saae        exact ROC-AUC, PRO-AUC, average precision and best F1, together (saae_train.evaluation.metrics);
  one sort    exact PRO-AUC alone: all pixels concatenated, one index sort, cumulative sums of false
              positives and of each pixel's share in its region (the MVTec AD evaluation's approach);
  thresholds  PRO-AUC alone, approximate: thresholds sorted and tried one after another, each region's overlap
              and the FPR counted for every one of them.

Each timing includes everything from maps and masks to numbers, also connected components.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from saae_train.evaluation.metrics import pixel_metrics

Floats = NDArray[np.float32]
Masks = list[NDArray[np.bool_]]
LIMIT = 0.3


def draw(images: int, size: int, seed: int = 0) -> tuple[list[Floats], Masks]:
    """Smooth random maps at a bottle-like ratio: a quarter good, the others with one to three defect regions."""
    rng = np.random.default_rng(seed)
    maps, masks = [], []
    for i in range(images):
        mask = np.zeros((size, size), bool)
        if i % 4:
            for _ in range(rng.integers(1, 4)):
                h, w = rng.integers(size // 20 + 1, size // 6 + 2, 2)
                y, x = rng.integers(0, size - h), rng.integers(0, size - w)
                mask[y : y + h, x : x + w] = True
        grid = rng.random((28, 28), dtype=np.float32) ** 2
        noise = ndimage.zoom(grid, size / 28, order=1, grid_mode=True, mode="nearest")[:size, :size]
        blurred = ndimage.uniform_filter(mask.astype(np.float32), size // 20 + 1)
        maps.append((noise + blurred).astype(np.float32))
        masks.append(mask)
    return maps, masks


def pro_one_sort(maps: list[Floats], masks: Masks, limit: float = LIMIT) -> float:
    """Exact PRO-AUC by one index sort over all pixels."""
    values, wrong, shares = [], [], []
    regions = 0
    for anomaly_map, mask in zip(maps, masks, strict=True):
        labels, count = ndimage.label(mask, structure=np.ones((3, 3), int))
        areas = np.bincount(labels.ravel(), minlength=count + 1)
        share = np.zeros(mask.shape)
        share[mask] = 1.0 / areas[labels[mask]]
        values.append(anomaly_map.ravel())
        wrong.append(~mask.ravel())
        shares.append(share.ravel())
        regions += count
    pooled = np.concatenate(values)
    order = np.argsort(pooled)[::-1]
    fpr = np.cumsum(np.concatenate(wrong)[order], dtype=np.float64)
    overlap = np.cumsum(np.concatenate(shares)[order]) / regions
    pooled = pooled[order]
    last = np.append(pooled[1:] != pooled[:-1], True)  # one point for equal values
    x = np.concatenate([[0.0], fpr[last] / fpr[-1]])
    y = np.concatenate([[0.0], overlap[last]])
    return integrate(x, y, limit)


def pro_thresholds(maps: list[Floats], masks: Masks, count: int, limit: float = LIMIT) -> float:
    """PRO-AUC from `count` thresholds at even quantiles, each counted on its own."""
    pooled = np.concatenate([m.ravel()[:: max(1, m.size // 2000)] for m in maps])
    thresholds = np.sort(np.quantile(pooled, np.linspace(0, 1, count)))[::-1]
    regions = []
    for anomaly_map, mask in zip(maps, masks, strict=True):
        labels, n = ndimage.label(mask, structure=np.ones((3, 3), int))
        regions += [anomaly_map[labels == k + 1] for k in range(n)]
    normal = sum(int((~m).sum()) for m in masks)
    x, y = [0.0], [0.0]
    for t in thresholds:
        false = sum(int(((a > t) & ~m).sum()) for a, m in zip(maps, masks, strict=True))
        x.append(false / normal)
        y.append(float(np.mean([(r > t).mean() for r in regions])))
    return integrate(np.array([*x, 1.0]), np.array([*y, 1.0]), limit)


def integrate(x: NDArray[np.float64], y: NDArray[np.float64], limit: float) -> float:
    """Trapezoid area for x up to limit, interpolated there, over limit."""
    inside = x <= limit
    xs = np.append(x[inside], limit)
    ys = np.append(y[inside], np.interp(limit, x, y))
    return float(np.sum(np.diff(xs) * (ys[1:] + ys[:-1]) / 2) / limit)


def main(
    images: Annotated[int, typer.Option(help="number of images")] = 83,
    size: Annotated[int, typer.Option(help="height and width in pixels")] = 900,
    thresholds: Annotated[int, typer.Option(help="thresholds of the third way")] = 200,
    runs: Annotated[int, typer.Option(help="timed runs of each")] = 3,
    out: Annotated[Path | None, typer.Option(help="result file")] = None,
) -> None:
    """Time the metrics; print and write the table."""
    common.print_machine()
    maps, masks = draw(images, size)
    found: dict[str, float] = {}
    seconds: dict[str, list[float]] = {"saae": [], "one sort": [], "thresholds": []}

    def ours() -> None:
        with common.PeakMemory() as memory:
            values = pixel_metrics(maps, masks, limit=LIMIT)
        found["saae"], found["peak"] = float(values["pro_auc"]), memory.gib

    def one_sort() -> None:
        found["one sort"] = pro_one_sort(maps, masks)

    def sweep() -> None:
        found["thresholds"] = pro_thresholds(maps, masks, thresholds)

    for _ in range(runs):
        for name, call in (("saae", ours), ("one sort", one_sort), ("thresholds", sweep)):
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    timings = {name: common.Timing.of(s) for name, s in seconds.items()}
    what = {
        "saae": "ROC, PRO, AP, F1; exact",
        "one sort": "PRO; exact",
        "thresholds": f"PRO; {thresholds} thresholds",
    }
    rows: list[dict[str, Any]] = [
        {
            "way": name,
            "computes": what[name],
            "pro_auc": found[name],
            "timing": timings[name].to_json(),
            "ratio": timings[name].median_ms / timings["saae"].median_ms,
        }
        for name in timings
    ]
    data = common.result(
        "metrics",
        rows,
        settings={"images": images, "size": size, "limit": LIMIT, "runs": runs},
        inside="from maps and masks to numbers, connected components included",
        peak_memory_gib=round(found["peak"], 2),
    )
    common.print_table(
        f"Metrics of {images} images of {size} x {size}",
        ["way", "computes", "PRO-AUC", "median s", "times saae"],
        [(r["way"], r["computes"], r["pro_auc"], timings[r["way"]].median_ms / 1000, r["ratio"]) for r in rows],
        [f"Peak memory with the maps: {found['peak']:.2f} GiB. Written to {common.write_result(data, out)}"],
    )


if __name__ == "__main__":
    typer.run(main)
