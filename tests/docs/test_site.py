"""The documentation builds as a site: nothing from outside, links lead somewhere, a broken one ends the build."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from doc_checks import ROOT
from folders import copy_tree
from needs import need
from site_checks import dead_links, outside_requests, read_pages

import saae_runtime

COMMANDS = "docs/reference/commands.md"
"""Not kept: written from the commands' own help."""


def copy_of_the_documentation(folder: Path) -> Path:
    """All that the site is made from."""
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "saae_runtime", folder / "saae_runtime", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mkdocs.yml", "CHANGELOG.md"):
        shutil.copy(ROOT / name, folder / name)
    subprocess.run([sys.executable, ROOT / "docs/commands.py", folder / COMMANDS], check=True, timeout=120)
    return folder


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    need("zensical"), need("mkdocstrings")
    return subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--clean", "--strict"],
        cwd=folder,
        env={**os.environ, "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def documentation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To be copied before it is changed."""
    return copy_of_the_documentation(tmp_path_factory.mktemp("documentation"))


@pytest.fixture(scope="module")
def site(documentation: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_tree(documentation, tmp_path_factory.mktemp("site") / "here")
    done = build(folder)
    assert done.returncode == 0, done.stdout
    return folder / "build/site"


def test_every_page_of_the_documentation_is_in_the_site(site: Path) -> None:
    written = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    written.add(Path(COMMANDS).relative_to("docs").with_suffix(".html"))
    built = {path.relative_to(site) for path in site.rglob("*.html")}
    assert written == built - {Path("404.html")}


def test_every_page_can_be_reached_from_the_first(site: Path) -> None:
    pages = read_pages(site)
    start = site / "index.html"
    seen, waiting = {start}, [start]
    while waiting:
        page = waiting.pop()
        for link in pages[page].linked:
            target = (page.parent / link.split("#")[0]).resolve()
            if target in pages and target not in seen:
                seen.add(target)
                waiting.append(target)
    assert set(pages) - seen == {site / "404.html"}


def test_nothing_is_asked_for_from_outside(site: Path) -> None:
    assert outside_requests(site) == []


def test_every_link_leads_somewhere(site: Path) -> None:
    assert dead_links(site) == []


def test_the_reference_holds_the_public_names(site: Path) -> None:
    anchors = set().union(*(page.anchors for page in read_pages(site).values()))
    shown = {anchor.rsplit(".", 1)[-1] for anchor in anchors if anchor.startswith("saae_runtime.")}
    assert set(saae_runtime.__all__) - shown == {"BACKENDS"}  # a tuple of names, in the page's text
    for name in (
        "Engine.stream",
        "manifest.Manifest",
        "errors.SaaeError",
        "errors.FrameError",
        "thresholds.ThresholdTable",
    ):
        assert f"saae_runtime.{name}" in anchors


def test_the_reference_holds_the_commands_and_their_options(site: Path) -> None:
    page = (site / "reference/commands.html").read_text(encoding="utf-8")
    anchors = read_pages(site)[site / "reference/commands.html"].anchors
    assert {
        "saae-run",
        "saae-line-run",
        "saae-export-build",
        "saae-train-fit-many",
        "saae-line-audit-verify",
    } <= anchors
    for option in ("--image-fpr &lt;float&gt;", "--ray-address ADDRESS", "--max-batch N", "--int8"):
        assert f"<code>{option}</code>" in page, option


def test_a_broken_link_ends_the_build(documentation: Path, tmp_path: Path) -> None:
    folder = copy_tree(documentation, tmp_path / "here")
    with (folder / "docs/faq.md").open("a", encoding="utf-8") as page:
        page.write("\n[nowhere](gone.md)\n")
    done = build(folder)
    assert done.returncode != 0
    assert "faq.md" in done.stdout


def test_the_checks_themselves(tmp_path: Path) -> None:
    (tmp_path / "a.css").write_text("@import 'https://fonts.example/x.css'; b { background: url(x.png) }")
    (tmp_path / "b.html").write_text("<h1 id=there>b</h1>")
    (tmp_path / "index.html").write_text(
        '<link rel="canonical" href="https://h/"><link rel="stylesheet" href="//cdn.example/a.css"><img src="gone.png">'
        '<script src="https://cdn.x/a.js"></script><a href="https://x.org/">fine</a><a href="b.html#there">x</a>'
        '<a href="b.html#gone">x</a><p style="background: url(http://x/y.png)">'
        "<style>i { src: url('https://z/') }</style>"
    )
    outside = outside_requests(tmp_path)
    assert len(outside) == 5, outside
    assert dead_links(tmp_path) == ["index.html: b.html#gone (no such anchor)", "index.html: gone.png"]
