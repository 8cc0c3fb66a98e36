"""Small trees to write, and what can go wrong meanwhile: Ctrl-C before any line, a call to the system that fails."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from saae_runtime import files, folders
from saae_runtime.folders import atomic_directory


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


OLD = {"a.txt": "old a", "sub/b.txt": "old b"}


NEW = {"a.txt": "new a", "deep/er/c.txt": "new c"}


def fill(folder: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def replace_directory(target: Path) -> None:
    with atomic_directory(target) as temporary:
        fill(temporary, NEW)


class Interrupt:
    """Raises KeyboardInterrupt just before the nth line that runs in one of these modules (and notes that line)."""

    modules = (files.__file__, folders.__file__)

    def __init__(self, nth: int) -> None:
        self.left = nth
        self.line = 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Interrupt | None:
        if frame.f_code.co_filename not in self.modules:
            return None
        if event == "line":
            self.left -= 1
            if self.left < 0 and not self.line:
                self.line = frame.f_lineno
                raise KeyboardInterrupt
        return self


def interrupted_everywhere(action: Any, check: Any) -> int:
    """Runs `action` with Ctrl-C before each of its lines in turn; returns how many there were."""
    for nth in range(500):
        interrupt = Interrupt(nth)
        before = sys.gettrace()
        sys.settrace(interrupt)
        try:
            action()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        check(interrupt.line)
        if not interrupt.line:
            return nth
    raise AssertionError("it never came to an end")


def failing(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, code: int, skip: int = 0) -> None:
    """Makes a call fail with an OSError once it has succeeded `skip` times."""
    real, calls = getattr(owner, name), [0]

    def call(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] > skip:
            raise OSError(code, os.strerror(code))
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, call)
