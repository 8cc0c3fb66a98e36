"""Webcams, through OpenCV."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError, DeviceError
from ...sources.video import camera_frames, check_camera
from ..camera import BadFrameError
from .options import delay_of, known_only, number
from .reconnect import LiveCamera, Mode, Picture

__all__ = ["open_webcam"]


def open_webcam(spec: str, options: Mapping[str, Any]) -> LiveCamera:
    """Open a camera named `camera:0`.

    Args:
        spec: the name.
        options: `buffer`: largest number of waiting frames (1); `delay`: see `delay_of`.

    Raises:
        ConfigError: OpenCV is missing, or another name.
    """
    known_only(options, ("buffer", "delay"), "camera")
    found = re.fullmatch(r"camera:(\d{1,3})", spec)
    if found is None:
        raise ConfigError(f"{spec}: not a camera.", "A webcam is given by its number.", "camera:0 for the first one")
    check_camera()
    keep = int(number(options, "buffer", 1, "camera"))
    return LiveCamera(spec, lambda: _Webcam(int(found[1])), keep, silent_after=None, delay=delay_of(options))


class _Webcam:
    mode: Mode = "off"

    def __init__(self, index: int) -> None:
        self._frames = camera_frames(index)
        self._first: Picture | None = self.fetch(0)

    def fetch(self, timeout: float) -> Picture | None:
        first: Picture | None = getattr(self, "_first", None)
        if first is not None:
            self._first = None
            return first
        item = next(self._frames, None)
        if item is None:
            raise DeviceError("The camera has ended.")
        if isinstance(item, Exception):
            raise BadFrameError(item.what, item.why, item.cure)
        return Picture(item)

    def trigger(self) -> None:
        """Refuse: it is free-running."""
        raise DeviceError("A webcam cannot be triggered.", "It is free-running.", "a part uses its next frame")

    def flush(self) -> None:
        """Do nothing: there are no pending frames."""

    def close(self) -> None:
        self._frames.close()  # type: ignore[attr-defined]
