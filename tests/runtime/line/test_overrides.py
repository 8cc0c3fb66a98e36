"""Overrides: durable, undone, with their pictures in the pool, and never outside of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from line_parts import bad

from saae_runtime import render
from saae_runtime.errors import ConfigError, DataError, StorageError
from saae_runtime.images import read_image
from saae_runtime.line.overrides import Overrides, called_defective, pool_folder
from saae_runtime.line.part import Part, Verdict, now


def record(part_id: str = "P-1", recipe: str | None = "gear") -> dict:
    part = Part(part_id, "one", now(), Verdict.NG, "score", recipe=recipe, bundle="b", score=50.0, threshold=40.0)
    return part.to_dict()


def test_an_override_stays_with_its_picture_until_it_is_undone(tmp_path: Path) -> None:
    part, frame = record(), bad()
    overrides = Overrides(tmp_path)
    made = overrides.mark(part, Verdict.OK, "anna", "dust", frame)
    assert (made.was, made.verdict, made.who, made.note) == ("NG", "OK", "anna", "dust")
    picture = tmp_path / "pool" / made.picture
    assert picture.parent == pool_folder(tmp_path, "gear")
    np.testing.assert_array_equal(read_image(picture), frame)  # what the model saw, bit for bit
    with pytest.raises(ConfigError, match="already, by anna"):
        overrides.mark(part, Verdict.NG, "ben")
    overrides.close()

    overrides = Overrides(tmp_path)  # after a restart
    assert overrides.get(part["key"]) == made
    assert overrides.pool("gear") == {"good": 1, "bad": 0}
    undone = overrides.undo(part["key"], "ben")
    assert (undone.undone_by, undone.picture) == ("ben", None)
    assert not picture.exists()
    with pytest.raises(DataError):
        overrides.undo(part["key"], "ben")
    again = overrides.mark(part, Verdict.NG, "ben", frame=frame)
    assert overrides.pool("gear") == {"good": 0, "bad": 1}
    overrides.close()
    overrides = Overrides(tmp_path)
    assert overrides.get(part["key"]) == again
    assert [item["who"] for item in overrides.latest(10)] == ["ben"]
    overrides.close()


def test_the_archived_images_of_overlooked_defects_are_known_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saae_runtime.line.overrides._REMEMBERED", 2)  # the file knows the older ones, too
    assert called_defective(tmp_path) == frozenset()
    overrides = Overrides(tmp_path)
    parts = [{**record(f"P-{number}"), "verdict": "OK", "picture": f"OK/gear/{number}.png"} for number in range(6)]
    parts[4]["picture"] = None  # not archived
    for part in parts:
        overrides.mark(part, Verdict.OK if part["part_id"] == "P-1" else Verdict.NG, "anna")
    overrides.undo(parts[5]["key"], "ben")
    assert overrides.get(parts[0]["key"]) is None
    with (tmp_path / "overrides.jsonl").open("ab") as stream:
        stream.write(b'{"of": "another version"}\nnonsense\n{"key": "half of a li')
    assert called_defective(tmp_path) == {f"OK/gear/{number}.png" for number in (0, 2, 3)}
    overrides.close()
    (tmp_path / "overrides.jsonl").unlink()
    (tmp_path / "overrides.jsonl").mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        called_defective(tmp_path)


@pytest.mark.parametrize("part_id", ["../../etc/passwd", "a/b\\c", "..", "x" * 64, "päрт \U0001f600"])
def test_no_part_id_leads_out_of_the_pool(tmp_path: Path, part_id: str) -> None:
    overrides = Overrides(tmp_path / "http")
    made = overrides.mark(record(part_id), Verdict.OK, "anna", "", bad())
    found = list(tmp_path.rglob("*.png"))
    assert found == [tmp_path / "http" / "pool" / made.picture]
    assert found[0].parent == pool_folder(tmp_path / "http", "gear")
    overrides.close()


def test_an_edited_file_removes_nothing_elsewhere(tmp_path: Path) -> None:
    victim = tmp_path / "victim.png"
    victim.write_bytes(b"x")
    overrides = Overrides(tmp_path / "http")
    made = overrides.mark(record(), Verdict.OK, "anna", "", bad())
    overrides.close()
    forged = replace(made, key="forged", picture="../../victim.png")
    with (tmp_path / "http" / "overrides.jsonl").open("a") as stream:
        stream.write(json.dumps(asdict(forged)) + "\nnonsense\n{}\n")
    overrides = Overrides(tmp_path / "http")
    overrides.undo("forged", "eve")
    assert victim.exists()
    overrides.close()


def test_whoever_reads_does_not_wait_for_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = Overrides(tmp_path)
    part, answered = record(), []

    def read() -> None:
        overrides.get(part["key"])
        overrides.latest(10)
        answered.append(True)

    def during(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*values: object) -> Any:
            reader = threading.Thread(target=read, daemon=True)
            reader.start()
            reader.join(5)
            return real(*values)

        return call

    monkeypatch.setattr(render, "encode_png", during(render.encode_png))
    monkeypatch.setattr(overrides._file, "sync", during(overrides._file.sync))
    overrides.mark(part, Verdict.OK, "anna", "", bad())
    assert len(answered) == 2
    overrides.undo(part["key"], "anna")
    assert len(answered) == 3
    overrides.close()


def test_two_people_at_once_make_one_override(tmp_path: Path) -> None:
    overrides = Overrides(tmp_path)
    part, begin = record(), threading.Barrier(4)
    made: list[str] = []

    def mark(who: str) -> None:
        begin.wait()
        with suppress(ConfigError):
            made.append(overrides.mark(part, Verdict.OK, who, "", bad()).who)

    threads = [threading.Thread(target=mark, args=(who,)) for who in ("anna", "ben", "carl", "dora")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    found = overrides.get(part["key"])
    assert found is not None
    assert made == [found.who]
    assert overrides.pool("gear") == {"good": 1, "bad": 0}  # its picture was not removed with another's attempt
    overrides.close()


def test_without_a_picture_the_reason_is_kept(tmp_path: Path) -> None:
    overrides = Overrides(tmp_path, pool_mb=1e-4)
    assert overrides.mark(record("a"), Verdict.OK, "anna", "", bad()).why == "the pool is full"
    assert overrides.mark(record("b"), Verdict.OK, "anna", no_frame="gone").why == "gone"
    assert overrides.mark(record("c", None), Verdict.OK, "anna", "", bad()).picture is None
    with pytest.raises(ConfigError, match="note"):
        overrides.mark(record("d"), Verdict.OK, "anna", "x" * 501)
    overrides.close()


def test_what_could_not_be_written_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = Overrides(tmp_path)

    def full(line: bytes) -> None:
        raise StorageError("full")

    monkeypatch.setattr(overrides._file, "write", full)
    part = record()
    with pytest.raises(StorageError):
        overrides.mark(part, Verdict.OK, "anna", "", bad())
    assert overrides.get(part["key"]) is None
    assert overrides.pool("gear") == {"good": 0, "bad": 0}
    overrides.close()
