"""An asyncio server on a thread of its own, started and ended from ordinary code."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from ...errors import ConfigError, DeviceError, SaaeError

__all__ = ["ServerThread"]

_START = 30.0  # seconds that a server may take until it listens
_STOP = 5.0  # and until it is gone


class ServerThread:
    """Runs `serve(started, stop)` in an event loop of its own until `close`.

    `serve` listens, calls `started(port)`, awaits `stop.wait()`, and cleans up.

    Args:
        name: of the thread, and in errors: "modbus", "opcua".
        address: as in errors, `host:port`.
        serve: the coroutine.

    Attributes:
        port: that the server listens on.

    Raises:
        DeviceError: it cannot listen there.
    """

    port: int

    def __init__(
        self,
        name: str,
        address: str,
        serve: Callable[[Callable[[int], None], asyncio.Event], Coroutine[Any, Any, None]],
    ) -> None:
        self._name = name
        self._serve = serve
        self._started = threading.Event()
        self._error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name=f"saae-{name}", daemon=True)
        self._thread.start()
        if not self._started.wait(_START):
            self._error = TimeoutError(f"not listening after {_START:.0f} seconds")
        if self._error is not None:
            self.close()
            if isinstance(self._error, SaaeError):
                raise self._error
            raise DeviceError(
                f"{name}: no server at {address}.",
                f"{type(self._error).__name__}: {self._error}",
                "choose an address of this machine and a port that no other program has; below 1024 it needs a right "
                "(AmbientCapabilities=CAP_NET_BIND_SERVICE in the unit file)",
            ) from self._error

    @property
    def alive(self) -> bool:
        """Whether the server still serves."""
        return self._thread.is_alive() and self._error is None

    @property
    def error(self) -> BaseException | None:
        """What ended the server, if not `close`."""
        return self._error

    def call(self, function: Callable[[], Awaitable[None]]) -> None:
        """Runs a coroutine function in the server's loop and waits for its end."""
        assert self._loop is not None

        async def run() -> None:
            await function()

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(_STOP)

    def close(self) -> None:
        """Ends the server and its connections. May be called twice."""
        if self._loop is not None and self._stop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
        if threading.current_thread() is not self._thread:
            self._thread.join(_STOP)

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:  # told by the constructor, or by `alive`
            self._error = error
        finally:
            self._started.set()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        await self._serve(self._listening, self._stop)

    def _listening(self, port: int) -> None:
        self.port = port
        self._started.set()


def parse_listen(text: str, default_port: int) -> tuple[str, int]:
    """`host:port`, `host` or `:port` as host and port; without a host it is 127.0.0.1.

    Raises:
        ConfigError: it is none of these.
    """
    host, colon, port = text.rpartition(":") if ":" in text else (text, "", "")
    if colon and not port.isdecimal():
        raise ConfigError(f"{text}: no address to listen on.", "", f"host:port, such as 127.0.0.1:{default_port}")
    number = int(port) if colon else default_port
    if number > 65535:
        raise ConfigError(f"{text}: no port {number}.", "Ports end at 65535.", f"such as 127.0.0.1:{default_port}")
    return host or "127.0.0.1", number
