"""Is the promised share of false alarms kept on good images that the model has not seen? Fits on a few of many.

    python benchmarks/promises.py --data DATA [--categories bottle,screw] [--images 30,100] [--draws 2]
                                  [--unseen 150] [--preset fast] [--weights packaged] [--out FILE]

Of a category's good training images some are drawn (another draw for each seed), the model is fitted on them alone and
calibrated by the preset's rule. Then all others, up to --unseen of them, are scored: they come from the same place as
the fitted ones, so the promise is held against nothing but chance. For nominal 1 and 5 false alarms in 100: the upper
bound that calibration states (95 %, one-sided) and the share found, with its two-sided 95 % interval.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from saae_runtime.errors import ConfigError, SaaeError
from saae_runtime.estimate import highest_rate
from saae_train.config import FitConfig, preset

RATES = (0.01, 0.05)
HEADINGS = ("category", "fitted", "draws", "unseen", "asked", "stated at most", "found", "95 %")


def measure(
    data: Path, name: str, config: FitConfig, images: int, unseen: int, weights: str | None, cache: Path
) -> dict[str, Any]:
    """One draw of `images` good images; the seed of `config` draws them.

    Raises:
        ConfigError: the category has not that many images and some more.
        SaaeError: of the kind that reading or fitting raises.
    """
    from saae_train.calibrate import calibrate_left_out
    from saae_train.data.category import find_category
    from saae_train.data.shape import typical_shape
    from saae_train.experiments.experiment import images_digest
    from saae_train.fitting.backbone import backbone_for
    from saae_train.fitting.fit import fit
    from saae_train.model.checkpoint import discard_state
    from saae_train.model.scorer import TorchScorer

    category = find_category(data, name)
    if images >= len(category.train):
        raise ConfigError(
            f"{name} has {len(category.train)} good images: {images} leave none unseen.", "", "smaller --images"
        )
    order = np.random.default_rng(config.seed).permutation(len(category.train))
    drawn = [category.train[place] for place in sorted(order[:images])]
    others = [category.train[place] for place in order[images : images + unseen]]
    backbone = backbone_for(config, drawn, weights)
    checkpoint = fit(backbone, drawn, config, name, cache=cache)
    left_out = checkpoint.left_out
    if left_out is None:
        raise ConfigError(f"The preset {config.preset} has no memory to leave images out of.", "", "--preset fast")
    detector = checkpoint.detector
    size = detector.backbone.input_size
    shape = typical_shape(drawn)
    frame_size = size if shape is None else shape.size
    tables = calibrate_left_out(left_out, detector.smoothing, frame_size, size, checkpoint.record.digest or "")
    scorer = TorchScorer(detector)
    scores = np.array([scorer(sample.read()).score for sample in others])
    discard_state(checkpoint)
    found = []
    for rate in RATES:
        limit = tables.image.at(rate)
        above = int((np.asarray(tables.scores) > limit).sum())
        found.append(
            {"rate": rate, "above": above, "stated": highest_rate(above, images), "alarms": int((scores > limit).sum())}
        )
    return {
        "category": name,
        "images": images,
        "seed": config.seed,
        "preset": config.preset,
        "weights": weights,
        "digest": images_digest(category),
        "unseen": len(others),
        "rates": found,
    }


def table_rows(rows: Sequence[dict[str, Any]]) -> list[list[object]]:
    """One row for each category, number of fitted images and rate, over its draws; rates in percent."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        name = row["category"] + ("" if row["preset"] == "fast" else f", {row['preset']}")
        groups.setdefault((name, row["images"]), []).append(row)
    table: list[list[object]] = []
    for (name, images), same in groups.items():
        unseen = sum(row["unseen"] for row in same)
        for place, rate in enumerate(RATES):
            alarms = sum(row["rates"][place]["alarms"] for row in same)
            stated = max(row["rates"][place]["stated"] for row in same)
            low, high = 1.0 - highest_rate(unseen - alarms, unseen, 0.975), highest_rate(alarms, unseen, 0.975)
            table.append(
                [
                    name,
                    images,
                    len(same),
                    unseen,
                    f"{100 * rate:g}",
                    f"{100 * stated:.1f}",
                    f"{100 * alarms / unseen:.1f}",
                    f"{100 * low:.1f} to {100 * high:.1f}",
                ]
            )
    return table


def main(
    data: Annotated[Path, typer.Option(help="folder of categories (MVTec AD tree)")],
    categories: Annotated[str, typer.Option(help="comma-separated; default: all found")] = "",
    images: Annotated[str, typer.Option(help="how many good images to fit on, comma-separated")] = "30,100",
    draws: Annotated[int, typer.Option(min=1, help="draws of each number")] = 2,
    unseen: Annotated[int, typer.Option(min=1, help="score at most so many of the others")] = 150,
    name: Annotated[str, typer.Option("--preset", help="fast, lite, small or bank")] = "fast",
    weights: Annotated[str | None, typer.Option(help="backbone weights: a file, cache, hub or packaged")] = None,
    out: Annotated[Path | None, typer.Option(help="result file; rows that it holds are not measured again")] = None,
) -> None:
    """Measure false alarms on unseen good images; print and write the table after every draw."""
    from benchmarks.quality import finished
    from saae_train.data.category import find_category, list_categories
    from saae_train.experiments.experiment import images_digest

    common.print_machine()
    target = out or common.RESULTS / "promises.json"
    rows = finished(target)
    done = {
        (row["category"], row["images"], row["seed"], row["preset"], row.get("weights"), row.get("digest"))
        for row in rows
    }
    try:
        counts = [int(count) for count in images.split(",")]
        for category in [n for n in categories.split(",") if n] or list_categories(data):
            digest = images_digest(find_category(data, category))
            for count in counts:
                for seed in range(draws):
                    if (category, count, seed, name, weights, digest) in done:
                        continue
                    with tempfile.TemporaryDirectory(prefix="saae-promises-") as cache:
                        config = preset(name).replace(seed=seed)
                        rows.append(measure(data, category, config, count, unseen, weights, Path(cache)))
                    common.write_result(common.result("promises", rows), target)
                    common.print_table("promises", HEADINGS, table_rows(rows), [f"Written to {target}"])
    except SaaeError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(error.exit_code) from error


if __name__ == "__main__":
    typer.run(main)
