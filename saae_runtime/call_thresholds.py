"""The thresholds of a call: rates looked up in the bundle's tables, or the values themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import ConfigError, shown
from .manifest import Thresholds
from .thresholds import ThresholdTable

__all__ = ["CallThresholds", "check_request"]

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class CallThresholds:
    """Pixel threshold T and image threshold of a call."""

    pixel: float
    image: float

    @classmethod
    def choose(
        cls,
        tables: Thresholds,
        default: CallThresholds | None,
        fpr: float | None,
        threshold: float | None,
        image_fpr: float | None,
        image_threshold: float | None,
    ) -> CallThresholds:
        """The requested thresholds. One that is not requested is that of `default`, or of the table's default rate.

        Args:
            tables: of the precision in use.
            default: the engine's thresholds, if it has them already.
            fpr, image_fpr: acceptable false-positive rates, 0..1.
            threshold, image_threshold: the values themselves, instead of the rates.

        Raises:
            ConfigError: a rate and a threshold together, a rate outside 0..1, or a threshold that is not finite.
        """
        check_request(fpr, threshold, image_fpr, image_threshold)
        return cls(
            _one(tables.pixel, fpr, threshold, None if default is None else default.pixel),
            _one(tables.image, image_fpr, image_threshold, None if default is None else default.image),
        )


def _one(table: ThresholdTable, rate: float | None, threshold: float | None, default: float | None) -> float:
    if threshold is not None:
        return float(threshold)
    return table.at(rate) if rate is not None or default is None else default


def check_request(
    fpr: float | None = None,
    threshold: float | None = None,
    image_fpr: float | None = None,
    image_threshold: float | None = None,
) -> None:
    """Check requested thresholds without a bundle.

    Raises:
        ConfigError: a rate and a threshold together, or a threshold that is not finite.
    """
    for rate, value, prefix in ((fpr, threshold, ""), (image_fpr, image_threshold, "image_")):
        if rate is not None and value is not None:
            raise ConfigError(
                f"{prefix}fpr and {prefix}threshold are both given.",
                "Each of them alone decides the threshold.",
                f"give {prefix}fpr (a rate, looked up in the bundle's table) or {prefix}threshold (the value itself)",
            )
        if value is not None and not _is_finite(value):
            raise ConfigError(f"{prefix}threshold={shown(value)} is not possible.", "", "give a finite number")


def _is_finite(value: Any) -> bool:
    """Whether a value is a real number in the range of float32, the type of maps."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        return False
    exact = value if isinstance(value, int) else float(value)  # an int may have any length
    return abs(exact) <= _LARGEST  # false for NaN
