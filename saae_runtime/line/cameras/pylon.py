"""Basler cameras through pypylon (extra `pylon`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError, DeviceError
from ..camera import BadFrameError
from .options import NodeOptions
from .pixels import to_rgb
from .reconnect import LiveCamera, Mode, Picture

__all__ = ["open_pylon"]

_READY = 1000  # milliseconds until a camera must be ready for a trigger


def open_pylon(spec: str, options: Mapping[str, Any]) -> LiveCamera:
    """Open a camera named `pylon:` (the first one) or `pylon:SERIAL`.

    Args:
        spec: the name.
        options: see `saae_runtime.line.cameras.options.NodeOptions`.

    Raises:
        ConfigError: pypylon is missing, or the camera lacks a requested feature.
    """
    serial = spec.removeprefix("pylon:").removeprefix("pylon")
    wanted = NodeOptions.read(options)
    library = _load()
    name = f"pylon:{serial}" if serial else "pylon"
    return LiveCamera(
        name,
        lambda: _PylonDevice(name, library, serial, wanted),
        wanted.buffer,
        wanted.silent_after,
        early=wanted.early,
    )


class _PylonDevice:
    def __init__(self, name: str, library: Any, serial: str, options: NodeOptions) -> None:
        self._name, self._pylon, self._options = name, library, options
        self.mode: Mode = options.trigger
        factory = library.TlFactory.GetInstance()
        there = {info.GetSerialNumber(): info for info in factory.EnumerateDevices()}
        if not there or (serial and serial not in there):
            raise DeviceError(
                f"{name} is not there.",
                f"pylon sees {', '.join(there) if there else 'no camera'}.",
                "check cable, power, network; close other programs that use it",
            )
        self._camera = library.InstantCamera(
            factory.CreateDevice(there[serial] if serial else next(iter(there.values())))
        )
        try:
            self._camera.Open()
            options.apply(name, self._node, lambda node, value: node.SetValue(value))
            if options.buffers:
                self._camera.MaxNumBuffer.SetValue(options.buffers)
            self._start()
        except BaseException:
            self.close()
            raise

    def _node(self, name: str) -> Any:
        try:
            found = getattr(self._camera, name)
        except Exception:  # the library's own error for a missing node
            return None
        valid = getattr(found, "IsValid", None)  # newer releases return a placeholder
        return found if valid is None or valid() else None

    def _start(self) -> None:
        self._last: int | None = None
        self._camera.StartGrabbing(self._pylon.GrabStrategy_OneByOne)

    def fetch(self, timeout: float) -> Picture | None:
        found = self._camera.RetrieveResult(int(1000 * timeout), self._pylon.TimeoutHandling_Return)
        if not found.IsValid():
            if self._camera.IsCameraDeviceRemoved() or not self._camera.IsGrabbing():
                raise DeviceError(f"{self._name} was removed.")
            return None
        try:
            if not found.GrabSucceeded():
                raise BadFrameError(
                    f"{self._name}: a frame arrived damaged.",
                    str(found.ErrorDescription),
                    "check the network",
                    self._name,
                )
            number = int(found.BlockID)
            lost = max(number - self._last - 1, 0) if self._last is not None else 0
            self._last = number
            pixel_format = str(self._camera.PixelFormat.GetValue())
            size = (int(found.Height), int(found.Width))
            frame = to_rgb(found.Array, pixel_format, size, self._options.white_level, self._name)
            return Picture(frame, lost)
        finally:
            found.Release()

    def trigger(self) -> None:
        self._camera.WaitForFrameTriggerReady(_READY, self._pylon.TimeoutHandling_ThrowException)
        self._camera.ExecuteSoftwareTrigger()

    def flush(self) -> None:
        self._camera.StopGrabbing()
        self._start()

    def close(self) -> None:
        self._camera.Close()


def _load() -> Any:
    try:
        from pypylon import pylon
    except ImportError as error:
        raise ConfigError(
            "Basler cameras are not available.", f"pypylon cannot be imported: {error}", "pip install 'saae[pylon]'"
        ) from error
    return pylon
