"""Watches folders for new or rewritten images; yields each once, when it is complete."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePath

from ..errors import ConfigError, DataError, ImageError
from .files import Facts, Frame, Source, image_frames, unique_stem
from .folders import filing_stem
from .listing import Listing
from .notices import Notices

__all__ = ["PATIENCE", "SETTLE", "FolderWatch"]

SETTLE = 0.5
"""Seconds without a change of size or time after which a file is complete."""

PATIENCE = 5.0
"""Seconds after which an unreadable file and an unavailable folder are reported."""

_POLL = 0.2  # seconds between two checks
_BACK_OFF = 10.0  # longest pause between attempts for an unavailable folder, in seconds
_RECENT = 64  # latest files, which are checked every time: rings of names and `latest.png`
_AROUND = 0.007  # seconds per check for earlier files, in turn
_AT_LEAST = 50  # at least this many of them, also on a slow share
_FORGET = 100_000  # removed files that are still remembered

State = tuple[int, int, int]  # size, time of the last change, inode


@dataclass
class _Waiting:
    """A file that is not yielded yet: its state, since when, and whether it was tried."""

    state: State
    since: float
    tried: bool = False


@dataclass
class _Root:
    """A named folder, and since when it is unavailable."""

    path: Path
    prefix: PurePath
    listing: Listing
    away_since: float | None = None
    said: bool = False
    next_try: float = 0.0
    wait: float = _POLL


class FolderWatch:
    """Finds images in folders again and again, including those that exist at the start.

    Polling works on every file system, also network shares; with watchdog, the system's notices make it faster. A file
    is a new image if its name is new, or its size, time or inode changes. Names that start with a dot are skipped, so
    a program that writes `.x.png` and renames it is always safe. An unavailable folder (such as a lost share) is tried
    again after growing pauses of up to 10 seconds. A folder below that this user may not list is left out.

    Args:
        names: the folders.
        recursive: whether folders below them are watched too.
        say: called with a line about a folder that is unavailable or back.
        note: called with a line about a folder below that is left out; None: `say`.
        knows: whether a file (absolute path, facts) was scored by an earlier run and is skipped.

    Attributes:
        outages: how often a folder was unavailable.
        away: total seconds.
        passed_over: files that an earlier run had scored.
        left_out: images that were not yielded, see `leave_out`.

    Raises:
        ConfigError: a name that is not a folder.
    """

    def __init__(
        self,
        names: Sequence[str],
        recursive: bool = False,
        say: Callable[[str], None] = lambda text: None,
        knows: Callable[[str, Facts], bool] = lambda path, facts: False,
        note: Callable[[str], None] | None = None,
    ) -> None:
        self._roots: list[_Root] = []
        for name in names:
            folder = Path(name)
            if not folder.is_dir():
                raise ConfigError(
                    f"--watch {name}: not a folder.",
                    "Images can only be added to a folder.",
                    "name the folder that the camera writes to; without --watch, files and videos can be named",
                )
            # As in `find_sources`: two folders may hold the same names.
            prefix = PurePath(folder.resolve().name) if len(names) > 1 else PurePath()
            self._roots.append(_Root(folder, prefix, Listing(folder, recursive, note or say)))
        self._recursive = recursive
        self._say = say
        self._knows = knows
        self._waiting: dict[str, _Waiting] = {}
        self._given: dict[str, State] = {}
        self._turns: deque[str] = deque()  # yielded files, in the order of their next check
        self._has_turn: set[str] = set()
        self._recent: deque[str] = deque(maxlen=_RECENT)
        self._gone: OrderedDict[str, State] = OrderedDict()
        self._stems: dict[str, PurePath] = {}
        self._taken: set[str] = set()
        self._before: set[str] = set()  # waiting files that are left out when they are complete
        self._unchanged: set[str] | None = None  # yielded files known not to have changed before the last `leave_out`
        self._notices: Notices | None = None
        self.outages = 0
        self.away = 0.0
        self.passed_over = 0
        self.left_out = 0

    def frames(self, stop: threading.Event, white_level: int | None = None) -> Iterator[Frame]:
        """Frames as they come, until `stop` is set; `white_level` is that of 16-bit files."""
        self._notices = Notices([root.path for root in self._roots], self._recursive)
        try:
            while not stop.is_set():
                for frame in self.poll(time.monotonic(), white_level):
                    yield frame
                    if stop.is_set():
                        return
                # not stop.wait(): the signal handler sets `stop` on this thread, which must not hold its lock
                time.sleep(_POLL)
        finally:
            self._notices.close()

    def poll(self, now: float, white_level: int | None = None) -> Iterator[Frame]:
        """One check: images completed since the last one, by name; an error for unreadable ones.

        An image is read when its frame is asked for, however much later, and only if it is as it was at the check.

        Args:
            now: monotonic time in seconds.
            white_level: of 16-bit files.
        """
        hints = self._notices.take() if self._notices is not None else set()
        wanted: set[str] = set()
        removed: list[Frame] = []
        for root in self._roots:
            if now < root.next_try:
                continue
            try:
                new, gone = root.listing.changes(hints, now)
            except OSError as error:
                self._is_away(root, error, now)
                continue
            if root.away_since is not None:
                self._is_back(root, now)
            wanted |= new
            for path in sorted(gone):
                if (frame := self._forget(path)) is not None:
                    removed.append(frame)
        wanted |= {path for path in hints if path in self._given}
        wanted.update(self._recent, self._waiting)
        # in turn while there is time for it
        complete = [path for path in chain(sorted(wanted), self._in_turn()) if self._look(path, now)]
        yield from removed
        for path in complete:
            yield from self._read(path, now, white_level)

    def leave_out(self, now: float) -> list[str]:
        """Leave out the images that are there now, complete or not: later checks yield what comes from now on.

        An image that is being written now is left out when it is complete. So is one that was yielded long ago and
        has changed, if it was not looked at now: nobody knows when it changed.

        Args:
            now: monotonic time in seconds.

        Returns:
            Paths of the images that no earlier call has left out.

        Raises:
            OSError: a folder is unavailable.
        """
        wanted = {*self._recent, *self._waiting}
        failed: OSError | None = None
        for root in self._roots:
            root.listing.list_again()
            try:
                new, gone = root.listing.changes(set(), now)
            except OSError as error:
                self._is_away(root, error, now)
                failed = error
                continue
            if root.away_since is not None:
                self._is_back(root, now)
            wanted |= new
            for path in gone:
                self._forget(path)
        before, self._unchanged = set(self._before), set()
        for path in chain(sorted(wanted), self._in_turn()):
            self._look(path, now)
        for path in self._waiting:
            self._leave(path)
        if failed is not None:
            raise failed
        return sorted(self._before - before)

    def _leave(self, path: str) -> None:
        self.left_out += path not in self._before
        self._before.add(path)

    def _in_turn(self) -> Iterator[str]:
        """Some of the files that were yielded long ago, in turn."""
        end = time.perf_counter() + _AROUND
        for count in range(len(self._turns)):
            if count >= _AT_LEAST and time.perf_counter() > end:
                return
            path = self._turns.popleft()
            if path in self._given:
                self._turns.append(path)
                yield path
            else:
                self._has_turn.discard(path)

    def _give(self, path: str, state: State) -> None:
        self._given[path] = state
        if path not in self._has_turn:
            self._has_turn.add(path)
            self._turns.append(path)

    def _is_away(self, root: _Root, error: OSError, now: float) -> None:
        if root.away_since is None:
            root.away_since, root.wait = now, _POLL
        root.wait = min(2 * root.wait, _BACK_OFF)
        root.next_try = now + root.wait
        if not root.said and now - root.away_since >= PATIENCE:
            root.said = True
            self._say(f"{root.path} is away ({error.strerror or error}); waiting for it, Ctrl-C ends the run")

    def _is_back(self, root: _Root, now: float) -> None:
        assert root.away_since is not None
        seconds = now - root.away_since
        if root.said:
            self.outages += 1
            self.away += seconds
            self._say(f"{root.path} is back after {seconds:.0f} s")
        root.away_since, root.said, root.next_try = None, False, 0.0

    def _forget(self, path: str) -> Frame | None:
        """Forget a file that is gone; return an error if it was not scored yet."""
        frame = None
        waiting = self._waiting.pop(path, None)
        if waiting is not None and path in self._before:
            self._before.discard(path)
            self._given[path] = waiting.state
        elif waiting is not None:
            frame = Frame(self._source(path), 0, None, _gone_error(path))
        if path in self._given:
            # A share may be empty at first when it is back: files that reappear are not new images.
            self._gone[path] = self._given.pop(path)
            if len(self._gone) > _FORGET:
                self._drop_stem(self._gone.popitem(last=False)[0])
        else:
            self._drop_stem(path)
        return frame

    def _look(self, path: str, now: float) -> bool:
        """Note a file's state; return whether it is a complete image that was not yielded yet."""
        facts = _facts(path)
        if facts is None:  # removed since the listing, or the share is unavailable
            return False
        state = _state(facts)
        waiting = self._waiting.get(path)
        if waiting is None:
            if self._given.get(path) == state and self._unchanged is not None:
                self._unchanged.add(path)
            if self._given.get(path) == state or stat.S_ISDIR(facts.st_mode):
                return False
            if path not in self._given and self._was_given(path, state):
                self._give(path, state)
                return False
            if path in self._given and self._unchanged is not None and path not in self._unchanged:
                self._leave(path)
        if waiting is None or waiting.state != state:
            self._waiting[path] = _Waiting(state, now)
            return False
        since = now - waiting.since
        return since >= PATIENCE or (since >= SETTLE and not waiting.tried)

    def _read(self, path: str, now: float, white_level: int | None) -> Iterator[Frame]:
        """The frames of a file that was complete at a check."""
        waiting, facts = self._waiting.get(path), _facts(path)
        if waiting is None or facts is None or waiting.state != _state(facts):  # the next check sees what happened
            return
        if path in self._before:
            self._before.discard(path)
            self._finish(path, waiting.state)
            return
        frames = image_frames(self._source(path), waiting.state[:2], white_level)
        first = next(frames)
        if isinstance(first.error, ImageError) and now - waiting.since < PATIENCE:
            waiting.tried = True  # the writer may only pause
            return
        self._finish(path, waiting.state)
        yield first
        yield from frames

    def _finish(self, path: str, state: State) -> None:
        del self._waiting[path]
        self._give(path, state)
        if path not in self._recent:
            self._recent.append(path)

    def _was_given(self, path: str, state: State) -> bool:
        if self._gone.pop(path, None) == state:
            return True
        known = self._knows(os.path.abspath(path), state[:2])  # noqa: PTH100
        self.passed_over += known
        return known

    def _source(self, path: str) -> Source:
        stem = self._stems.get(path)
        if stem is None:
            root = next(item for item in self._roots if path.startswith(os.path.join(item.path, "")))  # noqa: PTH118
            stem = unique_stem(root.prefix / filing_stem(PurePath(path).relative_to(root.path)), self._taken)
            self._stems[path] = stem
        return Source("image", path, stem, path=Path(path))

    def _drop_stem(self, path: str) -> None:
        if (stem := self._stems.pop(path, None)) is not None:  # memory must not grow for months
            self._taken.discard(str(stem).lower())


def _facts(path: str) -> os.stat_result | None:
    """What the system knows of a file; None if it cannot be asked."""
    try:
        return os.stat(path)  # noqa: PTH116 (Path is slow, and this runs for every file at every look)
    except OSError:
        return None


def _state(facts: os.stat_result) -> State:
    return facts.st_size, facts.st_mtime_ns, facts.st_ino


def _gone_error(path: str) -> DataError:
    return DataError(
        f"{path}: removed before it was complete.",
        "It was removed, moved or renamed just after it had appeared, so it was not scored.",
        "move images away only after they were scored; write them under a name that starts with a dot, then rename",
    )
