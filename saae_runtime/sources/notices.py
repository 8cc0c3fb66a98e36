"""The system's notices of changes in folders (inotify and the like), through watchdog if it is installed."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .folders import is_picture_name

__all__ = ["Notices"]

_MOST = 100_000  # paths kept between two checks
_READING = ("opened", "closed_no_write")  # events caused by our own reading


class Notices:
    """Collects notices of created, written, moved and removed image files.

    They only make checks cheaper and sooner. A share that another machine writes to gives no notices, so nothing may
    depend on them.

    Args:
        folders: the folders.
        recursive: whether to include subfolders.
    """

    def __init__(self, folders: Sequence[Path], recursive: bool) -> None:
        self._lock = threading.Lock()
        self._paths: set[str] = set()
        self._observer: Any = None
        try:
            from watchdog.events import FileSystemEventHandler
            from watchdog.observers import Observer
        except ImportError:
            return
        add = self._add

        class Handler(FileSystemEventHandler):
            def on_any_event(self, event: Any) -> None:
                if event.event_type not in _READING:
                    add(event.src_path, getattr(event, "dest_path", ""))

        observer = Observer()
        try:
            for folder in folders:
                observer.schedule(Handler(), str(folder), recursive=recursive)
            observer.start()
        except OSError:  # the system's number of watches is used up
            return
        self._observer = observer

    def _add(self, *paths: str | bytes) -> None:
        named = [os.fsdecode(path) for path in paths if path]
        with self._lock:
            if len(self._paths) < _MOST:
                self._paths.update(path for path in named if is_picture_name(os.path.basename(path)))  # noqa: PTH119

    def take(self) -> set[str]:
        """The paths since the last call."""
        with self._lock:
            taken, self._paths = self._paths, set()
        return taken

    def close(self) -> None:
        """End the observing thread. May be called twice."""
        if self._observer is not None:
            with suppress(RuntimeError, OSError):
                self._observer.stop()
            self._observer = None
