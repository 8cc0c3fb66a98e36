"""Turns the names on the command line of `saae-run` into frames."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..sources.files import Facts, Frame, Source, facts_of, read_frames
from ..sources.scored import Scored
from ..sources.watch import FolderWatch

__all__ = ["Given", "knower", "named", "watched"]


@dataclass(frozen=True)
class Given:
    """The frames to score: a reader that stops at an event, whether they come in real time, their number, and text for
    the summary."""

    frames: Callable[[threading.Event, int | None], Iterator[Frame]]
    live: bool
    count: Callable[[], int | None]
    words: Callable[[], list[str]] = list
    sources: Sequence[Source] = ()
    nothing_new: bool = False  # an earlier run scored all of them


def watched(watcher: FolderWatch) -> Given:
    """Watched folders: endless frames."""

    def words() -> list[str]:
        said = []
        if watcher.outages:
            times = "once" if watcher.outages == 1 else f"{watcher.outages} times"
            said.append(f"a watched folder was away {times}, for {watcher.away:.0f} s in all")
        if watcher.passed_over:
            said.append(_passed_over(watcher.passed_over))
        return said

    return Given(watcher.frames, live=True, count=lambda: None, words=words)


def named(sources: Sequence[Source], skip: Scored | None) -> Given:
    """Named sources, without the files that `skip` knows."""
    left = [source for source in sources if not _is_scored(source, skip)]
    passed_over = len(sources) - len(left)

    def count() -> int | None:
        counts = [source.count() for source in left]
        return sum(number for number in counts if number is not None) if None not in counts else None

    return Given(
        lambda stop, white_level: read_frames(left, white_level),
        any(source.live for source in left),
        count,
        lambda: [_passed_over(passed_over)] if passed_over else [],
        left,
        nothing_new=passed_over > 0 and not left,
    )


def _passed_over(count: int) -> str:
    return f"{count} file{'' if count == 1 else 's'} skipped: scored by an earlier run (--score-again scores them)"


def _is_scored(source: Source, scored: Scored | None) -> bool:
    if scored is None or source.kind != "image" or source.path is None:
        return False
    return scored.knows(str(source.path.absolute()), facts_of(source.path))


def knower(scored: Scored | None) -> Callable[[str, Facts], bool]:
    """Tell whether a file was scored before."""
    return (lambda path, facts: False) if scored is None else scored.knows
