"""Whatever comes in, the service stays up, answers in words, and no verdict, recipe or threshold changes."""

from __future__ import annotations

import io
import json
import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest
from http_client import form
from line_parts import bad, good
from PIL import Image

from saae_runtime.line.http.guard import SECURITY_HEADERS
from saae_runtime.render import encode_png

SEEDS = [encode_png(bad()), encode_png(good()[:8, :8])]
for kind in ("JPEG", "BMP", "TIFF", "WEBP", "PPM"):
    buffer = io.BytesIO()
    Image.fromarray(bad()).save(buffer, kind)
    SEEDS.append(buffer.getvalue())
TYPES = [
    "image/png",
    "multipart/form-data; boundary=b0undary",
    "multipart/form-data",
    "application/json",
    "",
    "\x01;=\xff",
]
PATHS = ["/v1/judge"] * 6 + [
    "/v1/trigger",
    "/v1/recipe",
    "/v1/threshold",
    "/v1/bundle",
    "/v1/overrides",
    "/v1/overrides/undo",
    "/v1/recalibration",
    "/v1/login",
    "/v1/parts/1/picture",
]
WORDS = [
    "first",
    "one",
    "asked",
    "none",
    "",
    "../x",
    "\x00",
    "a" * 5000,
    None,
    True,
    -1,
    1e308,
    10**40,
    [],
    {},
    "NaN",
    0.5,
]
KEYS = [
    "recipe",
    "station",
    "part_id",
    "threshold",
    "false_alarms",
    "key",
    "verdict",
    "bundle",
    "version",
    "token",
    "note",
]


def body(rng: random.Random) -> bytes:
    how = rng.randrange(7)
    data = bytearray(rng.choice(SEEDS))
    if how == 0:
        return rng.randbytes(rng.randrange(2000))
    if how == 1:
        return json.dumps({rng.choice(KEYS): rng.choice(WORDS) for _ in range(4)}).encode()
    if how == 2:
        return rng.choice(
            [b"[" * 5000, b'{"recipe":' * 900, b"\xff\xfe{}", b"null", b"1e999", b'"' + b"a" * 9000 + b'"']
        )
    if how == 3:
        return bytes(data[: rng.randrange(len(data))])
    for _ in range(rng.choice([1, 3, 30])):
        data[rng.randrange(min(len(data), rng.choice([64, 10**6])))] = rng.randrange(256)
    return form("image", bytes(data))[0][rng.randrange(2) :] if how == 4 else bytes(data)


def requests(count: int, seed: int) -> Iterator[tuple[str, bytes, dict[str, str]]]:
    rng = random.Random(seed)
    for _ in range(count):
        headers = {"content-type": rng.choice(TYPES).encode("latin-1").decode("latin-1")}
        path = rng.choice(PATHS)
        if rng.random() < 0.3:
            path += (
                f"?{rng.choice(KEYS)}={rng.choice(['%00', '%ff', 'first', '1e999', 'a' * 300, '..%2f', '&&=', '-1'])}"
            )
        yield path, body(rng), headers


def fuzz(served: ExitStack, count: int, seed: int) -> None:
    client, line = served.client, served.line
    expected = client.post("/v1/judge", encode_png(bad())).json
    in_force = {name: line.book.get(name) for name in line.book.names}
    for number, (path, data, headers) in enumerate(requests(count, seed)):
        answer = client.post(path, data, headers)
        assert answer.status != 500, (number, path, data[:200], answer.body)
        assert answer.headers["content-security-policy"] == SECURITY_HEADERS["content-security-policy"]
        if answer.status >= 400:
            assert set(answer.json) == {"what", "why", "cure"}
        for name in line.book.names:  # a body of JSON may ask for a change that is one; then it is taken back
            if line.book.get(name) is not in_force[name]:
                assert path.startswith(("/v1/threshold", "/v1/bundle"))
                assert answer.status == 200
                line.book.change(name, threshold=in_force[name].threshold)
                in_force[name] = line.book.get(name)
        if number % 50 == 0:
            found = client.post("/v1/judge", encode_png(bad()), station="one").json
            assert (found["score"], found["verdict"]) == (expected["score"], expected["verdict"])
    found = client.post("/v1/trigger", {"station": "asked", "part_id": "after", "recipe": "first"}).json
    assert found["verdict"] == ("NG" if found["score"] > in_force["first"].threshold else "OK")
    assert client.get("/livez").status == 200
    assert line.stations["one"].reading().counts["NG"] == 1  # of its own camera, and no other


@pytest.mark.parametrize("bodies", [500, pytest.param(10_000, marks=pytest.mark.fuzz)])
def test_bodies(served: ExitStack, bodies: int, request: pytest.FixtureRequest) -> None:
    if bodies > 500 and "fuzz" not in request.config.option.markexpr:
        pytest.skip("for minutes; only where asked for by -m fuzz")
    fuzz(served, bodies, seed=bodies)


def test_what_is_no_http(served: ExitStack) -> None:
    rng = np.random.default_rng(3)
    heads = [
        b"",
        b"GET ",
        b"POST /v1/judge HTTP/1.1\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\n" + b"a: b\r\n" * 9000,
    ]
    for number in range(40):
        with socket.create_connection(("127.0.0.1", served.http.port)) as stream:
            stream.settimeout(10)
            try:
                stream.sendall(heads[number % len(heads)] + rng.bytes(int(rng.integers(1, 3000))) + b"\r\n\r\n")
                stream.shutdown(socket.SHUT_WR)
                while stream.recv(65536):
                    pass
            except ConnectionError:
                continue
    assert served.client.get("/livez").status == 200
