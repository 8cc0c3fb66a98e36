"""Who gets in: tokens, roles, sessions, hosts, origins; and that nobody else learns or changes anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from http_client import Client
from line_parts import line_text, wait_until

from saae_runtime.errors import ConfigError
from saae_runtime.line.config import load_config
from saae_runtime.line.http.access import Access, Throttled
from saae_runtime.line.http.guard import is_our_name
from saae_runtime.line.http.options import HttpOptions, User, users_of
from saae_runtime.line.sinks import KINDS
from saae_runtime.line.wiring import SECTIONS

OPERATOR, ENGINEER = "operators-token-0001", "engineers-token-0002"
USERS = """
[[http.user]]
name = "olga"
role = "operator"
token_env = "TEST_OPERATOR"
[[http.user]]
name = "emil"
role = "engineer"
token_env = "TEST_ENGINEER"
"""


@pytest.fixture(scope="module")
def guarded(serving: Callable[..., ExitStack], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExitStack]:
    """A line whose file names two users."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEST_OPERATOR", OPERATOR)
        patch.setenv("TEST_ENGINEER", ENGINEER)
        with serving(tmp_path_factory.mktemp("guarded"), USERS) as stack:
            yield stack


def client(stack: ExitStack, token: str | None = None) -> Client:
    port = stack.http.port
    return Client(port) if token is None else Client(port, authorization=f"Bearer {token}")


def paths(stack: ExitStack) -> list[tuple[str, str]]:
    document = client(stack).get("/openapi.json").json["paths"]
    return [(method.upper(), path) for path, item in document.items() for method in item]


PUBLIC = {"/livez", "/readyz", "/v1/me", "/v1/login", "/v1/logout"}
FOR_ENGINEERS = {
    ("POST", "/v1/threshold"),
    ("POST", "/v1/bundle"),
    ("POST", "/v1/recalibration"),
    ("GET", "/v1/audit"),
}


def test_every_path_but_five_takes_a_token(guarded: ExitStack) -> None:
    found = paths(guarded)
    assert len(found) > 15
    for method, path in found:
        answer = client(guarded).request(method, path.replace("{number}", "1"), b"{}" if method == "POST" else None)
        assert (answer.status == 401) == (path not in PUBLIC), (method, path, answer.status)


def test_an_operator_does_what_operators_may(guarded: ExitStack) -> None:
    asker = client(guarded, OPERATOR)
    for method, path in paths(guarded):
        if path in PUBLIC or path == "/v1/events":
            continue
        answer = asker.request(method, path.replace("{number}", "1"), {} if method == "POST" else None)
        assert (answer.status == 403) == ((method, path) in FOR_ENGINEERS), (method, path, answer.status)
    assert asker.get("/v1/me").json == {"name": "olga", "role": "operator", "needs_token": True}
    changed = client(guarded, ENGINEER).post("/v1/threshold", {"recipe": "first", "false_alarms": 0.01})
    assert changed.status == 200
    entry = client(guarded, ENGINEER).get("/v1/audit", last=1).json[0]
    assert (entry["who"], entry["role"], entry["what"]) == ("emil", "engineer", "threshold")
    assert (entry["data"]["before"], entry["data"]["after"]) == (40.0, 20.0)


def test_a_session_opens_with_a_token_and_ends(guarded: ExitStack) -> None:
    opened = client(guarded).post("/v1/login", {"token": OPERATOR})
    cookie = opened.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=strict"} <= set(cookie.split("; "))
    assert OPERATOR not in cookie
    asker = Client(guarded.http.port, cookie=cookie.split(";")[0])
    assert asker.get("/v1/parts").status == 200
    assert asker.post("/v1/threshold", {"recipe": "first", "false_alarms": 0.01}).status == 403
    assert asker.post("/v1/logout").status == 200
    assert asker.get("/v1/parts").status == 401


def test_wrong_tokens_are_written_down_and_not_listened_to_for_long(guarded: ExitStack) -> None:
    for _ in range(5):
        assert client(guarded, "a-wrong-token-000000").get("/v1/parts").status == 401
    answer = client(guarded, ENGINEER).get("/v1/parts")  # from the same address: not even with the right one
    assert answer.status == 429
    assert 0 < int(answer.headers["retry-after"]) <= 60
    guarded.http.context.access._tries.clear()
    entries = client(guarded, ENGINEER).get("/v1/audit", last=5).json
    assert [entry["what"] for entry in entries] == ["login failed"] * 5
    assert entries[0]["data"]["address"] == "127.0.0.1"
    assert "wrong-token" not in str(entries)


def test_many_failures_do_not_fill_the_log() -> None:
    told: list[str] = []
    moment = [0.0]
    access = Access([User("a", "operator", OPERATOR)], lambda address, how: told.append(address), lambda: moment[0])
    for number in range(500):
        assert access.by_token("wrong", f"10.0.{number}.1") is None
    assert len(told) == 60
    moment[0] = 61.0
    assert access.by_token("wrong", "10.1.1.1") is None
    assert len(told) == 61
    for _ in range(4):
        access.by_token("wrong", "10.1.1.1")
    with pytest.raises(Throttled):
        access.by_token(OPERATOR, "10.1.1.1")
    moment[0] += 60.5
    assert access.by_token(OPERATOR, "10.1.1.1").name == "a"
    secret = access.login(OPERATOR, "x")
    assert access.by_session(secret).name == "a"
    moment[0] += 12 * 3600 + 1
    assert access.by_session(secret) is None


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 421),
        ({"host": "127.0.0.1.evil.example"}, 421),
        ({"host": "[::1"}, 421),
        ({"host": "127.0.0.1:80x"}, 421),
        ({"host": ""}, 421),
        ({"host": "10.1.2.3:8484"}, 200),  # an address is no name that could be bent
        ({"host": "localhost"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-origin"}, 200),
    ],
)
def test_no_page_of_another_site_reads_or_posts(served: ExitStack, headers: dict[str, str], status: int) -> None:
    answer = served.client.get("/v1/me", headers)
    assert answer.status == status
    assert not [name for name in answer.headers if name.startswith("access-control")]
    before = served.line.stations["asked"].recipe
    body = {"station": "asked", "recipe": "other"}
    assert (served.client.post("/v1/recipe", body, headers).status == 200) == (status == 200)
    if status != 200:
        assert served.line.stations["asked"].recipe == before
    served.client.post("/v1/recipe", {"station": "asked", "recipe": "first"})


def test_names_of_ours() -> None:
    options = HttpOptions(hosts=("Line3.factory",))
    assert is_our_name("line3.FACTORY:8484", options)
    assert is_our_name("[::1]:8484", options)
    assert not is_our_name("line3.factory.evil.example", options)


def test_the_answers_forbid_everything_from_elsewhere(served: ExitStack) -> None:
    for path in ("/", "/page.js", "/v1/parts", "/nonsense"):
        headers = served.client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
    for method in ("PUT", "DELETE", "TRACE", "OPTIONS"):
        assert served.client.request(method, "/v1/parts").status == 405


@pytest.mark.parametrize(
    "path", ["/../pyproject.toml", "/page/..%2f..%2fservice.py", "/static/page.js", "//etc/passwd"]
)
def test_no_path_reaches_the_disk(served: ExitStack, path: str) -> None:
    assert served.client.get(path).status == 404


@pytest.mark.parametrize(
    "lines",
    [
        'host = "0.0.0.0"',
        'host = "192.168.1.5"',
        'host = "::"',
        'formats = ["EPS"]',
        "port = 70000",
        'shifts = ["14:00", "06:00"]',
        'shifts = ["25:00"]',
        'certificate = "a.pem"',
        "timeout = 0",
        '[[http.user]]\nname = "a"\nrole = "boss"\ntoken_env = "X"',
        "prot = 1",
    ],
)
def test_a_table_that_cannot_be_is_refused(tmp_path: Path, lines: str) -> None:
    (tmp_path / "line.toml").write_text(line_text(tmp_path, more=f"[http]\n{lines}\n"), encoding="utf-8")
    with pytest.raises(ConfigError, match="http"):
        load_config(tmp_path / "line.toml", KINDS, SECTIONS)


def test_tokens_are_long_and_different(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "line.toml").write_text(
        line_text(tmp_path, more=f'[http]\nhost = "0.0.0.0"\n{USERS}'), encoding="utf-8"
    )
    options = load_config(tmp_path / "line.toml", KINDS, SECTIONS).extra["http"]
    for one, other in (("", ENGINEER), ("short", ENGINEER), (ENGINEER, ENGINEER)):
        monkeypatch.setenv("TEST_OPERATOR", one)
        monkeypatch.setenv("TEST_ENGINEER", other)
        with pytest.raises(ConfigError, match="token"):
            users_of(options)
    monkeypatch.setenv("TEST_OPERATOR", OPERATOR)
    assert [user.name for user in users_of(options)] == ["olga", "emil"]


def test_idle_connections_end(served: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    from saae_runtime.line.http import service

    monkeypatch.setattr(service, "_IDLE", 0.3)
    with socket.create_connection(("127.0.0.1", served.http.port)) as stream:
        stream.sendall(b"GET / HTTP/1.1\r\nhost: 127")  # and never the rest
        stream.settimeout(10)
        with suppress(ConnectionError):  # ended as well
            assert stream.recv(10) == b""
    assert wait_until(lambda: served.client.get("/livez").status == 200)
