"""The page of error messages quotes messages that the packages really raise."""

from __future__ import annotations

from pathlib import Path

import pytest
from doc_checks import ROOT, sections
from message_checks import messages, quoted, source_of
from tiny_bundle import make_tiny_bundle

from saae_runtime import SaaeError, open_bundle

PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
KNOWN = messages()


def test_every_quoted_message_is_in_the_source() -> None:
    assert [f"line {line}: {text}" for line, text in quoted(PAGE) if source_of(text, KNOWN) is None] == []


def test_no_message_is_there_twice_and_there_are_enough() -> None:
    places = [source_of(text, KNOWN) for _, text in quoted(PAGE)]
    assert len(places) >= 25
    assert len(set(places)) == len(places)


def test_every_heading_of_a_message_was_checked() -> None:
    shown = [part.title.strip("`") for part in sections(PAGE) if part.title.startswith("`")]
    assert shown == [text for _, text in quoted(PAGE)]


def test_the_example_is_what_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block at the top, made again: a misspelt name beside a bundle."""
    monkeypatch.chdir(tmp_path)
    make_tiny_bundle("bundles/gear")
    with pytest.raises(SaaeError) as caught:
        open_bundle("bundles/gaer")
    assert str(caught.value) in PAGE


def test_the_check_itself(tmp_path: Path) -> None:
    (tmp_path / "saae_runtime").mkdir()
    (tmp_path / "saae_runtime/errors.py").write_text("class SaaeError(Exception): ...\nclass AError(SaaeError): ...\n")
    (tmp_path / "saae_runtime/a.py").write_text(
        'raise AError(f"{x} is not (quite) a bundle.", "why")\nraise AError(f"{x} is {y}.")\n'
        'print("No such text, ever.")\n'
    )
    known = messages(tmp_path)
    assert source_of("part.txt is not (quite) a bundle.", known) == "saae_runtime/a.py:1"
    for other in ("part.txt is not a bundle.", "part.txt is not (quite) a bundle", "No such text, ever.", "a is b."):
        assert source_of(other, known) is None
    assert quoted("# T\n\n### `One.`\n\ntext\n\n### Two\n") == [(3, "One.")]
