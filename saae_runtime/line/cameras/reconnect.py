"""Reading, reconnecting and triggering for all live cameras."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ...ending import native_call
from ...errors import ConfigError, DeviceError, SaaeError
from ..camera import BadFrameError, CameraStats, EndOfFrames, NoFrameError, Shot
from ..part import now

__all__ = ["BackOff", "Device", "LiveCamera", "Mode", "Picture"]

_TICK = 0.1  # seconds of one wait for a frame
_FLUSH = 5.0  # seconds for a device to drop pending frames
_CLOSE = 1.0  # seconds that `close` waits for the reading thread


@dataclass(frozen=True, eq=False)
class Picture:
    """A frame of a device: uint8 H x W x 3 (RGB) in its own memory, and how many frames were lost before it."""

    frame: NDArray[np.uint8]
    lost: int = 0


Mode = Literal["off", "software", "hardware"]
"""What makes a camera take a frame: nothing (free-running), `trigger` (one each), or the camera's input."""


class Device(Protocol):
    """A connected camera. One thread calls `fetch`, `flush` and `close`, another one `trigger`."""

    @property
    def mode(self) -> Mode:
        """What makes it take frames."""

    def fetch(self, timeout: float) -> Picture | None:
        """The next frame; None if none came within about `timeout` seconds.

        Raises:
            BadFrameError: one frame is lost.
            ConfigError: the frames can never be used.
            Exception: the camera is lost.
        """

    def trigger(self) -> None:
        """Take one frame."""

    def flush(self) -> None:
        """Drop pending frames, so that the next one is taken afterwards."""

    def close(self) -> None:
        """Release it, whatever its state."""


class BackOff:
    """Pauses between attempts, twice as long each time.

    Args:
        first, longest: seconds.
    """

    def __init__(self, first: float = 0.2, longest: float = 10.0) -> None:
        self._first = self._next = first
        self._longest = longest

    def next(self) -> float:
        """Seconds to wait now."""
        pause, self._next = self._next, min(2 * self._next, self._longest)
        return pause

    def succeeded(self) -> None:
        """Start again with the first pause."""
        self._next = self._first


class LiveCamera:
    """A camera that a thread reads all the time, so that the newest frame is available.

    A device that fails is closed, and opened again after growing pauses. Frames that are not fetched are dropped, the
    oldest first, and counted. Once `trigger` is used they are no longer counted, because then a frame without a
    trigger is not a missed part.

    A frame that was taken for one part is never used for another: before each trigger, waiting frames are dropped, and
    if a triggered frame is still to come, the device drops its pending ones. A free-running camera gives the second
    frame after the trigger, because the first may have been exposed before it; frames that need `delay` seconds from
    the exposure to here count as if the trigger came that much later. A camera with a hardware trigger gives
    the first frame after the line's trigger, or up to `early` seconds before it.

    Args:
        name: in shots and errors.
        connect: opens the device.
        keep: largest number of waiting frames.
        silent_after: seconds without a frame after which a free-running device counts as lost; None: never.
        back_off: pauses between attempts to connect.
        early: seconds that a frame of a hardware trigger may come before the line's trigger.
        delay: seconds after a trigger for which frames of a free-running camera still show what was before it.

    Raises:
        ConfigError: from the first attempt to connect. A device that is only missing is searched for from then on.
    """

    live = True

    def __init__(
        self,
        name: str,
        connect: Callable[[], Device],
        keep: int = 1,
        silent_after: float | None = 5.0,
        back_off: BackOff | None = None,
        early: float = 0.0,
        delay: float = 0.0,
    ) -> None:
        self._early, self._delay = early, delay
        self._name, self._connect, self._keep, self._silent_after = name, connect, keep, silent_after
        self._back_off = back_off or BackOff()
        self._changed = threading.Condition()
        self._shots: deque[tuple[float, Shot | SaaeError]] = deque()  # with its arrival time
        self._stats = CameraStats(connected=False)
        self._device: Device | None = None
        self._number = 0
        self._dropped = 0
        self._skip = 0
        self._from = 0.0  # time before which frames are for no part
        self._owed = False
        self._asked = False
        self._flushing = False
        self._closed = False
        self._broken: ConfigError | None = None
        self._ever = self._tried = False
        self._thread = threading.Thread(target=self._read, name=f"camera-{name}", daemon=True)
        self._thread.start()
        try:
            with self._changed:  # connect on the thread, because connecting may hang where Ctrl-C does not reach it
                self._changed.wait_for(lambda: self._tried)
            if self._broken is not None:
                raise self._broken
        except BaseException:
            self._closed = True
            raise

    @property
    def stats(self) -> CameraStats:
        """Counts so far."""
        with self._changed:
            return self._stats

    def trigger(self) -> None:
        """Take one frame now. For a free-running camera, only frames from now on count.

        Raises:
            DeviceError: it is not connected, or refuses the trigger.
        """
        with self._changed:
            self._asked = True
            self._dropped = 0
            device = self._device
            if device is None:
                self._shots.clear()
                raise self._gone()
            if device.mode == "hardware":
                oldest = time.monotonic() - self._early
                while self._shots and self._shots[0][0] < oldest:
                    self._shots.popleft()
                return
            self._shots.clear()
            if device.mode == "off":
                self._skip, self._from = 1, time.monotonic() + self._delay
                return
            if self._owed:
                self._flushing = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: not self._flushing or self._closed, _FLUSH)
                if self._flushing or self._device is not device:
                    raise self._gone()
                self._shots.clear()
            self._owed = True
        try:
            device.trigger()
        except Exception as error:
            raise DeviceError(
                f"{self._name}: the frame could not be triggered.",
                f"{type(error).__name__}: {error}",
                "see the camera",
            ) from error

    def grab(self, timeout: float) -> Shot:
        """The next frame; see `saae_runtime.line.camera.Camera`."""
        with self._changed:
            self._changed.wait_for(lambda: self._shots or self._closed or self._broken, timeout)
            if self._shots:
                _, item = self._shots.popleft()
                self._changed.notify_all()
                self._owed = False
                if isinstance(item, SaaeError):
                    raise item
                self._stats = replace(self._stats, grabbed=self._stats.grabbed + 1)
                return item
            if self._closed:
                raise EndOfFrames
            if self._broken is not None:
                raise self._broken
            away = "" if self._stats.connected else f"It is disconnected: {self._stats.last_error}"
            raise NoFrameError(f"{self._name} gave no frame within {timeout:g} s.", away, "check cable, power, trigger")

    def close(self) -> None:
        """Release the camera. May be called twice.

        A device that hangs in a call is released by the reading thread when the call returns.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(_CLOSE)

    # --- the reading thread ---

    def _read(self) -> None:
        self._try_to_connect(first=True)
        with self._changed:
            self._tried = True
            self._changed.notify_all()
        while True:
            with self._changed:
                if self._closed or self._broken is not None:
                    break
                device = self._device
            if device is None:
                self._pause(self._back_off.next())
                self._try_to_connect()
                continue
            if self._serve(device):
                self._back_off.succeeded()
            self._disconnect(device)
        if self._device is not None:
            self._disconnect(self._device)

    def _serve(self, device: Device) -> bool:
        """Read until the device fails or the camera is closed; return whether it gave a frame."""
        gave = False
        heard = time.monotonic()
        while True:
            with self._changed:
                if self._closed:
                    return gave
                flush = self._flushing
            try:
                if flush:
                    with native_call():
                        device.flush()
                    with self._changed:
                        self._shots.clear()
                        self._flushing = False
                        self._changed.notify_all()
                with native_call():
                    picture = device.fetch(_TICK)
            except BadFrameError as error:
                gave, heard = True, time.monotonic()
                self._put(error, 0)
                continue
            except ConfigError as error:
                with self._changed:
                    self._broken = error
                    self._changed.notify_all()
                return gave
            except Exception as error:
                self._note(error)
                return gave
            if picture is not None:
                gave, heard = True, time.monotonic()
                self._put(picture.frame, picture.lost)
            elif device.mode == "off" and self._silent_after is not None:
                silent = time.monotonic() - heard
                if silent > self._silent_after:
                    self._note(NoFrameError(f"{self._name} has given no frame for {silent:.0f} s."))
                    return gave

    def _put(self, item: NDArray[np.uint8] | BadFrameError, lost: int) -> None:
        with self._changed:
            self._number += 1
            if time.monotonic() < self._from:
                return
            if self._skip:
                self._skip -= 1
                return
            if self._flushing:  # taken for a part that is no longer waited for
                return
            if isinstance(item, BadFrameError):
                self._stats = replace(self._stats, bad=self._stats.bad + 1, last_error=item.what)
            before = 0  # lost before the frames that are dropped now, and already counted
            while len(self._shots) >= self._keep:
                _, old = self._shots.popleft()
                before += old.dropped if isinstance(old, Shot) else 0
                lost += 1
            if self._asked:
                before = lost = 0
            self._dropped += before + lost
            self._stats = replace(self._stats, dropped=self._stats.dropped + lost)
            if isinstance(item, BadFrameError):
                self._shots.append((time.monotonic(), item))
            else:
                shot = Shot(item, f"{self._name}#{self._number}", now(), self._dropped)
                self._shots.append((time.monotonic(), shot))
                self._dropped = 0
            self._changed.notify_all()

    def _try_to_connect(self, first: bool = False) -> None:
        try:
            with native_call():
                device = self._connect()
        except ConfigError as error:
            if first:
                self._broken = error
            self._note(error)
            return
        except Exception as error:
            self._note(error)
            return
        with self._changed:
            again = self._ever
            self._ever = True
            self._device = device
            self._owed = self._flushing = False
            self._shots.clear()
            self._stats = replace(self._stats, connected=True, reconnects=self._stats.reconnects + again)
            self._changed.notify_all()

    def _disconnect(self, device: Device) -> None:
        with self._changed:
            self._device = None
            self._flushing = False
            self._stats = replace(self._stats, connected=False)
            self._changed.notify_all()
        try:
            device.close()
        except Exception as error:  # it is lost already
            if not self._closed:
                self._note(error)

    def _note(self, error: Exception) -> None:
        text = (
            f"{error.what} {error.why}".strip() if isinstance(error, SaaeError) else f"{type(error).__name__}: {error}"
        )
        with self._changed:
            self._stats = replace(self._stats, last_error=text)

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed, seconds)

    def _gone(self) -> DeviceError:
        return DeviceError(
            f"{self._name} is not there.",
            self._stats.last_error,
            "check cable and power; the connection is retried",
        )
