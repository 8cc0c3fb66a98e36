"""New thresholds from confirmed parts, computed by saae-export beside the bundle, and what would change."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle import is_bundle, open_bundle
from ..errors import CalibrationError, ConfigError, DataError
from ..thresholds import ThresholdTable
from .archive import archived
from .config import LineConfig, RecipeConfig
from .overrides import called_defective, pool_folder
from .part import Verdict
from .recipes import Recipe

__all__ = ["GoodParts", "Recalibration", "changed_parts", "good_parts", "next_version", "recalibrate", "versions"]

_MARK = re.compile(r"\.recal-(\d{1,6})$")
_PATIENCE = 3600.0  # seconds
_SAID = 4000  # characters of saae-export's output that are kept


@dataclass(frozen=True)
class GoodParts:
    """Where the images of a recipe's good parts are.

    Attributes:
        folders: of the images, with those below them.
        left_out: images in them that do not count.
    """

    folders: tuple[Path, ...]
    left_out: tuple[Path, ...] = ()

    def images(self) -> dict[Path, list[Path]]:
        """The images of each folder that has any that count."""
        gone = {path.resolve() for path in self.left_out}
        names = {path.name for path in gone}
        found = {}
        for folder in self.folders:
            inside = [item for item in folder.rglob("*.png") if item.is_file()] if folder.is_dir() else []
            found[folder] = [item for item in inside if item.name not in names or item.resolve() not in gone]
        return {folder: inside for folder, inside in found.items() if inside}


def good_parts(config: LineConfig, folder: Path, recipe: str, archive: bool, more: Iterable[Path] = ()) -> GoodParts:
    """The images that a recipe is recalibrated on: confirmed ones, and the archive's OK images.

    Parts that the line took for OK and a person called defective are left out, wherever they are.

    Args:
        config: of line.toml.
        folder: of `[http]`, with the overrides and their pool.
        recipe: the recipe's name.
        archive: whether to use the archive.
        more: further folders.

    Raises:
        ConfigError: the overrides cannot be read.
    """
    folders = [pool_folder(folder, recipe), *more]
    if config.archive is None or config.archive.format != "png":
        return GoodParts(tuple(folders))
    place = config.place(config.archive.folder)
    if archive:
        folders.append(archived(place, Verdict.OK, recipe))
    return GoodParts(tuple(folders), tuple(place / name for name in sorted(called_defective(folder))))


@dataclass(frozen=True)
class Recalibration:
    """The result of a recalibration.

    Attributes:
        bundle: the bundle before.
        written: the new version; None: nothing was written.
        precision: of the thresholds.
        before, after: image threshold of the recipe, by its own rule.
        pixel_before, pixel_after: pixel threshold T.
        pictures: number of images of good parts.
        said: notes and warnings of saae-export.
    """

    bundle: Path
    written: Path | None
    precision: str
    before: float
    after: float
    pixel_before: float
    pixel_after: float
    pictures: int
    said: str

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "bundle": self.bundle.name,
            "written": None if self.written is None else self.written.name,
            "precision": self.precision,
            "before": self.before,
            "after": self.after,
            "pixel_before": self.pixel_before,
            "pixel_after": self.pixel_after,
            "pictures": self.pictures,
            "said": self.said,
        }


def versions(bundle: Path) -> list[Path]:
    """The built bundle and its existing recalibrated versions, the oldest first."""
    first = _first(bundle)
    found = {0: first} if is_bundle(first) else {}
    for path in first.parent.iterdir() if first.parent.is_dir() else ():
        mark = _MARK.search(path.name)
        if mark is not None and path.name[: mark.start()] == first.name and is_bundle(path):
            found[int(mark[1])] = path
    return [found[number] for number in sorted(found)]


def next_version(bundle: Path) -> Path:
    """Folder of the next version: `NAME.recal-1`, `NAME.recal-2` and so on."""
    first = _first(bundle)
    number = 1
    while (path := first.with_name(f"{first.name}.recal-{number}")).exists():
        number += 1
    return path


def recalibrate(
    bundle: Path,
    recipe: Recipe,
    parts: GoodParts,
    *,
    dry_run: bool = False,
    started: Callable[[subprocess.Popen[bytes]], None] = lambda process: None,
) -> Recalibration:
    """Compute thresholds by `saae-export calibrate` in a separate process, at low priority.

    The bundle is not changed: the new version is a folder beside it, which appears complete or not at all.

    Args:
        bundle: the recipe's bundle, on disk.
        recipe: the recipe whose thresholds are compared.
        parts: images of good parts, from `good_parts`.
        dry_run: keep nothing.
        started: called with the process, so that it can be ended.

    Raises:
        DataError: there are no images.
        ConfigError: the recipe sets its threshold as a number, or saae-export cannot run here.
        CalibrationError: saae-export failed; the message has its reason.
    """
    if recipe.config.threshold is not None:
        raise ConfigError(
            f"Recipe {recipe.name} sets its threshold as a number.",
            "A recalibrated bundle would not change it.",
            "set a false alarm rate instead: `false_alarms`",
        )
    images = parts.images()
    if not images:
        raise DataError(
            "There are no images of good parts to calibrate on.",
            f"Looked into {', '.join(map(str, parts.folders))}.",
            "confirm parts as OK on the page, or keep more OK images: [archive] ok_share",
        )
    with tempfile.TemporaryDirectory(
        prefix=".recal-", dir=bundle.parent if _writable(bundle.parent) else None
    ) as place:
        target = Path(place) / "bundle" if dry_run else next_version(bundle)
        command = [sys.executable, "-m", "saae_export.cli", "calibrate", str(bundle), "--out", str(target)]
        for folder in images:
            command += ["--normal", str(folder)]
        for path in parts.left_out:
            if path.is_file() and any(folder.resolve() in path.resolve().parents for folder in images):
                command += ["--exclude", str(path)]
        said = _run(command, started)
        precision = recipe.shared.engine.backend.precision
        after = open_bundle(target).manifest.thresholds.get(precision)
    if after is None:
        raise CalibrationError(f"{target.name} has no thresholds for {precision}.", said, "")
    config = recipe.config
    pixel = after.pixel.at(config.pixel_fpr) if config.pixel_threshold is None else config.pixel_threshold
    return Recalibration(
        bundle=bundle,
        written=None if dry_run else target,
        precision=precision,
        before=recipe.threshold,
        after=_at(after.image, config),
        pixel_before=recipe.pixel_threshold,
        pixel_after=pixel,
        pictures=sum(map(len, images.values())),
        said=said,
    )


def changed_parts(records: Iterable[Mapping[str, Any]], threshold: float) -> tuple[int, list[dict[str, Any]]]:
    """Which parts another image threshold would have judged differently.

    Args:
        records: of parts, `Part.to_dict`; those without a score stay NG.
        threshold: the other image threshold.

    Returns:
        Number of parts with a score, and for each that changes: part_id, station, time, score, verdict, would_be.
    """
    judged, changed = 0, []
    for record in records:
        if record["score"] is None:
            continue
        judged += 1
        would_be = "NG" if record["score"] > threshold else "OK"
        if would_be != record["verdict"] and record["reason"] == "score":
            kept = {key: record[key] for key in ("part_id", "station", "time", "score", "verdict")}
            changed.append({**kept, "would_be": would_be})
    return judged, changed


def _at(table: ThresholdTable, config: RecipeConfig) -> float:
    return float(table.at(config.false_alarms))


def _first(bundle: Path) -> Path:
    mark = _MARK.search(bundle.name)
    return bundle if mark is None else bundle.with_name(bundle.name[: mark.start()])


def _writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryDirectory(prefix=".recal-", dir=folder):
            return True
    except OSError:
        return False


def _run(command: list[str], started: Callable[[subprocess.Popen[bytes]], None]) -> str:
    nice = shutil.which("nice")
    try:
        process = subprocess.Popen(
            [nice, "-n", "10", *command] if nice else command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    except OSError as error:
        raise ConfigError("saae-export cannot be started.", str(error), "pip install saae") from error
    try:
        started(process)
        output, _ = process.communicate(timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        raise CalibrationError(
            "The calibration took too long.", f"{_PATIENCE:.0f} seconds", "give fewer images"
        ) from None
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    said = output.decode("utf-8", "replace").strip()[-_SAID:]
    if process.returncode != 0:
        raise CalibrationError("The calibration failed.", said or f"exit code {process.returncode}", "")
    return said
