"""Fits many categories, each in its own job; one that has its checkpoint is not fitted again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saae_runtime.errors import SaaeError, StorageError
from saae_runtime.files import canonical_json, sha256_bytes, write_json
from saae_runtime.progress import Progress

from ..data.category import find_category
from ..data.check import check
from ..data.split import split_for
from .experiment import Experiment, images_digest
from .jobs import Job, Jobs, Report, Workers

__all__ = ["CategoryFit", "fit_category", "fit_many", "kept_fit"]

_RECORD = "fit.json"


@dataclass(frozen=True)
class CategoryFit:
    """A category to fit.

    Attributes:
        experiment: the category and the configuration.
        out: folder of all categories; the checkpoint is `out/CATEGORY/checkpoint`, beside it the record `fit.json`.
        texture: a texture or an object; None: by the category's name.
    """

    experiment: Experiment
    out: str
    texture: bool | None = None

    @property
    def folder(self) -> Path:
        """Folder of the category."""
        return Path(self.out) / self.experiment.category

    def key(self) -> str:
        """Hex sha256 of everything that the checkpoint depends on. Raises DataError if the images cannot be listed."""
        found = find_category(self.experiment.data, self.experiment.category)
        told = {"experiment": self.experiment.key(images_digest(found)), "texture": self.texture}
        return sha256_bytes(canonical_json(told).encode())


def kept_fit(wanted: CategoryFit) -> dict[str, Any] | None:
    """The record of a finished fit of the same images and settings; None if there is none.

    Raises:
        DataError: the images cannot be listed.
    """
    try:
        record = json.loads((wanted.folder / _RECORD).read_text(encoding="utf-8"))
        is_whole = (wanted.folder / "checkpoint" / "config.json").is_file()
    except (OSError, ValueError):
        return None
    return record if is_whole and isinstance(record, dict) and record.get("key") == wanted.key() else None


def fit_category(wanted: CategoryFit, report: Report) -> Mapping[str, Any]:
    """Fit a category in this process and write its checkpoint, then its record, which is returned.

    Raises:
        SaaeError: images, weights, configuration or fit are invalid, or the checkpoint cannot be written.
    """
    # Imported late: it loads PyTorch, which each job's process sets to its own number of threads.
    from ..fitting.backbone import backbone_for
    from ..fitting.fit import fit
    from ..fitting.loop import Reporter
    from ..model.checkpoint import check_target, save_checkpoint

    def under(what: str) -> Progress:
        return lambda done, total, text="": report(what, done, total)

    started = time.monotonic()
    experiment, config = wanted.experiment, wanted.experiment.config
    key = wanted.key()
    target = check_target(wanted.folder / "checkpoint")
    found = find_category(experiment.data, experiment.category).with_white_level(config.white_level)
    checked = check(found, progress=under("check the images"))
    checked.raise_if_bad()
    split = split_for(config, found)
    backbone = backbone_for(config, split.fitting, experiment.weights)
    checkpoint = fit(
        backbone,
        split.fitting,
        config,
        found.name,
        device=experiment.device,
        cache=None if experiment.cache is None else Path(experiment.cache),
        texture=wanted.texture,
        reporter=Reporter(
            features=under("features"),
            steps=lambda done, total, value: report(f"loss {value:.4f}", done, total),
            memory=under("memory"),
        ),
        held_out=split.held_out,
        synthetic=found.synthetic,
    )
    save_checkpoint(target, checkpoint)
    record = {
        "key": key,
        **experiment.settings(),
        "images": len(split.fitting),
        "weights_source": backbone.weights.source,
        "warnings": [str(warning) for warning in checked.warnings],
        "seconds": round(time.monotonic() - started, 1),
        "tools": dict(checkpoint.record.tools),
    }
    write_json(wanted.folder / _RECORD, record)
    return record


def fit_many(
    fits: Sequence[CategoryFit],
    workers: Workers,
    *,
    started: Callable[[str], None] = lambda category: None,
    report: Callable[[str, str, int, int], None] = lambda category, what, done, total: None,
    died: Callable[[Job, str], None] = lambda job, why: None,
    done: Callable[[str, Mapping[str, Any] | SaaeError, bool], None] = lambda category, outcome, fresh: None,
) -> dict[str, Mapping[str, Any] | SaaeError]:
    """Fit the categories that have no checkpoint yet. One that fails does not stop the others.

    Args:
        fits: one for each category.
        workers: where; closed at the end.
        started, report, done: called for each category; `fresh` is True if it was fitted now.
        died: called when a fit is started again because its process died.

    Returns:
        Category -> its record, or why it failed.
    """
    found: dict[str, Mapping[str, Any] | SaaeError] = {}
    left = list(fits)[::-1]
    by_name = {wanted.experiment.category: wanted for wanted in fits}
    with Jobs(workers, died) as jobs:
        while left or jobs.keys:
            if left and jobs.has_room:
                wanted = left.pop()
                name = wanted.experiment.category
                try:
                    kept = kept_fit(wanted)
                except SaaeError as error:
                    found[name] = error
                    done(name, error, True)
                    continue
                if kept is not None:
                    found[name] = kept
                    done(name, kept, False)
                    continue
                started(name)
                jobs.begin(name, Job(f"the fit of {name}", fit_category, wanted), _of(name, report))
                continue
            name, outcome = jobs.next()
            if not isinstance(outcome, SaaeError) and kept_fit(by_name[name]) is None:
                outcome = StorageError(
                    f"The checkpoint of {name} is not in {by_name[name].folder}.",
                    "It was written on another machine, to a folder that this one does not see, or removed since.",
                    "a folder that all machines of the cluster share, with --out",
                )
            found[name] = outcome
            done(name, outcome, True)
    return found


def _of(name: str, report: Callable[[str, str, int, int], None]) -> Report:
    return lambda what, done, total: report(name, what, done, total)
