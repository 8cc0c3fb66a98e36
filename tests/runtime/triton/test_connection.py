"""Addresses of servers, and what is said where there is none or no client library."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fake_triton import fake_triton
from hypothesis import given
from hypothesis import strategies as st

from saae_runtime import TritonEngine
from saae_runtime.errors import BackendUnavailableError, ConfigError, SaaeError
from saae_runtime.triton.connection import Connection, parse_url


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("localhost", ("grpc", "localhost:8001", False)),
        ("localhost:9000", ("grpc", "localhost:9000", False)),
        ("grpc://10.0.0.3", ("grpc", "10.0.0.3:8001", False)),
        ("http://inference", ("http", "inference:8000", False)),
        ("https://inference:443/", ("http", "inference:443", True)),
        ("grpcs://inference", ("grpc", "inference:8001", True)),
        ("http://[::1]:80", ("http", "[::1]:80", False)),
    ],
)
def test_addresses(url: str, expected: tuple[str, str, bool]) -> None:
    assert parse_url(url) == expected


@pytest.mark.parametrize("url", ["", "ftp://x", "http://", "http://x:port", "http://x:99999", "http://x/v2", "grpc://"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ConfigError, match="not the address"):
        parse_url(url)


@given(st.text(max_size=40))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    try:
        protocol, address, _ = parse_url(text)
    except ConfigError:
        return
    assert protocol in ("grpc", "http")
    assert 0 < int(address.rpartition(":")[2]) < 65536


def open_files() -> int:
    """How many this process has open, sockets included."""
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def nobody() -> int:
    """A port that nobody listens on."""
    with socket.socket() as item:
        item.bind(("127.0.0.1", 0))
        return int(item.getsockname()[1])


@pytest.mark.needs("tritonclient")
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_nobody_there(nobody: int, protocol: str) -> None:
    with pytest.raises(BackendUnavailableError, match="answers") as caught:
        TritonEngine(f"{protocol}://127.0.0.1:{nobody}", "x", timeout=5)
    assert "tritonserver" in caught.value.cure


@pytest.mark.needs("tritonclient")
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_it_is_waited_for_as_long_as_asked(nobody: int, protocol: str) -> None:
    started = time.monotonic()
    with pytest.raises(BackendUnavailableError):
        TritonEngine(f"{protocol}://127.0.0.1:{nobody}", "x", timeout=5, wait=0.7)
    assert time.monotonic() - started >= 0.7


@pytest.mark.needs("tritonclient")
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_something_else_listens_there(protocol: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            while True:
                try:
                    connected, _ = listener.accept()
                except OSError:
                    return
                with connected:
                    connected.recv(1000)
                    connected.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(SaaeError):
            TritonEngine(f"{protocol}://127.0.0.1:{listener.getsockname()[1]}", "x", timeout=3)


@pytest.mark.needs("tritonclient")
@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize(("ready", "answers"), [(True, 0), (True, 1), (True, 2), (True, 3), (False, 1)])
def test_the_timeout_holds_for_every_question_while_opening(protocol: str, ready: bool, answers: int) -> None:
    """A server that answers some questions and then nothing more."""
    with fake_triton(protocol, ready=ready, answers=answers) as fake:
        started = time.monotonic()
        with pytest.raises(BackendUnavailableError, match="answers"):
            TritonEngine(f"{protocol}://127.0.0.1:{fake.port}", "tiny", timeout=0.5)
        assert time.monotonic() - started < 10
        assert fake.calls == (["ready", "config", "v2", "infer"] if ready else ["ready", "index"])[: answers + 1]


@pytest.mark.needs("tritonclient")
def test_threads_that_end_leave_no_connection_behind() -> None:
    """Each call takes a connection that is free; closed, they leave none of their files open."""
    Connection("http://127.0.0.1", 5).close()  # what is opened once
    before = open_files()
    with fake_triton("http") as fake:
        connection = Connection(f"http://127.0.0.1:{fake.port}", 5)
        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(lambda _: connection.server(), range(40))) == {"triton x"}
        assert 1 <= len(fake.connected) <= 4
        most = len(fake.connected)
        for _ in range(20):
            thread = threading.Thread(target=connection.server)
            thread.start()
            thread.join()
        assert len(fake.connected) == most
        connection.close()
        connection.close()
        end = time.monotonic() + 5
        while any(fake.connected.values()) and time.monotonic() < end:
            time.sleep(0.01)
        assert not any(fake.connected.values())
    assert open_files() <= before


@pytest.mark.needs("tritonclient")
def test_a_connection_that_nobody_closes_ends_with_its_last_reference() -> None:
    with fake_triton("http") as fake:
        connection = Connection(f"http://127.0.0.1:{fake.port}", 5)
        connection.server()
        assert list(fake.connected.values()) == [True]
        del connection
        end = time.monotonic() + 5
        while any(fake.connected.values()) and time.monotonic() < end:
            time.sleep(0.01)
        assert list(fake.connected.values()) == [False]


@pytest.mark.needs("tritonclient")
@pytest.mark.parametrize(
    "options",
    [{"timeout": 0}, {"timeout": "x"}, {"slots": 0}, {"slots": True}, {"threshold": float("nan")}, {"white_level": 3}],
)
def test_options_that_cannot_work(options: dict) -> None:
    with pytest.raises(ConfigError):
        TritonEngine("localhost", "x", **options)


@pytest.mark.parametrize(("model", "version"), [("", ""), (None, ""), ("x", 1)])
@pytest.mark.needs("tritonclient")
def test_names_that_are_none(model: object, version: object) -> None:
    with pytest.raises(ConfigError, match="not possible"):
        TritonEngine("localhost", model, version=version)  # type: ignore[arg-type]


def test_without_tritonclient_it_says_what_to_install(repo_root: Path) -> None:
    code = """
import sys
import saae_runtime
assert "saae_runtime.triton.engine" not in sys.modules
sys.modules["tritonclient"] = None
try:
    saae_runtime.TritonEngine("localhost", "x")
except saae_runtime.SaaeError as error:
    print(error.cure)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "pip install 'saae[triton]'"
