"""The HTTP service of a line, on its own thread."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from ...errors import ConfigError, SaaeError
from ...version import saae_version
from ..part import Part
from ..plc.service import ServerThread
from ..service import Line
from . import control_routes, judge_routes, page_routes
from .access import Access
from .certificate import certificate_of
from .context import Context
from .control import Control
from .guard import Guard
from .judge_routes import STATION
from .judging import Batcher
from .options import HttpOptions, users_of
from .recent import Recent
from .yielding import give_way

__all__ = ["HttpService", "listener", "make_app"]

_CONNECTIONS = 100
_IDLE = 15.0  # seconds that a connection may be open without a complete request
_LINGER = 0.4  # seconds for running answers, at the end
_PATIENCE = 1.5  # seconds for the thread to end
_SAVE = 10.0  # seconds between two writes of the shift's counters
_HEADERS = 32 << 10  # bytes of a request's head


class HttpService:
    """Serves a line until `close`.

    Args:
        line: the line; started or not.
        options: `[http]`.

    Attributes:
        port: the port that it listens on.
        context: shared by all requests.

    Raises:
        ConfigError: a token is missing, certificate or key cannot be used, or another process uses the folder.
        StorageError: the folder cannot be written.
        DeviceError: it cannot listen there.
    """

    def __init__(self, line: Line, options: HttpOptions) -> None:
        users = users_of(options)
        self._certificate = certificate_of(line.config, options)
        folder = line.config.place(options.folder)
        recent = Recent(options.parts, options.frames_mb, options.shift_times, folder / "shift.json")
        control = Control(line, options, recent)

        def failed(address: str, how: str) -> None:
            with suppress(SaaeError):
                control.audit.append("nobody", "none", "login failed", {"address": address, "how": how})

        batcher = Batcher(options.batch, options.waiting, lambda: line.computing)
        self.context = Context(line, options, Access(users, failed), recent, control, batcher)
        self._unlisten = [line.listen(recent.take), line.listen(lambda part, *_: self._seen(part))]
        self._server: uvicorn.Server | None = None
        try:
            self._thread = ServerThread("http", (_numeric(options.host), options.port), self._serve)
        except BaseException:
            self._let_go()
            raise
        self.port = self._thread.port

    @property
    def url(self) -> str:
        """Address of the page."""
        options = self.context.options
        scheme = "http" if options.certificate is None else "https"
        host = f"[{options.host}]" if ":" in options.host else options.host
        return f"{scheme}://{host}:{self.port}/"

    @property
    def alive(self) -> bool:
        """Whether it still serves."""
        return self._thread.alive

    def stop(self) -> None:
        """Accept no further requests; return at once. See `close`."""
        self.context.stopping.set()
        self.context.batcher.close(timeout=0.0)
        if self._server is not None:
            self._server.should_exit = True

    def close(self) -> None:
        """End running answers within a second and write everything. May be called twice."""
        self.stop()
        self._thread.close(_PATIENCE)
        self._let_go()

    def _let_go(self) -> None:
        for end in self._unlisten:
            end()
        self.context.batcher.close()
        self.context.recent.save()
        self.context.control.close()

    def __enter__(self) -> HttpService:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _seen(self, part: Part) -> None:
        if part.station != STATION:
            self.context.batcher.part_came()

    async def _save(self) -> None:
        """Save the shift's counters again and again, so that a kill or a power cut loses only the latest."""
        while True:
            await asyncio.sleep(_SAVE)
            await asyncio.to_thread(self.context.recent.save)

    async def _serve(self, port: int, started: Callable[[int], None], stop: asyncio.Event) -> None:
        give_way()
        options = self.context.options
        certificate, key = self._certificate or (None, None)
        config = uvicorn.Config(
            make_app(self.context),
            http=_Protocol,
            ws="none",
            lifespan="off",
            loop="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=_CONNECTIONS,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=_LINGER,  # type: ignore[arg-type]  # it is given to asyncio.wait_for
            h11_max_incomplete_event_size=_HEADERS,
            ssl_certfile=certificate,
            ssl_keyfile=key,
        )
        found = listener(options.host, port)
        self._server = server = uvicorn.Server(config)
        serving = asyncio.ensure_future(server.serve(sockets=[found]))
        try:
            while not server.started and not serving.done():
                await asyncio.sleep(0.01)
            if server.started:
                started(found.getsockname()[1])
                waiting, saving = asyncio.ensure_future(stop.wait()), asyncio.ensure_future(self._save())
                await asyncio.wait({waiting, serving}, return_when=asyncio.FIRST_COMPLETED)
                waiting.cancel()
                saving.cancel()
            server.should_exit = True
            await serving
        finally:
            found.close()


def make_app(context: Context) -> Any:
    """The ASGI application."""
    app = FastAPI(
        title="saae line",
        description="Judges images, and shows and controls a line.",
        version=saae_version(),
        docs_url=None,  # its page loads scripts from other sites
        redoc_url=None,
    )
    context.install(app)
    for module in (judge_routes, control_routes, page_routes):
        app.include_router(module.router(context))
    return Guard(app, context.options)


class _Protocol(H11Protocol):
    """Closes connections that stay open without a complete request; uvicorn's own timer ends with the first byte."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._begun = self.loop.time()
        self._timer = self.loop.call_later(_IDLE, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._begun = self.loop.time()
        super().on_response_complete()

    def _look(self) -> None:
        waiting = self.cycle is None or self.cycle.response_complete
        if waiting and self.loop.time() - self._begun >= _IDLE:
            self.transport.abort()
            return
        self._timer = self.loop.call_later(_IDLE / 3, self._look)


def _numeric(host: str) -> str:
    return "127.0.0.1" if host == "localhost" else host


def listener(name: str, port: int) -> socket.socket:
    """Open a socket on this address.

    Raises:
        ConfigError: the address cannot be used.
    """
    host = _numeric(name)
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise ConfigError(f"http: cannot listen on {host}:{port}.", str(error), "[http] host and port") from error
    found.set_inheritable(False)
    return found
