"""What people change while the line runs: in force at once, written down, in force again after a restart."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import datetime, timedelta
from datetime import time as day_time
from pathlib import Path

import numpy as np
import pytest
from http_client import Client
from line_parts import bad, good, wait_until

from saae_runtime.errors import CalibrationError
from saae_runtime.images import read_image
from saae_runtime.line.audit import verify
from saae_runtime.line.http import service
from saae_runtime.line.http.recent import Recent
from saae_runtime.line.part import Part, Verdict, now
from saae_runtime.line.recalibrate import GoodParts, changed_parts, next_version, versions
from saae_runtime.line.recipes import Recipe

Serving = Callable[..., ExitStack]
JSONL = '[[sink]]\nkind = "jsonl"\npath = "records.jsonl"\n'


@pytest.fixture
def stack(serving: Serving, tmp_path: Path) -> Iterator[ExitStack]:
    with serving(tmp_path, more=JSONL) as found:
        assert wait_until(lambda: len(found.http.context.recent.records(9, station="one")) == 3)
        yield found


def events(folder: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    return [line for line in lines if line["type"] == kind]


def test_a_threshold_is_previewed_changed_and_kept(stack: ExitStack, serving: Serving, tmp_path: Path) -> None:
    client: Client = stack.client
    seen = client.get("/v1/threshold", recipe="first", false_alarms=0.0).json
    assert (seen["threshold"], seen["wanted"], seen["judged"], seen["ng"]) == (40.0, 60.0, 3, 1)
    assert seen["changed"] == []
    seen = client.get("/v1/threshold", recipe="first", threshold=130.0).json
    assert (seen["would_be_ng"], [item["would_be"] for item in seen["changed"]]) == (0, ["OK"])
    assert stack.line.book.get("first").threshold == 40.0  # looking changes nothing

    assert client.post("/v1/threshold", {"recipe": "first", "threshold": 130.0, "version": 7}).status == 400
    made = client.post("/v1/threshold", {"recipe": "first", "threshold": 130.0, "version": 1}).json
    assert made == {"recipe": "first", "threshold": 130.0, "version": 2}
    assert client.post("/v1/judge", _png(bad())).json["verdict"] == "OK"
    for body in (
        {"recipe": "first"},
        {"recipe": "first", "threshold": 1.0, "false_alarms": 0.1},
        {"recipe": "first", "threshold": 1e9},  # nothing would be NG any more
        {"recipe": "none", "threshold": 1.0},
    ):
        assert client.post("/v1/threshold", body).status == 400
    for text in ("NaN", "Infinity", "-1", '"x"', "1e400"):
        assert client.post("/v1/threshold", f'{{"recipe": "first", "threshold": {text}}}'.encode()).status == 422
    assert stack.line.book.get("first").threshold == 130.0
    stack.close()
    assert [item["data"].get("after") for item in events(tmp_path, "audit")] == [130.0]

    with serving(tmp_path) as again:
        assert again.line.book.get("first").threshold == 130.0
        assert again.client.get("/v1/audit", last=1).json[0]["what"] == "change in force again"
    text = (tmp_path / "line.toml").read_text()
    (tmp_path / "line.toml").write_text(text)
    with serving(
        tmp_path, more='\n[[recipe]]\nname = "x"\nbundle = "none"\n'.replace("none", str(_bundle(text)))
    ) as again:
        assert again.line.book.get("first").threshold == 130.0  # another recipe's table is no matter
    assert verify(tmp_path / "http" / "audit.jsonl").problems == ()


def _bundle(text: str) -> Path:
    return Path(text.split('bundle = "')[1].split('"')[0])


def _png(frame: np.ndarray) -> bytes:
    from saae_runtime.render import encode_png

    return encode_png(frame)


def test_who_edits_the_file_has_the_last_word(stack: ExitStack, serving: Serving, tmp_path: Path) -> None:
    stack.client.post("/v1/threshold", {"recipe": "other", "false_alarms": 0.01})
    assert stack.line.book.get("other").threshold == 20.0
    stack.close()
    kept = json.loads((tmp_path / "http" / "in-force.json").read_text())
    kept["other"]["recipe"] = "0" * 64  # as if the table had been edited
    kept["gone"] = {"recipe": "0", "changes": {}}
    kept["first"] = {"nonsense": 1}
    (tmp_path / "http" / "in-force.json").write_text(json.dumps(kept))
    with serving(tmp_path) as again:
        assert again.line.book.get("other").threshold == 500.0
        dropped = [item["data"]["recipe"] for item in again.client.get("/v1/audit", last=3).json]
        assert set(dropped) == {"other", "gone", "first"}
    (tmp_path / "http" / "in-force.json").write_text("nonsense")
    with serving(tmp_path) as again:
        assert "is ignored" in again.line.health()["last_error"]


def test_a_bundle_is_switched_to_a_version_and_back(stack: ExitStack, tiny: Path, strict: Path, tmp_path: Path) -> None:
    client: Client = stack.client
    newer = tiny.with_name("tiny.recal-1")
    try:
        shutil.copytree(strict, newer)
        (tiny.with_name("tiny.recal-x")).mkdir(exist_ok=True)
        (tiny.with_name("tiny.recal-7")).mkdir(exist_ok=True)  # no bundle in it
        assert versions(newer) == versions(tiny) == [tiny, newer]
        assert next_version(newer) == tiny.with_name("tiny.recal-2")
        assert client.get("/v1/bundle", recipe="first").json["versions"] == ["tiny", "tiny.recal-1"]
        for name in ("../other", str(strict), "tiny.recal-7", "", "tiny.recal-2"):
            answer = client.post("/v1/bundle", {"recipe": "first", "bundle": name})
            assert answer.status == 400, name
        before = stack.line.book.get("first")
        made = client.post("/v1/bundle", {"recipe": "first", "bundle": "tiny.recal-1"}).json
        assert (made["threshold"], made["version"]) == (200.0, before.version + 1)
        assert client.post("/v1/judge", _png(bad())).json["bundle"] == made["digest"] != before.bundle
        client.post("/v1/bundle", {"recipe": "first", "bundle": "tiny"})
        assert stack.line.book.get("first").bundle == before.bundle
        assert (
            not (tmp_path / "http" / "in-force.json").exists()
            or json.loads((tmp_path / "http" / "in-force.json").read_text()) == {}
        )
        (newer / "model.onnx").write_bytes(b"damaged")
        assert client.post("/v1/bundle", {"recipe": "first", "bundle": "tiny.recal-1"}).status == 409
        assert stack.line.book.get("first").bundle == before.bundle
        whats = [item["what"] for item in client.get("/v1/audit", last=3).json]
        assert whats == ["bundle refused", "bundle", "bundle"]
    finally:
        for path in tiny.parent.glob("tiny.recal-*"):
            shutil.rmtree(path)


def test_an_override_goes_to_the_pool_and_to_every_sink(stack: ExitStack, tmp_path: Path) -> None:
    client: Client = stack.client
    part = client.get("/v1/parts", station="one", verdict="NG").json[0]
    made = client.post("/v1/overrides", {"key": part["key"], "verdict": "OK", "note": "dust"}).json
    assert (tmp_path / "http" / "pool" / made["picture"]).is_file()
    assert client.post("/v1/overrides", {"key": part["key"], "verdict": "OK"}).status == 400
    assert client.get("/v1/parts", station="one", verdict="NG").json[0]["override"]["verdict"] == "OK"
    assert client.post("/v1/overrides", {"key": "nobody", "verdict": "OK"}).status == 404
    undone = client.post("/v1/overrides/undo", {"key": part["key"]}).json
    assert undone["undone_by"] == "local"
    assert client.post("/v1/overrides/undo", {"key": part["key"]}).status == 404
    assert not list((tmp_path / "http" / "pool").rglob("*.png"))
    stack.close()
    (override,) = events(tmp_path, "override")
    assert (override["part_id"], override["was"], override["verdict"]) == (part["part_id"], "NG", "OK")
    assert override["part_key"] == part["key"]
    assert len(events(tmp_path, "override-undone")) == 1
    record = next(item for item in events(tmp_path, "part") if item["key"] == part["key"])
    assert record["verdict"] == "NG"  # what the line did stays what it did


def test_a_change_that_cannot_be_written_down_is_not_made(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    from saae_runtime.errors import StorageError

    def full(*_: object) -> str:
        raise StorageError("The disk is full.")

    part = stack.client.get("/v1/parts", station="one", verdict="NG").json[0]
    monkeypatch.setattr(stack.http.context.control.audit, "append", full)
    assert stack.client.post("/v1/threshold", {"recipe": "first", "threshold": 130.0}).status == 507
    assert stack.client.post("/v1/recipe", {"station": "asked", "recipe": "other"}).status == 507
    assert stack.client.post("/v1/overrides", {"key": part["key"], "verdict": "OK"}).status == 507
    assert stack.line.book.get("first").threshold == 40.0
    assert stack.line.stations["asked"].recipe == "first"
    assert stack.http.context.control.overrides.get(part["key"]) is None


def test_a_change_that_cannot_be_kept_is_not_in_force(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from saae_runtime.errors import StorageError

    def full(*_: object) -> None:
        raise StorageError("The disk is full.")

    audit = stack.http.context.control.audit
    append, logged = audit.append, []

    def log_the_first(*entry: object) -> str:
        logged.append(entry)
        if len(logged) > 1:
            raise StorageError("The log is full, too.")
        return append(*entry)

    before = stack.line.book.get("first")
    with monkeypatch.context() as patched:
        patched.setattr("saae_runtime.line.in_force.write_json", full)
        assert stack.client.post("/v1/threshold", {"recipe": "first", "threshold": 130.0}).status == 507
        entry = stack.client.get("/v1/audit", last=1).json[0]
        assert (entry["what"], entry["data"]["why"]) == ("threshold refused", "The disk is full.")
        patched.setattr(audit, "append", log_the_first)
        assert stack.client.post("/v1/threshold", {"recipe": "first", "threshold": 130.0}).status == 507
        assert "log is full" in stack.line.health()["last_error"]
    assert not (tmp_path / "http" / "in-force.json").exists()
    assert stack.line.book.get("first") is before
    assert stack.client.post("/v1/judge", _png(bad())).json["verdict"] == "NG"
    assert stack.client.post("/v1/threshold", {"recipe": "first", "threshold": 130.0, "version": 1}).status == 200


def test_a_full_disk_does_not_keep_the_line_from_starting(
    stack: ExitStack, serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from saae_runtime.errors import StorageError

    def full(*_: object) -> None:
        raise StorageError("The disk is full.")

    assert stack.client.post("/v1/threshold", {"recipe": "first", "threshold": 130.0}).status == 200
    stack.close()
    monkeypatch.setattr("saae_runtime.line.audit.write_json", full)
    with serving(tmp_path, more=JSONL) as again:
        assert again.line.book.get("first").threshold == 130.0
        assert "disk is full" in again.line.health()["last_error"]
        assert again.client.post("/v1/threshold", {"recipe": "first", "threshold": 140.0}).status == 507
    assert verify(tmp_path / "http" / "audit.jsonl").problems == ()


def test_the_recipe_of_a_station_is_switched(stack: ExitStack) -> None:
    assert stack.client.post("/v1/recipe", {"station": "asked", "recipe": "other"}).json["recipe"] == "other"
    assert stack.client.get("/v1/recipe").json["stations"]["asked"]["recipe"] == "other"
    assert stack.client.post("/v1/recipe", {"station": "one", "recipe": "other"}).status == 400
    assert stack.client.post("/v1/recipe", {"station": "none", "recipe": "other"}).status == 404
    assert stack.client.post("/v1/trigger", {"station": "asked", "part_id": "A"}).json["record"]["recipe"] == "other"


def test_health_and_metrics(stack: ExitStack) -> None:
    assert stack.client.get("/readyz").status == 200
    assert stack.client.get("/v1/health").json["stations"][0]["counts"]["NG"] == 1
    assert b'saae_parts_total{station="one",verdict="NG"} 1.0' in stack.client.get("/metrics").body
    stack.line.stations["one"].stop()
    assert wait_until(lambda: stack.client.get("/readyz").status == 503)
    assert stack.client.get("/livez").status == 200


def test_pictures_of_parts(stack: ExitStack) -> None:
    part = stack.client.get("/v1/parts", station="one", verdict="NG").json[0]
    answers = [
        stack.client.get(f"/v1/parts/{part['number']}/picture", layer=name) for name in ("frame", "overlay", "heat")
    ]
    assert [answer.headers["content-type"] for answer in answers] == ["image/jpeg"] * 3
    assert len({answer.body for answer in answers}) == 3
    for place, status in (("0", 422), ("999999", 404), ("..%2f1", 404), ("1e3", 422)):
        assert stack.client.get(f"/v1/parts/{place}/picture").status == status
    for key, status in ((part["key"], 200), ("of/another/start", 404)):
        assert stack.client.get(f"/v1/parts/{part['number']}/picture", key=key).status == status


def test_events_come_as_parts_do_and_the_service_ends_with_pages_open(stack: ExitStack) -> None:
    got: list[bytes] = []
    with socket.create_connection(("127.0.0.1", stack.http.port)) as stream:
        stream.sendall(b"GET /v1/events HTTP/1.1\r\nhost: localhost\r\n\r\n")

        def read() -> None:
            while data := stream.recv(65536):
                got.append(data)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        assert wait_until(lambda: b"event: state" in b"".join(got))
        stack.client.post("/v1/trigger", {"station": "asked", "part_id": "seen-live"})
        assert wait_until(lambda: b"seen-live" in b"".join(got))
        start = time.monotonic()
        stack.close()
        assert time.monotonic() - start < 10  # and not at a time-out of 15 s and more
        reader.join(5)
        assert not reader.is_alive()


def test_an_overlooked_defect_is_no_good_part(
    serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[GoodParts] = []

    def stop(bundle: Path, recipe: Recipe, parts: GoodParts, **_: object) -> None:
        asked.append(parts)
        raise CalibrationError("Enough is known.")

    monkeypatch.setattr("saae_runtime.line.http.control.recalibrate", stop)
    with serving(tmp_path, more='[archive]\nfolder = "pictures"\nok_share = 1.0\nmin_free_gb = 0.0\n') as stack:
        client: Client = stack.client
        assert wait_until(lambda: len(client.get("/v1/parts", station="one", verdict="OK").json) == 2)
        fine, overlooked = (
            tmp_path / "pictures" / item["picture"]
            for item in client.get("/v1/parts", station="one", verdict="OK").json
        )
        assert wait_until(lambda: fine.is_file() and overlooked.is_file())
        key = client.get("/v1/parts", station="one", verdict="OK").json[1]["key"]
        assert client.post("/v1/overrides", {"key": key, "verdict": "NG"}).status == 200
        for archive, images in ((True, {fine.parents[1]: [fine]}), (False, {})):
            body = {"recipe": "first", "dry_run": True, "archive": archive}
            assert client.post("/v1/recalibration", body).status == 202
            assert wait_until(lambda: client.get("/v1/recalibration").json["state"] == "failed")
            assert asked.pop().images() == images


def test_an_open_page_that_waits_for_an_override_delays_no_other_request(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = stack.http.context.control.overrides
    asked, go, waited = threading.Event(), threading.Event(), []
    get = overrides.get

    def slow(key: str) -> object:
        asked.set()
        waited.append(go.wait(10))
        return get(key)

    with socket.create_connection(("127.0.0.1", stack.http.port)) as stream:
        stream.sendall(b"GET /v1/events HTTP/1.1\r\nhost: localhost\r\n\r\n")
        got = b""
        while b"event: state" not in got:
            got += stream.recv(65536)
        monkeypatch.setattr(overrides, "get", slow)
        assert stack.client.post("/v1/trigger", {"station": "asked", "part_id": "seen-live"}).status == 200
        assert asked.wait(20)
        assert stack.client.get("/livez").status == 200
        assert waited == []
        go.set()
        while b"seen-live" not in got:
            got += stream.recv(65536)


# --- the parts behind it ---


def part(number: int, verdict: Verdict, recipe: str = "r") -> Part:
    return Part(f"p{number}", "one", now(), verdict, "score", recipe=recipe, bundle="b", score=float(number))


def test_the_latest_parts_are_bounded_and_bad_ones_stay_longer() -> None:
    size = good().nbytes
    recent = Recent(parts=50, frames_mb=8 * size / 1e6, shifts=(day_time(6),))
    recent.take(part(0, Verdict.NG), bad(), None)
    for number in range(1, 200):
        recent.take(part(number, Verdict.OK), good(), None)
    assert len(recent.records(1000)) == 50
    assert recent.with_frames() == [1, 197, 198, 199, 200]
    assert recent.seen(2) is None
    assert [item["part_id"] for item in recent.records(2, recipe="r")] == ["p199", "p198"]
    assert recent.records(10, recipe="none") == []
    assert [item["number"] for item in recent.records(10, after=198)] == [200, 199]


def test_counters_are_saved_while_nobody_looks(
    serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_SAVE", 0.05)
    with serving(tmp_path) as stack:
        file = stack.line.config.place(stack.http.context.options.folder) / "shift.json"

        def saved() -> int:
            return sum(row[3] for row in json.loads(file.read_text())["counts"]) if file.is_file() else 0

        assert wait_until(lambda: saved() == 3)
        stack.client.post("/v1/trigger", {"station": "asked", "part_id": "a"})
        assert wait_until(lambda: saved() == 4)
        before = file.stat()
        time.sleep(0.3)
        assert file.stat().st_mtime_ns == before.st_mtime_ns  # nothing new is not written again


def test_counters_begin_with_the_shift_and_survive_a_restart(tmp_path: Path) -> None:
    moment = [datetime(2026, 3, 1, 13, 59)]
    shifts = (day_time(6), day_time(14), day_time(22))

    def opened() -> Recent:
        return Recent(10, 1.0, shifts, tmp_path / "shift.json", lambda: moment[0])

    recent = opened()
    for number in range(3):
        recent.take(part(number, Verdict.OK), None, None)
    recent.take(part(4, Verdict.NG), None, None)
    assert recent.counters() == {
        "since": "2026-03-01T06:00",
        "rows": [{"station": "one", "recipe": "r", "OK": 3, "NG": 1}],
    }
    recent.save()
    recent = opened()
    assert recent.counters()["rows"][0]["OK"] == 3
    moment[0] += timedelta(minutes=2)
    assert recent.counters() == {"since": "2026-03-01T14:00", "rows": []}
    moment[0] = datetime(2026, 3, 2, 3, 0)
    assert recent.counters()["since"] == "2026-03-01T22:00"
    assert opened().counters()["rows"] == []


def test_changed_parts() -> None:
    records = [part(number, Verdict.NG if number > 4 else Verdict.OK).to_dict() for number in range(10)]
    records.append(Part("late", "one", now(), Verdict.NG, "timeout").to_dict())
    judged, changed = changed_parts(records, 6.0)
    assert judged == 10
    assert [(item["part_id"], item["would_be"]) for item in changed] == [("p5", "OK"), ("p6", "OK")]
    assert changed_parts(records, 4.0) == (10, [])


@pytest.mark.parametrize(("form", "kept"), [("png", True), ("jpg", False)])
def test_a_frame_that_left_memory_comes_from_the_archive(
    serving: Serving, tmp_path: Path, form: str, kept: bool
) -> None:
    archive = f'[archive]\nfolder = "pictures"\nformat = "{form}"\n'
    with serving(tmp_path, "frames_mb = 0.001", archive) as stack:
        client: Client = stack.client
        assert wait_until(lambda: client.get("/v1/parts", station="one", verdict="NG").json)
        part = client.get("/v1/parts", station="one", verdict="NG").json[0]
        client.post("/v1/trigger", {"station": "asked", "part_id": "newer"})  # NG, too
        assert stack.http.context.recent.seen(part["number"]) is None
        assert client.get(f"/v1/parts/{part['number']}/picture").status == 404
        assert wait_until(lambda: (tmp_path / "pictures" / part["picture"]).is_file())
        made = client.post("/v1/overrides", {"key": part["key"], "verdict": "OK"}).json
        if kept:
            np.testing.assert_array_equal(read_image(tmp_path / "http" / "pool" / made["picture"]), bad())
        else:
            assert (made["picture"], "JPEG" in made["why"]) == (None, True)


def test_a_recipe_that_the_line_asks_for_is_in_the_audit_log(serving: Serving, tmp_path: Path) -> None:
    with serving(tmp_path, more=JSONL) as stack:
        audit, source = stack.http.context.control.audit, stack.line.stations["asked"].source
        assert wait_until(lambda: source.view().ready)
        source.select("other", who="opcua")
        source.select("other", who="opcua")
        for number in range(2):  # the same recipe again is no change
            assert wait_until(lambda: source.view().ready)
            source.trigger(f"part-{number}", "first", who="modbus")
            assert wait_until(lambda: source.view().valid)
            source.acknowledge(f"part-{number}")
        assert stack.client.post("/v1/trigger", {"station": "asked", "part_id": "p", "recipe": "other"}).status == 200
        assert wait_until(lambda: len(audit.latest(10)) == 3)
        found = [(item["who"], item["role"], item["what"], item["data"]) for item in reversed(audit.latest(10))]
    data = [{key: value for key, value in item[3].items() if key != "asked"} for item in found]
    assert [item[:3] for item in found] == [
        ("opcua", "plc", "recipe"),
        ("modbus", "plc", "recipe"),
        ("local", "engineer", "recipe"),
    ]
    assert data == [
        {"station": "asked", "before": "first", "after": "other"},
        {"station": "asked", "before": "other", "after": "first"},
        {"station": "asked", "before": "first", "after": "other"},
    ]
    assert verify(tmp_path / "http" / "audit.jsonl").problems == ()
    assert len(events(tmp_path, "audit")) == 3  # and from there to every sink
