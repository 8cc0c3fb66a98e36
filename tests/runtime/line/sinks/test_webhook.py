"""The webhook against a real server: answers, silence, restarts; refused records do not hold up the others."""

from __future__ import annotations

import json
import re
import threading
import time
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from line_parts import wait_until

from saae_runtime.errors import FetchError
from saae_runtime.line.config import SinkConfig
from saae_runtime.line.part import Part, Verdict, now
from saae_runtime.line.sinks import KINDS, make_sink
from saae_runtime.line.sinks.delivery import Delivery
from saae_runtime.line.spool import Spool


class Server:
    """Answers as told, and notes what it took."""

    def __init__(self) -> None:
        self.taken: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answers: dict[str, int] = {}  # part id -> status
        self.default = 200
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status = outer.answers.get(body["part_id"], outer.default)
                if status == 200:
                    outer.taken.append(body)
                    outer.headers.append(dict(self.headers.items()))
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "/elsewhere")
                self.end_headers()

            def do_GET(self) -> None:
                outer.taken.append({"part_id": "a redirect was followed"})
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/parts"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def ids(self) -> list[str]:
        return [body["part_id"] for body in self.taken]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def put(spool: Spool, numbers: range) -> None:
    for number in numbers:
        item = Part(f"p{number}", "one", now(), Verdict.NG if number % 2 else Verdict.OK, "score", score=1.0)
        spool.append(item.key, item.to_json().encode())


def delivery(spool: Spool, url: str, **options: Any) -> Delivery:
    config = SinkConfig("webhook", "mes", KINDS["webhook"](url=url, timeout=2.0, **options))
    return Delivery("mes", make_sink(config, Path(), "l1"), spool.reader("mes"), 0.05)


def names(numbers: range) -> list[str]:
    return [f"p{number}" for number in numbers]


def test_each_record_is_a_post(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MES_TOKEN", "secret")
    spool = Spool(tmp_path)
    sink = delivery(spool, server.url, token_env="MES_TOKEN", headers={"X-Line": "7"})
    put(spool, range(60))
    assert wait_until(lambda: sink.state()["backlog"] == 0)
    assert server.ids == names(range(60))
    sent = {name.lower(): value for name, value in server.headers[0].items()}
    assert (sent["authorization"], sent["x-line"]) == ("Bearer secret", "7")
    assert sent["idempotency-key"] == server.taken[0]["key"]
    assert "secret" not in json.dumps(sink.state())
    sink.finish(time.monotonic() + 5)
    spool.close()


def test_refused_records_are_counted_and_the_others_go_on(server: Server, tmp_path: Path) -> None:
    server.answers = {"p3": 400, "p5": 422}
    spool = Spool(tmp_path)
    sink = delivery(spool, server.url)
    put(spool, range(10))
    assert wait_until(lambda: sink.state()["backlog"] == 0)
    assert server.ids == [name for name in names(range(10)) if name not in ("p3", "p5")]
    state = sink.state()
    assert (state["refused"], state["working"]) == (2, True)
    assert "refuses the record" in state["last_error"]
    assert "422" in state["last_error"]
    assert state["error_age_seconds"] < 60
    sink.finish(time.monotonic() + 5)
    spool.close()


@pytest.mark.parametrize("status", [500, 503, 429, 302, 401, 403, 404, 405, 407, 408, 425])
def test_what_is_not_taken_comes_again(server: Server, tmp_path: Path, status: int) -> None:
    server.answers = {"p3": status}
    spool = Spool(tmp_path)
    sink = delivery(spool, server.url)
    put(spool, range(3))
    assert wait_until(lambda: server.ids == names(range(3)))  # taken, and not synced yet: they do not come again
    put(spool, range(3, 10))
    assert wait_until(lambda: sink.state()["last_error"])
    assert str(status) in sink.state()["last_error"]
    assert (sink.state()["working"], sink.state()["refused"]) == (False, 0)
    assert server.ids == names(range(3))
    server.answers = {}
    assert wait_until(lambda: sink.state()["backlog"] == 0)
    assert server.ids == names(range(10))
    assert wait_until(lambda: sink.state()["working"])
    sink.finish(time.monotonic() + 5)
    spool.close()


def test_a_server_that_is_not_there_gets_everything_later(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    sink = delivery(spool, "http://127.0.0.1:9/parts")
    put(spool, range(10))
    assert wait_until(lambda: sink.state()["last_error"])
    sink.finish(time.monotonic() + 1)
    spool.close()
    made = Server()
    spool = Spool(tmp_path)
    sink = delivery(spool, made.url)
    put(spool, range(10, 12))
    assert wait_until(lambda: sink.state()["backlog"] == 0)
    assert made.ids == names(range(12))
    sink.finish(time.monotonic() + 5)
    spool.close()
    made.close()


def test_a_missing_token_is_said(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MES_TOKEN", raising=False)
    spool = Spool(tmp_path)
    sink = delivery(spool, server.url, token_env="MES_TOKEN", only_ng=True)
    put(spool, range(4))
    assert wait_until(lambda: sink.state()["last_error"])
    assert "MES_TOKEN" in sink.state()["last_error"]
    monkeypatch.setenv("MES_TOKEN", "x")
    assert wait_until(lambda: sink.state()["backlog"] == 0)
    assert server.ids == ["p1", "p3"]
    sink.finish(time.monotonic() + 5)
    spool.close()


@pytest.mark.parametrize("end", ["\r", "\n", "\x07", "\u00e9"])
def test_a_token_that_cannot_be_sent_is_said_and_not_shown(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setenv("MES_TOKEN", f"secret{end}")
    spool = Spool(tmp_path)
    sink = delivery(spool, server.url, token_env="MES_TOKEN")
    put(spool, range(4))
    assert wait_until(lambda: sink.state()["last_error"])
    assert "$MES_TOKEN is not printable ASCII" in sink.state()["last_error"]
    assert "secret" not in json.dumps(sink.state())
    monkeypatch.setenv("MES_TOKEN", "secret")
    assert wait_until(lambda: sink.state()["backlog"] == 0)
    assert server.ids == names(range(4))
    sink.finish(time.monotonic() + 5)
    spool.close()


def test_a_token_that_changes_after_the_check_is_not_shown(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MES_TOKEN", "fine")
    spool = Spool(tmp_path)
    reader = spool.reader("mes")
    options = KINDS["webhook"](url=server.url, token_env="MES_TOKEN")
    sink = make_sink(SinkConfig("webhook", "mes", options), Path(), "l1")
    sink.open()
    monkeypatch.setenv("MES_TOKEN", "secret\r")
    put(spool, range(1))
    with pytest.raises(FetchError, match="a header cannot be sent") as caught:
        sink.write(reader.read(1, 1.0), threading.Event())
    shown = "".join(traceback.format_exception(caught.value))
    assert "secret" not in shown
    spool.close()


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"X-Key": "secret\r\nX-More: 1"}, "the value of X-Key"),
        ({"X-Key": "secr\u00e9t"}, "the value of X-Key"),
        ({"X Key": "7"}, "invalid name: 'X Key'"),
        ({"X-Key:": "7"}, "invalid name: 'X-Key:'"),
        ({"": "7"}, "invalid name: ''"),
    ],
)
def test_headers_that_cannot_be_sent_are_no_options(headers: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        KINDS["webhook"](url="http://127.0.0.1:9/", headers=headers)
    assert "secr" not in str(caught.value)
