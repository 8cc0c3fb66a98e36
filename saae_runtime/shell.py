"""Commands to paste into a shell."""

from __future__ import annotations

import os
import shlex

__all__ = ["shell_line"]


def shell_line(*words: str | os.PathLike[str]) -> str:
    """A command for a shell; words with blanks and other special characters are quoted."""
    return shlex.join(os.fspath(word) for word in words)
