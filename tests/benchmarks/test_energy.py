"""Energy of the processor: counters of a made-up machine, which wrap, are of several packages, or may not be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.energy import Metered, find_rapl

RANGE = 1_000_000


def zone(root: Path, folder: str, name: str, energy: int) -> Path:
    """A zone as the kernel shows it."""
    place = root / folder
    place.mkdir(parents=True)
    (place / "name").write_text(f"{name}\n")
    (place / "energy_uj").write_text(f"{energy}\n")
    (place / "max_energy_range_uj").write_text(f"{RANGE}\n")
    return place / "energy_uj"


def test_packages_are_added_and_their_parts_are_not(tmp_path: Path) -> None:
    counters = [zone(tmp_path, f"intel-rapl:{number}", f"package-{number}", 1000) for number in range(2)]
    core = zone(tmp_path, "intel-rapl:0:0", "core", 0)
    board = zone(tmp_path, "intel-rapl:2", "psys", 0)
    (tmp_path / "intel-rapl").mkdir()  # the control type itself has no energy
    meter = find_rapl(tmp_path)
    assert meter is not None
    for counter, energy in zip((*counters, core, board), (251_000, 501_000, 900_000, 900_000), strict=True):
        counter.write_text(str(energy))
    assert meter.joules() == pytest.approx(0.75)
    assert meter.joules() == pytest.approx(0.75)


def test_a_counter_that_wraps(tmp_path: Path) -> None:
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    meter = find_rapl(tmp_path)
    assert meter is not None
    counter.write_text("100000")
    assert meter.joules() == pytest.approx(0.2)


@pytest.mark.parametrize("state", ["no folder", "nothing in it", "no package", "not readable", "no number"])
def test_machines_without(tmp_path: Path, state: str) -> None:
    root = tmp_path / "powercap"
    if state != "no folder":
        root.mkdir()
    if state == "no package":
        zone(root, "dtpm", "dtpm", 0)
    if state == "not readable":  # also for root, who runs tests in containers
        counter = zone(root, "intel-rapl:0", "package-0", 0)
        counter.unlink()
        counter.mkdir()
    if state == "no number":
        zone(root, "intel-rapl:0", "package-0", 0).write_text("much")
    assert find_rapl(root) is None


def test_only_the_turns_of_the_thing_itself_count(tmp_path: Path) -> None:
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    meter = find_rapl(tmp_path)
    assert meter is not None

    def turn(seconds: float) -> list[float]:
        counter.write_text(str(int(counter.read_text()) + 60_000))
        return [seconds] * 2

    metered = Metered(turn, meter)
    metered(0.5)
    counter.write_text(str(int(counter.read_text()) + 500_000))  # another's turn
    assert metered(0.5) == [0.5, 0.5]
    assert metered.joules == pytest.approx(0.12)
    assert metered.calls == 6  # two timed and one before them, twice
