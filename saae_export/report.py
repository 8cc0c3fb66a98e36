"""The build report: `write_report(path, ReportData)` writes one self-contained HTML file."""

from __future__ import annotations

from saae_export.report_data import (
    Curve,
    Example,
    Facts,
    FitHistory,
    LatencyRow,
    MetricRow,
    ParityRow,
    ReportData,
    Scores,
    ThresholdSet,
)

__all__ = [
    "Curve",
    "Example",
    "Facts",
    "FitHistory",
    "LatencyRow",
    "MetricRow",
    "ParityRow",
    "ReportData",
    "Scores",
    "ThresholdSet",
]
