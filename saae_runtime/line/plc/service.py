"""Runs an asyncio server on a separate thread."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from ...errors import ConfigError, DeviceError, SaaeError

__all__ = ["ServerThread"]

_START = 30.0  # seconds for a server to listen
_STOP = 5.0  # seconds for it to end, by default
_AGAIN = 1.0  # seconds until a failed server is started again


class ServerThread:
    """Runs `serve(port, started, stop)` in a separate event loop until `close`.

    `serve` listens, calls `started(port)`, awaits `stop.wait()`, and cleans up. If it fails later, it is started again
    on the same port.

    Args:
        name: of the thread, and in errors: "modbus", "opcua".
        address: host and port that it will listen on.
        serve: the coroutine.

    Attributes:
        port: the port that the server listens on.

    Raises:
        DeviceError: it cannot listen there.
    """

    port: int

    def __init__(
        self,
        name: str,
        address: tuple[str, int],
        serve: Callable[[int, Callable[[int], None], asyncio.Event], Coroutine[Any, Any, None]],
    ) -> None:
        self._name = name
        self._serve = serve
        self.port = address[1]
        self._started = threading.Event()
        self._closed = threading.Event()
        self._error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name=f"saae-{name}", daemon=True)
        try:
            # Check early, because not all libraries say why they cannot listen.
            with socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            raise self._cannot_listen(address, error) from error
        self._thread.start()
        if not self._started.wait(_START):
            self._error = TimeoutError(f"not listening after {_START:.0f} seconds")
        if self._error is not None:
            self.close()
            if isinstance(self._error, SaaeError):
                raise self._error
            raise self._cannot_listen(address, self._error) from self._error

    @property
    def alive(self) -> bool:
        """Whether the server still serves."""
        return self._thread.is_alive() and self._error is None

    def stop(self) -> None:
        """Ask the server to end, and return at once."""
        self._closed.set()
        if self._loop is not None and self._stop is not None and self._thread.is_alive():
            with suppress(RuntimeError):  # the loop has just ended
                self._loop.call_soon_threadsafe(self._stop.set)

    def close(self, timeout: float = _STOP) -> None:
        """End the server and its connections; wait at most this many seconds for it. May be called twice."""
        self.stop()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def _cannot_listen(self, address: tuple[str, int], error: BaseException) -> DeviceError:
        return DeviceError(
            f"{self._name}: cannot listen on {address[0]}:{address[1]}.",
            f"{type(error).__name__}: {error}",
            "use an address of this machine and a free port; a port below 1024 needs a privilege "
            "(AmbientCapabilities=CAP_NET_BIND_SERVICE in the unit file)",
        )

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                asyncio.run(self._main())
                break
            except BaseException as error:  # reported by the constructor, or by `alive`
                self._error = error
                if not self._started.is_set():
                    break
            self._closed.wait(_AGAIN)
        self._started.set()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        if not self._closed.is_set():
            await self._serve(self.port, self._listening, self._stop)

    def _listening(self, port: int) -> None:
        self.port = port
        self._error = None
        self._started.set()


def parse_listen(text: str, default_port: int) -> tuple[str, int]:
    """`host:port`, `host` or `:port` as host and port; without a host it is 127.0.0.1.

    Raises:
        ConfigError: another text.
    """
    host, colon, port = text.rpartition(":") if ":" in text else (text, "", "")
    if colon and not port.isdecimal():
        raise ConfigError(f"{text}: not an address to listen on.", "", f"host:port, such as 127.0.0.1:{default_port}")
    number = int(port) if colon else default_port
    if number > 65535:
        raise ConfigError(
            f"{text}: {number} is not a port.", "Ports end at 65535.", f"such as 127.0.0.1:{default_port}"
        )
    return host or "127.0.0.1", number
