"""A running line with its HTTP service, shared by the tests of a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from http_client import Client
from line_parts import ListCamera, bad, good, line_text
from needs import need

from saae_runtime.line.camera import Camera
from saae_runtime.line.config import LineConfig, StationConfig, load_config
from saae_runtime.line.service import Line
from saae_runtime.line.sinks import KINDS
from saae_runtime.line.wiring import SECTIONS, open_http, open_trigger

SECOND = """
[[station]]
name = "asked"
camera = "frames"
recipes = ["first", "other"]
trigger = "http"
verdict_timeout = 20.0

[[recipe]]
name = "other"
bundle = "{bundle}"
threads = 1
threshold = 500.0
"""


def cameras(config: LineConfig, station: StationConfig) -> Camera:
    """Station one sees three parts, the second one bad; the other one sees a bad and a good one in turn, for ever."""
    if station.trigger == "free":
        return ListCamera([good(), bad(), good()], endless=True)

    def frames() -> Iterator[object]:
        while True:
            yield bad()
            yield good()

    return ListCamera(frames(), live=True, endless=True)


@pytest.fixture(scope="session")
def serving(tiny: Path) -> Callable[..., ExitStack]:
    """Starts a line with an HTTP service: (folder, lines of [http], further tables) -> its ExitStack, `.http` on it."""

    for library in ("fastapi", "uvicorn", "python_multipart"):
        need(library)

    def serve(folder: Path, options: str = "", more: str = "") -> ExitStack:
        file = folder / "line.toml"
        text = line_text(tiny, more=SECOND.format(bundle=tiny) + more + f"\n[http]\nport = 0\n{options}\n")
        file.write_text(text, encoding="utf-8")
        config = load_config(file, KINDS, SECTIONS)
        stack = ExitStack()
        try:
            line = stack.enter_context(Line(config, cameras, open_trigger))
            http = stack.enter_context(open_http(line))
            line.start()
        except BaseException:
            stack.close()
            raise
        assert http is not None
        stack.line, stack.http, stack.client = line, http, Client(http.port)  # type: ignore[attr-defined]
        return stack

    return serve


@pytest.fixture(scope="module")
def served(serving: Callable[..., ExitStack], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExitStack]:
    """One for all tests of a file; nobody needs a token."""
    with serving(tmp_path_factory.mktemp("served"), "max_body_mb = 1.0\nmax_pixels = 100000\nwaiting = 64") as stack:
        yield stack


@pytest.fixture
def client(served: ExitStack) -> Client:
    """Asks it."""
    return served.client  # type: ignore[attr-defined, no-any-return]
