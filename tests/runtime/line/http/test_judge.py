"""Judging over HTTP: the answer is the engine's; files that are not images, too large or too late are refused."""

from __future__ import annotations

import base64
import io
import socket
import threading
import time
from contextlib import ExitStack

import numpy as np
import pytest
from http_client import Client, form
from line_parts import bad, good, wait_until
from PIL import Image
from tiny_bundle import gray_frame

from saae_runtime.line.handshake import Handshake
from saae_runtime.line.http.judging import Batcher, BusyError
from saae_runtime.line.part import Verdict
from saae_runtime.render import encode_png


def test_a_picture_gets_what_the_engine_says(served: ExitStack, client: Client) -> None:
    recipe = served.line.book.get("first")
    for frame in (good(), bad(), gray_frame((50, 40), (5, 5, 9, 9))):
        expected = recipe.judge(frame)
        found = client.post("/v1/judge", encode_png(frame), part_id="P 7").json
        assert found["verdict"] == ("NG" if expected.is_anomalous else "OK")
        assert found["score"] == expected.score
        assert found["regions"] == [region.to_dict() for region in expected.regions()]
        assert (found["part_id"], found["recipe"], found["bundle"]) == ("P 7", "first", recipe.bundle)
        assert (found["height"], found["width"]) == expected.size
        assert found["map"] is None
    assert client.post("/v1/judge", encode_png(bad()), recipe="other").json["verdict"] == "OK"
    assert client.post("/v1/judge", encode_png(bad()), station="one").json["verdict"] == "NG"


def test_a_form_is_as_good_as_a_body(client: Client) -> None:
    data = encode_png(bad()) + b"\r\n--b0undar is no end\r\n"
    body, headers = form("image", data)
    assert client.post("/v1/judge", body, headers).json["score"] == client.post("/v1/judge", data).json["score"] > 100
    assert client.post("/v1/judge", body[:-40], headers).status == 422
    assert client.post("/v1/judge", b"--x--", {"content-type": "multipart/form-data; boundary=x"}).status == 422
    assert client.post("/v1/judge", body, {"content-type": "multipart/form-data"}).status == 422


def test_the_map_comes_as_png_on_request(served: ExitStack, client: Client) -> None:
    expected = served.line.book.get("first").judge(bad())
    found = client.post("/v1/judge", encode_png(bad()), map="levels").json["map"]
    levels = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["png"]))))
    np.testing.assert_allclose(levels * found["score_per_level"], expected.anomaly_map, atol=0.01)
    heat = client.post("/v1/judge", encode_png(bad()), map="heat").json["map"]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(heat["png"])))), expected.heatmap())


def encoded(kind: str, frame: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 422),
        (b"\x89PNG\r\n\x1a\n", 422),
        (encode_png(gray_frame())[:200], 422),
        (encoded("TIFF", gray_frame()), 422),  # not in [http] formats
        (encoded("GIF", gray_frame()), 422),  # in no list
        (encode_png(gray_frame((400, 300))), 422),  # pixels
        (b"x" * 1_000_001, 413),
    ],
)
def test_what_is_no_picture_for_us_is_refused_in_words(client: Client, body: bytes, status: int) -> None:
    answer = client.post("/v1/judge", body)
    assert answer.status == status
    assert answer.json["what"]
    assert set(answer.json) == {"what", "why", "cure"}


def test_a_body_of_unknown_length_is_counted(served: ExitStack) -> None:
    with socket.create_connection(("127.0.0.1", served.http.port)) as stream:
        stream.sendall(b"POST /v1/judge HTTP/1.1\r\nhost: 127.0.0.1\r\ntransfer-encoding: chunked\r\n\r\n")
        try:
            for _ in range(40):
                stream.sendall(b"8000\r\n" + b"x" * 0x8000 + b"\r\n")
        except ConnectionError:  # it has answered and closed
            pass
        stream.settimeout(10)
        assert b" 413 " in stream.recv(100)


@pytest.mark.parametrize(
    "query", [{"recipe": "none"}, {"station": "none"}, {"part_id": "a\nb"}, {"part_id": " a"}, {"map": "x"}]
)
def test_a_query_that_cannot_be_is_refused(client: Client, query: dict[str, str]) -> None:
    assert client.post("/v1/judge", encode_png(good()), **query).status in (400, 422)


def test_requests_together_are_computed_together_and_not_mixed(served: ExitStack, client: Client) -> None:
    levels = [130 + 4 * number for number in range(20)]
    found: dict[int, dict] = {}

    def ask(level: int) -> None:
        frame = np.full((64, 96, 3), level, np.uint8)
        found[level] = client.post("/v1/judge", encode_png(frame), part_id=f"L{level}").json

    threads = [threading.Thread(target=ask, args=(level,)) for level in levels]
    computing = served.http.context.batcher
    computing._busy = lambda: len(computing._tasks) < 6  # until several wait: as if the line computed meanwhile
    computing._line_seen = float("-inf")  # and has had no part for a while
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        computing._busy = lambda: False
    assert {level: answer["part_id"] for level, answer in found.items()} == {level: f"L{level}" for level in levels}
    for level in levels:
        assert found[level]["score"] == pytest.approx(level - 128, abs=1e-3)
    assert max(answer["judged_together"] for answer in found.values()) > 1


def test_a_trigger_waits_for_the_verdict_of_its_own_part(served: ExitStack, client: Client) -> None:
    for number in range(4):  # the camera sees a bad part and a good one in turn
        found = client.post("/v1/trigger", {"station": "asked", "part_id": f"T-{number}"}).json
        assert found["part_id"] == f"T-{number}"
        assert found["verdict"] == ("NG" if found["score"] > 100 else "OK")
        assert found["reason"] == "score"
        assert found["record"]["part_id"] == f"T-{number}"
    assert [record["part_id"] for record in client.get("/v1/parts", station="asked", last=4).json] == [
        f"T-{number}" for number in (3, 2, 1, 0)
    ]
    found = client.post("/v1/trigger", {"station": "asked", "part_id": "T-4", "recipe": "other"}).json
    assert (found["verdict"], found["record"]["recipe"]) == ("OK", "other")


def test_a_trigger_that_cannot_be_is_refused(served: ExitStack, client: Client) -> None:
    assert client.post("/v1/trigger", {"station": "one", "part_id": "a"}).status == 409
    assert client.post("/v1/trigger", {"station": "none", "part_id": "a"}).status == 404
    assert client.post("/v1/trigger", {"part_id": "a"}).status == 400  # which of the two?
    assert client.post("/v1/trigger", {"station": "asked", "part_id": "a", "recipe": "none"}).status == 409
    assert client.post("/v1/trigger", {"station": "asked", "part_id": "a\x00"}).status == 409
    source = served.line.stations["asked"].source
    assert isinstance(source, Handshake)
    assert wait_until(lambda: source.view().ready)


def test_a_part_that_somebody_else_took_is_ng(served: ExitStack, client: Client) -> None:
    source = served.line.stations["asked"].source
    answers = []
    real = source.acknowledge
    source.acknowledge = lambda part_id: (real(part_id), real(part_id))[1]  # a PLC was a moment earlier
    try:
        answers.append(client.post("/v1/trigger", {"station": "asked", "part_id": "X"}).json)
    finally:
        del source.acknowledge
    assert answers[0]["verdict"] == "NG"
    assert answers[0]["reason"] == "withdrawn"
    assert wait_until(lambda: source.view().ready)


def test_judging_does_not_wait_for_ever(served: ExitStack) -> None:
    batcher = served.http.context.batcher
    real, served.http.context.options.__dict__["timeout"] = served.http.context.options.timeout, 0.3
    batcher._busy = lambda: time.sleep(0.5) or False
    try:
        answer = served.client.post("/v1/judge", encode_png(good()))
        assert answer.status == 504
    finally:
        batcher._busy = lambda: False
        served.http.context.options.__dict__["timeout"] = real
    assert served.client.post("/v1/judge", encode_png(good())).json["verdict"] == Verdict.OK.value


class Slow:
    """In the place of a recipe: counts its calls, and is held up."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.go = threading.Event()

    def judge_many(self, frames: list[np.ndarray]) -> list[object]:
        self.calls.append(len(frames))
        self.go.wait(60)
        return [object() for _ in frames]


@pytest.mark.parametrize("active", [True, False])
def test_while_the_line_has_parts_pictures_are_computed_one_by_one(active: bool) -> None:
    batcher, recipe = Batcher(8, 8), Slow()
    futures = [batcher.submit(good(), recipe)]  # type: ignore[arg-type]
    assert wait_until(lambda: recipe.calls)
    futures += [batcher.submit(good(), recipe) for _ in range(6)]  # type: ignore[arg-type]
    if active:
        batcher.part_came()
    recipe.go.set()
    assert len({id(future.result(60)) for future in futures}) == 7
    batcher.close()
    assert recipe.calls == ([1] * 7 if active else [1, 6])


def test_posts_beyond_the_queue_are_refused_before_they_are_read() -> None:
    batcher, recipe = Batcher(1, 2), Slow()
    batcher.submit(good(), recipe)  # type: ignore[arg-type]
    assert wait_until(lambda: recipe.calls)
    batcher.admit()
    waiting = [batcher.submit(good(), recipe) for _ in range(2)]  # type: ignore[arg-type]
    with pytest.raises(BusyError, match="2 images are waiting"):
        batcher.admit()
    recipe.go.set()
    for future in waiting:
        future.result(60)
    batcher.admit()
    batcher.close()


def test_a_refused_post_is_told_when_to_come_again(served: ExitStack, client: Client) -> None:
    batcher = served.http.context.batcher
    real, batcher._waiting = batcher._waiting, 0
    try:
        answer = client.post("/v1/judge", b"not even a picture")
    finally:
        batcher._waiting = real
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")


def test_parts_of_the_line_are_seen_and_posted_pictures_are_not(served: ExitStack, client: Client) -> None:
    batcher = served.http.context.batcher
    batcher._line_seen = float("-inf")
    client.post("/v1/judge", encode_png(good()))
    assert not batcher._line_is_active
    client.post("/v1/trigger", {"station": "asked", "part_id": "seen"})
    assert wait_until(lambda: batcher._line_is_active)
