"""Results in other tools' formats: CSV, COCO, and anomaly maps for benchmark servers; Parquet is in `parquet.py`."""

from __future__ import annotations

import csv
import io
from pathlib import Path, PurePath
from typing import Any, Protocol

import numpy as np

from ..appending import LineFile
from ..errors import ConfigError
from ..files import encodable, storage_error, write_bytes, write_json
from ..render import save_png
from ..tiff import encode_tiff
from .scoring import Outcome

__all__ = ["MAP_FORMATS", "CocoFile", "CsvFile", "Export", "MapTree"]

MAP_FORMATS = ("tiff", "mvtec", "mvtec-ad-2")
"""`tiff`: laid out like the sources. `mvtec`: for the evaluation scripts of MVTec AD and MVTec LOCO AD. `mvtec-ad-2`:
for a submission to that benchmark's server."""


class Export(Protocol):
    """Receives outcomes one after the other."""

    def write(self, outcome: Outcome) -> None:
        """Write an outcome, or keep it for `close`. Raises StorageError."""

    def close(self) -> None:
        """Finish the file. Raises StorageError: then it has nothing of what `unfinished` counts."""

    @property
    def unfinished(self) -> int:
        """Number of results that are there only after `close`."""


class CsvFile:
    """One line per frame, appended, each written at once; a new file begins with the names of the columns.

    A frame that could not be read has `error` and no verdict. `left` to `peak_score` are for the strongest region.

    Args:
        path: the file; folders are made.
        min_area: regions of fewer pixels are left out.

    Raises:
        ConfigError: another run writes this file, or it holds other columns.
        StorageError: the file cannot be written.
    """

    COLUMNS = (
        "source", "frame", "verdict", "score", "rank", "image_threshold", "threshold", "height", "width",
        "defect_share", "regions", "left", "top", "right", "bottom", "area", "peak_x", "peak_y", "peak_score", "ms",
        "error",
    )  # fmt: skip

    unfinished = 0

    def __init__(self, path: Path, min_area: int = 1) -> None:
        self._min_area = min_area
        header = _line(self.COLUMNS)
        if path.is_file():
            try:
                with path.open("rb") as stream:
                    found = stream.readline(len(header))
            except OSError as error:
                raise storage_error(path, error) from error
            if not header.startswith(found):
                raise ConfigError(
                    f"--csv {path}: the file has other columns.", "Lines are appended to what is there.", "another file"
                )
        self._file = LineFile(path, cure="give each run its own --csv FILE", header=header)

    def write(self, outcome: Outcome) -> None:
        """See `Export.write`."""
        self._file.write(_line([_cell(value) for value in self._values(outcome)]))

    def _values(self, outcome: Outcome) -> list[Any]:
        result = outcome.result
        head = [outcome.frame.name, outcome.frame.index]
        if result is None:
            said = "" if outcome.error is None else outcome.error.what
            return [*head, *[None] * (len(self.COLUMNS) - 3), said]
        regions = result.regions(self._min_area)
        strongest: list[Any] = [None] * 8
        if regions:
            best = regions[0]
            strongest = [*best.bbox, best.area, *best.peak, best.score]
        verdict = "defect" if result.is_anomalous else "clean"
        numbers = [result.score, result.rank, result.image_threshold, result.threshold, *result.size]
        return [
            *head, verdict, *numbers, float(result.mask.mean()), len(regions), *strongest, outcome.milliseconds, None,
        ]  # fmt: skip

    def close(self) -> None:
        """Close the file. May be called twice."""
        self._file.close()


def _line(values: Any) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return encodable(text.getvalue()).encode()


def _cell(value: Any) -> Any:
    """Text without line breaks."""
    return value.replace("\n", " ").replace("\r", " ") if isinstance(value, str) else value


class CocoFile:
    """One COCO data set of all frames and their regions, written when the run ends.

    `images` have the file's name; there is one of `annotations` per region, with its `score`; the only category is the
    product's.

    Args:
        path: the file.
        category: name of the category.
        min_area: regions of fewer pixels are left out.
    """

    def __init__(self, path: Path, category: str, min_area: int = 1) -> None:
        self._path = path
        self._category = category
        self._min_area = min_area
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []

    def write(self, outcome: Outcome) -> None:
        """See `Export.write`."""
        result = outcome.result
        if result is None:
            return
        height, width = result.size
        number = len(self._images) + 1
        image = {"id": number, "file_name": outcome.frame.name, "height": height, "width": width}
        self._images.append(image | {"score": result.score, "is_anomalous": result.is_anomalous})
        for item in result.coco(self._min_area):
            ids = {"id": len(self._annotations) + 1, "image_id": number, "category_id": 1, "iscrowd": 0}
            self._annotations.append(ids | item)

    @property
    def unfinished(self) -> int:
        """See `Export.unfinished`."""
        return len(self._images)

    def close(self) -> None:
        """Write the file, atomically."""
        data = {
            "info": {"description": f"saae: {self._category}"},
            "images": self._images,
            "annotations": self._annotations,
            "categories": [{"id": 1, "name": "defect", "supercategory": self._category}],
        }
        write_json(self._path, data)


class MapTree:
    """One TIFF per frame with its anomaly map at the frame's size; for `mvtec-ad-2` also the mask as PNG.

    The benchmarks' layouts follow the data set's: below a folder named as the bundle's category, an image
    `test/cut/000.png` becomes `FOLDER/CATEGORY/test/cut/000.tiff`, of 32 bits. MVTec AD 2 takes 16 bits, in
    `anomaly_images`, and masks of 0 and 255 in `anomaly_images_thresholded`.

    Args:
        folder: folder of the maps.
        kind: one of `MAP_FORMATS`.
        category: the bundle's category.
    """

    unfinished = 0

    def __init__(self, folder: Path, kind: str, category: str) -> None:
        self._folder = folder
        self._kind = kind
        self._category = category

    def write(self, outcome: Outcome) -> None:
        """See `Export.write`.

        Raises:
            ConfigError: with a benchmark's format, a frame that is not in a folder of the category.
        """
        result = outcome.result
        if result is None:
            return
        if self._kind == "mvtec-ad-2":
            place = self._placed(outcome)
            largest = np.finfo(np.float16).max
            narrow = np.clip(result.anomaly_map, -largest, largest).astype(np.float16)
            self._write(PurePath("anomaly_images") / place, encode_tiff(narrow))
            mask = self._folder / "anomaly_images_thresholded" / place
            save_png(mask.with_name(f"{mask.name}.png"), result.mask)
            return
        place = outcome.frame.stem if self._kind == "tiff" else self._placed(outcome)
        self._write(place, encode_tiff(result.anomaly_map))

    def _write(self, stem: PurePath, data: bytes) -> None:
        path = self._folder / stem
        write_bytes(path.with_name(f"{path.name}.tiff"), data)

    def _placed(self, outcome: Outcome) -> PurePath:
        """CATEGORY/split/.../name of the frame in the data set, without ending."""
        path = outcome.frame.source.path
        parts = () if path is None else path.absolute().with_suffix("").parts
        if self._category not in parts[:-1] or outcome.frame.source.kind != "image":
            raise ConfigError(
                f"{outcome.frame.name} does not lie below a folder named {self._category}.",
                f"--map-format {self._kind} writes maps in the layout of that data set.",
                "give the images of the data set, or --map-format tiff",
            )
        first = len(parts) - 1 - parts[::-1].index(self._category)
        return PurePath(*parts[first:])

    def close(self) -> None:
        """Do nothing."""
