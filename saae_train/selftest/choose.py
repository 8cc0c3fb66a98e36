"""Chooses among models of one product by how well each tells simulated defects from its good images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saae_runtime.errors import ConfigError

from .result import SelfTest

__all__ = ["Choice", "Tried", "choose"]

_SURE = 2.0
"""Standard errors by which another model must be ahead of the first to be taken."""


@dataclass(frozen=True)
class Tried:
    """One model and its self-test.

    Attributes:
        name: of the configuration.
        test: on the same defects as the other models.
        normal: scores of good images, each as if it were new; at least one.
    """

    name: str
    test: SelfTest
    normal: tuple[float, ...]

    def ranks(self) -> NDArray[np.float64]:
        """For each defect the share of good images that score lower; ties count half."""
        normal = np.sort(np.asarray(self.normal, np.float64))
        scores = [defect.score for defect in self.test.defects]
        below, up_to = np.searchsorted(normal, scores, "left"), np.searchsorted(normal, scores, "right")
        return np.asarray(0.5 * (below + up_to) / normal.size)


@dataclass(frozen=True)
class Choice:
    """The chosen model, and the figures that decided.

    Attributes:
        name: of the chosen configuration.
        separation: name -> simulated image ROC-AUC, every kind, size and contrast weighted equally.
        ahead: name -> its separation minus the first one's, in standard errors of the paired difference.
        found: name -> share of the defects found at its own image threshold, weighted in the same way.
    """

    name: str
    separation: dict[str, float]
    ahead: dict[str, float]
    found: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "simulated": True,
            "chosen": self.name,
            "separation": self.separation,
            "ahead": self.ahead,
            "found": self.found,
        }


def choose(tried: Sequence[Tried]) -> Choice:
    """Take the model with the largest simulated image ROC-AUC that is clearly ahead of the first, else the first.

    The same defects were drawn for each model, so the difference is taken defect by defect.

    Args:
        tried: the default first.

    Raises:
        ConfigError: nothing was tried, or not on the same defects.
    """
    if not tried:
        raise ConfigError("There is no model to choose from.", "", "--select auto")
    first = tried[0]
    recipes = [defect.recipe for defect in first.test.defects]
    if any([defect.recipe for defect in item.test.defects] != recipes for item in tried):
        raise ConfigError("The models were tried on different defects.", "They cannot be compared.", "draw them again")
    weights = _weights(first.test)
    base = first.ranks()
    separation = {item.name: float(weights @ item.ranks()) for item in tried}
    ahead = {item.name: _ahead(item.ranks() - base, weights) for item in tried}
    found = {
        item.name: float(weights @ np.asarray([defect.found for defect in item.test.defects], float)) for item in tried
    }
    sure = [item.name for item in tried if ahead[item.name] > _SURE]
    name = max(sure, key=lambda one: separation[one]) if sure else first.name
    return Choice(name, separation, ahead, found)


def _weights(test: SelfTest) -> NDArray[np.float64]:
    """One weight for each defect, sum 1: combinations of kind, size and contrast count equally."""
    keys = [(defect.kind, defect.size, defect.contrast) for defect in test.defects]
    count = Counter(keys)
    return np.asarray([1.0 / (len(count) * count[key]) for key in keys])


def _ahead(difference: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    mean = float(weights @ difference)
    error = float(np.sqrt(np.square(weights * (difference - mean)).sum()))
    return mean / error if error > 0 else 0.0
