"""The audit log: whatever is done to a finished log is found, and what a killed service leaves is no fault."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saae_runtime.appending import LineFile
from saae_runtime.errors import ConfigError, StorageError
from saae_runtime.files import canonical_json, sha256_bytes
from saae_runtime.line.audit import AuditLog, explain, head_of, verify


def written(path: Path, count: int = 6) -> list[bytes]:
    """A log of so many entries; its lines."""
    log = AuditLog(path)
    for number in range(count):
        log.append("anna", "engineer", "threshold", {"recipe": "r", "after": number / 3})
    log.close()
    return path.read_bytes().splitlines()


def put(path: Path, lines: list[bytes]) -> None:
    path.write_bytes(b"".join(line + b"\n" for line in lines))


def refuse(*_: object) -> None:
    raise StorageError("The disk is full.")


def test_entries_chain_and_go_on_after_a_restart(tmp_path: Path) -> None:
    path, copies = tmp_path / "audit.jsonl", []
    written(path, 3)
    log = AuditLog(path, copies.append)
    digest = log.append("ben", "operator", "override", {"key": "k"})
    assert [item["n"] for item in log.latest(2)] == [4, 3]
    log.close()
    log.close()
    with pytest.raises(StorageError):
        log.append("ben", "operator", "override", {})
    found = verify(path)
    assert (found.entries, found.problems, found.notes, found.sha256) == (4, (), (), digest)
    assert explain(found) is None
    assert copies[0]["sha256"] == digest
    assert sha256_bytes(path.read_bytes().splitlines()[-1]) == digest


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    with pytest.raises(ConfigError):
        AuditLog(tmp_path / "audit.jsonl")
    log.close()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_changed_removed_moved_or_cut_line_is_found(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("audit") / "audit.jsonl"
    lines = written(path)
    place = data.draw(st.integers(0, len(lines) - 1))
    how = data.draw(st.sampled_from(["byte", "remove", "swap", "cut", "double", "insert", "half", "rewrite"]))
    if how == "byte":
        line, at = bytearray(lines[place]), data.draw(st.integers(0, len(lines[place]) - 1))
        line[at] ^= data.draw(st.integers(1, 255))
        lines[place] = bytes(line)
        if b"\n" in line or b"\r" in line:
            return
    elif how == "remove":
        del lines[place]
    elif how == "swap":
        other = (place + 1) % len(lines)
        lines[place], lines[other] = lines[other], lines[place]
    elif how == "cut":
        lines = lines[:place]
    elif how == "double":
        lines.insert(place, lines[place])
    elif how == "insert":
        lines.insert(place, canonical_json({**json.loads(lines[place]), "who": "eve"}).encode())
    elif how == "rewrite":  # a whole entry, its own form right
        lines[place] = canonical_json({**json.loads(lines[place]), "who": "eve"}).encode()
    put(path, lines)
    if how == "half":
        path.write_bytes(path.read_bytes()[: -1 - data.draw(st.integers(1, 50))])
    error = explain(verify(path))
    assert isinstance(error, ConfigError)


def test_a_new_chain_is_found_by_an_anchor_only(tmp_path: Path) -> None:
    anchor = sha256_bytes(written(tmp_path / "a" / "audit.jsonl")[2])
    written(tmp_path / "b" / "audit.jsonl")  # at another time: other hashes
    assert not verify(tmp_path / "a" / "audit.jsonl", anchor).problems
    assert not verify(tmp_path / "b" / "audit.jsonl").problems
    assert "no entry has the hash" in verify(tmp_path / "b" / "audit.jsonl", anchor).problems[0]


def test_a_kill_between_entry_and_head_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    written(path, 3)
    before = head_of(path).read_bytes()
    log = AuditLog(path)
    log.append("anna", "engineer", "bundle", {})
    log.close()
    head_of(path).write_bytes(before)
    found = verify(path)
    assert not found.problems
    assert "newer than the head file" in found.notes[0]
    log = AuditLog(path)
    assert log.damage == ""
    log.append("anna", "engineer", "bundle", {})
    log.close()
    assert verify(path).problems == ()


def test_a_half_line_of_a_power_cut_is_cut_off_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    written(path, 2)
    with path.open("ab") as stream:
        stream.write(b'{"n":3,"who"')
    assert verify(path).problems
    AuditLog(path).close()
    assert verify(path).problems == ()


@pytest.mark.parametrize("how", ["head", "entries"])
def test_damage_is_said_in_the_log_itself(tmp_path: Path, how: str) -> None:
    path = tmp_path / "audit.jsonl"
    lines = written(path, 4)
    if how == "head":
        head_of(path).unlink()
        assert "is missing" in verify(path).problems[0]
    else:
        put(path, lines[:2])
        assert verify(path).problems == ("2 entries are missing at the end",)
    log = AuditLog(path)
    assert log.damage
    assert log.latest(1)[0]["what"] == "audit log damaged"
    log.close()
    assert verify(path).notes  # and stays seen


@pytest.mark.parametrize("fails", ["head", "sync"])
def test_a_refused_entry_is_not_in_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    """The last block of the log has room when the disk is full; a new head file has not."""
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.append("anna", "engineer", "threshold", {"after": 1})
    for after in (2, 3):
        with monkeypatch.context() as full:
            full.setattr(
                *(("saae_runtime.line.audit.write_json", refuse) if fails == "head" else (LineFile, "sync", refuse))
            )
            with pytest.raises(StorageError):
                log.append("anna", "engineer", "threshold", {"after": after})
        assert [item["data"]["after"] for item in log.latest(9)] == [1]
        assert verify(path).problems == verify(path).notes == ()
    log.append("anna", "engineer", "threshold", {"after": 4})
    log.close()
    assert (verify(path).entries, verify(path).problems) == (2, ())
    log = AuditLog(path)
    assert log.damage == ""
    log.close()


def test_a_refused_entry_that_cannot_be_taken_back_is_taken_back_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.append("anna", "engineer", "threshold", {"after": 1})
    with monkeypatch.context() as broken:
        broken.setattr("saae_runtime.line.audit.write_json", refuse)
        broken.setattr(LineFile, "cut", refuse)
        for _ in range(3):
            with pytest.raises(StorageError):
                log.append("anna", "engineer", "threshold", {"after": 2})
    log.append("anna", "engineer", "threshold", {"after": 3})
    assert [item["data"]["after"] for item in log.latest(9)] == [3, 1]
    assert verify(path).problems == ()
    log.close()


def test_damage_that_cannot_be_said_at_once_comes_before_the_next_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "audit.jsonl"
    put(path, written(path, 4)[:2])
    with monkeypatch.context() as full:
        full.setattr("saae_runtime.line.audit.write_json", refuse)
        log = AuditLog(path)
        assert "full" in log.failed
        with pytest.raises(StorageError):
            log.append("anna", "engineer", "bundle", {})
    log.append("anna", "engineer", "bundle", {})
    assert [item["what"] for item in log.latest(2)] == ["bundle", "audit log damaged"]
    log.close()


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        verify(tmp_path / "none.jsonl")
