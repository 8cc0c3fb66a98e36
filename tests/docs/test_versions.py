"""The changelog and the page about versions name the present version and the bundle's schemas."""

from __future__ import annotations

import re

from doc_checks import ROOT

from saae_runtime.manifest import SCHEMA
from saae_runtime.version import saae_version


def test_the_changelog_begins_with_the_present_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^### (\d+\.\d+\.\d+)", text, re.MULTILINE)
    assert versions[0] == re.match(r"\d+\.\d+\.\d+", saae_version())[0]  # type: ignore[index]
    assert versions == sorted(versions, key=lambda text: [int(part) for part in text.split(".")], reverse=True)


def test_the_promise_lists_every_schema() -> None:
    text = (ROOT / "docs/versions.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (\d+) \|", text, re.MULTILINE) == [str(number) for number in range(1, SCHEMA + 1)]
    assert f"at present {SCHEMA}." in text
