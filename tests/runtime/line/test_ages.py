"""The clock for removal by age: right with a right clock, and slow to follow a wrong one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from saae_runtime.line.ages import Ages

HOUR, DAY = 3600.0, 86400.0


class Clocks:
    """A system's clock and a running time that a test sets."""

    def __init__(self) -> None:
        self.wall, self.ran = 1000 * DAY, 5.0

    def run(self, seconds: float, ages: Ages) -> float:
        self.wall += seconds
        self.ran += seconds
        return ages.now()

    def ages(self, newest: float | None = None, memory: Path | None = None) -> Ages:
        return Ages(newest, memory, lambda: self.wall, lambda: self.ran)


def test_a_right_clock_is_followed() -> None:
    clocks = Clocks()
    ages = clocks.ages()
    for seconds in (0.0, 30.0, 30.0, 100 * DAY):
        assert clocks.run(seconds, ages) == clocks.wall


@pytest.mark.parametrize("days", [100.0, -100.0])
def test_an_hour_of_a_wrong_clock_is_ten_hours_at_most(days: float) -> None:
    clocks = Clocks()
    ages = clocks.ages()
    begin = ages.now()
    clocks.wall += days * DAY
    for _ in range(60):
        assert clocks.run(60.0, ages) <= begin + 10 * HOUR
    clocks.wall -= days * DAY
    assert clocks.run(0.0, ages) <= clocks.wall
    assert clocks.run(1.3 * HOUR, ages) == clocks.wall  # and it is made up for


def test_what_is_stored_while_the_clock_is_behind_is_not_old_when_it_is_right_again() -> None:
    clocks = Clocks()
    ages = clocks.ages()
    right = ages.now()
    assert ages.stamp() == right
    clocks.wall = 0.0
    for _ in range(60):
        clocks.run(60.0, ages)
        assert right - 10 * HOUR <= ages.stamp() <= right
    clocks.wall = right + 100 * DAY
    assert ages.stamp() == clocks.wall


def test_a_pause_is_caught_up_in_a_tenth_of_it() -> None:
    clocks = Clocks()
    ages = clocks.ages(newest=clocks.wall - 20 * DAY)
    assert ages.now() == clocks.wall - 20 * DAY
    assert clocks.run(1 * DAY, ages) == pytest.approx(clocks.wall - 11 * DAY)
    assert clocks.run(2 * DAY, ages) == clocks.wall


def test_it_goes_on_where_it_was(tmp_path: Path) -> None:
    clocks, memory = Clocks(), tmp_path / "age"
    begin = clocks.ages(memory=memory).now()
    clocks.wall += 100 * DAY
    ages = clocks.ages(newest=clocks.wall, memory=memory)  # stored while the clock was wrong
    assert ages.now() == begin
    assert clocks.run(60.0, ages) == begin + 600.0
    assert memory.stat().st_mtime == begin + 600.0
    os.utime(memory, (clocks.wall, clocks.wall))
    assert clocks.ages(memory=memory).now() == clocks.wall
