"""The spool: nothing lost, nothing doubled, whatever is killed, cut off, damaged or full."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from saae_runtime.errors import ConfigError
from saae_runtime.line.spool import Spool
from saae_runtime.line.spool_reader import Reader

pytestmark = pytest.mark.usefixtures("synced")


def payload(number: int, size: int = 0) -> bytes:
    return json.dumps({"key": f"k{number}", "n": number, "fill": "x" * size}).encode()


def take(reader: Reader, commit: bool = True) -> list[int]:
    found = []
    while batch := reader.read(100, 0):
        found += [record.data["n"] for record in batch]
        if commit:
            reader.commit(batch[-1].number)
    return found


def put(spool: Spool, numbers: range, size: int = 0) -> None:
    for number in numbers:
        assert spool.append(f"k{number}", payload(number, size))


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.log"))


def test_every_reader_gets_every_record_in_order(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    one, two = spool.reader("one"), spool.reader("two")
    put(spool, range(50))
    assert take(one) == list(range(50))
    put(spool, range(50, 120))
    assert take(one) == list(range(50, 120))
    assert two.backlog == 120
    assert take(two) == list(range(120))
    spool.close()


def test_what_was_not_committed_comes_again(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    reader = spool.reader("r")
    put(spool, range(10))
    (first, *_), rest = reader.read(4, 0), reader.read(4, 0)
    assert (first.data["n"], rest[0].data["n"]) == (0, 4)
    reader.commit(rest[1].number)
    reader.rewind()
    assert take(reader, commit=False) == [6, 7, 8, 9]
    spool.close()
    again = Spool(tmp_path)
    assert take(again.reader("r")) == [6, 7, 8, 9]
    again.close()
    last = Spool(tmp_path)
    assert take(last.reader("r")) == []
    last.close()


def test_a_new_reader_begins_with_the_next_record(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    put(spool, range(5))
    reader = spool.reader("late")
    put(spool, range(5, 7))
    assert take(reader) == [5, 6]
    spool.close()


def test_the_same_key_is_one_record_across_a_restart(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    reader = spool.reader("r")
    put(spool, range(3))
    assert not spool.append("k1", payload(1))
    assert take(reader) == [0, 1, 2]
    spool.close()
    again = Spool(tmp_path)
    reader = again.reader("r")
    assert not again.append("k2", payload(2))
    assert again.append("k3", payload(3))
    assert again.stats.doubled == 1
    assert take(reader) == [3]
    again.close()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    code = f"from pathlib import Path; from saae_runtime.line.spool import Spool; Spool(Path({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ConfigError" in done.stderr
    spool.close()
    Spool(tmp_path).close()


def test_read_files_are_removed_and_numbers_go_on(tmp_path: Path) -> None:
    spool = Spool(tmp_path, limit=1 << 20)
    reader = spool.reader("r")
    put(spool, range(300), size=2000)
    assert len(files(tmp_path)) > 3
    assert take(reader) == list(range(300))
    assert len(files(tmp_path)) == 1
    spool.close()
    again = Spool(tmp_path, limit=1 << 20)
    reader = again.reader("r")
    put(again, range(300, 303))
    assert take(reader) == [300, 301, 302]
    again.close()


def test_full_spool_gives_up_the_oldest_and_counts_them(tmp_path: Path) -> None:
    limit = 1 << 20
    spool = Spool(tmp_path, limit=limit)
    slow, quick = spool.reader("slow"), spool.reader("quick")
    seen = []
    for start in range(0, 1000, 100):
        put(spool, range(start, start + 100), size=3000)
        seen += take(quick)
    assert sum(file.stat().st_size for file in files(tmp_path)) <= limit + (1 << 17)
    assert seen == list(range(1000))
    assert quick.lost == 0
    assert 0 < slow.lost < 1000
    assert take(slow) == list(range(slow.lost, 1000))
    lost = slow.lost
    spool.close()
    again = Spool(tmp_path, limit=limit)
    assert again.reader("slow").lost == lost  # the count survives a restart
    again.close()


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(1, 400), sizes=st.lists(st.integers(0, 300), min_size=1, max_size=8))
@example(cut=len(payload(0)) + 12 - 1, sizes=[0])  # one byte of the last record is left
@example(cut=len(payload(0)) + 12 - 2, sizes=[0])
def test_a_cut_tail_costs_the_cut_records_alone(
    tmp_path_factory: pytest.TempPathFactory, cut: int, sizes: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("spool")
    spool = Spool(folder)
    spool.reader("r")
    ends = []
    for number, size in enumerate(sizes):
        spool.append(f"k{number}", payload(number, size))
        ends.append(files(folder)[0].stat().st_size)
    spool.close()
    (file,) = files(folder)
    left = max(ends[-1] - cut, 0)
    os.truncate(file, left)
    whole = sum(end <= left for end in ends)
    again = Spool(folder)
    reader = again.reader("r")
    assert file.stat().st_size == (ends[whole - 1] if whole else 0)
    again.append("new", payload(99))
    assert take(reader) == [*range(whole), 99]
    again.close()


@settings(max_examples=40, deadline=None)
@given(place=st.floats(0, 0.999), value=st.integers(1, 255))
def test_a_damaged_byte_never_gives_a_wrong_record(
    tmp_path_factory: pytest.TempPathFactory, place: float, value: int
) -> None:
    folder = tmp_path_factory.mktemp("spool")
    spool = Spool(folder, limit=1 << 20)
    spool.reader("r")
    put(spool, range(100), size=3000)
    spool.close()
    first = files(folder)[0]
    data = bytearray(first.read_bytes())
    data[int(place * len(data))] ^= value
    first.write_bytes(data)
    again = Spool(folder, limit=1 << 20)
    reader = again.reader("r")
    got = take(reader)
    assert got == sorted(set(got))
    assert len(got) + again.stats.damaged == 100
    assert got[-1] == 99  # the files behind it are whole
    again.close()


@settings(max_examples=40, deadline=None)
@given(place=st.floats(0, 0.999), value=st.integers(1, 255))
def test_a_damaged_byte_costs_one_record_wherever_it_is(
    tmp_path_factory: pytest.TempPathFactory, place: float, value: int
) -> None:
    folder = tmp_path_factory.mktemp("spool")
    spool = Spool(folder)
    spool.reader("r")
    put(spool, range(50), size=20)
    spool.close()
    (file,) = files(folder)
    data = bytearray(file.read_bytes())
    last = data.rfind(b'{"key"') - 12
    data[at := int(place * len(data))] ^= value
    file.write_bytes(data)
    again = Spool(folder)
    reader = again.reader("r")
    put(again, range(50, 60))
    got = take(reader)
    assert len(got) == 59
    assert got == sorted(set(got))
    assert got[-10:] == list(range(50, 60))
    if not last <= at < last + 4:  # a wrong length of the last record looks like one that is not complete
        assert (again.stats.damaged, reader.lost) == (1, 1)
        assert (again.end, reader.backlog) == (61, 0)
    again.close()
    last_time = Spool(folder)
    assert last_time.reader("r").lost == reader.lost  # the count survives a restart
    last_time.close()


@pytest.mark.parametrize("last", [False, True])
def test_a_hole_costs_its_records_alone(tmp_path: Path, last: bool) -> None:
    spool = Spool(tmp_path)
    one, two = spool.reader("one"), spool.reader("two")
    assert take(one) == []
    put(spool, range(2000), size=1000)
    spool.close()
    (file,) = files(tmp_path)
    data = bytearray(file.read_bytes())
    begin = data.index(b'{"key": "k1500"') if not last else data.index(b'{"key": "k1999"')
    data[begin : begin + 10_000] = os.urandom(10_000)[: len(data) - begin]
    file.write_bytes(data)
    again = Spool(tmp_path)
    one, two = again.reader("one"), again.reader("two")
    assert again.stats.damaged == (1 if last else 10)  # known at the start
    expected = [number for number in range(2000) if not (number == 1999 if last else 1500 <= number < 1510)]
    assert take(one) == take(two, commit=False) == expected
    assert one.lost == again.stats.damaged
    assert one.backlog == 0
    two.rewind()
    assert take(two) == expected
    assert two.lost == one.lost == again.stats.damaged
    put(again, range(2000, 2001))
    assert take(one) == [2000]
    again.close()


def test_an_unreadable_cursor_means_again_not_never(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    reader = spool.reader("r")
    put(spool, range(5))
    reader.commit(reader.read(3, 0)[-1].number)
    spool.close()
    (tmp_path / "r.cursor").write_bytes(b"\0" * 20)
    again = Spool(tmp_path)
    assert take(again.reader("r")) == [0, 1, 2, 3, 4]
    again.close()


def test_a_file_that_cannot_be_opened_for_a_while_costs_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = Spool(tmp_path)
    reader = spool.reader("r")
    put(spool, range(20))
    reader.read(5, 0)
    reader.rewind()  # as after a failure of its sink
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, old[1]))
    try:
        for _ in range(2):
            with pytest.raises(OSError, match="Too many open files"):
                reader.read(5, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, old)
    real = os.pread
    for good in ([], [True]):  # reads that work before the disk fails: none, and the one that finds the place
        reader.rewind()

        def fails(file: int, size: int, offset: int, good: list[bool] = good) -> bytes:
            if not good or not good.pop():
                raise OSError(5, "Input/output error")
            return real(file, size, offset)

        with monkeypatch.context() as patch:
            patch.setattr("saae_runtime.line.spool_records.os.pread", fails)
            with pytest.raises(OSError, match="Input/output error"):
                reader.read(100, 0)
    assert (reader.lost, reader.backlog, spool.stats.damaged) == (0, 20, 0)
    assert take(reader) == list(range(20))
    assert (reader.lost, reader.backlog) == (0, 0)
    spool.close()


def test_records_of_a_removed_file_are_counted_and_those_behind_it_delivered(tmp_path: Path) -> None:
    spool = Spool(tmp_path, limit=1 << 20)
    reader = spool.reader("r")
    put(spool, range(100), size=3000)
    first, second = files(tmp_path)[:2]
    first.unlink()
    gone = int(second.stem) - 1
    assert take(reader) == list(range(gone, 100))
    assert (reader.lost, reader.backlog) == (gone, 0)
    spool.close()


def test_a_waiting_reader_is_woken(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    reader = spool.reader("r")
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.extend(r.data["n"] for r in reader.read(5, 30)))
    thread.start()
    put(spool, range(1))
    thread.join(20)
    assert found == [0]
    spool.close()


def test_a_full_disk_holds_nobody_up_and_loses_nothing(tmp_path: Path) -> None:
    """In a process of its own: the limit on the size of files would hit the tests' own output."""
    code = f"""
import json, resource, signal
from pathlib import Path
from saae_runtime.line.spool import Spool
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
spool = Spool(Path({str(tmp_path)!r}))
reader = spool.reader("r")
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
for number in range(300):
    assert spool.append(f"k{{number}}", json.dumps({{"key": f"k{{number}}", "n": number, "fill": "x" * 200}}).encode())
assert spool.stats.waiting > 100, spool.stats
assert spool.last_error is not None
def take():
    found = []
    while batch := reader.read(100, 0):
        found += [record.data["n"] for record in batch]
    return found
before = take()
assert before == list(range(len(before))) and len(before) < 200
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
spool.append("k300", json.dumps({{"key": "k300", "n": 300}}).encode())
assert before + take() == list(range(301))
assert spool.stats.waiting == spool.stats.lost == 0
spool.close()
print("good")
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "good\n", done.stderr


_WRITER = """
import json, sys
from pathlib import Path
from saae_runtime.line.spool import Spool
spool = Spool(Path(sys.argv[1]), limit=1 << 24)
reader = spool.reader("r")
start = int(sys.argv[2])
for number in range(start, start + 1_000_000):
    spool.append(f"k{number}", json.dumps({"key": f"k{number}", "n": number, "fill": "x" * 500}).encode())
    print(number, flush=True)
"""


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.fuzz)])
def test_killed_writers_lose_nothing(tmp_path: Path, kills: int) -> None:
    start = 0
    for turn in range(kills):
        with subprocess.Popen(
            [sys.executable, "-c", _WRITER, tmp_path, str(start)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            for _ in range(50 + 37 * turn % 400):
                process.stdout.readline()
            process.send_signal(signal.SIGKILL)
            said = process.stdout.read().split()
        if said:
            start = int(said[-1]) + 1
        else:
            start += 50 + 37 * turn % 400
    spool = Spool(tmp_path)
    got = take(spool.reader("r"))
    assert got == list(range(len(got)))
    assert start <= len(got) <= start + 1  # one may be written and not said
    spool.close()


def test_closed_and_too_long(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    with pytest.raises(ConfigError, match="too long"):
        spool.append("k", b"x" * (9 << 20))
    with pytest.raises(ConfigError, match="already"):
        _ = [spool.reader("a"), spool.reader("a")]
    spool.close()
    spool.close()
    with pytest.raises(ConfigError, match="closed"):
        spool.append("k", b"{}")
