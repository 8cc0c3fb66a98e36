"""Writes happen whole or not at all: crashes, Ctrl-C at every line, full disks, missing rights."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from saae_runtime import files
from saae_runtime.errors import ConfigError, StorageError
from saae_runtime.files import (
    IrregularFileError,
    LargeFileError,
    alone,
    atomic_directory,
    atomic_file,
    canonical_json,
    put_back,
    read_regular,
    sha256_bytes,
    sha256_file,
    short_name,
    write_bytes,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


OLD = {"a.txt": "old a", "sub/b.txt": "old b"}
NEW = {"a.txt": "new a", "deep/er/c.txt": "new c"}


def fill(folder: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def replace_directory(target: Path) -> None:
    with atomic_directory(target) as temporary:
        fill(temporary, NEW)


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


class Interrupt:
    """Raises KeyboardInterrupt just before the nth line that runs in files.py (and notes that line)."""

    def __init__(self, nth: int) -> None:
        self.left = nth
        self.line = 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Interrupt | None:
        if frame.f_code.co_filename != files.__file__:
            return None
        if event == "line":
            self.left -= 1
            if self.left < 0 and not self.line:
                self.line = frame.f_lineno
                raise KeyboardInterrupt
        return self


def interrupted_everywhere(action: Any, check: Any) -> int:
    """Runs `action` with Ctrl-C before each of its lines in turn; returns how many there were."""
    for nth in range(500):
        interrupt = Interrupt(nth)
        before = sys.gettrace()
        sys.settrace(interrupt)
        try:
            action()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        check(interrupt.line)
        if not interrupt.line:
            return nth
    raise AssertionError("it never came to an end")


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


def failing(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, code: int, skip: int = 0) -> None:
    """Makes a call fail with an OSError once it has succeeded `skip` times."""
    real, calls = getattr(owner, name), [0]

    def call(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] > skip:
            raise OSError(code, os.strerror(code))
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, call)


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


LIMITED = """
import resource, signal, sys
from pathlib import Path
from saae_runtime.errors import StorageError
from saae_runtime.files import atomic_directory, write_bytes
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
    pytest.importorskip("resource", reason="needs POSIX file size limits")
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


KILLED = """
import os, signal, sys
from pathlib import Path
from saae_runtime.files import atomic_directory
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


HOLDING = """
import sys, time
from pathlib import Path
from saae_runtime.files import alone
with alone(Path(sys.argv[1]), "A build", "wait"):
    print("in", flush=True)
    time.sleep(60)
"""


def test_one_process_at_a_time_and_a_killed_one_lets_go(tmp_path: Path, repo_root: Path) -> None:
    pytest.importorskip("fcntl", reason="needs POSIX locks")
    lock = tmp_path / "work" / ".lock"
    command = [sys.executable, "-c", HOLDING, str(lock)]
    with subprocess.Popen(command, cwd=repo_root, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"in\n"
        with pytest.raises(ConfigError, match="A fit is going on") as caught, alone(lock, "A fit", "wait"):
            pass
        assert caught.value.cure == "wait"
        other.kill()
    for _ in range(2):
        with alone(lock, "A fit", "wait"):
            pass


LEFT = """
import os, signal, sys
from pathlib import Path
from saae_runtime.files import atomic_directory, atomic_file
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

    for _ in range(3):
        process = begin()
        process.communicate()
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
        for process in (begin(),):
            process.communicate()
        monkeypatch.setattr(files, "_swept", set())
        write_text(tmp_path / "c", "new")
        assert set(names(tmp_path)) == living | {"b", "c", "e"}
        alive.communicate()


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
