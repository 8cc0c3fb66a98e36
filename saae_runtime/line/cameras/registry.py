"""Opens live cameras by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...errors import ConfigError
from ..camera import Camera
from .genicam import open_genicam
from .piped import open_stdin
from .pylon import open_pylon
from .rtsp import STREAMS, open_stream
from .webcam import open_webcam

__all__ = ["Opener", "has_white_level", "is_camera", "open_camera"]

Opener = Callable[[str, Mapping[str, Any]], Camera]
"""Opens the named camera with the options of the configuration."""

_BY_PREFIX: dict[str, Opener] = {
    "camera": open_webcam,
    "genicam": open_genicam,
    "pylon": open_pylon,
    "stdin": open_stdin,
    **dict.fromkeys(STREAMS, open_stream),
}


def _opener(spec: str) -> Opener | None:
    prefix = spec.partition(":")[0]
    if prefix in _BY_PREFIX and (":" in spec or prefix == "pylon"):
        return _BY_PREFIX[prefix]
    return None


def is_camera(spec: str) -> bool:
    """Whether `open_camera` knows this kind of name."""
    return _opener(spec) is not None


def has_white_level(spec: str) -> bool:
    """Whether this camera can give pixels of more than 8 bits, and has the option `white_level`."""
    return _opener(spec) in (open_genicam, open_pylon)


def open_camera(spec: str, options: Mapping[str, Any] | None = None, triggered: bool = False) -> Camera:
    """Open a camera by its name.

    Names are `genicam:PRODUCER.cti#SERIAL`, `pylon:SERIAL`, `rtsp://...`, `camera:0` and `stdin:WIDTHxHEIGHT`. A live
    camera that is missing is searched for from then on; see its `stats`.

    Args:
        spec: the name.
        options: of `camera_options`.
        triggered: whether parts are requested, so that frames on standard input are dropped until a trigger.

    Raises:
        ConfigError: an unknown kind of name, a missing library, an option that the camera does not have.
    """
    opener = _opener(spec)
    if opener is None:
        raise ConfigError(
            f"{spec}: unknown camera.",
            f"Kinds: {', '.join(f'{prefix}:' for prefix in _BY_PREFIX)}.",
            "see docs/plc.md",
        )
    if opener is open_stdin:
        return open_stdin(spec, options or {}, triggered)
    return opener(spec, options or {})
