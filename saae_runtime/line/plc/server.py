"""Base of the servers for a handshake: an address, a thread, a name in the audit log."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable

from ..handshake import Handshake
from .service import ServerThread, parse_listen

__all__ = ["PlcServer"]


class PlcServer(ABC):
    """Serves a handshake by one protocol, from its own thread, until `close`.

    Args:
        handshake: what the protocol drives.
        listen: `host:port`; port 0: any free one.

    Attributes:
        name: of the protocol, for threads, errors and the audit log.
        default_port: if `listen` names none.
        host, port: where it listens.

    Raises:
        ConfigError: `listen` is not an address.
        DeviceError: it cannot listen there.
    """

    name: str
    default_port: int

    def __init__(self, handshake: Handshake, listen: str) -> None:
        self.host, port = parse_listen(listen, self.default_port)
        self._handshake = handshake
        self._thread = ServerThread(self.name, (self.host, port), self._serve)

    @abstractmethod
    async def _serve(self, port: int, started: Callable[[int], None], stop: asyncio.Event) -> None:
        """See `ServerThread`."""

    @property
    def port(self) -> int:
        """The TCP port."""
        return self._thread.port

    @property
    def alive(self) -> bool:
        """Whether it serves."""
        return self._thread.alive

    def stop(self) -> None:
        """Ask the server to end, and return at once."""
        self._thread.stop()

    def close(self, timeout: float = 5.0) -> None:
        """End all connections and the server; wait at most this many seconds for it. May be called twice."""
        self._thread.close(timeout)
