"""Builds the paper's tables with our values: means, differences, and how the set-ups differ."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..config import FitConfig, default_layers, preset
from .paper import CLASSES, MEANS, PaperTable, paper_fps, paper_fps_title, paper_mean, paper_table
from .plan import COLUMNS, Plan, RunResult

__all__ = [
    "Figure",
    "Table",
    "csv_text",
    "differences",
    "fps_table",
    "make_tables",
    "markdown",
    "measured_with",
    "versions_text",
]

RunResults = Mapping[tuple[str, str, int], RunResult]

_PAPER_IMAGES = (700, 1024)
"""Sides of MVTec AD's images in pixels (section 4.1.1)."""

_SKIPPED = frozenset({"preset", "seed", "steps", "epochs", "batch", "held_out"})
_WORDS = {
    "input_size": "input",
    "keep": "share of the variance that V keeps",
    "latent": "V",
    "latent_limit": "limit of V",
}


@dataclass(frozen=True)
class Figure:
    """One number of a table beside the paper's.

    Attributes:
        table, row, column: its position in the paper.
        unit: "%" or "frames/s".
        ours: measured here, mean over the seeds; None with a `reason`.
        spread: standard deviation over the seeds; None for one seed.
        seeds: number of seeds.
        paper: the published figure (a mean is over the same classes); None if there is none.
        reason: why `ours` is None.
        note: remark on either number.
    """

    table: str
    row: str
    column: str
    unit: str
    ours: float | None
    spread: float | None
    seeds: int
    paper: float | None
    reason: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        if self.ours is None and not self.reason:
            raise ValueError("a Figure without a value must give its reason")
        if self.ours is not None and not np.isfinite(self.ours):
            raise ValueError(f"a Figure must be finite, got {self.ours}")

    @property
    def difference(self) -> float | None:
        """Ours minus the paper's."""
        return None if self.ours is None or self.paper is None else self.ours - self.paper

    def to_json(self) -> dict[str, Any]:
        """All fields and `difference`, as JSON values."""
        return {**asdict(self), "difference": None if self.difference is None else round(self.difference, 4)}


@dataclass(frozen=True)
class Table:
    """A table to print.

    Attributes:
        name, title: the paper's.
        rows, columns: names, in order.
        figures: by (row, column).
        also: the paper's other columns, by row.
        setup: how the set-up differs from the paper's, and in which experiments.
    """

    name: str
    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    figures: Mapping[tuple[str, str], Figure]
    also: Mapping[str, Mapping[str, float]]
    setup: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "table": self.name,
            "title": self.title,
            "entries": [figure.to_json() for figure in self.figures.values()],
            "setup": list(self.setup),
        }

    def grid(self, also: bool = False) -> tuple[list[str], list[list[str]], list[str]]:
        """Headings, rows of text, and the numbered notes that the rows refer to.

        With one or two columns, the paper's figure and the difference have their own columns, else brackets.

        Args:
            also: include the paper's other columns.
        """
        apart = len(self.columns) <= 2
        extra = list(next(iter(self.also.values()), {})) if also else []
        heads = [self.rows_are]
        for name in self.columns:
            heads += [f"{name}, here", "paper", "difference"] if apart else [name]
        notes: list[str] = []
        lines = []
        for row in self.rows:
            line = [row]
            for column in self.columns:
                figure = self.figures[row, column]
                here = _shown(figure) + _marks(figure, notes)
                paper = "-" if figure.paper is None else f"{figure.paper:.1f}"
                change = "-" if figure.difference is None else f"{figure.difference:+.1f}"
                line += (
                    [here, paper, change]
                    if apart
                    else [here if figure.paper is None else f"{here} ({paper}, {change})"]
                )
            line += [
                f"{value:.1f}" if (value := self.also.get(row, {}).get(name)) is not None else "-" for name in extra
            ]
            lines.append(line)
        return heads + [f"{name} (paper)" for name in extra], lines, notes

    @property
    def rows_are(self) -> str:
        return "model" if self.name == "fps" else "class"


def _shown(figure: Figure) -> str:
    if figure.ours is None:
        return figure.reason.partition(":")[0] or "-"
    if figure.unit != "%":
        return f"{figure.ours:.3g}"
    return f"{figure.ours:.2f}" + ("" if figure.spread is None else f" ± {figure.spread:.2f}")


def _marks(figure: Figure, notes: list[str]) -> str:
    marks = []
    for text in (figure.reason, figure.note):
        if text:
            if text not in notes:
                notes.append(text)
            marks.append(notes.index(text) + 1)
    return f" [{', '.join(map(str, marks))}]" if marks else ""


def make_tables(plan: Plan, results: RunResults) -> list[Table]:
    """Build the tables of a plan.

    Means are over the paper's classes that were measured, with equal weights; the paper's mean is taken over the same
    classes. Other categories, and drawn ones, get rows but do not enter a mean.
    """
    made = []
    for name in plan.tables:
        paper, columns = paper_table(name), plan.columns[name]
        if not columns:
            continue
        drawn = {key[0] for key, result in results.items() if result.row is not None and result.row["synthetic"]}
        classes = [c for c in plan.categories if c in CLASSES and c not in drawn]
        rows: list[str] = []
        for mean, members in MEANS.items():
            there = [c for c in classes if c in members]
            rows += [c for c in there if c not in rows]
            if there:
                rows.append(mean)
        rows += [c for c in plan.categories if c not in classes]
        figures = {}
        for row in rows:
            for column in columns:
                figure = (
                    _mean(paper, row, column, plan, results, classes)
                    if row in MEANS
                    else _class(paper, row, column, plan.seeds, results, row in drawn)
                )
                figures[row, column] = figure
        others = [c for c in paper.columns if c not in columns]
        # The paper's mean over all classes cannot be compared with one over some.
        quoted = [r for r in rows if r in paper.figures and set(MEANS.get(r, (r,))) <= set(classes)]
        also = {row: {c: paper.figures[row][c] for c in others} for row in quoted if others}
        title = f"Table {name}. {paper.title}"
        setup = tuple(_setup(plan, columns, results))
        made.append(Table(name, title, tuple(rows), columns, figures, also, setup))
    return made


def _class(paper: PaperTable, row: str, column: str, seeds: Sequence[int], results: RunResults, drawn: bool) -> Figure:
    values, reasons = {}, []
    for seed in seeds:
        value, reason = _value(paper.metric, results.get((row, column, seed)))
        if value is None:
            reasons.append(reason if len(seeds) == 1 else f"seed {seed}: {reason}")
        else:
            values[seed] = value
    notes = ["drawn images: no published figure"] if drawn else []
    published = None if drawn else paper_mean(paper, column, row="mean", classes=[row]) if row in CLASSES else None
    if not values:
        return Figure(paper.name, row, column, "%", None, None, 0, published, "; ".join(dict.fromkeys(reasons)), *notes)
    if reasons:
        notes.append(f"over {len(values)} of {len(seeds)} seeds ({'; '.join(reasons)})")
    found = np.array(list(values.values()))
    return Figure(paper.name, row, column, "%", *_mean_spread(found), found.size, published, "", "; ".join(notes))


def _mean(paper: PaperTable, row: str, column: str, plan: Plan, results: RunResults, classes: Sequence[str]) -> Figure:
    members = MEANS[row]
    found: dict[str, list[float]] = {}
    for name in (c for c in classes if c in members):
        values = [_value(paper.metric, results.get((name, column, seed)))[0] for seed in plan.seeds]
        whole = [value for value in values if value is not None]
        if len(whole) == len(plan.seeds):
            found[name] = whole
    whole_mean = paper.figure(row, column)
    if not found:
        return Figure(paper.name, row, column, "%", None, None, 0, whole_mean, "no value: none of its classes has one")
    per_seed = np.array(list(found.values())).mean(axis=0)
    published = paper_mean(paper, column, row, list(found))
    note = ""
    if len(found) < len(members):
        missing = [name for name in members if name not in found]
        note = f"over {len(found)} of {len(members)} classes (without {', '.join(missing)})"
        if published is not None:
            note += ", the paper's over the same"
        elif whole_mean is not None:
            note += f"; the paper has only the mean over all, {whole_mean:.1f}"
    return Figure(paper.name, row, column, "%", *_mean_spread(per_seed), per_seed.size, published, "", note)


def _mean_spread(values: np.ndarray) -> tuple[float, float | None]:
    return float(values.mean()), float(values.std(ddof=1)) if values.size > 1 else None


def _value(metric: str, result: RunResult | None) -> tuple[float | None, str]:
    """The value in percent, or the reason why there is none."""
    if result is None:
        return None, "not run: stopped before it"
    if result.row is None:
        return None, result.reason
    found = result.row["overall"]["metrics"][metric]
    if found["value"] is None:
        return None, f"no value: {found.get('reason', 'unknown')}"
    return 100.0 * float(found["value"]), ""


def differences(row: Mapping[str, Any], column: str) -> list[str]:
    """How an experiment's recorded set-up differs from the paper's, one phrase each, always in the same order."""
    theirs = paper_config(column).to_json()
    ours = dict(row["config"])
    found = ["random weights of the backbone"] if str(row["weights_source"]).startswith("random") else []
    for key in dict.fromkeys([*theirs, *ours]):
        if key in _SKIPPED or (key == "latent" and column.removeprefix("f").isdigit()):
            continue  # the V of a single layer is that of layer 4, as in the paper
        if ours.get(key) != theirs.get(key):
            found.append(f"{_WORDS.get(key, key)} {_plain(ours.get(key))} (paper: {_plain(theirs.get(key))})")
    if _schedule(ours) != _schedule(theirs):
        found.append(f"{_schedule(ours)} (paper: {_schedule(theirs)})")
    sides = [side for size in row["image_sizes"] for side in size]
    if min(sides) < _PAPER_IMAGES[0] or max(sides) > _PAPER_IMAGES[1]:
        shown = " to ".join(dict.fromkeys(f"{height} x {width}" for height, width in row["image_sizes"]))
        found.append(f"images of {shown} pixels (paper: {_PAPER_IMAGES[0]} to {_PAPER_IMAGES[1]})")
    found.append(
        f"{round(100 * ours['held_out'])} % of the normal images held out to set T, and fitted on as many "
        "fewer (paper: T from the training set)"
    )
    if column == "DFR":
        found.append(
            "fitted as the SAAE is (DFR's own code: V at 90 % of the variance, mean squared error, batches of 4)"
        )
    return found


def paper_config(column: str) -> FitConfig:
    """The paper's configuration for a column."""
    base = preset("paper")
    return base.replace(**{"layers": default_layers(base.backbone, 0)[0], **COLUMNS[column]})


def _schedule(config: Mapping[str, Any]) -> str:
    length = f"{config['steps']} steps" if config["steps"] is not None else f"{config['epochs']} epochs"
    return f"{length} of {config['batch']} images a step"


def _plain(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _setup(plan: Plan, columns: Iterable[str], results: RunResults) -> list[str]:
    """Sentences on the set-up of some columns; experiments with the same differences share one."""
    groups: dict[tuple[str, ...], dict[str, list[str]]] = {}
    weights: dict[tuple[str, str], list[str]] = {}
    for column in columns:
        for (category, name, _), result in results.items():
            if name != column or result.row is None:
                continue
            experiments = groups.setdefault(tuple(differences(result.row, column)), {}).setdefault(column, [])
            if category not in experiments:
                experiments.append(category)
            sources = weights.setdefault((str(result.row["weights_source"]), paper_config(column).backbone), [])
            if column not in sources:
                sources.append(column)
    split = {column for column in columns if sum(column in found for found in groups.values()) > 1}
    lines = []
    for found, by_column in groups.items():
        of = [
            f"{column} of {', '.join(experiments)}" if column in split else column
            for column, experiments in by_column.items()
        ]
        lines.append(f"{'; '.join(of) if split else ', '.join(of)}: {'; '.join(found)}.")
    for (source, theirs), names in weights.items():
        lines.append(f"{', '.join(names)}, weights: {source} (paper: {theirs}, pretrained on ImageNet).")
    return lines


def fps_table(measured: Mapping[str, Any]) -> Table:
    """The table of frames per second from `speed.measure_fps`, with the paper's and the ratio of the two models."""
    paper, column, unit = paper_fps(), "frames a second", "frames/s"
    models: Mapping[str, Mapping[str, Any]] = measured["models"]
    figures: dict[tuple[str, str], Figure] = {}
    for name, published in paper.items():
        about = models.get(name, {"reason": "not run: not asked for"})
        ours = about.get("fps")
        figures[name, column] = Figure("fps", name, column, unit, ours, None, 1, published, about.get("reason", ""))
    first, second = paper
    name = f"{first} over {second}"
    values = [figures[model, column].ours for model in (first, second)]
    ratio = paper[first] / paper[second]
    if values[0] is None or values[1] is None:
        reason = "no value: one of the two was not measured"
        figures[name, column] = Figure("fps", name, column, "times", None, None, 0, ratio, reason)
    else:
        figures[name, column] = Figure("fps", name, column, "times", values[0] / values[1], None, 1, ratio)
    setup = [f"{measured['device']}, {measured['threads']} threads of PyTorch (paper: one GTX 1080 Ti)."]
    setup += [
        f"{model}: {about['backbone']} at {_plain(about['input_size'])}, layers {_plain(about['layers'])}, "
        f"V {about['latent']}, random weights."
        for model, about in models.items()
        if "fps" in about
    ]
    setup.append(
        f"Here: one image at a time, PyTorch FP32 (products in {measured.get('arithmetic', 'what is not recorded')}), "
        "from pixels at the model's input size to the map there. The paper does not say what its time holds. Exported "
        "graphs, whole frames and other precisions: benchmarks/fps.py."
    )
    rows = tuple(row for row, _ in figures)
    return Table("fps", paper_fps_title(), rows, (column,), figures, {}, tuple(setup))


def measured_with(results: RunResults) -> list[tuple[dict[str, str], list[str]]]:
    """Group the experiments by the library versions that measured them, largest group first.

    Results of earlier runs may have other versions; empty if none were recorded.
    """
    found: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for (category, column, seed), result in results.items():
        if result.row is not None:
            tools = tuple((str(name), str(version)) for name, version in result.row.get("tools", {}).items())
            found.setdefault(tools, []).append(f"{column} of {category}, seed {seed}")
    return [(dict(tools), experiments) for tools, experiments in sorted(found.items(), key=lambda item: -len(item[1]))]


def versions_text(measured: Sequence[tuple[Mapping[str, str], Sequence[str]]]) -> str:
    """The result of `measured_with` as a footer: one list of versions, or one per group of experiments."""
    texts = []
    for tools, experiments in measured:
        text = ", ".join(f"{name} {version}" for name, version in tools.items()) or "versions not recorded"
        texts.append(text if len(measured) == 1 else f"{text} ({'; '.join(experiments)})")
    if len(texts) > 1:
        return f"versions differ: {'. '.join(texts)}"
    return texts[0] if texts else "nothing measured"


def markdown(tables: Sequence[Table], origin: str) -> str:
    """All tables as a Markdown document; `origin` says which command made them, and when."""
    parts = ["# The paper's tables, ours beside them"]
    for table in tables:
        heads, rows, notes = table.grid(also=True)
        lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
        parts.append(f"## {table.title}")
        if len(table.columns) > 2:
            parts.append("In brackets the paper's figure and the difference.")
        parts.append("\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines))
        if notes:
            parts.append("\n".join(f"- [{number}] {note}" for number, note in enumerate(notes, start=1)))
        if table.setup:
            parts.append("What differs from the paper's set-up:\n\n" + "\n".join(f"- {line}" for line in table.setup))
    return "\n\n".join([*parts, f"<sub>{origin}</sub>"]) + "\n"


def csv_text(tables: Sequence[Table]) -> str:
    """Every figure as a line of CSV, and the paper's other figures with an empty `ours` and the reason for it."""
    out = io.StringIO()
    names = ["table", "row", "column", "unit", "ours", "spread", "seeds", "paper", "difference", "reason", "note"]
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    for table in tables:
        for figure in table.figures.values():
            writer.writerow(figure.to_json())
        for row, figures in table.also.items():
            for column, value in figures.items():
                quoted = {"table": table.name, "row": row, "column": column, "unit": "%", "seeds": 0, "paper": value}
                writer.writerow({**quoted, "reason": "the paper's figure alone"})
    return out.getvalue()
