"""Recipes: a bundle, thresholds and masks under one name, changed without a stop."""

from __future__ import annotations

import dataclasses
import difflib
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import open_bundle
from ..errors import BundleError, ConfigError, shown
from ..images import check_white_level
from ..result import Result
from ..thresholds import ThresholdTable
from .config import LineConfig, RecipeConfig, StationConfig
from .engines import Engines, SharedEngine, Way
from .masks import Masks, within

__all__ = ["Recipe", "RecipeBook", "white_level_of"]


@dataclass(frozen=True, eq=False)
class Recipe:
    """A recipe ready to judge. Immutable: a change makes another object, and a part keeps the one that it began with.

    Attributes:
        config: as configured.
        shared: the engine, shared with other recipes.
        masks: the judged areas.
        threshold: active image threshold.
        pixel_threshold: active pixel threshold T.
        table: the bundle's image scores of good parts, at the engine's precision.
        version: 1, increased by each change.
    """

    config: RecipeConfig
    shared: SharedEngine
    masks: Masks
    threshold: float
    pixel_threshold: float
    table: ThresholdTable
    version: int = 1

    @property
    def name(self) -> str:
        """Its name in line.toml."""
        return self.config.name

    @property
    def bundle(self) -> str:
        """sha256 of the bundle's manifest."""
        return self.shared.digest

    def judge(self, frame: NDArray[np.uint8]) -> Result:
        """Judge a frame within the masks.

        Raises:
            As for `saae_runtime.Engine`; FrameError: the masks do not fit the frame.
        """
        return self.judge_many([frame])[0]

    def judge_many(self, frames: Sequence[NDArray[np.uint8]]) -> list[Result]:
        """Judge several frames in one batch; otherwise as `judge`."""
        allowed = [self.masks.allowed((frame.shape[0], frame.shape[1])) for frame in frames]
        limits = {"threshold": self.pixel_threshold, "image_threshold": self.threshold}
        if len(frames) == 1:
            results = [self.shared.engine(frames[0], **limits)]
        else:
            results = self.shared.engine(list(frames), **limits)
        pairs = zip(results, allowed, strict=True)
        return [within(result, area, self.table) for result, area in pairs]

    def described_masks(self, size: tuple[int, int]) -> dict[str, Any] | None:
        """The masks for a record, with the judged share of a frame."""
        described, allowed = self.masks.describe(), self.masks.allowed(size)
        if described is None or allowed is None:
            return None
        return {**described, "judged": float(allowed.mean())}


class RecipeBook:
    """All recipes of a line.

    Args:
        configs: the recipes.
        folder: folder of relative paths.
        engines: opens bundles; None: a new one, which `close` closes.

    Raises:
        SaaeError: a bundle, backend, threshold or mask that cannot be used.
    """

    def __init__(self, configs: Sequence[RecipeConfig], folder: Path, engines: Engines | None = None) -> None:
        self._folder = folder
        self._engines = engines if engines is not None else Engines()
        self._owns_engines = engines is None
        self._lock = threading.Lock()
        self._recipes: dict[str, Recipe] = {}
        try:
            for config in configs:
                self._recipes[config.name] = self._load(config, 1)
        except BaseException:
            self.close()
            raise

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the order of the file."""
        return tuple(self._recipes)

    def get(self, name: str) -> Recipe:
        """The current recipe of a name.

        Raises:
            ConfigError: there is none.
        """
        with self._lock:
            found = self._recipes.get(name)
        if found is None:
            near = difflib.get_close_matches(name, self._recipes, n=1, cutoff=0.5)
            known = f"did you mean {near[0]}?" if near else f"there are {', '.join(self._recipes)}"
            raise ConfigError(f"No recipe is named {shown(name)}.", "", known)
        return found

    def named_by(self, part_id: str, among: Sequence[str]) -> str | None:
        """The first recipe of `among` with a pattern that matches the part's id; None without one."""
        with self._lock:
            return next((name for name in among if self._recipes[name].config.takes(part_id)), None)

    def change(self, name: str, /, **changes: Any) -> tuple[Recipe, Recipe]:
        """Replace a recipe by a changed one, for all later parts: `prepare` and `activate`."""
        before, after = self.prepare(name, **changes)
        self.activate(before, after)
        return before, after

    def prepare(self, name: str, /, **changes: Any) -> tuple[Recipe, Recipe]:
        """Load a changed recipe beside the active one, which stays active.

        Args:
            name: name of the recipe.
            changes: fields of `RecipeConfig`, such as `threshold=4.2`, `bundle="bundles/zipper-2"`, `roi=(...)`. A
                threshold replaces a rate, and the reverse.

        Returns:
            The active recipe, and the changed one.

        Raises:
            SaaeError: it cannot be used.
        """
        for one, other in (("threshold", "false_alarms"), ("pixel_threshold", "pixel_fpr")):
            for given, dropped in ((one, other), (other, one)):
                if changes.get(given) is not None and dropped not in changes:
                    changes[dropped] = None
        before = self.get(name)
        try:
            config = dataclasses.replace(before.config, **changes)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"Recipe {name} cannot be changed like this.", str(error), "") from error
        if config.name != name:
            raise ConfigError("A recipe keeps its name.")
        after = self._load(config, before.version + 1)
        levels = [item.shared.engine.white_level for item in (before, after)]
        if levels[0] != levels[1]:
            raise ConfigError(
                f"Recipe {name} cannot change to a bundle with another white level.",
                f"The running cameras scale their frames by {_level(levels[0])}; {config.bundle} was fitted with "
                f"{_level(levels[1])}.",
                "name the bundle in line.toml and restart the line",
            )
        return before, after

    def activate(self, before: Recipe, after: Recipe) -> None:
        """Replace a recipe by one from `prepare`, for all later parts.

        Raises:
            ConfigError: `before` is not the active one any more; nothing changes.
        """
        name = before.name
        with self._lock:
            if self._recipes[name] is not before:
                raise ConfigError(f"Recipe {name} is being changed by another user.", "", "reload it, then change it")
            self._recipes[name] = after

    def to_dict(self) -> dict[str, Mapping[str, Any]]:
        """The active recipes, for a page or a log."""
        with self._lock:
            recipes = list(self._recipes.values())
        return {
            item.name: {
                "bundle": item.config.bundle,
                "digest": item.bundle,
                "threshold": item.threshold,
                "pixel_threshold": item.pixel_threshold,
                "masks": item.masks.describe(),
                "version": item.version,
                "backend": item.shared.engine.backend.description,
            }
            for item in recipes
        }

    def close(self) -> None:
        """Close the engines, if they are its own."""
        if self._owns_engines:
            self._engines.close()

    def _load(self, config: RecipeConfig, version: int) -> Recipe:
        masks = Masks(config, self._folder)
        way = Way(config.backend, config.device, config.precision, config.threads)
        shared = self._engines.take(self._folder / config.bundle, way)
        tables = shared.engine.manifest.thresholds[shared.engine.backend.precision]
        image = tables.image.at(config.false_alarms) if config.threshold is None else config.threshold
        pixel = tables.pixel.at(config.pixel_fpr) if config.pixel_threshold is None else config.pixel_threshold
        return Recipe(config, shared, masks, float(image), float(pixel), tables.image, version)


def white_level_of(config: LineConfig, station: StationConfig) -> int | None:
    """The white level for a station's camera: that of its options, else the one that its bundles were fitted with.

    A bundle that cannot be opened is left out: its recipe reports it.

    Raises:
        ConfigError: an impossible level, or bundles with different ones.
    """
    own = station.camera_options.get("white_level")
    if own is not None:
        return check_white_level(own)
    levels: dict[str, int | None] = {}
    for name in station.recipes:
        with suppress(BundleError):
            bundle = open_bundle(config.place(config.recipe(name).bundle), verify=False)
            levels[name] = bundle.manifest.frame.white_level
    if len(set(levels.values())) > 1:
        found = ", ".join(f"{name}: {_level(level)}" for name, level in levels.items())
        raise ConfigError(
            f"Station {station.name}: its recipes have different white levels ({found}).",
            "A camera's frames are scaled once, by the white level that the bundles were fitted with.",
            "fit them with the same --white-level, or set one for all: camera_options = { white_level = 4095 }",
        )
    return next(iter(levels.values()), None)


def _level(level: int | None) -> str:
    return "the default" if level is None else str(level)
