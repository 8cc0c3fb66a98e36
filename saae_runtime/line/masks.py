"""Regions of interest and ignored areas of a recipe, applied to map, score and mask."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, FrameError
from ..files import sha256_file
from ..images import read_mask
from ..regions import defect_mask
from ..result import Result
from ..thresholds import ThresholdTable
from .config import Polygon, RecipeConfig

__all__ = ["Masks", "within"]

Allowed = NDArray[np.bool_]


class Masks:
    """The areas of one recipe.

    Args:
        recipe: its `roi` and `ignore`.
        folder: folder of relative PNG names.

    Raises:
        ConfigError, ImageError: a PNG that cannot be read, or areas that exclude everything.
    """

    def __init__(self, recipe: RecipeConfig, folder: Path) -> None:
        self._name = recipe.name
        self._roi, self._ignore = recipe.roi, recipe.ignore
        self._pictures: dict[str, Allowed] = {}
        self._digests: dict[str, str] = {}
        for area in (self._roi, self._ignore):
            if isinstance(area, str):
                self._pictures[area] = read_mask(folder / area)
                self._digests[area] = sha256_file(folder / area)
        self._lock = threading.Lock()
        self._size: tuple[int, int] | None = None
        self._allowed: Allowed | None = None
        for picture in self._pictures.values():
            self.allowed(picture.shape)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        return bool(self._roi or self._ignore)

    def describe(self) -> dict[str, Any] | None:
        """For a part's record: polygons, or name and sha256 of a PNG. None without masks."""
        if not self:
            return None
        return {"roi": self._described(self._roi), "ignore": self._described(self._ignore)}

    def _described(self, area: str | tuple[Polygon, ...]) -> Any:
        if isinstance(area, str):
            return {"png": area, "sha256": self._digests[area]}
        return [[list(corner) for corner in polygon] for polygon in area]

    def allowed(self, size: tuple[int, int]) -> Allowed | None:
        """The judged area of a frame of (height, width): bool H x W. None: everywhere.

        Raises:
            FrameError: the areas do not fit a frame of this size.
        """
        if not self:
            return None
        with self._lock:
            if size != self._size:
                self._allowed, self._size = self._drawn(size), size
            return self._allowed

    def _drawn(self, size: tuple[int, int]) -> Allowed:
        allowed = self._area(self._roi, size, "roi") if self._roi else np.ones(size, np.bool_)
        if self._ignore:
            allowed &= ~self._area(self._ignore, size, "ignore")
        if not allowed.any():
            raise FrameError(
                f"The masks of recipe {self._name} exclude the whole frame of {size[1]} x {size[0]} pixels.",
                "No pixel lies within `roi` and outside of `ignore`.",
                "redraw them on an image of this camera",
            )
        allowed.setflags(write=False)
        return allowed

    def _area(self, area: str | tuple[Polygon, ...], size: tuple[int, int], key: str) -> Allowed:
        if not isinstance(area, str):
            return draw(area, size)
        picture = self._pictures[area]
        if picture.shape != size:
            raise FrameError(
                f"The frame has {size[1]} x {size[0]} pixels, `{key}` of recipe {self._name} (file {area}) has "
                f"{picture.shape[1]} x {picture.shape[0]}.",
                "A mask fits one frame size only.",
                "save the mask at the camera's size",
            )
        return picture.copy()


def draw(polygons: tuple[Polygon, ...], size: tuple[int, int]) -> Allowed:
    """Filled polygons with their borders: bool H x W. Parts outside the frame are ignored."""
    from PIL import Image, ImageDraw

    picture = Image.new("1", (size[1], size[0]))
    pen = ImageDraw.Draw(picture)
    for polygon in polygons:
        pen.polygon([(x, y) for x, y in polygon], fill=1)
    return np.array(picture, dtype=np.bool_)


def within(result: Result, allowed: Allowed | None, table: ThresholdTable | None) -> Result:
    """Limit a result to the judged area.

    The map is 0 outside, and the score is the largest value of the rest. Mask and regions follow by the same rule as
    for a whole frame (`saae_runtime.regions.defect_mask`). If the highest value lies inside, the score stays the
    graph's, bit for bit.

    Args:
        result: of the whole frame.
        allowed: bool H x W; None: everywhere.
        table: threshold table of image scores, for the rank.

    Raises:
        ConfigError: `allowed` is of a different size.
    """
    if allowed is None:
        return result
    whole = result.anomaly_map
    if allowed.shape != whole.shape:
        raise ConfigError(f"The mask has shape {allowed.shape}, the map {whole.shape}.")
    anomaly_map = np.where(allowed, whole, np.float32(min(0.0, float(whole.min()))))
    highest = float(anomaly_map.max())
    score = result.score if highest == float(whole.max()) else min(highest, result.score)
    mask = defect_mask(anomaly_map, result.threshold, result.image_threshold, score)
    anomaly_map.setflags(write=False)
    mask.setflags(write=False)
    rank = table.share_below(score) if table is not None else None
    return Result(score, anomaly_map, mask, result.threshold, result.image_threshold, rank)
