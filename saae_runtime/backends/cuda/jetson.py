"""Detects an NVIDIA Jetson, its Jetson Linux and JetPack."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Jetson", "find_jetson"]

_RELEASE = re.compile(r"#\s*R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)")

# Jetson Linux major release -> JetPack generation, as NVIDIA's download pages pair them.
_JETPACK = {32: "4", 34: "5", 35: "5", 36: "6", 38: "7", 39: "7"}


@dataclass(frozen=True)
class Jetson:
    """A Jetson: the board's model, and its Jetson Linux (L4T) release such as `36.4.3`, empty if unknown."""

    model: str
    l4t: str

    @property
    def jetpack(self) -> str:
        """JetPack generation (`6`, `7`), empty if the release is unknown."""
        major = self.l4t.partition(".")[0]
        return _JETPACK.get(int(major), "") if major else ""

    def __str__(self) -> str:
        parts = [self.model or "NVIDIA Jetson"]
        if self.l4t:
            parts.append(f"Jetson Linux {self.l4t}")
        if self.jetpack:
            parts.append(f"JetPack {self.jetpack}")
        return ", ".join(parts)


def find_jetson(root: str | Path = "/") -> Jetson | None:
    """This machine as a Jetson, or None.

    Reads /etc/nv_tegra_release and the device tree's model; in a container one of the two may be missing.

    Args:
        root: where to look, for tests and for mounted images.
    """
    base = Path(root)
    release = _read(base / "etc/nv_tegra_release")
    model = _read(base / "proc/device-tree/model").strip("\0 \n")
    if not release and "jetson" not in model.lower():
        return None
    found = _RELEASE.search(release)
    return Jetson(model=model, l4t=f"{found[1]}.{found[2]}" if found else "")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
