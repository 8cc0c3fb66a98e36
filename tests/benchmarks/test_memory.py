"""benchmarks/memory.py: readings where they are said to be, and growth that is seen."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from benchmarks import memory
from saae_runtime.errors import ConfigError

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def test_readings_begin_after_the_first_calls_and_end_with_the_last() -> None:
    made: list[int] = []
    readings = memory.watch(lambda: made.append(1), calls=210, first=10)
    assert len(made) == 210
    assert readings[0]["call"] == 10
    assert readings[-1]["call"] == 210
    assert len(readings) == memory.READINGS + 1
    assert all(reading["resident_mib"] > 0 for reading in readings)


def test_memory_that_is_kept_is_seen() -> None:
    kept: list[np.ndarray] = []
    leaking = memory.watch(lambda: kept.append(np.ones(48 << 20, np.uint8)), calls=6, first=2)
    assert leaking[-1]["resident_mib"] - leaking[0]["resident_mib"] > 150  # 4 x 48 MiB
    assert memory.growth(leaking) > 0.02
    assert memory.growth([{"resident_mib": 100.0}, {"resident_mib": 101.0}, {"resident_mib": 99.0}]) == pytest.approx(
        0.01
    )


def test_too_few_calls_are_refused() -> None:
    with pytest.raises(ConfigError, match="100 calls"):
        memory.watch(lambda: None, calls=100)
