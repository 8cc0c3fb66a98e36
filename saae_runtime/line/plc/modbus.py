"""A Modbus TCP server for a handshake, on pymodbus (extra `modbus`). The register map is in `registers`."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from ...errors import ConfigError
from ..handshake import Handshake
from .registers import CONTROL, CONTROL_SIZE, STATUS, STATUS_SIZE, Registers
from .server import PlcServer

__all__ = ["DEFAULT_PORT", "ModbusServer"]

DEFAULT_PORT = 502

_READS = (3, 4)
_WRITES = (6, 16, 22, 23)  # these also read
_KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
"""Without a cable a PLC cannot close its connection, which counts as lost after half a minute."""

_SHARED = object()  # the client of all connections that share their control bits
_client: ContextVar[object] = ContextVar("modbus_client", default=_SHARED)


class ModbusServer(PlcServer):
    """Serves the register map on TCP from its own thread until `close`. Answers any unit identifier.

    A PLC keeps its connection open. When the connection ends, the part that it triggered and its verdict are withdrawn.

    Args:
        handshake: what the registers drive.
        listen: `host:port`; port 0: any free one. Modbus has no password: give the address of the PLC's network, not
            0.0.0.0.
        recipes: recipe number -> name.
        keep_on_disconnect: for clients that open a connection for each request: all connections share the control
            bits, and only `result_timeout` withdraws a result, not the end of a connection.

    Attributes:
        host, port: where it listens.

    Raises:
        ConfigError: pymodbus is missing, or `listen` is not an address.
        DeviceError: it cannot listen there.
    """

    name = "modbus"
    default_port = DEFAULT_PORT

    def __init__(
        self,
        handshake: Handshake,
        listen: str = "127.0.0.1:502",
        recipes: Mapping[int, str] | None = None,
        keep_on_disconnect: bool = False,
    ) -> None:
        self._registers = Registers(handshake, recipes, self.name)
        self._keep = keep_on_disconnect
        self._library = _load()
        super().__init__(handshake, listen)

    async def _serve(self, port: int, started: Callable[[int], None], stop: asyncio.Event) -> None:
        simulator, server_type = self._library
        registers = simulator.DataType.REGISTERS
        device = simulator.SimDevice(
            0,
            simdata=[
                simulator.SimData(CONTROL, count=CONTROL_SIZE, datatype=registers),
                simulator.SimData(STATUS, count=STATUS_SIZE, datatype=registers),
            ],
            action=self._request,
        )
        server = server_type(device, address=(self.host, port), on_lost=self._lost)
        await server.serve_forever(background=True)
        try:
            started(server.transport.sockets[0].getsockname()[1])
            await stop.wait()
        finally:
            await server.shutdown()

    async def _request(
        self, function: int, start: int, address: int, count: int, current: list[int], values: list[Any] | None
    ) -> Any:
        """Serve one request; return the exception code, or None."""
        from pymodbus.constants import ExcCodes

        if function not in _READS + _WRITES or (values is not None and function not in _WRITES):
            return ExcCodes.ILLEGAL_FUNCTION
        if values is not None:
            client = _SHARED if self._keep else _client.get()
            taken = self._registers.write(address, [int(value) for value in values], client)
            return None if taken else ExcCodes.ILLEGAL_ADDRESS
        found = self._registers.read(address, count)
        if found is None:
            return ExcCodes.ILLEGAL_ADDRESS
        current[address - start : address - start + count] = found
        return None

    def _lost(self, client: object) -> None:
        if not self._keep:
            self._registers.lost(client)


def _load() -> tuple[Any, Any]:
    """pymodbus.simulator, and a server type that knows the connection of a request and when it ends."""
    try:
        from pymodbus import simulator
        from pymodbus.server import ModbusTcpServer
        from pymodbus.server.requesthandler import ServerRequestHandler
    except ImportError as error:
        raise ConfigError(
            "Modbus is not available.", f"pymodbus cannot be imported: {error}", "pip install 'saae[modbus]'"
        ) from error
    # A network scan would log an error each time.
    logging.getLogger("pymodbus.logging").setLevel(logging.CRITICAL)

    class Connection(ServerRequestHandler):
        def callback_connected(self) -> None:
            super().callback_connected()
            peer = self.transport.get_extra_info("socket")
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEPALIVE:
                if hasattr(socket, name):
                    peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

        async def handle_request(self) -> None:
            _client.set(self)  # each request is a task with its own context
            await super().handle_request()

        def callback_disconnected(self, exc: Exception | None) -> None:
            super().callback_disconnected(exc)
            self.server.on_lost(self)

    class Server(ModbusTcpServer):
        def __init__(self, device: Any, address: tuple[str, int], on_lost: Callable[[object], None]) -> None:
            super().__init__(device, address=address)
            self.on_lost = on_lost

        def callback_new_connection(self) -> Any:
            return Connection(self, self.trace_packet, self.trace_pdu, self.trace_connect)

    return simulator, Server
