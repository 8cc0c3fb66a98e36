"""Folders are written whole or not at all: crashes, Ctrl-C at every line, full disks, places that cannot be renamed."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from failing_disk import NEW, OLD, failing, fill, interrupted_everywhere, names, replace_directory, tree

from saae_runtime.errors import StorageError
from saae_runtime.files import (
    write_text,
)
from saae_runtime.folders import atomic_directory, may_write_folder, put_back

pytestmark = pytest.mark.usefixtures("synced")


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("there", [True, False])
def test_directory_whose_writer_fails(tmp_path: Path, failure: type[BaseException], there: bool) -> None:
    target = tmp_path / "d"
    if there:
        fill(target, OLD)

    def write() -> None:
        with atomic_directory(target) as temporary:
            fill(temporary, NEW)
            raise failure

    with pytest.raises(failure):
        write()
    assert names(tmp_path) == (["d"] if there else [])
    assert not there or tree(target) == OLD


def test_directory_replaces_all_of_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "up" / "d"
    replace_directory(target)
    assert tree(target) == NEW
    (target / "stale").write_text("gone with the next write")
    replace_directory(target)
    assert tree(target) == NEW
    assert names(tmp_path / "up") == ["d"]


def test_directory_that_may_not_be_replaced(tmp_path: Path) -> None:
    fill(tmp_path / "d", OLD)
    with pytest.raises(StorageError, match="already there"), atomic_directory(tmp_path / "d", replace=False):
        pytest.fail("the body must not run")
    assert tree(tmp_path / "d") == OLD
    assert names(tmp_path) == ["d"]


def test_ctrl_c_before_any_line_of_a_directory_write(tmp_path: Path) -> None:
    target = tmp_path / "d"
    seen = set()

    def action() -> None:
        fill(target, OLD)
        (target / "deep/er/c.txt").unlink(missing_ok=True)
        for folder in ("deep/er", "deep"):
            if (target / folder).is_dir():
                (target / folder).rmdir()
        replace_directory(target)

    def check(line: int) -> None:
        # Either the old one whole or the new one whole, never neither and never a mixture.
        found = tree(target)
        assert found in (OLD, NEW), f"interrupted before line {line}"
        seen.add(found == NEW)

    assert interrupted_everywhere(action, check) > 25
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("owner", "name", "skip"),
    # fsync: 0 fails at the first file, 3 at the second (two folders between);
    # rename: 0 moving the old one away, 1 moving the new one in.
    [(os, "fsync", 0), (os, "fsync", 3), (Path, "rename", 0), (Path, "rename", 1), (Path, "mkdir", 0)],
)
def test_failing_disk_under_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, skip: int
) -> None:
    target = tmp_path / "d"
    fill(target, OLD)
    real = getattr(owner, name)
    calls = [0]

    def once(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == skip + 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, once)
    with pytest.raises(StorageError, match="disk is full"):
        replace_directory(target)
    monkeypatch.undo()
    assert tree(target) == OLD
    assert names(tmp_path) == ["d"]


def test_a_file_stands_where_a_folder_is_needed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    for write in (write_text, lambda path, text: replace_directory(path)):
        with pytest.raises(StorageError):
            write(tmp_path / "file" / "below", "new")
    with pytest.raises(StorageError, match="is a file"):
        replace_directory(tmp_path / "file")
    assert tree(tmp_path) == {"file": "old"}


@pytest.mark.parametrize("broken", [False, True])
def test_a_link_as_target_is_replaced_not_followed_into_ruin(tmp_path: Path, broken: bool) -> None:
    if not broken:
        fill(tmp_path / "real", OLD)
    (tmp_path / "d").symlink_to("real")
    replace_directory(tmp_path / "d")
    assert tree(tmp_path / "d") == NEW
    assert broken or tree(tmp_path / "real") == OLD
    assert names(tmp_path) == (["d"] if broken else ["d", "real"])


KILLED = """
import os, signal, sys
from pathlib import Path
from saae_runtime.folders import atomic_directory
rename, calls = Path.rename, []
def once(self, target):
    calls.append(target)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.rename = once
with atomic_directory(sys.argv[1]) as folder:
    (folder / "b.txt").write_text("new")
"""


def killed_while_swapping(target: Path, repo_root: Path) -> None:
    """Leaves what `kill -9` between the two renames of a replacement leaves."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(target)], cwd=repo_root, check=False)
    assert done.returncode == -9
    assert not target.exists()


def test_a_replacement_that_was_killed_is_put_back(tmp_path: Path, repo_root: Path) -> None:
    target = tmp_path / "d"
    fill(target, OLD)
    killed_while_swapping(target, repo_root)
    assert put_back(target) is None
    assert tree(target) == OLD
    assert put_back(target) is None  # nothing more to do


def test_the_next_write_finds_what_a_killed_one_moved_aside(tmp_path: Path, repo_root: Path) -> None:
    target = tmp_path / "d"
    fill(target, OLD)
    killed_while_swapping(target, repo_root)
    with pytest.raises(RuntimeError), atomic_directory(target):
        raise RuntimeError
    assert tree(target) == OLD
    (tmp_path / ".d.0123abcd.old").mkdir()  # killed after the second rename
    (tmp_path / ".d.notes.old").mkdir()  # somebody's own
    replace_directory(target)
    assert tree(target) == NEW
    assert [name for name in names(tmp_path) if name.endswith(".old")] == [".d.notes.old"]


def test_a_replacement_goes_on_where_a_reader_has_put_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "d"
    fill(target, OLD)
    real, calls = Path.rename, [0]

    def rename(self: Path, to: Path) -> Path:
        calls[0] += 1
        if calls[0] == 2:
            assert put_back(target) is None  # calls rename itself
            assert tree(target) == OLD
        return real(self, to)

    monkeypatch.setattr(Path, "rename", rename)
    replace_directory(target)
    assert tree(target) == NEW
    assert names(tmp_path) == ["d"]


def test_what_may_not_be_put_back_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aside = tmp_path / ".d.0123abcd.old"
    aside.mkdir()
    failing(monkeypatch, Path, "rename", errno.EACCES)
    assert put_back(tmp_path / "d") == aside


@pytest.fixture(params=["mount point", "parent that may not be written to", "busy", "another device"])
def fixed(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a bundle's files that cannot be renamed, as a container's volume cannot."""
    folder = tmp_path / "volume"
    folder.mkdir()
    (folder / "manifest.json").write_text("old")
    (folder / "old.onnx").write_text("old")
    original, access = Path.rename, os.access
    if request.param == "mount point":
        monkeypatch.setattr(Path, "is_mount", lambda self: self == folder)
    elif request.param == "parent that may not be written to":
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))

    def rename(self: Path, target: Path) -> Path:
        if self == folder:
            raise OSError(errno.EXDEV if request.param == "another device" else errno.EBUSY, "in use")
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {entry.relative_to(folder).as_posix(): entry.read_text() for entry in folder.rglob("*") if entry.is_file()}


def test_a_folder_that_cannot_be_renamed_gets_new_contents(fixed: Path) -> None:
    before = fixed.stat().st_ino
    with atomic_directory(fixed, last="manifest.json") as temporary:
        (temporary / "manifest.json").write_text("new")
        (temporary / "samples").mkdir()
        (temporary / "samples" / "1.png").write_text("new")
        assert contents(fixed)["manifest.json"] == "old"
    assert contents(fixed) == {"manifest.json": "new", "samples/1.png": "new"}
    assert [entry.name for entry in fixed.parent.iterdir()] == [fixed.name]
    assert fixed.stat().st_ino == before


def test_a_failed_exchange_puts_back_what_was_there(fixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == "manifest.json" and self.read_text() == "new":
            assert not (fixed / "manifest.json").exists()  # it comes last, and in between there is none
            raise OSError(errno.EIO, "the disk fails")
        return inner(self, target)

    monkeypatch.setattr(Path, "rename", rename)

    def write() -> None:
        with atomic_directory(fixed, last="manifest.json") as temporary:
            (temporary / "manifest.json").write_text("new")
            (temporary / "new.onnx").write_text("new")

    with pytest.raises(StorageError):
        write()
    assert contents(fixed) == {"manifest.json": "old", "old.onnx": "old"}
    assert [entry.name for entry in fixed.parent.iterdir()] == [fixed.name]


def test_a_place_that_may_not_be_written_to_is_said_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write_folder(tmp_path / "a" / "b")
    (tmp_path / "old").mkdir()
    may_write_folder(tmp_path / "old")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for target in (tmp_path / "a" / "b", tmp_path / "old"):
        with pytest.raises(StorageError, match=r"denied|read-only|Read-only"):
            may_write_folder(target)
    assert not (tmp_path / "a").exists()
