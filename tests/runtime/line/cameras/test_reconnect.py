"""The shared reader of live cameras, over a device that does what a test tells it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from saae_runtime.errors import ConfigError, DeviceError
from saae_runtime.line.camera import BadFrameError, EndOfFrames, NoFrameError
from saae_runtime.line.cameras.reconnect import BackOff, LiveCamera, Mode, Picture

QUICK = 0.001


class Bench:
    """A camera on a bench: frames are numbers, put by the test or taken by a trigger."""

    def __init__(self, mode: Mode = "off") -> None:
        self.mode: Mode = mode
        self.there = True
        self.changed = threading.Condition()
        self.frames: list[int | Exception | tuple[int, int]] = []
        self.taken = 0
        self.lazy = False
        self.opened = self.closed = self.flushed = 0

    def connect(self) -> Device:
        if not self.there:
            raise DeviceError("the bench camera is unplugged")
        self.opened += 1
        return Device(self)

    def put(self, *frames: int | Exception | tuple[int, int]) -> None:
        with self.changed:
            self.frames += frames
            self.changed.notify_all()


class Device:
    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.mode: Mode = bench.mode

    def fetch(self, timeout: float) -> Picture | None:
        bench = self.bench
        with bench.changed:
            if not bench.there:
                raise DeviceError("the bench camera was unplugged")
            bench.changed.wait_for(lambda: bench.frames, timeout)
            if not bench.frames:
                return None
            item = bench.frames.pop(0)
        if isinstance(item, Exception):
            raise item
        number, lost = item if isinstance(item, tuple) else (item, 0)
        return Picture(np.full((2, 2, 3), number, np.uint8), lost)

    def trigger(self) -> None:
        self.bench.taken += 1
        if not self.bench.lazy:
            self.bench.put(self.bench.taken)

    def flush(self) -> None:
        self.bench.flushed += 1
        with self.bench.changed:
            self.bench.frames.clear()

    def close(self) -> None:
        self.bench.closed += 1


def opened(bench: Bench, **options: object) -> LiveCamera:
    return LiveCamera("bench", bench.connect, back_off=BackOff(QUICK, QUICK), **options)  # type: ignore[arg-type]


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_the_newest_frame_is_kept_and_the_older_ones_are_counted() -> None:
    bench = Bench()
    camera = opened(bench)
    bench.put(1, 2, (3, 4), 5)
    until(lambda: camera.stats.dropped == 7)  # three that nobody fetched, four that the camera lost
    shot = camera.grab(10)
    assert (shot.frame[0, 0, 0], shot.dropped) == (5, 7)
    bench.put(6)
    assert camera.grab(10).dropped == 0
    stats = camera.stats
    assert (stats.grabbed, stats.dropped, stats.connected, stats.reconnects) == (2, 7, True, 0)
    camera.close()


def test_a_camera_that_goes_is_looked_for_and_counted() -> None:
    bench = Bench()
    camera = opened(bench)
    for round_ in range(1, 4):
        bench.there = False
        until(lambda: not camera.stats.connected)
        with pytest.raises(NoFrameError, match="disconnected"):
            camera.grab(0.01)
        with pytest.raises(DeviceError, match="not there"):
            camera.trigger()
        bench.there = True
        until(lambda: camera.stats.connected)
        bench.put(round_)
        assert camera.grab(10).frame[0, 0, 0] == round_
        assert camera.stats.reconnects == round_
    assert "unplugged" in camera.stats.last_error
    camera.close()
    assert bench.opened == bench.closed == 4


def test_a_camera_that_is_not_there_at_the_start_is_found_later() -> None:
    bench = Bench()
    bench.there = False
    camera = opened(bench)
    assert not camera.stats.connected
    bench.there = True
    bench.put(1)
    assert camera.grab(30).frame[0, 0, 0] == 1
    assert camera.stats.reconnects == 0
    camera.close()


def test_silence_counts_as_gone_unless_it_waits_for_triggers() -> None:
    bench = Bench()
    camera = opened(bench, silent_after=0.05)
    until(lambda: camera.stats.reconnects >= 2)
    assert "no frame" in camera.stats.last_error
    camera.close()
    bench = Bench("software")
    camera = opened(bench, silent_after=0.01)
    time.sleep(0.3)
    assert camera.stats.reconnects == 0
    camera.close()


def test_a_triggered_picture_is_the_one_of_its_trigger() -> None:
    bench = Bench("software")
    camera = opened(bench)
    for number in range(1, 6):
        camera.trigger()
        assert camera.grab(10).frame[0, 0, 0] == number
    assert bench.flushed == 0
    camera.close()


def test_a_late_picture_never_serves_the_next_part() -> None:
    bench = Bench("software")
    camera = opened(bench)
    bench.lazy = True
    camera.trigger()
    with pytest.raises(NoFrameError):
        camera.grab(0.02)
    bench.put(99)  # of the part before: it arrives while nobody waits, or just before the next trigger
    bench.lazy = False
    camera.trigger()
    assert camera.grab(10).frame[0, 0, 0] == 2
    assert bench.flushed == 1
    camera.close()


def test_of_a_free_camera_the_second_frame_after_the_trigger_counts() -> None:
    bench = Bench()
    camera = opened(bench)
    bench.put(1)
    until(lambda: camera._number == 1)
    camera.trigger()
    bench.put(2, 3)
    assert camera.grab(10).frame[0, 0, 0] == 3
    dropped = camera.stats.dropped
    bench.put(*range(4, 20))
    until(lambda: camera._number == 19)
    assert camera.stats.dropped == dropped  # between parts nothing is missed
    camera.close()


def test_frames_within_the_delay_after_a_trigger_show_what_was_before() -> None:
    bench = Bench()
    camera = opened(bench, delay=0.8)
    camera.trigger()
    bench.put(*[0] * 10)  # as many as may be: taken before the trigger
    with pytest.raises(NoFrameError):
        camera.grab(0.85)
    bench.put(0, 1)  # the first one may have been exposed before, as without a delay
    assert camera.grab(10).frame[0, 0, 0] == 1
    camera.close()


def test_a_picture_of_the_cameras_own_input_comes_after_the_trigger_or_a_little_before() -> None:
    bench = Bench("hardware")
    camera = opened(bench, early=3600.0, keep=3)
    bench.put(1)
    until(lambda: camera._number == 1)
    camera.trigger()
    assert camera.grab(10).frame[0, 0, 0] == 1
    camera.close()
    camera = opened(bench)
    bench.put(2)
    until(lambda: camera._number == 1)
    time.sleep(0.01)
    camera.trigger()  # frame 2 was taken for nobody
    bench.put(3)
    assert camera.grab(10).frame[0, 0, 0] == 3
    assert bench.taken == 0
    camera.close()


def test_broken_frames_are_told_and_counted() -> None:
    bench = Bench()
    camera = opened(bench, keep=2)
    bench.put(BadFrameError("packets are lost"), 2)
    with pytest.raises(BadFrameError, match="packets"):
        camera.grab(10)
    assert camera.grab(10).frame[0, 0, 0] == 2
    assert (camera.stats.bad, camera.stats.connected) == (1, True)
    camera.close()


def test_frames_that_can_never_be_used_end_it_with_the_cure() -> None:
    bench = Bench()
    camera = opened(bench)
    bench.put(ConfigError("BayerRG8", "", "set pixel_format"))
    with pytest.raises(ConfigError, match="pixel_format"):
        camera.grab(10)
    with pytest.raises(ConfigError, match="pixel_format"):
        camera.grab(10)
    camera.close()


def test_close_ends_a_grab() -> None:
    camera = opened(Bench())
    seen: list[type] = []

    def grab() -> None:
        try:
            camera.grab(60)
        except EndOfFrames:
            seen.append(EndOfFrames)

    thread = threading.Thread(target=grab)
    thread.start()
    camera.close()
    camera.close()
    thread.join(30)
    assert seen == [EndOfFrames]


def test_pauses_grow_to_a_limit() -> None:
    pauses = BackOff(0.2, 1.0)
    assert [pauses.next() for _ in range(5)] == [0.2, 0.4, 0.8, 1.0, 1.0]
    pauses.succeeded()
    assert pauses.next() == 0.2
