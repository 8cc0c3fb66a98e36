"""The first sentences of the errors that the packages raise, as patterns, read from the source."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_LEAST = 10  # letters of fixed text: a pattern with less would match nearly anything


def messages(root: Path = ROOT) -> dict[str, str]:
    """Every `what` of a SaaeError that is written out in the packages: pattern -> place, most fixed text first."""
    classes = {
        node.name
        for node in ast.parse((root / "saae_runtime/errors.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    }
    found = []
    for file in sorted(path for package in root.glob("saae_*") for path in package.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            if isinstance(node.func, ast.Name) and node.func.id in classes:
                pattern, fixed = _pattern(node.args[0])
                if fixed >= _LEAST:
                    found.append((fixed, pattern, f"{file.relative_to(root)}:{node.lineno}"))
    return {pattern: place for _, pattern, place in sorted(found, reverse=True)}


def _pattern(node: ast.expr) -> tuple[str, int]:
    """A regular expression for the text of an expression, and how many of its letters are fixed."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.escape(node.value), len(node.value)
    if isinstance(node, ast.JoinedStr):
        parts = [_pattern(part) for part in node.values]
        return "".join(part for part, _ in parts), sum(fixed for _, fixed in parts)
    return ".*", 0


def quoted(text: str) -> list[tuple[int, str]]:
    """The messages of a page: (line, text) of each third-level heading that is code alone."""
    lines = enumerate(text.splitlines(), 1)
    return [(line, match[2]) for line, content in lines if (match := re.fullmatch(r"### (`+)(.+)\1", content))]


def source_of(message: str, known: dict[str, str]) -> str | None:
    """File and line that raise a message, or None."""
    return next((place for pattern, place in known.items() if re.fullmatch(pattern, message)), None)
