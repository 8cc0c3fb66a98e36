"""A station's trigger in line.toml: a handshake with its servers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from ...errors import ConfigError, shown
from ..config import LineConfig, StationConfig
from ..handshake import Handshake
from .modbus import ModbusServer
from .opcua import OpcuaServer
from .server import PlcServer

__all__ = ["PlcConfig", "PlcTrigger", "open_trigger"]

_STOP = 0.3  # seconds for a server to end: everything is withdrawn by then, and a service must stop in time


@dataclass(frozen=True)
class PlcConfig:
    """`[plc]`.

    Attributes:
        result_timeout: seconds after which an unacknowledged result is withdrawn.
        recipe_numbers: recipe -> its number in Modbus registers, 1 to 65535.
        keep_on_disconnect: see `saae_runtime.line.plc.modbus.ModbusServer`.
    """

    result_timeout: float = 10.0
    recipe_numbers: Mapping[str, int] = field(default_factory=dict)
    keep_on_disconnect: bool = False

    def __post_init__(self) -> None:
        if not self.result_timeout > 0:
            raise ValueError(f"`result_timeout` is {self.result_timeout}; it must be above 0")
        numbers = list(self.recipe_numbers.values())
        if len(set(numbers)) != len(numbers) or not all(1 <= number <= 0xFFFF for number in numbers):
            raise ValueError("`recipe_numbers` must be different numbers from 1 to 65535")


class PlcTrigger(Handshake):
    """A handshake that owns its servers.

    Attributes:
        servers: a `ModbusServer`, an `OpcuaServer`, or both.
    """

    servers: tuple[PlcServer, ...] = ()

    def close(self) -> None:
        """Withdraw everything and end the servers. May be called twice."""
        super().close()
        for server in self.servers:
            server.stop()
        for server in self.servers:
            server.close(_STOP)


def open_trigger(config: LineConfig, station: StationConfig) -> PlcTrigger | None:
    """Open a station's trigger.

    `free`: None, each frame is a part; `modbus:HOST:PORT`, `opcua:HOST:PORT`, or both with a comma between them:
    servers on these addresses; `http`: without a server, see `saae_runtime.line.http`.

    Raises:
        ConfigError: another trigger, an unknown recipe, a missing library.
        DeviceError: a server cannot listen.
    """
    if station.trigger == "free":
        return None
    options = config.extra.get("plc") or PlcConfig()
    assert isinstance(options, PlcConfig)
    known = [recipe.name for recipe in config.recipes]
    for name in options.recipe_numbers:
        if name not in known:
            raise ConfigError(
                f"[plc]: no recipe is named {shown(name)}.", "", f"`recipe_numbers` of {', '.join(known)}"
            )
    numbers = {number: name for name, number in options.recipe_numbers.items() if name in station.recipes}
    handshake = PlcTrigger(station.verdict_timeout, options.result_timeout, station.recipes)
    try:
        for spec in station.trigger.split(","):
            kind, _, listen = spec.strip().partition(":")
            if spec.strip() == "http":  # `POST /v1/trigger` of the HTTP service
                continue
            if kind == "modbus":
                server: PlcServer = ModbusServer(
                    handshake, listen or "127.0.0.1", numbers, keep_on_disconnect=options.keep_on_disconnect
                )
            elif kind == "opcua":
                server = OpcuaServer(handshake, listen or "127.0.0.1")
            else:
                raise ConfigError(
                    f"Station {station.name}: no trigger is named {shown(spec)}.",
                    "",
                    'trigger = "free", "http", "modbus:127.0.0.1:502", "opcua:127.0.0.1:4840", or several with a comma',
                )
            handshake.servers += (server,)
    except BaseException:
        with suppress(Exception):
            handshake.close()
        raise
    return handshake
