"""Network cameras by RTSP (and other streams that FFmpeg opens by an address), through PyAV (extra `video`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from ...errors import ConfigError, DeviceError
from .options import delay_of, known_only, number
from .reconnect import LiveCamera, Mode, Picture

__all__ = ["STREAMS", "open_stream"]

STREAMS = ("rtsp", "rtsps", "http", "https", "rtmp", "udp", "srt")
"""Schemes of the addresses of streams."""


def open_stream(spec: str, options: Mapping[str, Any]) -> LiveCamera:
    """Open a stream by its address, `rtsp://user:password@host/path`.

    Args:
        spec: the address. Name and password are left out of every message and record.
        options: `timeout`: seconds until a silent or frozen server counts as lost (3); `transport`: `tcp` (default)
            or `udp`; `buffer`: largest number of waiting frames (1); `delay`: see `delay_of`.

    Raises:
        ConfigError: PyAV is missing, or an invalid option.
    """
    known_only(options, ("timeout", "transport", "buffer", "delay"), "camera")
    timeout = number(options, "timeout", 3.0, "camera")
    transport = options.get("transport", "tcp")
    if transport not in ("tcp", "udp"):
        raise ConfigError(f"camera: transport is {transport!r}.", "", "tcp or udp")
    try:
        import av
    except ImportError as error:
        raise ConfigError(
            "Network streams are not available.", f"PyAV cannot be imported: {error}", "pip install 'saae[video]'"
        ) from error
    name = without_password(spec)
    delay = delay_of(options)
    keep = int(number(options, "buffer", 1, "camera"))
    # PyAV gives up after `timeout`, so `silent_after` is not needed.
    return LiveCamera(name, lambda: _Stream(av, spec, name, timeout, transport), keep, silent_after=None, delay=delay)


def without_password(address: str) -> str:
    """An address without name and password."""
    parts = urlsplit(address)
    return address if "@" not in parts.netloc else address.replace(f"{parts.netloc.rpartition('@')[0]}@", "", 1)


class _Stream:
    mode: Mode = "off"

    def __init__(self, av: Any, address: str, name: str, timeout: float, transport: str) -> None:
        self._name = name
        options = {"rtsp_transport": transport} if address.startswith("rtsp") else {}
        try:
            self._container = av.open(address, options=options, timeout=(timeout, timeout))
        except Exception as error:
            why = f"{type(error).__name__}: {error}".replace(address, name)
            raise DeviceError(f"{name} cannot be opened.", why, "check address, password and network") from None
        streams = self._container.streams.video
        if not streams:
            self._container.close()
            raise DeviceError(f"{name} has no video stream.", "", "check the address")
        streams[0].thread_type = "NONE"  # deliver frames without delay
        self._frames: Iterator[Any] = self._container.decode(streams[0])

    def fetch(self, timeout: float) -> Picture | None:
        try:
            picture = next(self._frames)
        except StopIteration:
            raise DeviceError(f"{self._name} has ended.") from None
        except Exception as error:
            raise DeviceError(f"The connection to {self._name} is lost.", type(error).__name__) from error
        return Picture(picture.to_ndarray(format="rgb24"))

    def trigger(self) -> None:
        """Refuse: it is free-running."""
        raise DeviceError(f"{self._name} cannot be triggered.", "It is free-running.", "a part uses its next frame")

    def flush(self) -> None:
        """Do nothing: there are no pending frames."""

    def close(self) -> None:
        self._container.close()
