"""JSON lines, CSV and SQLite: every record once and in order, across kills, full disks and half-written lines."""

from __future__ import annotations

import csv
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from line_parts import wait_until

from saae_runtime.errors import ConfigError
from saae_runtime.line.config import SinkConfig
from saae_runtime.line.part import Part, Verdict, now, stamp
from saae_runtime.line.sinks import KINDS, make_sink
from saae_runtime.line.sinks.delivery import Delivery
from saae_runtime.line.spool import Spool
from saae_runtime.line.spool_records import Record

START = now()
LOCAL = ("jsonl", "csv", "sqlite")


def part(number: int, **changes: Any) -> Part:
    region = {"bbox": [1, 2, 3, 4], "area": 4, "peak": [1, 2], "score": 5.0}
    values = {
        "reason": "score",
        "recipe": "r",
        "score": number / 7,
        "threshold": 3.0,
        "regions": (region,),
        "source": 'a, "b".png',
    }
    return Part(f"p{number}", "one", START + timedelta(seconds=number), Verdict.NG, **{**values, **changes})


def put(spool: Spool, numbers: range, **changes: Any) -> None:
    for number in numbers:
        item = part(number, **changes)
        spool.append(item.key, item.to_json().encode())


def delivery(spool: Spool, kind: str, folder: Path, **options: Any) -> Delivery:
    config = SinkConfig(kind, kind, KINDS[kind](path=f"out.{kind}", **options))
    return Delivery(kind, make_sink(config, folder, "line"), spool.reader(kind), 0.02)


def ids(kind: str, folder: Path) -> list[str]:
    path = folder / f"out.{kind}"
    if not path.exists():
        return []
    if kind == "jsonl":
        return [json.loads(line).get("part_id") for line in path.read_text().splitlines()]
    if kind == "csv":
        with path.open(newline="") as stream:
            return [row["part_id"] for row in csv.DictReader(stream)]
    with sqlite3.connect(path) as database:
        return [row[0] for row in database.execute("SELECT part_id FROM parts ORDER BY time")]


def names(numbers: range) -> list[str]:
    return [f"p{number}" for number in numbers]


@pytest.mark.parametrize("kind", LOCAL)
def test_every_record_once_and_in_order(kind: str, tmp_path: Path) -> None:
    for start in (0, 700, 1400):  # a restart in between
        spool = Spool(tmp_path / "spool")
        sink = delivery(spool, kind, tmp_path)
        put(spool, range(start, start + 700))
        sink.finish(time.monotonic() + 20)
        assert sink.state()["backlog"] == 0
        spool.close()
    assert ids(kind, tmp_path) == names(range(2100))


@pytest.mark.parametrize("kind", LOCAL)
def test_records_that_come_again_are_written_once(kind: str, tmp_path: Path) -> None:
    """A kill between writing and remembering: the place in the spool is behind what the file has."""
    spool = Spool(tmp_path / "spool")
    sink = delivery(spool, kind, tmp_path)
    put(spool, range(300))
    assert wait_until(lambda: sink.state()["backlog"] == 0)
    place = (tmp_path / "spool" / f"{kind}.cursor").read_bytes()
    put(spool, range(300, 1000))
    sink.finish(time.monotonic() + 20)
    spool.close()
    (tmp_path / "spool" / f"{kind}.cursor").write_bytes(place)
    if kind != "sqlite":  # and the last line is half there
        with (tmp_path / f"out.{kind}").open("ab") as stream:
            stream.write(b'{"type": "pa' if kind == "jsonl" else b"2026-01-01T00")
    spool = Spool(tmp_path / "spool")
    sink = delivery(spool, kind, tmp_path)
    put(spool, range(1000, 1010))
    sink.finish(time.monotonic() + 20)
    spool.close()
    assert ids(kind, tmp_path) == names(range(1010))


def test_values_survive_the_way(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    sinks = [delivery(spool, kind, tmp_path) for kind in LOCAL]
    odd = part(
        3, source='a\nb;\x07"c"', reason="error: ü\n2", masks={"roi": [[[0, 1]]], "judged": 0.5}, picture="NG/x.png"
    )
    spool.append(odd.key, odd.to_json().encode())
    spool.append("e", json.dumps({"type": "drift", "key": "e", "time": "t", "station": "one", "words": "x"}).encode())
    for sink in sinks:
        sink.finish(time.monotonic() + 20)
    spool.close()
    one, two = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert one == json.loads(odd.to_json())
    assert two["type"] == "drift"
    with (tmp_path / "out.csv").open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert (row["reason"], row["source"]) == ("error: ü 2", 'a b;\x07"c"')
    assert float(row["score"]) == odd.score
    assert (row["regions"], row["left"], row["bottom"]) == ("1", "1", "4")
    with sqlite3.connect(tmp_path / "out.sqlite") as database:
        database.row_factory = sqlite3.Row
        (found,) = database.execute("SELECT * FROM parts")
        assert found["source"] == odd.source
        assert json.loads(found["masks"]) == odd.masks
        assert json.loads(found["regions"]) == [dict(region) for region in odd.regions]
        assert database.execute("SELECT type, station FROM events").fetchall()[0][:] == ("drift", "one")


@pytest.mark.parametrize("kind", LOCAL)
def test_a_name_that_is_not_utf_8_costs_no_record(kind: str, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    sink = delivery(spool, kind, tmp_path)
    odd = part(1, source="in/Pr\udcfcfling.png")
    spool.append(odd.key, odd.to_json().encode())
    as_it_is = {**part(2).to_dict(), "part_id": "Pr\udcfcfling"}  # whatever a record holds
    spool.append("other", json.dumps(as_it_is).encode())
    spool.append("e\udcfc", json.dumps({"type": "recipe", "key": "e\udcfc", "station": "\udcfc"}).encode())
    sink.finish(time.monotonic() + 20)
    spool.close()
    assert (sink.state()["refused"], sink.state()["backlog"]) == (0, 0)
    assert len(ids(kind, tmp_path)) == 3 if kind == "jsonl" else ids(kind, tmp_path) == ["p1", r"Pr\udcfcfling"]


def test_the_record_of_a_name_that_is_not_utf_8_is_utf_8() -> None:
    odd = part(1, source="in/Pr\udcfcfling.png", reason="error: \udcfc")
    odd = replace(odd, part_id="Pr\udcfcfling")
    assert odd.to_dict()["source"] == r"in/Pr\udcfcfling.png"
    assert odd.to_dict()["part_id"] == r"Pr\udcfcfling"
    assert odd.to_dict()["key"] == odd.key
    json.dumps(odd.to_dict(), ensure_ascii=False).encode("utf-8")  # as the HTTP service writes it


def test_files_are_turned_over(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    sink = delivery(spool, "jsonl", tmp_path, rotate="20kb", keep=3)
    put(spool, range(200))
    sink.finish(time.monotonic() + 20)
    spool.close()
    files = sorted(tmp_path.glob("out.jsonl*"), reverse=True)
    assert len(files) == 4
    written = [json.loads(line)["part_id"] for file in files for line in file.read_text().splitlines()]
    assert written == names(range(200))[-len(written) :]


def test_a_table_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.csv").write_text("a,b\n1,2\n")
    spool = Spool(tmp_path / "spool")
    sink = delivery(spool, "csv", tmp_path)
    put(spool, range(3))
    assert wait_until(lambda: sink.state()["last_error"])
    assert "a different table" in sink.state()["last_error"]
    assert not sink.state()["working"]
    sink.finish(time.monotonic() + 5)
    spool.close()
    assert (tmp_path / "out.csv").read_text() == "a,b\n1,2\n"
    with pytest.raises(ConfigError, match="a different table"):
        make_sink(SinkConfig("csv", "csv", KINDS["csv"](path="out.csv")), tmp_path, "l").open()


def test_a_spool_that_cannot_be_opened_for_a_while_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failures = os.open, [3]

    def fails(path: object, flags: int, *more: int) -> int:
        if str(path).endswith(".log") and not flags & os.O_WRONLY and failures[0]:
            failures[0] -= 1
            raise OSError(24, "Too many open files")
        return real(path, flags, *more)  # type: ignore[arg-type]

    spool = Spool(tmp_path / "spool")
    sink = delivery(spool, "jsonl", tmp_path)
    monkeypatch.setattr("saae_runtime.line.spool_reader.os.open", fails)
    put(spool, range(3))
    assert wait_until(lambda: sink.state()["delivered"] == 3)
    assert "Too many open files" in sink.state()["last_error"]
    sink.finish(time.monotonic() + 20)
    assert (sink.state()["lost"], failures) == (0, [0])
    spool.close()
    assert ids("jsonl", tmp_path) == names(range(3))


def test_old_parts_leave_the_database(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    sink = delivery(spool, "sqlite", tmp_path, days=1.0)
    old = Part("old", "one", now() - timedelta(days=2), Verdict.OK, "score")
    spool.append(old.key, old.to_json().encode())
    put(spool, range(3))
    sink.finish(time.monotonic() + 20)
    spool.close()
    # A part is as old as its row: its own time may be that of an old file.
    assert ids("sqlite", tmp_path) == ["old", *names(range(3))]
    with sqlite3.connect(tmp_path / "out.sqlite") as database:
        database.execute("UPDATE parts SET recorded = ? WHERE part_id = 'old'", (stamp(old.time),))
    again = Spool(tmp_path / "spool")
    sink = delivery(again, "sqlite", tmp_path, days=1.0)
    put(again, range(3, 4))
    assert wait_until(lambda: ids("sqlite", tmp_path) == names(range(4)))
    sink.finish(time.monotonic() + 20)
    again.close()


def test_a_wrong_clock_does_not_empty_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for start, ahead in ((0, 0), (3, 100), (6, 100), (9, -9000), (12, 0)):  # the clock is wrong at three starts
        moment = now() + timedelta(days=ahead)
        monkeypatch.setattr("saae_runtime.line.sinks.sqlite.now", lambda moment=moment: moment)
        sink = make_sink(SinkConfig("s", "sqlite", KINDS["sqlite"](path="out.sqlite", days=30.0)), tmp_path, "l")
        sink.open()
        records = [Record(number, part(number).to_json().encode()) for number in range(start, start + 3)]
        assert sink.write(records, threading.Event()) == 3
        sink.close()
    assert ids("sqlite", tmp_path) == names(range(15))


@pytest.mark.parametrize("kind", LOCAL)
def test_a_full_disk_delays_and_loses_nothing(kind: str, tmp_path: Path) -> None:
    """In a process of its own, which may write files of 80 kB, and later larger ones."""
    code = f"""
import importlib.util, resource, signal, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("lines", {__file__!r})
lines = importlib.util.module_from_spec(spec); spec.loader.exec_module(lines)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path({str(tmp_path)!r})
spool = lines.Spool(folder / "spool", limit=1 << 19)  # files of 65 kB
sink = lines.delivery(spool, {kind!r}, folder)
lines.put(spool, range(20))
assert lines.wait_until(lambda: sink.state()["backlog"] == 0), sink.state()
resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, resource.RLIM_INFINITY))
lines.put(spool, range(20, 500), source="x" * 200)
assert lines.wait_until(lambda: sink.state()["last_error"]), sink.state()
assert not sink.state()["working"]
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
lines.put(spool, range(500, 501))
assert lines.wait_until(lambda: sink.state()["backlog"] == 0 and not spool.stats.waiting, 60), sink.state()
sink.finish(time.monotonic() + 20)
spool.close()
found = lines.ids({kind!r}, folder)
assert found == lines.names(range(501)), len(found)
print("good")
"""
    support = str(Path(__file__).parents[3] / "support")
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {support!r})\n{code}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "good\n", done.stderr


def test_a_sink_that_breaks_at_a_record_leaves_it_out_and_goes_on(tmp_path: Path) -> None:
    class Broken:
        batch, refused = 10, 0

        def __init__(self) -> None:
            self.got: list[str] = []

        def open(self) -> None: ...
        def sync(self) -> None: ...
        def close(self) -> None: ...
        def state(self) -> dict[str, Any]:
            return {}

        def write(self, records: Any, hurry: Any) -> int:
            if any(record.data["part_id"] == "p7" for record in records):
                raise KeyError("p7")
            self.got += [record.data["part_id"] for record in records]
            return len(records)

    spool = Spool(tmp_path / "spool")
    sink = Broken()
    feeder = Delivery("broken", sink, spool.reader("broken"), 0.02)
    put(spool, range(20))
    assert wait_until(lambda: feeder.state()["backlog"] == 0, 60)
    assert feeder.state()["refused"] == 1
    assert "KeyError" in feeder.state()["last_error"]
    feeder.finish(time.monotonic() + 5)
    spool.close()
    assert sink.got == [name for name in names(range(20)) if name != "p7"]
