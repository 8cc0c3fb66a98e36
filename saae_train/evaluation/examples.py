"""Chooses test images to show, and makes their columns for the sheet of the paper's Figure 3."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from saae_runtime.geometry import upsample_map
from saae_runtime.result import Scorer

from ..charts.sheet import SheetColumn
from ..data.category import GOOD, Category
from .result import Evaluation, ImageScore

__all__ = ["representatives", "sheet_columns"]


def representatives(evaluation: Evaluation, per_type: int = 1) -> list[ImageScore]:
    """Typical images to show: those around the median score of each label."""
    chosen: list[ImageScore] = []
    for label in [GOOD, *sorted({i.label for i in evaluation.images if i.is_anomalous})]:
        ranked = sorted((i for i in evaluation.images if i.label == label), key=lambda i: (i.score, i.file))
        start = max(0, (len(ranked) - per_type) // 2)
        chosen += ranked[start : start + per_type]
    return chosen


def sheet_columns(scorer: Scorer, category: Category, chosen: Iterable[ImageScore]) -> list[SheetColumn]:
    """Columns for `charts.sheet.qualitative_sheet`: the chosen test images, scored once more for their maps."""
    samples = {str(s.path): s for s in category.test}
    columns = []
    for image in chosen:
        sample = samples[image.file]
        frame = sample.read()
        anomaly_map = scorer(frame).anomaly_map
        truth = sample.truth()
        if not sample.is_anomalous:
            truth = np.zeros(frame.shape[:2], np.bool_)
        columns.append(SheetColumn(image.label, frame, truth, upsample_map(anomaly_map, frame.shape[:2])))
    return columns
