"""A part that was asked for and that no station took is NG, with a record, once, in every sink."""

from __future__ import annotations

import csv
import json
import sqlite3
import threading
from pathlib import Path

from line_parts import SINKS, ListCamera, good, line_text, wait_until

from saae_runtime.line.config import load_config
from saae_runtime.line.handshake import _MOST_UNTOLD, Handshake
from saae_runtime.line.health import prometheus_text
from saae_runtime.line.service import Line
from saae_runtime.line.sinks import KINDS
from saae_runtime.line.view import Phase, Reply
from saae_runtime.line.wiring import SECTIONS, open_trigger


def test_each_missed_part_has_one_record_in_every_sink(tiny: Path, tmp_path: Path) -> None:
    text = line_text(tiny, station='trigger = "http"\nverdict_timeout = 1.0', more=SINKS)
    (tmp_path / "line.toml").write_text(text)
    config = load_config(tmp_path / "line.toml", KINDS, SECTIONS)
    go, held = threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        held.set()
        go.wait(60)

    camera = ListCamera((good() for _ in range(100)), live=True)
    with Line(config, lambda *_: camera, open_trigger) as line:
        handshake = line.stations["one"].source
        assert isinstance(handshake, Handshake)
        line.listen(hold)
        line.start()
        assert wait_until(lambda: handshake.view().ready)
        handshake.trigger("taken")
        assert held.wait(20)  # the station is busy with what comes behind the verdict
        handshake.acknowledge("taken")
        assert handshake.trigger("late") is Reply.ACCEPTED
        assert wait_until(lambda: handshake.view().valid)
        assert not handshake.view().ok
        handshake.acknowledge("late")
        handshake.trigger("gone", owner="plc")
        handshake.lost("plc")
        go.set()
        assert wait_until(lambda: line.stations["one"].reading().counts["missed"] == 2)
        assert wait_until(lambda: all(sink["delivered"] == 3 for sink in line.health()["sinks"]))
        counts = line.stations["one"].reading().counts
        assert counts["OK"] + counts["NG"] == 3
        assert b'saae_parts_missed_total{station="one"} 2.0' in prometheus_text(line.health())
        # and one that is withdrawn by the stop itself
        go.clear()
        held.clear()
        handshake.trigger("last taken")
        assert held.wait(20)
        handshake.acknowledge("last taken")
        handshake.trigger("at the end")
        line.stations["one"].stop()
        go.set()
    records = [json.loads(row) for row in (tmp_path / "out.jsonl").read_text().splitlines()]
    found = {record["part_id"]: (record["verdict"], record["reason"]) for record in records}
    assert len(records) == len(found) == 5
    assert found["late"] == ("NG", "timeout")
    assert found["gone"] == ("NG", "error: the station did not take the part: client lost")
    assert found["at the end"] == ("NG", "error: the station did not take the part: closed")
    with (tmp_path / "out.csv").open(newline="") as stream:
        assert sorted(row["part_id"] for row in csv.DictReader(stream)) == sorted(found)
    with sqlite3.connect(tmp_path / "out.sqlite") as database:
        assert dict(database.execute("SELECT part_id, verdict FROM parts")) == {
            part_id: verdict for part_id, (verdict, _) in found.items()
        }
    assert {part_id for part_id, (verdict, _) in found.items() if verdict == "OK"} <= {"taken", "last taken"}


def test_no_trigger_is_accepted_while_too_many_records_wait() -> None:
    handshake = Handshake(60.0)
    handshake.wait(0)
    for number in range(_MOST_UNTOLD):
        assert handshake.trigger(f"p{number}", owner="plc") is Reply.ACCEPTED
        handshake.lost("plc")
    assert handshake.trigger("one more") is Reply.OFFLINE
    assert handshake.view().phase is Phase.OFFLINE
    assert len(handshake.missed()) == _MOST_UNTOLD
    assert handshake.trigger("one more") is Reply.ACCEPTED
