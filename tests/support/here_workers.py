"""Workers that do a job in this process, for tests of what is begun and what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from saae_train.experiments.jobs import Job, Report


class Here:
    """See `saae_train.experiments.jobs.Workers`. A job is done when its result is asked for.

    Args:
        room: how many jobs may have begun; the last of them ends first.
    """

    def __init__(self, room: int = 1) -> None:
        self.room = room
        self.most = 0
        self.closed = False
        self._begun = 0

    def begin(self, job: Job, report: Report) -> tuple[Job, Report]:
        self._begun += 1
        self.most = max(self.most, self._begun)
        return job, report

    def first(self, begun: Sequence[tuple[Job, Report]]) -> tuple[Job, Report]:
        return begun[-1]

    def result(self, ended: tuple[Job, Report]) -> Mapping[str, Any]:
        self._begun -= 1
        job, report = ended
        return job.task(job.argument, report)

    def close(self) -> None:
        self.closed = True
