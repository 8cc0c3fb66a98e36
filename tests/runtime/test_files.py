"""Files are written whole or not at all: crashes, Ctrl-C at every line, full disks, missing rights."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from failing_disk import OLD, failing, fill, interrupted_everywhere, names, replace_directory, tree
from needs import need

from saae_runtime import files
from saae_runtime.errors import StorageError
from saae_runtime.files import (
    IrregularFileError,
    LargeFileError,
    atomic_file,
    canonical_json,
    read_regular,
    sha256_bytes,
    sha256_file,
    short_name,
    write_bytes,
    write_json,
    write_text,
)

pytestmark = pytest.mark.usefixtures("synced")


def test_hashes(tmp_path: Path) -> None:
    data = os.urandom(3 * (1 << 20) + 17)  # more than one piece
    (tmp_path / "a").write_bytes(data)
    assert sha256_file(tmp_path / "a") == sha256_bytes(data) == hashlib.sha256(data).hexdigest()
    assert sha256_bytes(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_canonical_json_is_one_form() -> None:
    assert canonical_json({"b": [1, 2.5], "a": "é"}) == '{"a":"\\u00e9","b":[1,2.5]}'
    assert canonical_json({"a": 1, "b": 2}) == canonical_json({"b": 2, "a": 1})
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"a": float("nan")})


def test_writers(tmp_path: Path) -> None:
    write_bytes(tmp_path / "new" / "folder" / "a.bin", b"\x00\xff")
    write_text(tmp_path / "b.txt", "größer\n")
    write_json(tmp_path / "c.json", {"ä": [1, None]})
    assert (tmp_path / "new/folder/a.bin").read_bytes() == b"\x00\xff"
    assert (tmp_path / "b.txt").read_bytes() == "größer\n".encode()
    assert json.loads((tmp_path / "c.json").read_text(encoding="utf-8")) == {"ä": [1, None]}
    write_text(tmp_path / "b.txt", "again")
    assert (tmp_path / "b.txt").read_text() == "again"
    assert names(tmp_path) == ["b.txt", "c.json", "new"]


def test_a_file_name_that_is_no_utf_8_can_be_written_and_read_back(tmp_path: Path) -> None:
    name = os.fsdecode(b"teil_\xe4.png")
    write_json(tmp_path / "a.json", {name: [name, "größer"]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {name: [name, "größer"]}
    write_text(tmp_path / "a.txt", name)
    assert (tmp_path / "a.txt").read_bytes() == b"teil_\\udce4.png"


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"old": 1})
    for value, kind in (({"x": float("inf")}, ValueError), ({"x": object()}, TypeError)):
        with pytest.raises(kind):
            write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("there", [True, False])
def test_file_whose_writer_fails(tmp_path: Path, failure: type[BaseException], there: bool) -> None:
    if there:
        (tmp_path / "a").write_text("old")

    def write() -> None:
        with atomic_file(tmp_path / "a") as temporary:
            temporary.write_text("half")
            assert temporary.parent == tmp_path  # a rename across file systems would not be atomic
            raise failure

    with pytest.raises(failure):
        write()
    assert tree(tmp_path) == ({"a": "old"} if there else {})


def test_ctrl_c_before_any_line_of_a_file_write(tmp_path: Path) -> None:
    target = tmp_path / "a"
    seen = set()

    def action() -> None:
        target.write_text("old")
        write_text(target, "new")

    def check(line: int) -> None:
        assert target.read_text() in ("old", "new"), f"interrupted before line {line}"
        seen.add(target.read_text())

    assert interrupted_everywhere(action, check) > 8
    assert seen == {"old", "new"}


@pytest.mark.parametrize(
    ("code", "word"), [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "disk is full"), (errno.EIO, "Could not write")]
)
@pytest.mark.parametrize(("owner", "name"), [(os, "fsync"), (Path, "replace"), (Path, "write_bytes"), (Path, "mkdir")])
def test_failing_disk_under_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, code: int, word: str
) -> None:
    (tmp_path / "a").write_text("old")
    failing(monkeypatch, owner, name, code)
    with pytest.raises(StorageError, match=word) as caught:
        write_text(tmp_path / "a", "new")
    assert caught.value.cure
    monkeypatch.undo()
    assert tree(tmp_path) == {"a": "old"}


LIMITED = """
import resource, signal, sys
from pathlib import Path
from saae_runtime.errors import StorageError
from saae_runtime.files import write_bytes
from saae_runtime.folders import atomic_directory
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
target = Path(sys.argv[1])
try:
    if target.is_dir():
        with atomic_directory(target) as folder:
            (folder / "small").write_bytes(b"x")
            write_bytes(folder / "large", b"x" * 100_000)
    else:
        write_bytes(target, b"x" * 100_000)
except StorageError as error:
    print(error)
else:
    raise SystemExit("the limit did not hold")
"""


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_write_that_the_system_cuts_short(tmp_path: Path, repo_root: Path, kind: str) -> None:
    need("resource")
    target = tmp_path / "t"
    if kind == "file":
        target.write_text("old")
    else:
        fill(target, OLD)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(target)], cwd=repo_root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "File too large" in done.stdout
    assert names(tmp_path) == ["t"]
    assert target.read_text() == "old" if kind == "file" else tree(target) == OLD


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    # /dev/full refuses every write as a full disk does, with the real error from the kernel.
    with pytest.raises(StorageError, match="disk is full") as caught, atomic_file(tmp_path / "a"):
        FULL.write_bytes(b"x" * 100_000)
    assert "free space" in caught.value.cure
    assert names(tmp_path) == []


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    fill(locked, {"a": "old"})
    locked.chmod(0o500)
    try:
        for write in (lambda: write_text(locked / "a", "new"), lambda: replace_directory(locked / "d")):
            with pytest.raises(StorageError, match="Permission denied") as caught:
                write()
            assert str(locked) in caught.value.cure
        assert tree(locked) == {"a": "old"}
    finally:
        locked.chmod(0o700)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_no_permission_as_the_system_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    (tmp_path / "a").write_text("old")
    failing(monkeypatch, Path, "write_bytes", code)
    with pytest.raises(StorageError, match=os.strerror(code)) as caught:
        write_text(tmp_path / "a", "new")
    assert "may write to" in caught.value.cure
    monkeypatch.undo()
    assert tree(tmp_path) == {"a": "old"}


def test_rights_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "x")
        replace_directory(tmp_path / "d")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o750


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "a") as first, atomic_file(tmp_path / "a") as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert tree(tmp_path) == {"a": "first"}


LEFT = """
import os, signal, sys
from pathlib import Path
from saae_runtime.files import atomic_file
from saae_runtime.folders import atomic_directory
with atomic_file(Path(sys.argv[1]) / "a.png"), atomic_directory(Path(sys.argv[1]) / "d") as folder:
    (folder / "half").write_text("half")
    print("in it", flush=True)
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_killed_writers_have_left_goes_and_what_others_write_stays(
    tmp_path: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", LEFT, str(tmp_path)],
            cwd=repo_root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "in it\n"
        return process

    def end(process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(60)

    for _ in range(3):
        process = begin()
        end(process)
        assert process.returncode == -9
    killed = names(tmp_path)
    assert len(killed) == 6
    (tmp_path / ".a.png.notes.saae-tmp").touch()  # somebody's own
    with begin() as alive:
        living = set(names(tmp_path)) - set(killed)
        write_text(tmp_path / "b", "new")
        assert set(killed) <= set(names(tmp_path)), "too young: its writer may not have locked it yet"
        monkeypatch.setattr(files, "_GRACE", -1.0)
        replace_directory(tmp_path / "e")
        assert set(names(tmp_path)) == living | {"b", "e"}
        end(begin())
        monkeypatch.setattr(files, "_swept", set())
        write_text(tmp_path / "c", "new")
        assert set(names(tmp_path)) == living | {"b", "c", "e"}
        end(alive)


@pytest.mark.parametrize("length", [200, 236, 240, 255])
def test_names_as_long_as_a_file_system_takes_them(tmp_path: Path, length: int) -> None:
    for name in ("n" * length, ("ä" * length)[: length // 2]):
        write_text(tmp_path / name, "whole")
        assert (tmp_path / name).read_text() == "whole"
        replace_directory(tmp_path / f"{name[:-1]}d")
        replace_directory(tmp_path / f"{name[:-1]}d")
    assert len(names(tmp_path)) == 4


def test_a_name_that_is_too_long_is_an_error_with_a_cure(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        write_text(tmp_path / ("n" * 256), "x")
    assert names(tmp_path) == []


def test_short_names_stay_apart_and_fit() -> None:
    long = ["x" * 300 + end for end in ("a", "b")] + ["ö" * 300]
    short = [short_name(name, 20) for name in long]
    assert len(set(short)) == 3
    assert all(len(os.fsencode(name)) <= 235 for name in short)
    assert short_name("part.png", 20) == "part.png"


@pytest.mark.parametrize("kind", ["fifo", "folder", "endless"])
def test_only_regular_files_are_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    {"fifo": lambda: os.mkfifo(path), "folder": path.mkdir, "endless": lambda: path.symlink_to("/dev/zero")}[kind]()
    for read in (lambda: read_regular(path, 100), lambda: sha256_file(path)):
        with pytest.raises(IrregularFileError):
            read()


def test_a_file_larger_than_the_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    assert read_regular(tmp_path / "x", 5) == b"12345"
    with pytest.raises(LargeFileError) as caught:
        read_regular(tmp_path / "x", 4)
    assert caught.value.size == 5
