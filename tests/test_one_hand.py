"""The packages are written in one hand: `__all__`, relative imports, attributes and shapes the same way everywhere."""

from __future__ import annotations

import ast
import re
from pathlib import Path

PACKAGES = ("saae_runtime", "saae_train", "saae_export")
SHAPE = re.compile(r"\[[A-Z](, ?[A-Z0-9])+\]")
NO_ALL = {Path("saae_export/triton/python_model.py")}  # copied into a model repository, imported by Triton alone


def problems(file: Path, source: str) -> list[str]:
    """What a module does differently from the others; `file` is relative to the repository."""
    tree = ast.parse(source)
    found = []
    listed = any(isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__" for node in tree.body)
    if not listed and file.name not in ("__init__.py", "__main__.py") and file not in NO_ALL:
        found.append(f"{file}: no __all__")
    for node in ast.walk(tree):
        where = f"{file}:{getattr(node, 'lineno', 1)}"
        named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        named += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        found += [f"{where}: absolute import of {name}" for name in named if name.split(".")[0] == file.parts[0]]
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and SHAPE.search(node.value):
            found.append(f"{where}: a shape is written H x W")
        if isinstance(node, ast.ClassDef):
            after = [
                b for a, b in zip(node.body, node.body[1:], strict=False) if isinstance(a, ast.Assign | ast.AnnAssign)
            ]
            if any(isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant) for item in after):
                found.append(f"{where}: attributes are described in the class's docstring, under `Attributes:`")
    return found


def test_the_packages_are_written_in_one_hand(repo_root: Path) -> None:
    files = [file.relative_to(repo_root) for name in PACKAGES for file in sorted((repo_root / name).rglob("*.py"))]
    assert len(files) > 100
    assert [line for file in files for line in problems(file, (repo_root / file).read_text(encoding="utf-8"))] == []


def test_each_difference_is_named() -> None:
    source = '''"""Scores of shape [H, W]."""
from saae_train.config import FitConfig
class Score:
    """A score."""
    value: float
    """The value."""
'''
    found = problems(Path("saae_train/score.py"), source)
    assert [line.split(": ", 1)[1].split()[0] for line in found] == ["no", "absolute", "attributes", "a"]
