"""Commands that a person pastes into a shell."""

from __future__ import annotations

import os
import shlex

__all__ = ["shell_line"]


def shell_line(*words: str | os.PathLike[str]) -> str:
    """A command as it can be pasted into a shell: words with blanks and other special letters are quoted."""
    return shlex.join(os.fspath(word) for word in words)
