"""The streaming pipeline: order, overlap, failures and clean ends, on a backend that records its calls."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from saae_runtime.backends.base import Backend, RawOutputs, Ticket
from saae_runtime.errors import DeviceError
from saae_runtime.stream import Channel, Closed, Pipeline


class Recorder(Backend):
    """Scores a frame by its first pixel, and keeps a log of submits and collects."""

    name = "recorder"
    description = "a backend that keeps a log"
    precision = "fp32"
    frame_size = (2, 2)

    def __init__(self, slots: int = 1, fail_at: int | None = None) -> None:
        self.slots = slots
        self.log: list[tuple[str, int]] = []
        self.fail_at = fail_at

    def infer(self, frames: NDArray[np.uint8], threshold: float) -> RawOutputs:
        score = frames[:, 0, 0, 0].astype(np.float32)
        anomaly_map = np.broadcast_to(score[:, None, None], (len(frames), 2, 2)).copy()
        return RawOutputs(anomaly_map, score, anomaly_map > threshold)

    def submit(self, frames: NDArray[np.uint8], threshold: float) -> Ticket:
        number = int(frames[0, 0, 0, 0])
        self.log.append(("submit", number))
        if number == self.fail_at:
            raise DeviceError("the device is lost")
        return Ticket((number, self.infer(frames, threshold)))

    def collect(self, ticket: Ticket) -> RawOutputs:
        number, outputs = ticket.payload
        self.log.append(("collect", number))
        return outputs

    def close(self) -> None:
        pass


def frame(number: int) -> NDArray[np.uint8]:
    return np.full((2, 2, 3), number, np.uint8)


def prepare(item: object) -> tuple[int, NDArray[np.uint8]]:
    if item == "bad":
        raise ValueError("a frame that cannot be used")
    assert isinstance(item, int)
    return item, frame(item)


def pipeline(source, backend: Backend, batch_size: int = 1) -> Pipeline[int]:
    return Pipeline(source, prepare, backend, 0.5, batch_size)


def flat(results) -> Iterator[tuple[int, float]]:
    for contexts, outputs in results:
        yield from zip(contexts, outputs.score.tolist(), strict=True)


def exhaust(results: Iterator[tuple[int, float]], into: list[int]) -> None:
    for number, _ in results:
        into.append(number)


def saae_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("saae-")]


def assert_no_threads() -> None:
    deadline = time.monotonic() + 5
    while saae_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert saae_threads() == []


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_order_is_kept_and_everything_collected_once(slots: int, batch_size: int) -> None:
    backend = Recorder(slots)
    assert list(flat(pipeline(range(40), backend, batch_size))) == [(i, float(i)) for i in range(40)]
    submitted = [number for verb, number in backend.log if verb == "submit"]
    collected = [number for verb, number in backend.log if verb == "collect"]
    assert submitted == collected == list(range(0, 40, batch_size))
    assert_no_threads()


class Gated(Recorder):
    """Ends no batch before `slots` of them are in flight, or before everything was submitted."""

    def __init__(self, slots: int, batches: int) -> None:
        super().__init__(slots)
        self.batches = batches
        self.submitted = self.collected = self.most = 0
        self.changed = threading.Condition()

    def submit(self, frames: NDArray[np.uint8], threshold: float) -> Ticket:
        with self.changed:
            self.submitted += 1
            self.most = max(self.most, self.submitted - self.collected)
            self.changed.notify_all()
        return super().submit(frames, threshold)

    def collect(self, ticket: Ticket) -> RawOutputs:
        with self.changed:
            full = lambda: self.submitted - self.collected == self.slots or self.submitted == self.batches  # noqa: E731
            assert self.changed.wait_for(full, 10)
            self.collected += 1
        return super().collect(ticket)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_as_many_in_flight_as_there_are_slots(slots: int) -> None:
    backend = Gated(slots, 20)
    assert list(flat(pipeline(range(20), backend))) == [(i, float(i)) for i in range(20)]
    assert backend.most == slots


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_no_result_waits_for_a_frame_that_is_not_there(slots: int, batch_size: int) -> None:
    """A triggered camera: the next frames come only when the results before them have been used."""
    used = threading.Semaphore(0)

    def source() -> Iterator[int]:
        for part in range(6):
            for item in range(batch_size):
                yield part * batch_size + item
            assert used.acquire(timeout=10), f"the result of part {part} was withheld"

    seen = []
    for number, _ in flat(pipeline(source(), Recorder(slots), batch_size)):
        seen.append(number)
        if len(seen) % batch_size == 0:
            used.release()
    assert seen == list(range(6 * batch_size))
    assert_no_threads()


def test_failure_of_a_collect_stops_the_source_and_collects_the_rest() -> None:
    class Failing(Recorder):
        def collect(self, ticket: Ticket) -> RawOutputs:
            outputs = super().collect(ticket)
            if ticket.payload[0] == 7:
                raise DeviceError("the device is lost")
            return outputs

    backend = Failing(3)
    seen: list[int] = []
    with pytest.raises(DeviceError):
        exhaust(flat(pipeline(iter(range(100)), backend)), seen)
    assert seen == list(range(7))
    submitted = [number for verb, number in backend.log if verb == "submit"]
    assert [number for verb, number in backend.log if verb == "collect"] == submitted
    assert len(submitted) < 30
    assert_no_threads()


def test_empty_source() -> None:
    assert list(pipeline([], Recorder())) == []
    assert_no_threads()


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("slots", [1, 3])
def test_failure_of_the_source_comes_after_the_results_before_it(slots: int, batch_size: int) -> None:
    def source() -> Iterator[int]:
        yield from range(5)
        raise OSError("camera unplugged")

    seen: list[int] = []
    with pytest.raises(OSError, match="camera unplugged"):
        exhaust(flat(pipeline(source(), Recorder(slots), batch_size)), seen)
    assert seen == list(range(5))
    assert_no_threads()


def test_bad_item_comes_in_its_place() -> None:
    seen: list[int] = []
    with pytest.raises(ValueError, match="cannot be used"):
        exhaust(flat(pipeline([0, 1, 2, "bad", 4], Recorder(), 2)), seen)
    assert seen == [0, 1, 2]
    assert_no_threads()


def test_failure_of_the_device_stops_the_source() -> None:
    taken = []

    def source() -> Iterator[int]:
        for number in range(200):
            taken.append(number)
            yield number

    backend = Recorder(2, fail_at=10)
    seen: list[int] = []
    with pytest.raises(DeviceError):
        exhaust(flat(pipeline(source(), backend)), seen)
    assert seen == list(range(len(seen)))
    assert len(taken) < 30
    submitted = {number for verb, number in backend.log if verb == "submit"} - {10}
    assert {number for verb, number in backend.log if verb == "collect"} == submitted
    assert_no_threads()


@pytest.mark.parametrize("slots", [1, 3])
def test_consumer_that_stops_early(slots: int) -> None:
    backend = Recorder(slots)
    endless = iter(int, 1)
    results = flat(pipeline(endless, backend))
    next(results)
    next(results)
    results.close()
    assert_no_threads()
    assert len([v for v, _ in backend.log if v == "submit"]) == len([v for v, _ in backend.log if v == "collect"])


def test_stop_from_another_thread_reaches_the_consumer() -> None:
    waiting = threading.Event()
    release = threading.Event()

    def source() -> Iterator[int]:
        yield 0
        waiting.set()
        release.wait(10)
        yield 1

    stream = pipeline(source(), Recorder())
    threading.Thread(target=lambda: (waiting.wait(10), stream.stop(DeviceError("closed")), release.set())).start()
    with pytest.raises(DeviceError, match="closed"):
        list(flat(stream))
    assert_no_threads()


def test_source_is_read_ahead_but_not_without_bound() -> None:
    taken = []

    def source() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    results = flat(pipeline(source(), Recorder(1)))
    next(results)
    deadline = time.monotonic() + 5
    while len(taken) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert 4 <= len(taken) <= 10
    results.close()


def test_channel_wakes_a_waiting_writer_and_reader() -> None:
    channel: Channel[int] = Channel(1)
    channel.put(1)
    outcome = []

    def write() -> None:
        try:
            channel.put(2)
        except Closed:
            outcome.append("closed")

    writer = threading.Thread(target=write)
    writer.start()
    channel.cancel()
    writer.join(5)
    assert outcome == ["closed"]
    with pytest.raises(Closed):
        channel.get()
