"""A station: waits for parts, judges each in time, and reports the result. One thread waits, another judges."""

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
"""Largest number of regions in a record, the strongest first."""

_WAIT = 0.2  # seconds between two checks whether to end

Judged = Callable[[Part, "NDArray[np.uint8] | None", "Result | None", "Recipe | None"], None]
"""Called for each part, in order, after its verdict: record, frame, result, recipe; None for what is missing."""

Chosen = Callable[["Station", Choice], None]
"""Called for each change of the recipe requested by the line."""


class Station:
    """One station.

    The verdict is computed on a second thread: if it is late, the station goes on without it, and the part is NG. Every
    exception becomes an NG with its reason; none ends the station.

    Args:
        config: of line.toml.
        camera: closed by `close`.
        book: all recipes.
        judged: called for each part; must not block.
        source: of requests for parts; None: each frame is a part.
        chosen: called when the line requests another recipe; must not block.
        elsewhere: text of what else the station needs and has failed; empty for nothing.

    Attributes:
        meter: counts `OK`, `NG`, `timeout`, `error` (both NG), `missed` (among these: requested parts that the station
            never took), `dropped`; latencies from trigger to verdict.
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
        self._faulty = False  # whether the source shows our fault
        self._thread = threading.Thread(target=self._run, name=f"station-{config.name}", daemon=True)
        self.finished = threading.Event()

    @property
    def name(self) -> str:
        """Name of the station."""
        return self.config.name

    @property
    def recipe(self) -> str:
        """Name of the active recipe, for parts that name none."""
        return self._recipe

    @property
    def source(self) -> TriggerSource | None:
        """Source of requests for parts; None: each frame is a part."""
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
        """Why it cannot judge now; empty: it can. The trigger source sees it as a fault."""
        return self._trouble.look()

    @property
    def stuck_seconds(self) -> float:
        """Seconds by which the current verdict is overdue; 0 if none is."""
        return max(self._worker.busy_seconds - self.config.verdict_timeout, 0.0)

    def reading(self) -> Reading:
        """Readings of its meter."""
        return self.meter.read()

    def start(self) -> None:
        """Start the station."""
        if self._source is None:
            self._feed = FreeFeed(self._camera, self._bind, self.config.queue, self.config.queue_size, self.meter)
        else:
            patience = self.config.grab_timeout or self.config.verdict_timeout
            self._feed = TriggeredFeed(self._source, self._camera, self._bind, patience, self.meter)
        self._thread.start()

    def switch(self, recipe: str) -> Recipe:
        """Activate another recipe: every part that comes after this call is judged by it, none before.

        Returns:
            The active recipe.

        Raises:
            ConfigError: the station has no such recipe; the previous one stays active.
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
        """Take no further parts; return at once. See `join`."""
        self._stop.set()
        if self._feed is not None:
            self._feed.close()

    def join(self, timeout: float) -> bool:
        """Wait for the current and waiting parts; return whether all of them are done."""
        if self._feed is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def drop_waiting(self) -> None:
        """Drop the waiting frames, which are counted."""
        if isinstance(self._feed, FreeFeed):
            self._feed.drop_waiting()

    def close(self) -> None:
        """Stop, and release the camera. May be called twice."""
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
                except Exception as error:  # the trigger source failed: try again
                    self.meter.fail(error)
                    self._stop.wait(_WAIT)
                    continue
                if job is not None:
                    self._take(job)
        finally:
            if self._source is not None:
                self._source.close()  # the line no longer sees a station
                self._tell_untaken()
            self.finished.set()

    def _show_trouble(self) -> None:
        """Set the fault of the trigger source while no part can be judged, and clear it afterwards."""
        if self._source is None:  # frames come without requests, and each tries the engine again
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
        """Make the record of each requested part that was never taken, and report chosen recipes."""
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
        """Choose the recipe of a part: the requested one, the one for its id, or the active one."""
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
        """Give the verdict to the trigger source, and make the record of what was accepted."""
        part_id, source = job.trigger.part_id, self._feed.source if self._feed is not None else None
        verdict = Verdict.OK if result is not None and not result.is_anomalous else Verdict.NG
        score = None if result is None else result.score
        if source is not None:
            try:
                if result is None:
                    source.fail(part_id, reason)
                elif not source.answer(part_id, verdict, score):
                    verdict, reason = Verdict.NG, TIMEOUT
            except Exception as error:  # the verdict did not arrive, so it is not OK
                verdict, reason = Verdict.NG, f"error: the verdict could not be given: {one_line(error)}"
        return Part(
            part_id,
            self.name,
            job.trigger.time,
            verdict,
            reason,
            score=score,
            rank=None if result is None else result.rank,
            mark=job.trigger.mark,
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
        except Exception as error:  # an error of `judged` must not stop the line
            self.meter.count("unrecorded")
            self.meter.fail(error)
            return
        try:
            if job.done is not None:
                job.done()
        except Exception as error:  # it has its record: after a restart it may be judged again, as the same part
            self.meter.fail(error)


class _Worker:
    """A thread that computes one task at a time, with a time limit for the caller."""

    def __init__(self, name: str) -> None:
        self._tasks: queue.SimpleQueue[tuple[Callable[[], Result], Future[Result]] | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore()  # a task, and so its frame, is handed over only to an idle thread
        self._since: float | None = None
        threading.Thread(target=self._work, name=name, daemon=True).start()

    @property
    def busy_seconds(self) -> float:
        """Seconds since the current task began; 0 without one."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def run(self, task: Callable[[], Result], timeout: float) -> Result:
        """Run a task and return its result.

        Raises:
            FutureTimeout: not in time; a task that has not started by then never starts.
            BaseException: the task's exception.
        """
        end = time.monotonic() + timeout
        if not self._idle.acquire(timeout=max(timeout, 0.0)):
            raise FutureTimeout
        future: Future[Result] = Future()
        self._tasks.put((task, future))
        try:
            return future.result(max(end - time.monotonic(), 0.0))
        except FutureTimeout:
            future.cancel()
            raise

    def stop(self) -> None:
        """End the thread after the current task."""
        self._tasks.put(None)

    def _work(self) -> None:
        while (item := self._tasks.get()) is not None:
            task, future = item
            try:
                if future.set_running_or_notify_cancel():
                    self._since = time.monotonic()
                    future.set_result(task())
            except BaseException as error:
                future.set_exception(error)
            finally:
                self._since = None
                del task, future, item  # free the frame and the map before the next part
                self._idle.release()
