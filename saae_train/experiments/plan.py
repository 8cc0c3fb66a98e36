"""The paper's Tables 2 to 5 as cells to run: which there are, what each changes, and running those that are missing.

Results lie in one folder, one JSON file a cell, named by what shapes the numbers (settings and images), so that a cell
that several tables share is run once, and a stopped run goes on where it was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from saae_runtime.errors import ConfigError, DataError, SaaeError, WeightsError
from saae_runtime.files import write_json

from ..config import FitConfig, default_layers
from ..data.category import find_category
from .experiment import Cell, Report, images_digest, run_fresh
from .paper import CLASSES, paper_table

__all__ = ["COLUMNS", "TABLES", "Outcome", "Plan", "Planned", "Results", "columns_of", "known_categories", "run_plan"]

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
"""Columns that can be run, and the fields of the configuration that each changes."""

_DEFAULT_COLUMNS = {"2": ("Ours",), "3": ("Ours",)}
_V_FROM = "f4"
"""Section 4.4.1: V by PCA for layer 4, and the same V for every other single layer."""


def columns_of(table: str, wanted: Sequence[str] = ()) -> tuple[str, ...]:
    """The columns of a table that are run: those `wanted` that it has, or by default the paper's own models."""
    own = tuple(name for name in paper_table(table).columns if name in COLUMNS)
    if wanted:
        return tuple(name for name in own if name in wanted)
    return _DEFAULT_COLUMNS.get(table, own)


@dataclass(frozen=True)
class Planned:
    """A cell to run. `v_from`: the column whose V this one takes, as soon as that is known."""

    column: str
    cell: Cell
    v_from: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: its row, or the reason why there is none ("not run: ...", "failed: ...")."""

    row: Mapping[str, Any] | None = None
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """All cells of some tables.

    Attributes:
        tables: names of the tables.
        columns: those that are run, by table.
        categories: which, in the order of the rows.
        seeds: each cell is run with each of them.
        cells: every cell once, one whose V another needs before that one.
    """

    tables: tuple[str, ...]
    columns: Mapping[str, tuple[str, ...]]
    categories: tuple[str, ...]
    seeds: tuple[int, ...]
    cells: tuple[Planned, ...] = field(repr=False)

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
        """Lists the cells.

        Args:
            data: folder of categories.
            categories: which.
            config: of the column "Ours"; the other columns change it.
            tables: of "2" to "5".
            columns: only these of each table; none: see `columns_of`.
            seeds: none: the configuration's.
            weights, device: see `Cell`.

        Raises:
            ConfigError: a table or column that there is not.
        """
        for name in tables:
            if name not in TABLES:
                raise ConfigError(f"There is no Table {name} to be made.", "", f"one of: {', '.join(TABLES)}, fps")
        for name in columns:
            if name not in COLUMNS:
                raise ConfigError(f"There is no column {name!r} to be run.", "", f"one of: {', '.join(COLUMNS)}")
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
        order.sort(key=lambda name: name != _V_FROM)  # first what others wait for
        kept = tuple(seeds) or (base.seed,)
        cells = []
        for category in categories:
            for seed in kept:
                for name in order:
                    changed = base.replace(**COLUMNS[name], seed=seed)
                    cell = Cell(str(data), category, changed, weights=_weights(weights, base, changed), device=device)
                    cells.append(Planned(name, cell, _V_FROM if name in single else None))
        return cls(tuple(tables), chosen, tuple(categories), kept, tuple(cells))


_SINGLE = frozenset(f"f{k}" for k in range(1, 13))


def _weights(weights: str | None, base: FitConfig, changed: FitConfig) -> str | None:
    """A file of weights belongs to the backbone that was asked for; another backbone finds its own."""
    named = weights in (None, "random", "cache", "hub", "packaged")
    return weights if named or changed.backbone == base.backbone else None


def _layers(backbone: str) -> tuple[int, ...]:
    layers, measured = default_layers(backbone, 0)
    if not measured:
        from ..model.vit import choose_layers  # needs torch and timm

        layers = choose_layers(backbone)[0]
    return layers


class Results:
    """The folder of result files.

    Args:
        folder: `cells/` in it holds the files, `work/` what an unfinished cell goes on from.
        data: folder of categories.
    """

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data
        self._digests: dict[str, str] = {}

    def key(self, cell: Cell) -> str:
        """Of a cell and the images it would see. Raises DataError when these cannot be listed."""
        if cell.category not in self._digests:
            self._digests[cell.category] = images_digest(find_category(self.data, cell.category))
        return cell.key(self._digests[cell.category])

    def path(self, cell: Cell) -> Path:
        """The cell's result file."""
        return self.folder / "cells" / f"{cell.category}-{self.key(cell)[:16]}.json"

    def work(self, cell: Cell) -> Path:
        """Features and state of a cell under way."""
        return self.folder / "work" / self.key(cell)[:16]

    def find(self, cell: Cell) -> Outcome | None:
        """What became of a cell in an earlier run; None when it was never run, or its file is damaged."""
        try:
            record = json.loads(self.path(cell).read_text(encoding="utf-8"))
            if "row" in record:
                row = record["row"]
                row["overall"]["metrics"], row["facts"]["latent"]
                return Outcome(row)
            return Outcome(reason=str(record["reason"]))
        except (OSError, ValueError, KeyError, TypeError, DataError):
            return None

    def keep(self, cell: Cell, outcome: Outcome) -> None:
        """Writes a result file."""
        told = (
            {"row": outcome.row} if outcome.row is not None else {"settings": cell.settings(), "reason": outcome.reason}
        )
        write_json(self.path(cell), told)


Runner = Callable[[Cell, Report], Mapping[str, Any]]


def _run(cell: Cell, report: Report) -> Mapping[str, Any]:
    return run_fresh(cell, report=report)


def resolved(planned: Planned, outcomes: Mapping[tuple[str, str, int], Outcome]) -> Cell | str:
    """The cell with its V filled in, or the reason why that cannot be had."""
    if planned.v_from is None:
        return planned.cell
    source = outcomes.get((planned.cell.category, planned.v_from, planned.cell.config.seed))
    if source is None or source.row is None:
        why = source.reason if source is not None else "not run"
        return f"not run: its V is that of {planned.v_from} ({why})"
    latent = int(source.row["facts"]["latent"])
    return replace(planned.cell, config=planned.cell.config.replace(latent=latent))


def run_plan(
    plan: Plan,
    results: Results,
    *,
    run: Runner = _run,
    started: Callable[[Planned], None] = lambda planned: None,
    report: Report = lambda what, done, total: None,
    done: Callable[[Planned, Outcome, bool], None] = lambda planned, outcome, fresh: None,
    outcomes: dict[tuple[str, str, int], Outcome] | None = None,
) -> dict[tuple[str, str, int], Outcome]:
    """Runs what is missing. A cell that fails is recorded with its reason; the others go on.

    A backbone whose weights are missing is asked for once; its other cells get the same reason.

    Args:
        plan: the cells.
        results: where they are kept.
        run: what runs one cell.
        started, report, done: told about each cell; `fresh` says whether it was run now.
        outcomes: filled while it goes, so that a caller has what is finished when this is stopped.

    Returns:
        (category, column, seed) -> what became of it.
    """
    found = {} if outcomes is None else outcomes
    missing: dict[tuple[str, str | None], str] = {}
    for planned in plan.cells:
        place = (planned.cell.category, planned.column, planned.cell.config.seed)
        cell = resolved(planned, found)
        fresh = False
        if isinstance(cell, str):
            outcome = Outcome(reason=cell)
        else:
            earlier = results.find(cell)
            backbone = (cell.config.backbone, cell.weights)
            if earlier is not None and earlier.row is not None:
                outcome = earlier
            elif backbone in missing:
                outcome = Outcome(reason=missing[backbone])
            else:
                started(planned)
                fresh = True
                outcome = _one(cell, results, run, report)
                if outcome.reason.startswith(_NO_WEIGHTS):
                    missing[backbone] = outcome.reason
        found[place] = outcome
        done(planned, outcome, fresh)
    return found


_NO_WEIGHTS = "not run: no weights"


def _one(cell: Cell, results: Results, run: Runner, report: Report) -> Outcome:
    try:
        work = results.work(cell)
        outcome = Outcome(run(replace(cell, cache=str(work)), report))
    except WeightsError as error:
        outcome = Outcome(reason=f"{_NO_WEIGHTS}: {_sentence(error)}")
    except SaaeError as error:
        outcome = Outcome(reason=f"failed: {_sentence(error)}")
    try:
        results.keep(cell, outcome)
    except DataError:
        return outcome  # images that cannot be listed have no file to be kept in
    if outcome.row is not None:
        shutil.rmtree(work, ignore_errors=True)
    return outcome


def _sentence(error: SaaeError) -> str:
    return " ".join(" ".join(part for part in (error.what, error.why) if part).split())


def known_categories(names: Iterable[str]) -> tuple[str, ...]:
    """Categories in the paper's order, others behind them by name."""
    order = {name: index for index, name in enumerate(CLASSES)}
    return tuple(sorted(dict.fromkeys(names), key=lambda name: (order.get(name, len(order)), name)))
