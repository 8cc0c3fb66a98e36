"""GenICam cameras of any vendor, through harvesters and the vendor's GenTL producer (extra `genicam`)."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import ConfigError, DeviceError
from .options import NodeOptions
from .pixels import to_rgb
from .reconnect import LiveCamera, Mode, Picture

__all__ = ["open_genicam"]

_LOOK = 500  # milliseconds for an interface to list its cameras


def open_genicam(spec: str, options: Mapping[str, Any]) -> LiveCamera:
    """Open a camera named `genicam:PRODUCER.cti` (its first one) or `genicam:PRODUCER.cti#SERIAL`.

    Args:
        spec: the name, with or without `genicam:`.
        options: see `saae_runtime.line.cameras.options.NodeOptions`.

    Raises:
        ConfigError: harvesters is missing, there is no such producer, or the camera lacks a requested feature.
    """
    path, _, serial = spec.removeprefix("genicam:").partition("#")
    wanted = NodeOptions.read(options)
    harvester_type = _load()
    if not Path(path).is_file():
        raise ConfigError(
            f"genicam:{path}: no such GenTL producer.",
            "A camera's vendor installs a file that ends in .cti.",
            "list the folders of $GENICAM_GENTL64_PATH: ls ${GENICAM_GENTL64_PATH//:/ }",
        )
    name = f"genicam:{Path(path).name}" + (f"#{serial}" if serial else "")
    producer = _Producer.of(path, harvester_type)
    return LiveCamera(
        name,
        lambda: _GenicamDevice(name, producer, serial, wanted),
        wanted.buffer,
        wanted.silent_after,
        early=wanted.early,
    )


class _Producer:
    """A producer file, loaded once per process and shared by its cameras."""

    _known: dict[str, _Producer] = {}  # noqa: RUF012
    _lock = threading.Lock()

    def __init__(self, path: str, harvester_type: Any) -> None:
        self.lock = threading.Lock()
        self._open = 0
        self.harvester = harvester_type()
        try:
            self.harvester.add_file(path, check_existence=True, check_validity=True)
        except Exception as error:
            self.harvester.reset()
            raise ConfigError(
                f"genicam:{path}: not a GenTL producer.", f"{type(error).__name__}: {error}", "reinstall the producer"
            ) from error

    @classmethod
    def of(cls, path: str, harvester_type: Any) -> _Producer:
        key = str(Path(path).resolve())
        with cls._lock:
            if key not in cls._known:
                cls._known[key] = cls(key, harvester_type)
            return cls._known[key]

    def acquirer(self, name: str, serial: str) -> Any:
        """Search for a camera and connect to it."""
        with self.lock:
            self._look()
            there = [str(info.property_dict.get("serial_number")) for info in self.harvester.device_info_list]
            if not there or (serial and serial not in there):
                raise DeviceError(
                    f"{name} is not there.",
                    f"The producer sees {', '.join(there) if there else 'no camera'}.",
                    "check cable, power, network; close other programs that use it",
                )
            with _keep_interrupt():
                found = self.harvester.create({"serial_number": serial} if serial else 0)
            self._open += 1
            return found

    def release(self, acquirer: Any) -> None:
        """Release a camera, whatever its state."""
        with self.lock:
            self._open -= 1
            try:
                acquirer.stop()
            finally:
                acquirer.destroy()

    def _look(self) -> None:
        """Search for cameras. The library's own function would disconnect every camera of the producer."""
        if not self._open:
            self.harvester.update()
            return
        from harvesters.core import DeviceInfo

        listed = self.harvester.device_info_list
        known = {info.id_ for info in listed}
        for interface in {id(info.parent): info.parent for info in listed}.values():
            interface.module.update_device_info_list(_LOOK)
            for info in interface.module.device_info_list:
                if info.id_ not in known:
                    listed.append(DeviceInfo(module=info, parent=interface))


class _GenicamDevice:
    def __init__(self, name: str, producer: _Producer, serial: str, options: NodeOptions) -> None:
        self._name, self._options, self._producer = name, options, producer
        self.mode: Mode = options.trigger
        self._last: int | None = None
        self._acquirer = producer.acquirer(name, serial)
        try:
            self._nodes = self._acquirer.remote_device.node_map
            options.apply(name, self._node, lambda node, value: setattr(node, "value", value))
            if options.buffers:
                self._acquirer.num_buffers = options.buffers
            self._acquirer.start()
        except BaseException:
            self.close()
            raise

    def _node(self, name: str) -> Any:
        return getattr(self._nodes, name, None)

    def fetch(self, timeout: float) -> Picture | None:
        buffer = self._acquirer.try_fetch(timeout=timeout)
        if buffer is None:
            return None
        with buffer:
            lost = self._lost(buffer)
            part = buffer.payload.components[0]
            size = (int(part.height), int(part.width))
            frame = to_rgb(part.data, str(part.data_format), size, self._options.white_level, self._name)
        return Picture(frame, lost)

    def _lost(self, buffer: Any) -> int:
        """Number of missing frames by their numbers, if the producer numbers them."""
        try:
            number = int(buffer.module.frame_id)
        except Exception:  # not every producer numbers frames
            return 0
        before, self._last = self._last, number
        return max(number - before - 1, 0) if before is not None else 0

    def trigger(self) -> None:
        self._nodes.TriggerSoftware.execute()

    def flush(self) -> None:
        self._acquirer.stop()
        self._last = None
        self._acquirer.start()

    def close(self) -> None:
        self._producer.release(self._acquirer)


@contextmanager
def _keep_interrupt() -> Iterator[None]:
    """Keep the handler of Ctrl-C, which harvesters replaces when it opens a camera in the main thread."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def _load() -> Any:
    try:
        from harvesters.core import Harvester
    except ImportError as error:
        raise ConfigError(
            "GenICam cameras are not available.",
            f"harvesters cannot be imported: {error}",
            "pip install 'saae[genicam]'",
        ) from error
    # It logs errors with a traceback that are raised and in the camera's stats, too.
    logging.getLogger("harvesters").setLevel(logging.CRITICAL)
    return Harvester
