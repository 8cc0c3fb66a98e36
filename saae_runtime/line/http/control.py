"""Changes by users while the line runs: recipes, thresholds, bundles, overrides; logged and saved."""

from __future__ import annotations

import queue
import subprocess
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ConfigError, DataError, SaaeError, StorageError, shown
from ...images import read_image
from ...meter import one_line
from ..audit import AuditLog
from ..in_force import InForce
from ..overrides import Override, Overrides
from ..part import Choice, Verdict, now, stamp
from ..recalibrate import changed_parts, good_parts, recalibrate, versions
from ..recipes import Recipe
from ..service import Line
from ..station import Station
from .access import Who
from .options import HttpOptions
from .recent import Recent

__all__ = ["Control"]

_CHANGED_SHOWN = 200
_LAST_CHOICES = 0.5  # seconds at the end for writing chosen recipes
_HIGHEST = 20.0  # times the highest threshold in the bundle's table: the limit of what users may set
SERVICE = Who("saae-line", "engineer")


class Control:
    """Applies every change: first the audit log, then the file that keeps it, then the change.

    A change that cannot be saved is refused: the recipe before stays active, and the audit log says so, as far as it
    can be written.

    Changes of a recipe (threshold, rate, bundle) apply again after a restart, as long as the recipe's table in
    line.toml is unchanged: an edit of line.toml takes precedence.

    Args:
        line: the line.
        options: `[http]`.
        recent: the latest parts.

    Raises:
        ConfigError: another process uses the folder.
        StorageError: it cannot be written.
    """

    def __init__(self, line: Line, options: HttpOptions, recent: Recent) -> None:
        self._line, self._recent = line, recent
        self._folder = line.config.place(options.folder)
        self._in_force = InForce(self._folder / "in-force.json", line.config)
        self._lock = threading.Lock()  # one change at a time
        self._job_lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self.job: dict[str, Any] = {"state": "none"}
        self.audit = AuditLog(self._folder / "audit.jsonl", self._copy)
        if self.audit.failed:
            line.meter.fail(self.audit.failed)
        self._choices: queue.SimpleQueue[tuple[str, str, Choice] | None] = queue.SimpleQueue()
        self._choice_writer = threading.Thread(target=self._write_choices, name="audit", daemon=True)
        try:
            self.overrides = Overrides(self._folder, options.pool_mb)
        except BaseException:
            self.audit.close()
            raise
        try:
            self._restore()
        except BaseException:
            self.close()
            raise
        self._choice_writer.start()
        line.listen_to_choices(self._chose)

    # --- recipes ---

    def switch(self, who: Who, station: str, recipe: str) -> dict[str, Any]:
        """Activate a recipe at a station, for all later parts.

        Raises:
            DataError: no such station. ConfigError: no such recipe there. StorageError: it could not be logged.
        """
        found = self._station(station)
        with self._lock:
            if recipe not in found.config.recipes:
                found.switch(recipe)  # raises the right error
            self._write(who, "recipe", {"station": station, "before": found.recipe, "after": recipe})
            now_in_force = found.switch(recipe)
        return {"station": station, "recipe": now_in_force.name, "version": now_in_force.version}

    def threshold(
        self, recipe: str, false_alarms: float | None = None, threshold: float | None = None, last: int = 200
    ) -> dict[str, Any]:
        """What another image threshold would have decided on the latest parts of a recipe; changes nothing.

        Raises:
            ConfigError: no such recipe, or an invalid rate.
        """
        found = self._recipe(recipe)
        wanted = found.threshold
        if threshold is not None:
            wanted = threshold
        elif false_alarms is not None:
            wanted = found.table.at(false_alarms)
        records = [item for item in self._recent.records(last, recipe=recipe) if item["bundle"] == found.bundle]
        judged, changed = changed_parts(records, wanted)
        scores = [item["score"] for item in records if item["score"] is not None]
        return {
            "recipe": recipe,
            "version": found.version,
            "threshold": found.threshold,
            "false_alarms": found.config.false_alarms if found.config.threshold is None else None,
            "default_false_alarms": found.table.default_fpr,
            "wanted": wanted,
            "judged": judged,
            "ng": sum(score > found.threshold for score in scores),
            "would_be_ng": sum(score > wanted for score in scores),
            "changed": changed[:_CHANGED_SHOWN],
        }

    def set_threshold(
        self, who: Who, recipe: str, false_alarms: float | None, threshold: float | None, version: int | None
    ) -> dict[str, Any]:
        """Change a recipe's image threshold, by rate or by value.

        Raises:
            ConfigError: no such recipe, not exactly one of rate and value, an impossible value, or `version` is out of
                date because somebody else has changed the recipe.
        """
        if (false_alarms is None) == (threshold is None):
            raise ConfigError("Give `false_alarms` or `threshold`.", "Exactly one of them sets the threshold.", "")
        with self._lock:
            found = self._current(recipe, version)
            after = found.table.at(false_alarms) if threshold is None else threshold
            highest = _HIGHEST * max(found.table.threshold[0], 0.0)
            if not 0.0 <= after <= highest:
                raise ConfigError(
                    f"A threshold of {after:g} is not possible for recipe {recipe}.",
                    f"Its good parts score up to {found.table.threshold[0]:.4g}; above {highest:.4g} nothing is NG.",
                    "set a false alarm rate instead",
                )
            changes = {"false_alarms": false_alarms} if threshold is None else {"threshold": threshold}
            data = {"recipe": recipe, "before": found.threshold, "after": after, **changes}
            made = self._change(who, "threshold", recipe, changes, data)
        return {"recipe": recipe, "threshold": made.threshold, "version": made.version}

    def bundles(self, recipe: str) -> dict[str, Any]:
        """The versions of a recipe's bundle, and the active one.

        Raises:
            ConfigError: no such recipe.
        """
        found = self._recipe(recipe)
        bundle = self._bundle(found)
        return {"recipe": recipe, "bundle": bundle.name, "versions": [path.name for path in versions(bundle)]}

    def set_bundle(self, who: Who, recipe: str, bundle: str, version: int | None) -> dict[str, Any]:
        """Activate another version of a recipe's bundle, without a stop.

        Args:
            who: the user.
            recipe: name of the recipe.
            bundle: one of the names that `bundles` lists; no other path is read.
            version: see `set_threshold`.

        Raises:
            ConfigError: no such recipe or version. BundleError: it cannot be used; nothing changes.
        """
        with self._lock:
            found = self._current(recipe, version)
            before = self._bundle(found)
            there = {path.name: path for path in versions(before)}
            if bundle not in there:
                raise ConfigError(
                    f"Recipe {recipe} has no bundle {shown(bundle)}.", "", f"one of {', '.join(there) or 'none'}"
                )
            written = str(Path(found.config.bundle).with_name(bundle))
            data = {"recipe": recipe, "before": before.name, "after": bundle, "digest_before": found.bundle}
            made = self._change(who, "bundle", recipe, {"bundle": written}, data)
        return {"recipe": recipe, "bundle": bundle, "digest": made.bundle, "threshold": made.threshold} | {
            "version": made.version
        }

    def _chose(self, station: Station, choice: Choice) -> None:
        """Queue a recipe change by a PLC or a trigger's client for the audit log, without waiting for the disk."""
        self._choices.put((station.name, station.recipe, choice))

    def _write_choices(self) -> None:
        while (item := self._choices.get()) is not None:
            station, own, choice = item
            data = {"station": station, "before": choice.before or own, "after": choice.after or own}
            try:
                self.audit.append(choice.who, choice.role, "recipe", {**data, "asked": stamp(choice.time)})
            except Exception as error:  # the parts' records still name their recipe
                self._line.meter.fail(error)

    # --- overrides ---

    def override(self, who: Who, key: str, verdict: Verdict, note: str) -> Override:
        """Override a part's verdict.

        Raises:
            DataError: the part is not among the latest parts. ConfigError: it is overridden already.
        """
        record = self._recent.by_key(key)
        if record is None:
            raise DataError(
                f"Part {shown(key, 200)} is not among the latest parts.",
                f"The service remembers the last {len(self._recent.records(10**6))} parts since it started.",
                "GET /v1/parts lists them",
            )
        frame, why = self._frame(record)
        with self._lock:
            made = self.overrides.mark(record, verdict, who.name, note, frame, why)
            try:
                self._write(who, "override", {"key": key, "was": made.was, "verdict": made.verdict, "note": note})
            except SaaeError:
                with suppress(SaaeError):
                    self.overrides.undo(key, SERVICE.name)
                raise
        self._tell("override", made)
        return made

    def undo(self, who: Who, key: str) -> Override:
        """Undo an override.

        Raises:
            DataError: this part has no override.
        """
        with self._lock:
            if self.overrides.get(key) is None:
                raise DataError(f"There is no override of {shown(key, 200)}.", "", "GET /v1/overrides lists them")
            self._write(who, "override undone", {"key": key})
            made = self.overrides.undo(key, who.name)
        self._tell("override-undone", made)
        return made

    # --- recalibration ---

    def start_recalibration(self, who: Who, recipe: str, dry_run: bool, archive: bool) -> dict[str, Any]:
        """Compute thresholds from the pool, on a separate thread and process; `job` tells the progress.

        Args:
            who: the user.
            recipe: name of the recipe.
            dry_run: only tell what would change.
            archive: whether to use the archive's OK images as well as the confirmed ones; see `good_parts`.

        Raises:
            ConfigError: no such recipe, or a recalibration is running.
        """
        found = self._recipe(recipe)
        with self._job_lock:
            if self._closed or self.job["state"] == "running":
                raise ConfigError("A recalibration is running.", "", "GET /v1/recalibration shows its progress")
            self.job = {"state": "running", "recipe": recipe, "dry_run": dry_run, "since": stamp(now())}
            started = dict(self.job)
        if not dry_run:
            try:
                self._write(who, "recalibration", {"recipe": recipe, "bundle": found.bundle})
            except SaaeError:
                self.job = {"state": "none"}
                raise
        job = threading.Thread(
            target=self._recalibrate, args=(who, found, dry_run, archive), name="recalibrate", daemon=True
        )
        job.start()
        return started

    def _recalibrate(self, who: Who, recipe: Recipe, dry_run: bool, archive: bool) -> None:
        base = {"recipe": recipe.name, "dry_run": dry_run}
        try:
            parts = good_parts(self._line.config, self._folder, recipe.name, archive)
            found = recalibrate(self._bundle(recipe), recipe, parts, dry_run=dry_run, started=self._has_started)
            records = [
                item for item in self._recent.records(10**6, recipe=recipe.name) if item["bundle"] == recipe.bundle
            ]
            judged, changed = changed_parts(records, found.after)
            done = {"state": "done", **base, **found.to_dict(), "judged": judged, "changes": len(changed)}
            done["changed"] = changed[:_CHANGED_SHOWN]
            if found.written is not None:
                self._write(who, "bundle written", {"recipe": recipe.name, "bundle": found.written.name})
        except Exception as error:
            words = (error.what, error.why, error.cure) if isinstance(error, SaaeError) else (one_line(error), "", "")
            done = {"state": "failed", **base, **dict(zip(("what", "why", "cure"), words, strict=True))}
        with self._job_lock:
            self._process = None
            self.job = {**done, "until": stamp(now())}

    def _has_started(self, process: subprocess.Popen[bytes]) -> None:
        with self._job_lock:
            self._process = process
            if self._closed:
                process.kill()

    def close(self) -> None:
        """End a recalibration and close the files. May be called twice."""
        with self._job_lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()
        self._line.listen_to_choices(None)
        if self._choice_writer.is_alive():
            self._choices.put(None)
            self._choice_writer.join(_LAST_CHOICES)
        self.audit.close()
        self.overrides.close()

    # --- inside ---

    def _station(self, name: str) -> Any:
        found = self._line.stations.get(name)
        if found is None:
            raise DataError(f"No station is named {shown(name)}.", "", f"there is {', '.join(self._line.stations)}")
        return found

    def _recipe(self, name: str) -> Recipe:
        return self._line.book.get(name)

    def _current(self, name: str, version: int | None) -> Recipe:
        found = self._recipe(name)
        if version is not None and version != found.version:
            raise ConfigError(
                f"Recipe {name} has changed in the meantime.",
                f"It is at version {found.version}, not {version}.",
                "reload it, then change it",
            )
        return found

    def _bundle(self, recipe: Recipe) -> Path:
        return self._line.config.place(recipe.config.bundle)

    def _change(self, who: Who, what: str, recipe: str, changes: Mapping[str, Any], data: Mapping[str, Any]) -> Recipe:
        """Audit log, file, change; with the lock held."""
        self._write(who, what, data)
        book = self._line.book
        try:
            before, after = book.prepare(recipe, **changes)
            self._in_force.keep(after.config, who.name)
            try:
                book.activate(before, after)
            except SaaeError:
                self._in_force.keep(book.get(recipe).config, who.name)
                raise
        except SaaeError as error:
            try:
                self._write(who, f"{what} refused", {"recipe": recipe, "why": error.what})
            except StorageError as unsaid:
                self._line.meter.fail(unsaid)
            raise
        return after

    def _write(self, who: Who, what: str, data: Mapping[str, Any]) -> None:
        self.audit.append(who.name, who.role, what, data)

    def _copy(self, entry: Mapping[str, Any]) -> None:
        with suppress(SaaeError):  # it is in the log already
            self._line.event("audit", None, {key: value for key, value in entry.items() if key != "time"})

    def _tell(self, kind: str, made: Override) -> None:
        with suppress(SaaeError):
            data = {f"part_{key}" if key in ("time", "station", "key") else key: v for key, v in asdict(made).items()}
            self._line.event(kind, made.station, data)

    def _frame(self, record: Mapping[str, Any]) -> tuple[NDArray[np.uint8] | None, str]:
        """A part's frame, from memory or the archive, or why there is none."""
        seen = self._recent.seen(record["number"])
        if seen is not None:
            return seen.frame, ""
        kept = self._line.config.archive
        if kept is None or record["picture"] is None:
            return None, "its frame is no longer in memory, and not in the archive"
        if kept.format != "png":
            return None, "the archive has it only as JPEG, which differs from what the model saw"
        try:
            return read_image(self._line.config.place(kept.folder) / record["picture"]), ""
        except SaaeError as error:
            return None, one_line(error)

    def _restore(self) -> None:
        """Apply saved changes again; report and skip those that do not apply."""
        changes, problems = self._in_force.read()
        for name, change in changes.items():
            try:
                _, after = self._line.book.change(name, **change)
            except SaaeError as error:
                problems[name] = error.what
                continue
            data = {"recipe": name, "changes": change, "threshold": after.threshold}
            self._note("change in force again", data)
        for name, why in problems.items():
            self._line.meter.fail(f"a change of recipe {name} was dropped: {why}")
            self._note("change dropped", {"recipe": name, "why": why})

    def _note(self, what: str, data: Mapping[str, Any]) -> None:
        """An entry of the service itself; a full disk does not keep the line from starting."""
        try:
            self._write(SERVICE, what, data)
        except StorageError as error:
            self._line.meter.fail(error)
