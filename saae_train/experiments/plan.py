"""The experiments of the paper's Tables 2 to 5: lists them, and runs those that have no result yet.

Each result is a JSON file named by a hash of settings and images, so that an experiment that several tables share runs
once, and a stopped run resumes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from saae_runtime.errors import ConfigError, DataError, SaaeError, WeightsError
from saae_runtime.files import write_json

from ..config import FitConfig, default_layers
from ..data.category import find_category
from .experiment import Experiment, images_digest, run_experiment
from .jobs import Job, Jobs, Processes, Report, Task, Workers
from .paper import CLASSES, paper_table

__all__ = [
    "COLUMNS",
    "TABLES",
    "RunResult",
    "Plan",
    "PlannedRun",
    "ResultFolder",
    "columns_of",
    "known_categories",
    "measure",
    "run_plan",
]

TABLES = ("2", "3", "4", "5")

_VGG: Mapping[str, Any] = {"backbone": "vgg19", "layers": tuple(range(1, 13)), "input_size": (256, 256)}

COLUMNS: Mapping[str, Mapping[str, Any]] = {
    "Ours": {},
    "DFR": {**_VGG, "transformer": False},
    "w/o ViT": _VGG,  # section 4.3: VGG19 f1:12 at 256 x 256
    "w/o SAAE": {"transformer": False},  # section 4.3: the convolutional autoencoder
    "f1:4": {"layers": (0, 1, 2, 3, 4)},
    **{f"f{k}": {"layers": (0, k)} for k in range(1, 13)},  # section 4.4.1: each with the patch projection
}
"""Columns that can be run -> the fields of the configuration that each changes."""

_DEFAULT_COLUMNS = {"2": ("Ours",), "3": ("Ours",)}
_V_FROM = "f4"
"""Section 4.4.1: V by PCA for layer 4, and the same V for every other single layer."""


def columns_of(table: str, wanted: Sequence[str] = ()) -> tuple[str, ...]:
    """The columns of a table to run: those of `wanted` that it has, or by default the paper's own models."""
    own = tuple(name for name in paper_table(table).columns if name in COLUMNS)
    if wanted:
        return tuple(name for name in own if name in wanted)
    return _DEFAULT_COLUMNS.get(table, own)


@dataclass(frozen=True)
class PlannedRun:
    """An experiment to run for a column.

    Attributes:
        column: name of the column.
        experiment: the experiment.
        v_from: column whose V this experiment uses, filled in once that column has run; None: its own.
    """

    column: str
    experiment: Experiment
    v_from: str | None = None

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.experiment.category} {self.column}, seed {self.experiment.config.seed}"


@dataclass(frozen=True)
class RunResult:
    """Result of an experiment.

    Attributes:
        row: what was measured, see `run_experiment`; None if there is no result.
        reason: why there is none: "not run: ..." or "failed: ...".
    """

    row: Mapping[str, Any] | None = None
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """All experiments of the chosen tables.

    Attributes:
        tables: names of the tables.
        columns: columns to run, by table.
        categories: names, in the order of the rows.
        seeds: every experiment runs once per seed.
        runs: every experiment once, in an order in which a run comes before those that need its V.
    """

    tables: tuple[str, ...]
    columns: Mapping[str, tuple[str, ...]]
    categories: tuple[str, ...]
    seeds: tuple[int, ...]
    runs: tuple[PlannedRun, ...] = field(repr=False)

    @classmethod
    def make(
        cls,
        data: Path,
        categories: Sequence[str],
        config: FitConfig,
        *,
        tables: Sequence[str] = TABLES,
        columns: Sequence[str] = (),
        seeds: Sequence[int] = (),
        weights: str | None = None,
        device: str | None = None,
    ) -> Plan:
        """List the experiments.

        Args:
            data: folder of categories.
            categories: names.
            config: of the column "Ours"; the other columns change it.
            tables: any of "2" to "5".
            columns: only these of each table; empty: see `columns_of`.
            seeds: empty: the configuration's.
            weights, device: see `Experiment`.

        Raises:
            ConfigError: an unknown table or column.
        """
        for name in tables:
            if name not in TABLES:
                raise ConfigError(f"There is no Table {name}.", "", f"one of: {', '.join(TABLES)}, fps")
        for name in columns:
            if name not in COLUMNS:
                raise ConfigError(f"There is no column {name!r}.", "", f"one of: {', '.join(COLUMNS)}")
        chosen = {name: columns_of(name, columns) for name in tables}
        if columns and not any(chosen.values()):
            raise ConfigError(
                f"Table {' and '.join(tables)} has no column {', '.join(columns)}.",
                "",
                f"one of: {', '.join(columns_of(tables[0]))}",
            )
        base = config if config.layers else config.replace(layers=_layers(config.backbone))
        order = list(dict.fromkeys(name for names in chosen.values() for name in names))
        wants_v = base.latent is None
        single = [name for name in order if wants_v and name in _SINGLE and name != _V_FROM]
        if single and _V_FROM not in order:
            order.append(_V_FROM)
        order.sort(key=lambda name: name != _V_FROM)  # first the one that others need
        kept = tuple(seeds) or (base.seed,)
        runs = []
        for category in categories:
            for seed in kept:
                for name in order:
                    changed = base.replace(**COLUMNS[name], seed=seed)
                    experiment = Experiment(
                        str(data), category, changed, weights=_weights(weights, base, changed), device=device
                    )
                    runs.append(PlannedRun(name, experiment, _V_FROM if name in single else None))
        return cls(tuple(tables), chosen, tuple(categories), kept, tuple(runs))


_SINGLE = frozenset(f"f{k}" for k in range(1, 13))


def _weights(weights: str | None, base: FitConfig, changed: FitConfig) -> str | None:
    """A weights file applies to the configured backbone only; other backbones find their own weights."""
    named = weights in (None, "random", "cache", "hub", "packaged")
    return weights if named or changed.backbone == base.backbone else None


def _layers(backbone: str) -> tuple[int, ...]:
    layers, measured = default_layers(backbone, 0)
    if not measured:
        from ..model.vit import choose_layers  # needs torch and timm

        layers = choose_layers(backbone)[0]
    return layers


class ResultFolder:
    """The folder of result files.

    Args:
        root: `experiments/` in it holds the files, `work/` the state from which an unfinished experiment resumes. A
            result file in `cells/`, where earlier versions wrote, is read as well.
        data: folder of categories.
    """

    def __init__(self, root: Path, data: Path) -> None:
        self.root, self.data = root, data
        self._digests: dict[str, str] = {}

    def key(self, experiment: Experiment) -> str:
        """Hash of the experiment and its images. Raises DataError if the images cannot be listed."""
        if experiment.category not in self._digests:
            self._digests[experiment.category] = images_digest(find_category(self.data, experiment.category))
        return experiment.key(self._digests[experiment.category])

    def path(self, name: str) -> Path:
        """Where the result file of this name is written."""
        return self.root / "experiments" / name

    def read(self, name: str) -> Any:
        """Content of a result file. Raises OSError or ValueError if it is missing or not JSON."""
        path = self.path(name)
        return json.loads((path if path.exists() else self.root / "cells" / name).read_text(encoding="utf-8"))

    def name(self, experiment: Experiment) -> str:
        """Name of the experiment's result file."""
        return f"{experiment.category}-{self.key(experiment)[:16]}.json"

    def work(self, experiment: Experiment) -> Path:
        """Folder for features and state of an unfinished experiment."""
        return self.root / "work" / self.key(experiment)[:16]

    def find(self, experiment: Experiment) -> RunResult | None:
        """Result of an earlier run; None if the experiment never ran or its file is damaged."""
        try:
            record = self.read(self.name(experiment))
            if "row" in record:
                row = record["row"]
                row["overall"]["metrics"], row["facts"]["latent"]
                return RunResult(row)
            return RunResult(reason=str(record["reason"]))
        except (OSError, ValueError, KeyError, TypeError, DataError):
            return None

    def keep(self, experiment: Experiment, result: RunResult) -> None:
        """Write a result file."""
        record = (
            {"row": result.row}
            if result.row is not None
            else {"settings": experiment.settings(), "reason": result.reason}
        )
        write_json(self.path(self.name(experiment)), record)


def resolved(planned: PlannedRun, results: Mapping[tuple[str, str, int], RunResult]) -> Experiment | str:
    """The experiment with its V filled in, or the reason why V is unknown."""
    if planned.v_from is None:
        return planned.experiment
    source = results.get((planned.experiment.category, planned.v_from, planned.experiment.config.seed))
    if source is None or source.row is None:
        why = source.reason if source is not None else "not run"
        return f"not run: its V is that of {planned.v_from} ({why})"
    latent = int(source.row["facts"]["latent"])
    return replace(planned.experiment, config=planned.experiment.config.replace(latent=latent))


def measure(experiment: Experiment, report: Report) -> Mapping[str, Any]:
    """`run_experiment` of SAAE, as a task."""
    return run_experiment(experiment, report=report)


def run_plan(
    plan: Plan,
    folder: ResultFolder,
    *,
    run: Task = measure,
    workers: Workers | None = None,
    started: Callable[[PlannedRun], None] = lambda planned: None,
    report: Callable[[PlannedRun, str, int, int], None] = lambda planned, what, done, total: None,
    died: Callable[[Job, str], None] = lambda job, why: None,
    done: Callable[[PlannedRun, RunResult, bool], None] = lambda planned, result, fresh: None,
    results: dict[tuple[str, str, int], RunResult] | None = None,
) -> dict[tuple[str, str, int], RunResult]:
    """Run the experiments that have no result yet. A failure is recorded with its reason; the others go on.

    An experiment that needs another's V waits for it. If a backbone's weights are missing, its other experiments are
    not started and get the same reason.

    Args:
        plan: the experiments.
        folder: their result files.
        run: runs one experiment.
        workers: where; None: one fresh process after another. Closed at the end.
        started, report, done: called for each experiment; `fresh` is True if it ran now.
        died: called when an experiment is started again because its process died.
        results: filled as experiments finish, so that the caller keeps them if this is interrupted.

    Returns:
        (category, column, seed) -> result.
    """
    runner = _Runner(folder, run, started, report, done, {} if results is None else results)
    with Jobs(workers or Processes(), died) as jobs:
        waiting: Sequence[PlannedRun] = plan.runs
        while waiting or runner.running:
            waiting = runner.start(waiting, jobs)
            if runner.running:
                runner.collect(jobs)
    return runner.found


@dataclass
class _Runner:
    """State of `run_plan`: the results so far, running experiments, and why weights of a backbone are missing."""

    folder: ResultFolder
    task: Task
    started: Callable[[PlannedRun], None]
    report: Callable[[PlannedRun, str, int, int], None]
    done: Callable[[PlannedRun, RunResult, bool], None]
    found: dict[tuple[str, str, int], RunResult]
    running: dict[PlannedRun, Experiment] = field(default_factory=dict)
    missing: dict[tuple[str, str | None], str] = field(default_factory=dict)

    def start(self, waiting: Sequence[PlannedRun], jobs: Jobs) -> list[PlannedRun]:
        """Settle or start as many runs as possible; return those that have to wait."""
        left = []
        pending = {_place(planned) for planned in (*waiting, *self.running)}
        for planned in waiting:
            if not self._take(planned, jobs, pending):
                left.append(planned)
            elif planned not in self.running:
                pending.discard(_place(planned))
        return left

    def collect(self, jobs: Jobs) -> None:
        """Wait for a running experiment and keep its result."""
        planned, outcome = jobs.next()
        experiment = self.running.pop(planned)
        result = _result(outcome)
        self.folder.keep(experiment, result)
        if result.row is not None:
            shutil.rmtree(self.folder.work(experiment), ignore_errors=True)
        if result.reason.startswith(_NO_WEIGHTS):
            self.missing[experiment.config.backbone, experiment.weights] = result.reason
        self._settle(planned, result, True)

    def _take(self, planned: PlannedRun, jobs: Jobs, pending: set[tuple[str, str, int]]) -> bool:
        """Settle or start a run; False if it has to wait."""
        if not jobs.has_room or _source(planned) in pending:
            return False
        experiment = resolved(planned, self.found)
        if isinstance(experiment, str):
            self._settle(planned, RunResult(reason=experiment), False)
            return True
        if experiment in self.running.values():  # the same under another column
            return False
        earlier = self.folder.find(experiment)
        backbone = (experiment.config.backbone, experiment.weights)
        if earlier is not None and earlier.row is not None:
            self._settle(planned, earlier, False)
        elif backbone in self.missing:
            self._settle(planned, RunResult(reason=self.missing[backbone]), False)
        else:
            self._begin(planned, experiment, jobs)
        return True

    def _begin(self, planned: PlannedRun, experiment: Experiment, jobs: Jobs) -> None:
        self.started(planned)
        try:
            work = self.folder.work(experiment)
        except DataError as error:  # without a list of images there is no key and no result file
            self._settle(planned, RunResult(reason=f"failed: {_sentence(error)}"), True)
            return
        self.running[planned] = experiment
        job = Job(planned.title, self.task, replace(experiment, cache=str(work)))
        jobs.begin(planned, job, partial(self.report, planned))

    def _settle(self, planned: PlannedRun, result: RunResult, fresh: bool) -> None:
        self.found[_place(planned)] = result
        self.done(planned, result, fresh)


_NO_WEIGHTS = "not run: no weights"


def _place(planned: PlannedRun) -> tuple[str, str, int]:
    return planned.experiment.category, planned.column, planned.experiment.config.seed


def _source(planned: PlannedRun) -> tuple[str, str | None, int]:
    """The key of the run whose V it uses."""
    return planned.experiment.category, planned.v_from, planned.experiment.config.seed


def _result(outcome: Mapping[str, Any] | SaaeError) -> RunResult:
    if isinstance(outcome, WeightsError):
        return RunResult(reason=f"{_NO_WEIGHTS}: {_sentence(outcome)}")
    if isinstance(outcome, SaaeError):
        return RunResult(reason=f"failed: {_sentence(outcome)}")
    return RunResult(outcome)


def _sentence(error: SaaeError) -> str:
    return " ".join(" ".join(part for part in (error.what, error.why) if part).split())


def known_categories(names: Iterable[str]) -> tuple[str, ...]:
    """Categories in the paper's order, then others by name."""
    order = {name: index for index, name in enumerate(CLASSES)}
    return tuple(sorted(dict.fromkeys(names), key=lambda name: (order.get(name, len(order)), name)))
