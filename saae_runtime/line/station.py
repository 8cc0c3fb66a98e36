"""A station: waits for parts, judges each in time, and says what became of it. One thread each, and one that judges."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, shown
from ..meter import Meter, Reading, one_line
from ..result import Result
from .camera import Camera, CameraStats, EndOfFrames
from .config import StationConfig
from .feeds import Feed, FreeFeed, Job, TriggeredFeed
from .part import BY_SCORE, TIMEOUT, Choice, Part, Trigger, TriggerSource, Verdict
from .recipes import Recipe, RecipeBook
from .trouble import Trouble

__all__ = ["MOST_REGIONS", "Chosen", "Judged", "Station"]

MOST_REGIONS = 100
"""Regions in a record, the strongest."""

_WAIT = 0.2  # seconds between two looks whether to end

Judged = Callable[[Part, "NDArray[np.uint8] | None", "Result | None", "Recipe | None"], None]
"""Told about each part, in order, behind its verdict: record, frame, result, recipe; None for what there is none of."""

Chosen = Callable[["Station", Choice], None]
"""Told about each change of the recipe that the line asks for."""


class Station:
    """One station.

    The verdict is computed on a second thread: when it is not there in time, the station goes on without it, and the
    part is NG. Every exception on the way to a verdict is an NG with its reason; none ends the station.

    Args:
        config: of line.toml.
        camera: closed by `close`.
        book: all recipes.
        judged: told about each part; must not block.
        source: who asks for parts; None: each frame is a part.
        chosen: told when the line asks for another recipe; must not block.
        elsewhere: what the station needs besides and that has stopped for good, in words; empty for nothing.

    Attributes:
        meter: counts `OK`, `NG`, `timeout`, `error` (both of them NG), `missed` (among these: parts that were asked for
            and that the station never took), `dropped`; latencies from trigger to verdict.
    """

    def __init__(
        self,
        config: StationConfig,
        camera: Camera,
        book: RecipeBook,
        judged: Judged,
        source: TriggerSource | None = None,
        chosen: Chosen = lambda station, choice: None,
        elsewhere: Callable[[], str] = lambda: "",
    ) -> None:
        self.config = config
        self.meter = Meter()
        for name in ("OK", "NG", "timeout", "error", "missed", "dropped"):
            self.meter.count(name, 0)
        self._camera, self._book, self._judged, self._source = camera, book, judged, source
        self._chosen = chosen
        self._lock = threading.Lock()
        self._recipe = config.recipes[0]
        book.get(self._recipe)
        self._stop = threading.Event()
        self._feed: Feed | None = None
        self._worker = _Worker(f"judge-{config.name}")
        self._trouble = Trouble(camera, lambda: self.stuck_seconds, elsewhere)
        self._faulty = False  # whether the source shows a fault of ours
        self._thread = threading.Thread(target=self._run, name=f"station-{config.name}", daemon=True)
        self.finished = threading.Event()

    @property
    def name(self) -> str:
        """Of the station."""
        return self.config.name

    @property
    def recipe(self) -> str:
        """Name of the recipe in force where a part names none."""
        return self._recipe

    @property
    def source(self) -> TriggerSource | None:
        """Who asks for parts; None: each frame is a part."""
        return self._source

    @property
    def computing(self) -> bool:
        """Whether a verdict is being computed now."""
        return self._worker.busy_seconds > 0

    @property
    def camera_stats(self) -> CameraStats:
        """Of its camera."""
        return self._camera.stats

    @property
    def trouble(self) -> str:
        """Why it cannot judge now, in words; empty: it can. Whoever asks for parts sees it as a fault."""
        return self._trouble.look()

    @property
    def stuck_seconds(self) -> float:
        """For how long the verdict that is being computed is overdue; 0 where none is."""
        return max(self._worker.busy_seconds - self.config.verdict_timeout, 0.0)

    def reading(self) -> Reading:
        """What its meter shows."""
        return self.meter.read()

    def start(self) -> None:
        """Begin to work."""
        if self._source is None:
            self._feed = FreeFeed(self._camera, self._bind, self.config.queue, self.config.queue_size, self.meter)
        else:
            patience = self.config.grab_timeout or self.config.verdict_timeout
            self._feed = TriggeredFeed(self._source, self._camera, self._bind, patience)
        self._thread.start()

    def switch(self, recipe: str) -> Recipe:
        """Put another recipe in force: every part that comes after this call is judged by it, none before.

        Returns:
            The recipe, as it is now.

        Raises:
            ConfigError: the station has no such recipe; the one before stays.
        """
        if recipe not in self.config.recipes:
            raise ConfigError(
                f"Station {self.name} has no recipe {shown(recipe)}.",
                "A station can use only its recipes in line.toml.",
                f"one of {', '.join(self.config.recipes)}",
            )
        with self._lock:
            found = self._book.get(recipe)
            self._recipe = recipe
        return found

    def stop(self) -> None:
        """Take no further part; return at once. See `join`."""
        self._stop.set()
        if self._feed is not None:
            self._feed.close()

    def join(self, timeout: float) -> bool:
        """Wait for the part in work, and those that wait; whether all of them are done."""
        if self._feed is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def drop_waiting(self) -> None:
        """Give up the frames that wait, which are counted as dropped."""
        if isinstance(self._feed, FreeFeed):
            self._feed.drop_waiting()

    def close(self) -> None:
        """Stop and let go of the camera. May be called twice."""
        self.stop()
        self._worker.stop()
        self._camera.close()

    # --- the station's thread ---

    def _run(self) -> None:
        assert self._feed is not None
        try:
            while True:
                self.meter.beat()
                if self._stop.is_set() and isinstance(self._feed, TriggeredFeed):
                    return
                try:
                    self._show_trouble()
                    self._tell_untaken()
                    job = self._feed.next(_WAIT)
                except EndOfFrames:
                    return
                except Exception as error:  # a trigger source that broke: it is asked again
                    self.meter.fail(error)
                    self._stop.wait(_WAIT)
                    continue
                if job is not None:
                    self._take(job)
        finally:
            if self._source is not None:
                self._source.close()  # the line sees no station any more
                self._tell_untaken()
            self.finished.set()

    def _show_trouble(self) -> None:
        """Raise the fault of whoever asks for parts while no part can be judged, and clear it afterwards."""
        if self._source is None:  # frames come by themselves, and each tries the engine again
            return
        self._trouble.probe(
            self._book.get,
            lambda recipe, frame: self._worker.run(lambda: recipe.judge(frame), self.config.verdict_timeout),
        )
        reason = self._trouble.look()
        if reason:
            self._source.fault(reason)
        elif self._faulty:
            self._source.recover()
        if bool(reason) != self._faulty:
            self._faulty = bool(reason)
            if reason:
                self.meter.fail(reason)

    def _tell_untaken(self) -> None:
        """Make the record of each part that was asked for and never taken, and tell of recipes that were chosen."""
        if self._source is None:
            return
        for choice in self._source.choices():
            try:
                self._chosen(self, choice)
            except Exception as error:
                self.meter.fail(error)
        for trigger, why in self._source.missed():
            reason = TIMEOUT if why == TIMEOUT else f"error: the station did not take the part: {why}"
            self.meter.count("missed")
            part = self._count(Part(trigger.part_id, self.name, trigger.time, Verdict.NG, reason))
            self._tell(part, Job(trigger, None, None, why), None)

    def _bind(self, trigger: Trigger) -> Recipe | str:
        """Choose the recipe of a part: the one asked for, the one its id names, or the one in force."""
        try:
            with self._lock:
                name = trigger.recipe or self._book.named_by(trigger.part_id, self.config.recipes) or self._recipe
                if name not in self.config.recipes:
                    return f"station {self.name} has no recipe {shown(name)}"
                return self._book.get(name)
        except Exception as error:
            return one_line(error)

    def _take(self, job: Job) -> None:
        started = time.monotonic() if job.started is None else job.started
        result: Result | None = None
        reason = ""
        if job.problem or job.shot is None or job.recipe is None:
            reason = f"error: {job.problem or 'no frame'}"
        else:
            frame, recipe = job.shot.frame, job.recipe
            try:
                left = self.config.verdict_timeout - (time.monotonic() - started)
                result = self._worker.run(lambda: recipe.judge(frame), left)
                reason = BY_SCORE
                self._trouble.judged()
            except FutureTimeout:
                reason = TIMEOUT
            except BaseException as error:
                reason = f"error: {one_line(error)}"
                self._trouble.failed(recipe, frame, error)
        if job.ended:
            self._trouble.ran_out()
        part = self._count(self._answer(job, result, reason))
        latency = 1000 * (time.monotonic() - started)
        self.meter.take(latency)
        self._tell(replace(part, latency_ms=round(latency, 3)), job, result)

    def _count(self, part: Part) -> Part:
        self.meter.count(part.verdict.value)
        if part.reason != BY_SCORE:
            self.meter.count("timeout" if part.reason == TIMEOUT else "error")
            self.meter.fail(f"part {part.part_id}: {part.reason}")
        return part

    def _answer(self, job: Job, result: Result | None, reason: str) -> Part:
        """Give the verdict to whoever asked, and make the record of what really came of it."""
        part_id, source = job.trigger.part_id, self._feed.source if self._feed is not None else None
        verdict = Verdict.OK if result is not None and not result.is_anomalous else Verdict.NG
        score = None if result is None else result.score
        if source is not None:
            try:
                if result is None:
                    source.fail(part_id, reason)
                elif not source.answer(part_id, verdict, score):
                    verdict, reason = Verdict.NG, TIMEOUT
            except Exception as error:  # nobody has the verdict, so it is not OK
                verdict, reason = Verdict.NG, f"error: the verdict could not be given: {one_line(error)}"
        return Part(
            part_id,
            self.name,
            job.trigger.time,
            verdict,
            reason,
            score=score,
            rank=None if result is None else result.rank,
        )

    def _tell(self, part: Part, job: Job, result: Result | None) -> None:
        """Complete the record and hand it on."""
        changes: dict[str, Any] = {}
        try:
            if job.recipe is not None:
                changes |= {
                    "recipe": job.recipe.name,
                    "recipe_version": job.recipe.version,
                    "bundle": job.recipe.bundle,
                    "threshold": job.recipe.threshold,
                    "pixel_threshold": job.recipe.pixel_threshold,
                }
            if job.shot is not None:
                changes["source"] = job.shot.name
            if result is not None and job.recipe is not None:
                changes["masks"] = job.recipe.described_masks(result.size)
                changes["regions"] = tuple(region.to_dict() for region in result.regions()[:MOST_REGIONS])
        except Exception as error:
            self.meter.fail(error)
        try:
            frame = None if job.shot is None else job.shot.frame
            self._judged(replace(part, **changes), frame, result, job.recipe)
            if job.shot is not None and job.shot.done is not None:
                job.shot.done()
        except Exception as error:  # what is told must not stop the line
            self.meter.count("unrecorded")
            self.meter.fail(error)


class _Worker:
    """A thread that computes one thing after the other, for somebody who does not wait for ever."""

    def __init__(self, name: str) -> None:
        self._tasks: queue.SimpleQueue[tuple[Callable[[], Result], Future[Result]] | None] = queue.SimpleQueue()
        self._since: float | None = None
        threading.Thread(target=self._work, name=name, daemon=True).start()

    @property
    def busy_seconds(self) -> float:
        """For how long it has been computing what it computes now."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def run(self, task: Callable[[], Result], timeout: float) -> Result:
        """What the task gives.

        Raises:
            FutureTimeout: not in time; a task that has not begun by then never begins.
            BaseException: what the task raises.
        """
        future: Future[Result] = Future()
        self._tasks.put((task, future))
        try:
            return future.result(max(timeout, 0.0))
        except FutureTimeout:
            future.cancel()
            raise

    def stop(self) -> None:
        """End it behind what it computes."""
        self._tasks.put(None)

    def _work(self) -> None:
        while (item := self._tasks.get()) is not None:
            task, future = item
            if not future.set_running_or_notify_cancel():
                continue
            self._since = time.monotonic()
            try:
                future.set_result(task())
            except BaseException as error:
                future.set_exception(error)
            finally:
                self._since = None
                del task, future, item  # a frame and a map must not stay until the next part
