"""The paper's published figures (section 4), from paper.json: every number of Tables 2 to 5 and the frames a second."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

__all__ = [
    "CLASSES",
    "MEANS",
    "OBJECT_CLASSES",
    "TEXTURE_CLASSES",
    "PaperTable",
    "paper_fps",
    "paper_fps_title",
    "paper_mean",
    "paper_table",
    "paper_tables",
]

TEXTURE_CLASSES = ("carpet", "grid", "leather", "tile", "wood")
OBJECT_CLASSES = (
    "bottle", "cable", "capsule", "hazelnut", "metal_nut", "pill", "screw", "toothbrush", "transistor", "zipper",
)  # fmt: skip
CLASSES = TEXTURE_CLASSES + OBJECT_CLASSES
"""The classes of MVTec AD by their folders' names, in the paper's order."""

MEANS: Mapping[str, Sequence[str]] = {
    "mean of textures": TEXTURE_CLASSES,
    "mean of objects": OBJECT_CLASSES,
    "mean": CLASSES,
}
"""The paper's mean rows, and the classes of each; all classes have the same weight."""


@dataclass(frozen=True)
class PaperTable:
    """One table. `figures[row][column]` in percent; `metric` is the key of the same metric in an evaluation."""

    name: str
    title: str
    metric: str
    columns: tuple[str, ...]
    figures: Mapping[str, Mapping[str, float]]

    def figure(self, row: str, column: str) -> float | None:
        """The paper's figure; None if it has none."""
        return self.figures.get(row, {}).get(column)


@lru_cache(maxsize=1)
def _data() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(Path(__file__).with_name("paper.json").read_text(encoding="utf-8"))
    return data


@lru_cache(maxsize=1)
def paper_tables() -> dict[str, PaperTable]:
    """Tables "2" to "5"."""
    return {
        name: PaperTable(
            name,
            table["title"],
            table["metric"],
            tuple(table["columns"]),
            {row: dict(zip(table["columns"], values, strict=True)) for row, values in table["rows"].items()},
        )
        for name, table in _data()["tables"].items()
    }


def paper_table(name: str) -> PaperTable:
    """One of `paper_tables`."""
    return paper_tables()[name]


def paper_fps() -> dict[str, float]:
    """Frames a second of "SAAE" and of "DFR" on one GTX 1080 Ti (section 4.4.2)."""
    return dict(_data()["fps"]["rows"])


def paper_fps_title() -> str:
    """Heading of `paper_fps`."""
    return str(_data()["fps"]["title"])


def paper_mean(table: PaperTable, column: str, row: str, classes: Sequence[str]) -> float | None:
    """The paper's mean over `classes`: the printed one for all classes of `row`, else the mean of the printed classes.

    The columns of Table 4 are named after Table 2's: "Ours" has the same classes.

    Returns:
        Percent; None if the paper prints too little to compute it.
    """
    if set(classes) == set(MEANS[row]):
        return table.figure(row, column)
    source = table if table.figure(CLASSES[0], column) is not None else paper_table("2")
    values = [source.figure(name, column) for name in classes]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
