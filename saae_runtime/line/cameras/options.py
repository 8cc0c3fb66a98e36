"""Checks the options of a camera in line.toml; an unknown key is an error that suggests near names."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from ...errors import ConfigError, shown
from ...images import check_white_level

__all__ = ["NodeOptions", "delay_of", "known_only", "number"]


def known_only(options: Mapping[str, Any], known: tuple[str, ...], what: str) -> None:
    """Check that there are only known keys.

    Raises:
        ConfigError: an unknown key; near names are suggested.
    """
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=2)
            raise ConfigError(
                f"{what}: no option {shown(key)}.",
                f"Near: {', '.join(near)}." if near else "",
                f"one of {', '.join(known)}",
            )


def number(options: Mapping[str, Any], key: str, default: float, what: str, least: float = 0.0) -> float:
    """A number above `least`.

    Raises:
        ConfigError: the value is not.
    """
    value = options.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least < value < 1e9:
        raise ConfigError(f"{what}: {key} is {shown(value)}.", "", f"a number above {least:g}")
    return float(value)


def delay_of(options: Mapping[str, Any]) -> float:
    """The option `delay`: seconds that a frame needs from its exposure to here; default 0.

    Raises:
        ConfigError: the value is not a number of seconds.
    """
    return number(options, "delay", 0.0, "camera") if options.get("delay", 0) != 0 else 0.0


@dataclass(frozen=True)
class NodeOptions:
    """Settings of a camera with GenICam nodes.

    Attributes:
        trigger: `off`: free-running; `software`: one frame per part, when the station asks; `hardware`: by the camera's
            input, as set up in the camera.
        pixel_format: value of PixelFormat; None: the camera's setting.
        white_level: of gray with more than 8 bits; None: the maximum of its bits. `wiring` gives the bundles' one.
        early: seconds that a frame of a hardware trigger may come before the line's trigger.
        silent_after: seconds without a frame after which a free-running camera is opened again.
        buffer: largest number of waiting frames; older ones are dropped and counted.
        buffers: buffers of the producer; 0: its default.
        nodes: further nodes by name, such as ExposureTime, set in this order.
    """

    trigger: Literal["off", "software", "hardware"] = "off"
    pixel_format: str | None = None
    white_level: int | None = None
    early: float = 0.0
    silent_after: float | None = 5.0
    buffer: int = 1
    buffers: int = 0
    nodes: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, options: Mapping[str, Any], what: str = "camera") -> NodeOptions:
        """The options of a table.

        Raises:
            ConfigError: an unknown key or an impossible value.
        """
        known_only(options, tuple(cls.__dataclass_fields__), what)
        trigger = options.get("trigger", "off")
        if trigger not in ("off", "software", "hardware"):
            raise ConfigError(f"{what}: trigger is {shown(trigger)}.", "", "one of off, software, hardware")
        pixel_format = options.get("pixel_format")
        nodes = options.get("nodes", {})
        if not (pixel_format is None or isinstance(pixel_format, str)) or not isinstance(nodes, Mapping):
            raise ConfigError(
                f"{what}: pixel_format or nodes has the wrong type.",
                "",
                'pixel_format = "Mono8" and nodes = { ExposureTime = 5000.0 }',
            )
        silent = number(options, "silent_after", 5.0, what)
        return cls(
            trigger,
            pixel_format,
            check_white_level(options.get("white_level")),
            0.0 if "early" not in options else number(options, "early", 0.0, what),
            None if trigger == "hardware" else silent,
            int(number(options, "buffer", 1, what)),
            int(number(options, "buffers", 0, what, -1)),
            dict(nodes),
        )

    def apply(self, name: str, node: Callable[[str], Any], write: Callable[[Any, Any], None]) -> None:
        """Set the camera's nodes.

        Args:
            name: of the camera, in errors.
            node: looks up a node; returns None if there is none.
            write: sets a node.

        Raises:
            ConfigError: the camera has no such node, or does not take the value.
        """
        wanted = dict(self.nodes)
        if self.pixel_format is not None:
            wanted = {"PixelFormat": self.pixel_format} | wanted
        if self.trigger == "software":
            wanted |= {"TriggerSelector": "FrameStart", "TriggerMode": "On", "TriggerSource": "Software"}
        elif self.trigger == "off" and node("TriggerMode") is not None:
            wanted |= {"TriggerMode": "Off"}
        if self.trigger == "software" and any(node(key) is None for key in ("TriggerMode", "TriggerSoftware")):
            raise ConfigError(
                f"{name} cannot be triggered by software.",
                "It has no nodes TriggerMode and TriggerSoftware.",
                'trigger = "off" (the second frame after each trigger counts), or another camera',
            )
        for key, value in wanted.items():
            found = node(key)
            if found is None:
                if key == "TriggerSelector":  # a camera with one trigger has nothing to select
                    continue
                raise ConfigError(f"{name} has no node {key}.", "", "see the camera's manual for its nodes")
            try:
                write(found, value)
            except Exception as error:
                choices = _choices(found)
                offered = f" It offers {', '.join(choices)}." if choices else ""
                raise ConfigError(
                    f"{name} rejects {key} = {shown(value)}.",
                    f"{str(error).splitlines()[0] if str(error) else type(error).__name__}.{offered}",
                    "choose a value that the camera accepts",
                ) from error


def _choices(node: Any) -> list[str]:
    """Values of an enumeration; empty for other nodes. Libraries raise their own errors for missing ones."""
    for name in ("symbolics", "Symbolics"):
        with suppress(Exception):
            return [str(choice) for choice in getattr(node, name)]
    return []
