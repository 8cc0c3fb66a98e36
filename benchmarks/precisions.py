"""Does every deployed precision give FP32's verdicts? Scores test images by each backend and precision of a bundle.

    python benchmarks/precisions.py BUNDLE ... --data DATA

BUNDLE must be built from a category of DATA that has test images; several bundles give one table. Each backend and
precision that opens here scores every test image at the default threshold calibrated for it. `same` counts the images
with FP32's verdict; `score` is the median and the largest relative difference of their scores, before thresholds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from saae_runtime import Engine, open_bundle
from saae_runtime.bundle import Bundle
from saae_runtime.errors import BackendError, DataError, SaaeError
from saae_runtime.images import read_image
from saae_train.data.category import Sample, find_category

WAYS = ("onnxruntime:cpu", "openvino", "onnxruntime:cuda", "tensorrt")
REFERENCE = ("onnxruntime:cpu", "fp32")
HEADINGS = (
    "category",
    "backend",
    "precision",
    "images",
    "same",
    "found",
    "rejected",
    "score, median",
    "score, largest",
)


def compared(bundle: Bundle, samples: Sequence[Sample], threads: int) -> Iterator[dict[str, Any]]:
    """One row for each way that opens here, FP32 in ONNX Runtime first.

    Raises:
        BackendError: FP32 in ONNX Runtime does not open.
        ImageError: an image cannot be read.
    """
    defective = np.array([sample.label != "good" for sample in samples])
    precisions = dict.fromkeys(artefact.precision for artefact in bundle.manifest.artefacts)
    ways = [REFERENCE, *((way, p) for p in precisions for way in WAYS if (way, p) != REFERENCE)]
    scores_there, verdicts_there = _verdicts(bundle, samples, REFERENCE, threads)
    for way in ways:
        try:
            scores, verdicts = _verdicts(bundle, samples, way, threads)
        except BackendError:  # not on this machine, or no file for it
            continue
        apart = np.abs(scores / scores_there - 1)
        yield {
            "category": bundle.manifest.category,
            "backend": way[0],
            "precision": way[1],
            "images": len(samples),
            "same": int((verdicts == verdicts_there).sum()),
            "defective": int(defective.sum()),
            "found": int(verdicts[defective].sum()),
            "rejected": int(verdicts[~defective].sum()),
            "score_median": float(np.median(apart)),
            "score_largest": float(apart.max()),
        }


def _verdicts(bundle: Bundle, samples: Sequence[Sample], way: tuple[str, str], threads: int) -> tuple[Any, Any]:
    backend, precision = way
    with Engine(bundle, backend=backend, precision=precision, threads=threads) as engine:
        results = [engine(read_image(sample.path, engine.white_level)) for sample in samples]
    return np.array([result.score for result in results]), np.array([result.is_anomalous for result in results])


def main(
    bundles: Annotated[list[Path], typer.Argument(help="folders of bundles")],
    data: Annotated[Path, typer.Option(help="folder of the categories that they were built from")],
    threads: Annotated[int, typer.Option(min=1, help="of the processor")] = 1,
    out: Annotated[Path, typer.Option(help="result file")] = common.RESULTS / "precisions.json",
) -> None:
    """Compare the verdicts of every precision with FP32's."""
    common.print_machine()
    rows: list[dict[str, Any]] = []
    try:
        for path in bundles:
            bundle = open_bundle(path)
            samples = find_category(data, bundle.manifest.category).test
            if not samples:
                raise DataError(f"{bundle.manifest.category} has no test images in {data}.", "", "another --data")
            for row in compared(bundle, samples, threads):
                print(f"{row['category']} {row['backend']} {row['precision']}: {row['same']} of {row['images']}")
                rows.append(row)
    except SaaeError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(error.exit_code) from error
    common.print_table("verdicts of each precision", HEADINGS, table(rows))
    print(f"Written to {common.write_result(common.result('precisions', rows, threads=threads), out)}")


def table(rows: Sequence[dict[str, Any]]) -> list[list[object]]:
    """Rows of a result as cells under HEADINGS."""
    found = []
    for row in rows:
        good = row["images"] - row["defective"]
        shown = [row[key] for key in ("category", "backend", "precision", "images", "same")]
        shown += [f"{row['found']} / {row['defective']}", f"{row['rejected']} / {good}"]
        found.append([*shown, row["score_median"], row["score_largest"]])
    return found


if __name__ == "__main__":
    typer.run(main)
