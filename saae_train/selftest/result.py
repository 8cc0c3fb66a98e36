"""The result of a self-test: simulated defects counted by kind, size and contrast, with Wilson intervals.

The intervals assume independent defects; several share an image, so the true intervals are a little wider.
Everything made from a result (table, JSON, manifest entry) says "simulated".
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..evaluation.ranking import Metric
from ..evaluation.share import Share
from .simulate import CONTRASTS, KINDS, SIZES

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["LEAST_FOUND", "LEAST_JUDGED", "Defect", "Recipe", "SelfTest"]

LEAST_FOUND = 0.5
"""A model is blind if it finds, at 95 % confidence, less than this share of the large, strong simulated defects."""
LEAST_JUDGED = 5
"""Fewest large, strong defects for a verdict."""


Recipe = tuple[int, int, str, str, str, int]
"""Index of the image, index of the donor, kind, size, contrast, seed."""


@dataclass(frozen=True)
class Defect:
    """One simulated defect and its score.

    Attributes:
        file: the normal image that it was drawn onto.
        kind, size, contrast: as drawn and measured, see `saae_train.selftest.simulate`.
        extent: pixels across.
        area: pixels of the mask.
        change: mean change inside the mask, grey levels.
        score: image score.
        peak: largest map value inside the mask.
        found: the score is above the image threshold.
        marked: the map is above T inside the mask.
        recipe: redraws it.
    """

    file: str
    kind: str
    size: str
    contrast: str
    extent: float
    area: int
    change: float
    score: float
    peak: float
    found: bool
    marked: bool
    recipe: Recipe

    @property
    def easy(self) -> bool:
        """Whether it is large and strong: no model should miss it."""
        return self.size == "large" and self.contrast == "strong"


@dataclass(frozen=True)
class SelfTest:
    """The result of `selftest`. All defects are simulated.

    Attributes:
        defects: each one drawn and scored.
        false_alarms: untouched normal images above the image threshold.
        threshold, image_threshold: T for pixels and images.
        pixel_roc_auc, pro_auc: over simulated and untouched images together.
        not_drawn: kind -> defects that several tries could not make visible.
        images: different normal images that defects were drawn onto.
        seed: of the drawing.
        synthetic: whether the normal images themselves were drawn.
    """

    defects: tuple[Defect, ...]
    false_alarms: Share
    threshold: float
    image_threshold: float
    pixel_roc_auc: Metric
    pro_auc: Metric
    not_drawn: dict[str, int]
    images: int
    seed: int
    synthetic: bool = False

    def share(
        self, kind: str | None = None, size: str | None = None, contrast: str | None = None, *, marked: bool = False
    ) -> Share:
        """Share found (or marked) of the defects of one kind, size and contrast; None: all."""
        chosen = [
            d.marked if marked else d.found
            for d in self.defects
            if kind in (None, d.kind) and size in (None, d.size) and contrast in (None, d.contrast)
        ]
        return Share(sum(chosen), len(chosen))

    def balanced(self, kind: str | None = None, *, marked: bool = False) -> float | None:
        """Mean share found (or marked) over the combinations of kind, size and contrast that were drawn.

        The unweighted share would be too high, because a fifth of all defects is drawn large and strong for the gate.
        """
        shares = [
            self.share(one, size, contrast, marked=marked).value
            for one, size, contrast in itertools.product(self.kinds if kind is None else (kind,), SIZES, CONTRASTS)
        ]
        drawn = [share for share in shares if share is not None]
        return sum(drawn) / len(drawn) if drawn else None

    def balanced_text(self, kind: str | None = None, *, marked: bool = False) -> str:
        """`balanced` in percent, or a dash."""
        value = self.balanced(kind, marked=marked)
        return "-" if value is None else f"{100 * value:.0f} %"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds drawn, in the order of `KINDS`."""
        return tuple(kind for kind in KINDS if any(d.kind == kind for d in self.defects))

    @property
    def easy(self) -> Share:
        """Share found of the large, strong defects."""
        return Share(sum(d.found for d in self.defects if d.easy), sum(d.easy for d in self.defects))

    @property
    def judged(self) -> bool:
        """Whether there are enough large, strong defects to decide whether a model is blind."""
        return self.easy.count >= LEAST_JUDGED

    @property
    def misses_easy(self) -> bool:
        """Whether too many of the large, strong defects were missed; False if there are too few to decide."""
        interval = self.easy.interval
        return self.judged and interval is not None and interval[1] < LEAST_FOUND

    def notes(self) -> list[str]:
        """Remarks on the numbers."""
        notes = [f"Simulated defects on {self.images} normal images: real ones may be harder to find."]
        if self.not_drawn:
            listed = ", ".join(f"{count} {kind}" for kind, count in self.not_drawn.items())
            notes.append(f"Could not be made visible, and are not counted: {listed}.")
        if not self.judged:
            notes.append(f"Only {self.easy.count} large, strong defects: too few to say whether the model is blind.")
        return notes

    def summary(self) -> dict[str, Any]:
        """The counts without the list of defects, for the manifest."""
        cells = [
            (kind, size, contrast, self.share(kind, size, contrast), self.share(kind, size, contrast, marked=True))
            for kind, size, contrast in itertools.product(self.kinds, SIZES, CONTRASTS)
        ]
        return {
            "simulated": True,
            "synthetic": self.synthetic,
            "seed": self.seed,
            "images": self.images,
            "threshold": self.threshold,
            "image_threshold": self.image_threshold,
            "found": self.share().to_json(),
            "marked": self.share(marked=True).to_json(),
            "found_balanced": self.balanced(),
            "marked_balanced": self.balanced(marked=True),
            "large_strong": self.easy.to_json(),
            "blind": self.misses_easy if self.judged else None,
            "false_alarms": self.false_alarms.to_json(),
            "pixel_roc_auc": self.pixel_roc_auc.to_json(),
            "pro_auc": self.pro_auc.to_json(),
            "not_drawn": dict(self.not_drawn),
            "cells": [
                {"kind": k, "size": s, "contrast": c, "found": f.found, "marked": m.found, "count": f.count}
                for k, s, c, f, m in cells
                if f.count
            ],
        }

    def to_json(self) -> dict[str, Any]:
        """All values, as JSON."""
        return {
            **self.summary(),
            "notes": self.notes(),
            "defects": [vars(d) | {"recipe": list(d.recipe)} for d in self.defects],
        }

    def table(self) -> Table:
        """Found of drawn defects, one row per kind, for a terminal."""
        from rich.table import Table

        data = " on synthetic images" if self.synthetic else ""
        table = Table(title=f"SIMULATED defects{data}: found at the image threshold", title_justify="left")
        table.add_column("kind", no_wrap=True)
        columns: list[tuple[str | None, str | None]] = [(name, None) for name in SIZES]
        columns += [(None, name) for name in CONTRASTS]
        for size, contrast in columns:
            table.add_column(size or str(contrast), justify="right")
        table.add_column("all", justify="right")
        table.add_column("marked", justify="right")
        for kind in (*self.kinds, None):
            if kind is None:
                table.add_section()
            cells = [self.share(kind, *which) for which in columns]
            last = (self.balanced_text(kind), self.balanced_text(kind, marked=True))
            table.add_row(kind or "all", *(f"{s.found}/{s.count}" if s.count else "-" for s in cells), *last)
        lines = [
            f"large and strong: {_with_interval(self.easy)}; all and marked weight every size and contrast equally",
            f"simulated pixel ROC-AUC {self.pixel_roc_auc.percent}, PRO-AUC {self.pro_auc.percent}",
            *self.notes(),
        ]
        table.caption, table.caption_justify = "\n".join(lines), "left"
        return table


def _with_interval(share: Share) -> str:
    interval = share.interval
    if interval is None:
        return "none drawn"
    return (
        f"{share} ({100 * share.found / share.count:.0f} %, 95 %: {100 * interval[0]:.0f} to {100 * interval[1]:.0f})"
    )
