"""The map in docs/design.md is true: folders import what their row allows, and rows and folders are the same."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from layer_checks import Import, imports, layer_problems, modules, parts

FOREIGN = ("torch", "torchvision", "timm", "onnx", "onnxscript", "safetensors", "scipy", "sklearn", "jinja2")


def test_the_tree_is_as_the_map_says(repo_root: Path) -> None:
    rows = parts((repo_root / "docs/design.md").read_text(encoding="utf-8"))
    assert layer_problems(repo_root, rows) == []


def test_the_runtime_names_no_library_of_training_or_export(repo_root: Path) -> None:
    """Not even in a function: what a line PC does not have, no path may need."""
    found = []
    for file in modules(repo_root).values():
        if file.parts[0] != "saae_runtime":
            continue
        for node in ast.walk(ast.parse((repo_root / file).read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            found += [f"{file}:{node.lineno} {name}" for name in names if name.split(".")[0] in FOREIGN]
    assert found == []


# --- the check itself, on a small tree ---

MAP = """
| place | holds | may import | tests | a change there must raise |
|---|---|---|---|---|
| `benchmarks/` | | `train/`, `runtime/` | | |
| `saae_export/` | | `train/model/`, `runtime/` | `tests/export/` | |
| `saae_train/` | | `train/model/`, `runtime/` | | |
| `saae_train/model/` | | `runtime/` | | |
| `saae_runtime/engine.py` | | `runtime/` | | |
| `saae_runtime/` | | | | its format: `saae_runtime/manifest.py: SCHEMA` |
"""
FILES = {
    "benchmarks/fps.py": "from saae_train import fit\n",
    "saae_export/__init__.py": "",
    "saae_export/build.py": "from saae_train.model.net import Net\n",
    "saae_train/__init__.py": "",
    "saae_train/fit.py": "from .model import net\n",
    "saae_train/model/__init__.py": "",
    "saae_train/model/net.py": "from saae_runtime.manifest import SCHEMA\n",
    "saae_runtime/__init__.py": "",
    "saae_runtime/engine.py": "from .manifest import SCHEMA\n",
    "saae_runtime/manifest.py": "SCHEMA = 1\n",
}


def tree(root: Path, **changes: str) -> Path:
    """The small tree, with a line added to some files; `__` stands for a slash."""
    (root / "tests/export").mkdir(parents=True)
    added = {f"{name.replace('__', '/')}.py": text for name, text in changes.items()}
    for name, text in (FILES | {name: FILES.get(name, "") + text for name, text in added.items()}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def test_a_true_map_has_no_problems(tmp_path: Path) -> None:
    assert layer_problems(tree(tmp_path), parts(MAP)) == []


@pytest.mark.parametrize(
    "line",
    [
        "import saae_train.fit\n",
        "from saae_train import fit\n",
        "from saae_train.fit import anything\n",
        "def late():\n    from saae_train import fit\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from saae_train.fit import Fit\n",
        "import importlib\nfit = importlib.import_module('saae_train.fit')\n",
    ],
)
def test_an_arrow_upwards_is_found(tmp_path: Path, line: str) -> None:
    (found,) = layer_problems(tree(tmp_path, saae_runtime__manifest=line), parts(MAP))
    assert found.startswith("saae_runtime/manifest.py:")
    assert found.endswith("imports saae_train/fit.py, which saae_runtime/ may not")


def test_an_arrow_sideways_and_a_relative_one_are_found(tmp_path: Path) -> None:
    root = tree(
        tmp_path, saae_train__model__net="from .. import fit\n", saae_export__build="from saae_train import fit\n"
    )
    assert layer_problems(root, parts(MAP)) == [
        "saae_export/build.py:2 imports saae_train/fit.py, which saae_export/ may not",
        "saae_train/model/net.py:2 imports saae_train/fit.py, which saae_train/model/ may not",
    ]


def test_a_file_with_a_row_of_its_own_stands_above_its_folder(tmp_path: Path) -> None:
    root = tree(tmp_path, saae_runtime__manifest="from . import engine\n")
    assert layer_problems(root, parts(MAP)) == [
        "saae_runtime/manifest.py:2 imports saae_runtime/engine.py, which saae_runtime/ may not"
    ]


def test_a_folder_without_a_row_and_a_row_without_a_folder_are_found(tmp_path: Path) -> None:
    root = tree(tmp_path, saae_train__data__split="")
    assert layer_problems(root, parts(MAP)) == ["saae_train/data/ has no row"]
    more = MAP + "| `saae_runtime/gone/` | | | | |\n| `saae_runtime/gone.py` | | | | |\n"
    (root / "saae_train/data/split.py").unlink()
    assert layer_problems(root, parts(more)) == [
        "saae_runtime/gone/ has a row and is gone",
        "saae_runtime/gone.py has a row and is gone",
    ]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            "| `saae_runtime/` | | |",
            "| `saae_runtime/` | | `train/` |",
            "saae_runtime/ may not import saae_train/: no row",
        ),
        (
            "`train/`, `runtime/`",
            "`train/`, `train/nonsense/`, `runtime/`",
            "benchmarks/ may not import saae_train/nonsense/",
        ),
        ("`tests/export/`", "`tests/nonsense/`", "saae_export/: tests/nonsense/ is gone"),
        (": SCHEMA", ": BOUNDS", "saae_runtime/: saae_runtime/manifest.py has no BOUNDS"),
        ("| `saae_train/` |", "| `saae_train/` | | | | |\n| `saae_train/` |", "saae_train/ has two rows"),
    ],
)
def test_a_wrong_row_is_found(tmp_path: Path, old: str, new: str, problem: str) -> None:
    assert old in MAP
    found = layer_problems(tree(tmp_path), parts(MAP.replace(old, new)))
    assert [line for line in found if line.startswith(problem)], found


def test_a_document_without_the_map_is_refused() -> None:
    with pytest.raises(ValueError, match="no table"):
        parts("# Design\n\n| place | holds |\n|---|---|\n")
    with pytest.raises(ValueError, match="columns"):
        parts(MAP + "| `a/` | b |\n")


def test_imports_give_file_line_and_target(tmp_path: Path) -> None:
    found = list(imports(tree(tmp_path)))
    assert Import("saae_export/build.py", 1, "saae_train/model/net.py") in found
    assert Import("saae_train/fit.py", 1, "saae_train/model/net.py") in found
    assert Import("saae_runtime/engine.py", 1, "saae_runtime/manifest.py") in found
