"""The documentation is true: its commands exist, its Python runs, its numbers name their source, its links lead on."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from doc_checks import (
    ROOT,
    command_problems,
    commands,
    is_ours,
    link_problems,
    python_blocks,
    sections,
    table_problems,
)
from PIL import Image
from tiny_bundle import gray_frame, make_tiny_bundle

pytestmark = pytest.mark.needs("torch", "onnx")

EXPECTED = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", "docs/design.md", "docs/jetson.md"]
DOCUMENTS = sorted({*EXPECTED, *(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))})


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks() -> list[object]:
    found = []
    for name in DOCUMENTS:
        if (ROOT / name).is_file():
            found += [pytest.param(name, block, id=f"{name}:{block.line}") for block in python_blocks(read(name))]
    return found


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_exist(name: str) -> None:
    assert command_problems(read(name)) == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_tables_of_numbers_name_their_command(name: str) -> None:
    assert table_problems(read(name)) == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    within = ROOT / "docs" if name.startswith("docs/") else None  # all that the site holds
    assert link_problems(read(name), (ROOT / name).parent, within) == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_nothing_was_left_to_fill_in(name: str) -> None:
    for word in ("MEASURED_", "TODO", "FIXME", "XXX", "TBD"):
        assert word not in read(name)
    outside_fences = re.sub(r"^```.*?^```", "", read(name), flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"<!-- table: \S+ -->\s*<!-- end of table -->", outside_fences), "an empty table"


def test_the_first_screen_has_both_commands() -> None:
    first = "\n".join(read("README.md").splitlines()[:40])
    assert "make demo" in first
    assert "make test" in first


def test_the_readme_shows_all_three_commands_and_python() -> None:
    used = {words[0] for part in sections(read("README.md")) for item in part.snippets for _, words in commands(item)}
    assert {"saae-run", "saae-export", "saae-train", "make", "pip"} <= used
    assert python_blocks(read("README.md"))


@pytest.mark.parametrize(("name", "block"), blocks())
def test_python_blocks_run(name: str, block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder with bundles/zipper, zipper and frames/*.png; `frame`, `frames`, `np` are there, too."""
    if block.skip:
        pytest.skip(block.skip)
    monkeypatch.chdir(tmp_path)
    make_tiny_bundle("bundles/zipper")
    make_tiny_bundle("zipper")
    frames = [gray_frame(), gray_frame(spot=(10, 20, 8, 8)), gray_frame((48, 48))]
    Path("frames").mkdir()
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(f"frames/{index}.png")
    code = compile("\n" * (block.line - 1) + block.text, str(ROOT / name), "exec")
    exec(code, {"__name__": "__main__", "frame": frames[1], "frames": frames, "np": np})


# --- the checks themselves ---


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("saae-run bundles/zipper frames", None),
        ("$ saae-run bundles/zipper frames --json - | head  # a comment with --nonsense", None),
        ("SAAE_CACHE=x saae-export build --category zipper && saae-run bundles/zipper a.png", None),
        ("saae-export build \\\n    --category zipper", None),
        ("saae-export --help", None),
        ("saae-export build --help", None),
        ("saae-export --version", None),
        ("make demo PYTHON=python3.12", None),
        ("python benchmarks/quality.py --data DIR", None),
        ("python benchmarks/NAME.py --anything", None),
        ("ls --nonsense", None),
        ("pip install 'saae[cpu,video]' '.[demo]' other[thing]", None),
        ("saae-run bundles/zipper frames --nonsense", "--nonsense"),
        ("saae-run bundles/zipper frames --json", "--json"),  # its value is missing
        ("saae-run bundles/zipper", "sources is missing"),
        ("true && saae-run bundles/zipper a.png --nonsense", "--nonsense"),
        ("saae-export nonsense", "no command nonsense"),
        ("saae-export", "a command is missing"),
        ("saae-export build --category zipper --fast", "--fast"),
        ("saae-export build \\\n    --nonsense", "--nonsense"),
        ("saae-export build --category zipper extra", "too many"),
        ("make nonsense", "no target nonsense"),
        ("python benchmarks/nonsense.py", "there is no benchmarks/nonsense.py"),
        ("python benchmarks/quality.py --data DIR --nonsense 3", "--nonsense"),
        ("python benchmarks/quality.py", "data is missing"),
        ("pip install 'saae[nonsense]'", "no extra nonsense"),
        ("pip install '.[cpu,nonsense]'", "no extra nonsense"),
    ],
)
@pytest.mark.parametrize("language", ["bash", "console"])
def test_command_check(line: str, complaint: str | None, language: str) -> None:
    found = command_problems(f"# Title\n\ntext\n\n```{language}\n{line}\n```\n")
    if complaint is None:
        assert found == []
    else:
        assert len(found) == 1
        assert complaint in found[0]
        assert found[0].startswith("line 6: ")


def test_command_check_of_inline_and_indented_code() -> None:
    assert command_problems("See `saae-export build`, `saae-run` and `saae-export build --category zipper`.") == []
    assert "no command biuld" in command_problems("See `saae-export biuld`.")[0]
    assert "--nonsense" in command_problems("| a |\n|---|\n| `saae-run b f --nonsense` |\n")[0]
    usage = "text\n\n    python benchmarks/quality.py --data D [--preset fast|paper]\n        [--again] [--nonsense]\n"
    assert command_problems(usage.replace(" [--nonsense]", "")) == []
    assert "--nonsense" in command_problems(usage)[0]
    # Python and output are no commands.
    assert command_problems("```python\nsaae-export nonsense\n```\n```text\nmake nonsense\n```\n") == []


def test_table_check() -> None:
    table = "| method | ROC |\n|---|---|\n| ours | {} |\n"
    for number in ("98.5", "**0.97**", "12 ms", "~3", "97.9 / 94.3", "0.98 ± 0.01", "4.9x", "31 FPS", "1,024"):
        assert len(table_problems("## Results\n\n" + table.format(number))) == 1, number
    command = "\n```bash\npython benchmarks/quality.py --data DIR\n```\n"
    assert table_problems("## Results\n\n" + table.format("98.5") + command) == []
    assert table_problems("## Results\n" + command + "\n" + table.format("98.5")) == []
    assert table_problems("## Results\n\nMade by `make demo`.\n\n" + table.format("98.5")) == []
    # In another section it does not count, nor does a command of someone else.
    assert table_problems("## How\n" + command + "\n## Results\n\n" + table.format("98.5")) != []
    assert table_problems("## Results\n\n`ls -l`\n\n" + table.format("98.5")) != []
    assert table_problems("## Results\n\n" + table.format("yes, ViT-S/14")) == []
    excused = "## Versions\n\n<!-- test: not measured: the vendor's release notes -->\n\n" + table.format("12.6")
    assert table_problems(excused) == []


def test_link_check(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "out.md").write_text("# Out\n")
    (tmp_path / "docs/there.md").write_text("# There\n\n## A `part`, and more\n\n```text\n# Not this\n```\n")
    good = (
        "# Here\n\n[a](there.md), [b](there.md#a-part-and-more), [c](https://example.org#x), [d](#here), [e](../out.md)"
    )
    assert link_problems(good, tmp_path / "docs") == []
    assert link_problems("[a](gone.md)", tmp_path) == ["line 1: gone.md is not there"]
    for link in ("#there", "there.md#here", "there.md#not-this"):
        assert link_problems(f"# Here\n\n[a]({link})", tmp_path / "docs") == [f"line 3: {link} has no such heading"]
    assert "leaves docs/" in link_problems("[a](../out.md)", tmp_path / "docs", tmp_path / "docs")[0]


def test_python_block_finder() -> None:
    text = "a\n\n```python\nx = 1\n```\n\n<!-- test: skip needs a camera -->\n```python\ny\n```\n\n```bash\nls\n```\n"
    first, second = python_blocks(text)
    assert (first.text, first.line, first.skip) == ("x = 1\n", 4, None)
    assert (second.text, second.skip) == ("y\n", "needs a camera")


def test_is_ours() -> None:
    assert is_ours(["make", "demo"])
    assert is_ours(["python", "benchmarks/quality.py"])
    assert not is_ours(["make"])
    assert not is_ours(["python", "-c", "x"])
