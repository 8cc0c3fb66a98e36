"""The table "Parts" of docs/design.md held against the real imports: who may import whom, and what has no row."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

TOPS = ("benchmarks", "saae_export", "saae_train", "saae_runtime")
"""The folders whose modules the table is about."""

_HEADER = ("place", "holds", "may import", "tests", "a change there must raise")
_CODE = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Part:
    """A row: a folder's own files, or one file that stands higher than the rest of its folder.

    Attributes:
        place: "saae_train/data/" or "saae_runtime/engine.py".
        imports: the places that it may import, besides itself.
        tests: folders and files of its tests.
        raises: (file, name) of what a change there must raise.
    """

    place: str
    imports: tuple[str, ...]
    tests: tuple[str, ...]
    raises: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Import:
    """One import, anywhere in a file: which file imports which, relative to the checkout, and in which line."""

    file: str
    line: int
    target: str


def parts(markdown: str) -> list[Part]:
    """The rows of the table whose headings are `_HEADER`, top down.

    Raises:
        ValueError: there is no such table, or a row has too many or too few columns.
    """
    lines = markdown.splitlines()
    start = next((i for i, line in enumerate(lines) if _cells(line) == _HEADER), None)
    if start is None:
        raise ValueError(f"no table with the headings {', '.join(_HEADER)}")
    found = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells = _cells(line)
        if len(cells) != len(_HEADER):
            raise ValueError(f"not {len(_HEADER)} columns: {line}")
        place, _, imports, tests, raises = (_CODE.findall(cell) for cell in cells)
        named = [name.partition(": ") for name in raises]
        found.append(
            Part(
                place[0],
                tuple(_full(name) for name in imports),
                tuple(tests),
                tuple((file, constant) for file, colon, constant in named if colon),
            )
        )
    return found


def _cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.strip().strip("|").split("|"))


def _full(name: str) -> str:
    """The column "may import" says `train/data/` for saae_train/data/."""
    return f"saae_{name}"


def modules(root: Path) -> dict[str, Path]:
    """Every module of the folders in `TOPS`: dotted name -> file, relative to `root`."""
    found = {}
    for top in TOPS:
        for path in sorted((root / top).rglob("*.py")):
            file = path.relative_to(root)
            names = file.with_suffix("").parts
            found[".".join(names[:-1] if names[-1] == "__init__" else names)] = file
    return found


def imports(root: Path) -> Iterator[Import]:
    """Every import of one module of `TOPS` by another: at the top, in a function, for types alone, by import_module."""
    known = modules(root)
    for name, file in known.items():
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(ast.parse((root / file).read_text(encoding="utf-8"))):
            for target in _targets(node, package, known):
                module = _module(target, known)
                if module is not None and known[module] != file:
                    yield Import(file.as_posix(), getattr(node, "lineno", 0), known[module].as_posix())


def _targets(node: ast.AST, package: str, known: Mapping[str, Path]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        start = ".".join([*base, *([node.module] if node.module else [])])
        # A name of a package may be a module of it.
        return [f"{start}.{alias.name}" if f"{start}.{alias.name}" in known else start for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
            return [node.args[0].value]
    return []


def _module(dotted: str, known: Mapping[str, Path]) -> str | None:
    """The longest beginning of a dotted name that is a module."""
    while dotted and dotted not in known:
        dotted = dotted.rpartition(".")[0]
    return dotted or None


def place_of(file: str, table: Mapping[str, Part]) -> str:
    """The row that a file belongs to: its own, else its folder's (which may be missing)."""
    return file if file in table else f"{file.rpartition('/')[0]}/"


def layer_problems(root: Path, rows: list[Part]) -> list[str]:
    """What the table says and the tree does not hold; one line each, with file and line.

    A place without a row, a row without a place, an import that the table does not allow, an allowed import of a place
    that stands higher or nowhere (so there can be no circle), tests or constants that are not there.
    """
    table = {row.place: row for row in rows}
    problems = [f"{row.place} has two rows" for i, row in enumerate(rows) if row.place in [r.place for r in rows[:i]]]
    files = {path.as_posix() for path in modules(root).values()}
    folders = {f"{file.rpartition('/')[0]}/" for file in files}
    problems += [f"{folder} has no row" for folder in sorted(folders - set(table))]
    problems += [f"{place} has a row and is gone" for place in table if place not in folders | files]
    for i, row in enumerate(rows):
        below = {other.place for other in rows[i + 1 :]}
        problems += [
            f"{row.place} may not import {name}: no row below has it" for name in row.imports if name not in below
        ]
        problems += [f"{row.place}: {name} is gone" for name in row.tests if not (root / name).exists()]
        problems += [
            f"{row.place}: {file} has no {name}" for file, name in row.raises if not _defines(root / file, name)
        ]
    for found in dict.fromkeys(imports(root)):  # several names from one module count once
        here, there = place_of(found.file, table), place_of(found.target, table)
        if here != there and here in table and there not in table[here].imports:
            problems.append(f"{found.file}:{found.line} imports {found.target}, which {here} may not")
    return problems


def _defines(file: Path, name: str) -> bool:
    if not file.is_file():
        return False
    targets = [
        target
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    ]
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)
