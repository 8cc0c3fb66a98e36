"""Energy of the processor during a run, from RAPL's counters, if this user may read them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from saae_train.experiments.timing import Turn

__all__ = ["Metered", "Rapl", "find_rapl"]

_ROOT = Path("/sys/class/powercap")


class Rapl:
    """The energy counters of the processor's packages, which wrap around.

    Args:
        zones: folders of the packages' zones.
    """

    def __init__(self, zones: Sequence[Path]) -> None:
        self._zones = [(zone / "energy_uj", _number(zone / "max_energy_range_uj")) for zone in zones]
        self._last = [_number(file) for file, _ in self._zones]
        self._joules = 0.0

    def joules(self) -> float:
        """Joules since it was made; call it at least once a minute, before a counter wraps twice."""
        for place, (file, range_) in enumerate(self._zones):
            now = _number(file)
            self._joules += (now - self._last[place] + (range_ if now < self._last[place] else 0)) / 1e6
            self._last[place] = now
        return self._joules


class Metered:
    """A turn of `interleaved` that also counts energy; each turn makes one call that it does not time.

    Attributes:
        joules: spent by the package while its turns ran, idle power included.
        calls: number of calls.
    """

    def __init__(self, turn: Turn, meter: Rapl) -> None:
        self._turn, self._meter = turn, meter
        self.joules, self.calls = 0.0, 0

    def __call__(self, seconds: float) -> list[float]:
        before = self._meter.joules()
        found = self._turn(seconds)
        self.joules += self._meter.joules() - before
        self.calls += len(found) + 1
        return found


def find_rapl(root: Path = _ROOT) -> Rapl | None:
    """The counters of this machine's packages; None if there are none or this user may not read them."""
    try:
        zones = [zone for zone in sorted(root.iterdir()) if _is_package(zone)]
        return Rapl(zones) if zones else None
    except (OSError, ValueError):
        return None


def _is_package(zone: Path) -> bool:
    """Whether a zone is a package, not one of its parts (cores, memory) or the whole board."""
    name = zone / "name"
    return name.is_file() and name.read_text(encoding="ascii").strip().startswith("package-")


def _number(file: Path) -> int:
    return int(file.read_text(encoding="ascii"))
