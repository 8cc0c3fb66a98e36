"""The Modbus register map: translates between registers and the handshake."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...errors import ConfigError
from ..handshake import LONGEST_PART_ID, Handshake
from ..view import Reply, View

__all__ = [
    "ACKNOWLEDGE",
    "CONTROL",
    "CONTROL_SIZE",
    "MAP_VERSION",
    "RESET",
    "STATUS",
    "STATUS_SIZE",
    "TRIGGER",
    "Registers",
    "text_of",
]

CONTROL = 0
"""Address of the first register that the PLC writes."""
STATUS = 100
"""Address of the first register that the PLC reads."""

TRIGGER, ACKNOWLEDGE, RESET = 1, 2, 4
"""Bits of the control word; each acts when it changes from 0 to 1."""

MAP_VERSION = 1
"""Version of the map, in register 109; raise it when an address or a meaning changes."""

_LARGEST = 3.4e38  # the largest float32
_TEXT = LONGEST_PART_ID // 2  # registers of a part id
_RECIPE, _NUMBER, _PART = 1, 2, 4  # offset in the control block
CONTROL_SIZE = _PART + _TEXT
STATUS_SIZE = 20 + _TEXT

READY, BUSY, VALID, OK, NG, FAULT, REFUSED, ONLINE = (1 << bit for bit in range(8))
"""Bits of the status word."""


@dataclass
class _Client:
    """A connection's previous control bits; before its first write none of them can act."""

    bits: int = TRIGGER | ACKNOWLEDGE | RESET
    armed: bool = False


class Registers:
    """The registers of one handshake. A read returns a consistent state.

    Used by one thread. Any object identifies a connection; `None` is for all that share their control bits.

    Args:
        handshake: the handshake.
        recipes: recipe number (1..65535) -> name; 0 is the station's.
        who: name of the client in the audit log.

    Raises:
        ConfigError: a recipe number out of range.
    """

    def __init__(self, handshake: Handshake, recipes: Mapping[int, str] | None = None, who: str = "plc") -> None:
        self._handshake = handshake
        self._who = who
        self._recipes = dict(recipes or {})
        for number in self._recipes:
            if not 1 <= number <= 0xFFFF:
                raise ConfigError(
                    f"recipe number {number}.", "A register holds 1 to 65535.", "use a number in this range"
                )
        self._numbers = {name: number for number, name in self._recipes.items()}
        self._control = [0] * CONTROL_SIZE
        self._clients: dict[object, _Client] = {}
        self._writer: object = None

    def read(self, address: int, count: int) -> list[int] | None:
        """Registers of both blocks; None for other addresses."""
        for start, size in ((CONTROL, CONTROL_SIZE), (STATUS, STATUS_SIZE)):
            if start <= address and count > 0 and address + count <= start + size:
                block = self._control if start == CONTROL else self._status(self._handshake.view())
                return block[address - start : address - start + count]
        return None

    def write(self, address: int, values: Sequence[int], client: object = None) -> bool:
        """Write registers of the control block, then act on its bits; False for other addresses, or without values."""
        start = address - CONTROL
        if start < 0 or not values or start + len(values) > CONTROL_SIZE:
            return False
        self._control[start : start + len(values)] = [value & 0xFFFF for value in values]
        self._writer = client
        if start == 0:
            self._act(self._control[0], client)
        return True

    def lost(self, client: object) -> None:
        """A connection has ended: withdraw its part and forget its control word."""
        self._clients.pop(client, None)
        self._handshake.lost(client)
        if self._writer is client:
            self._control[0] = 0

    def _act(self, word: int, client: object) -> None:
        known = self._clients.setdefault(client, _Client())
        rising = word & ~known.bits
        if not known.armed and word & known.bits:
            # A PLC that reconnects with its bits still set must not trigger.
            self._handshake.refuse(Reply.NOT_ARMED)
        known.armed = known.armed or word & (TRIGGER | ACKNOWLEDGE | RESET) == 0
        known.bits = word
        if rising & RESET:
            self._handshake.reset()
        if rising & ACKNOWLEDGE:
            self._handshake.acknowledge(self._part_id())
        if rising & TRIGGER:
            self._trigger(client)

    def _trigger(self, client: object) -> None:
        number = self._control[_RECIPE]
        if number and number not in self._recipes:
            self._handshake.refuse(Reply.BAD_RECIPE)
            return
        self._handshake.trigger(self._part_id(), self._recipes.get(number), client, self._who)

    def _part_id(self) -> str:
        """The part id: the text up to its first zero, else the number; empty without either."""
        text = text_of(self._control[_PART : _PART + _TEXT])
        number = (self._control[_NUMBER] << 16) + self._control[_NUMBER + 1]
        return text or (str(number) if number else "")

    def _status(self, view: View) -> list[int]:
        low = self._control[0] & (TRIGGER | ACKNOWLEDGE | RESET) == 0
        word = (
            (READY if view.ready and low else 0)
            | (BUSY if view.busy else 0)
            | (VALID if view.valid else 0)
            | (OK if view.ok else 0)
            | (NG if view.ng else 0)
            | (FAULT if view.fault else 0)
            | (0 if view.refusal.accepted else REFUSED)
            | (ONLINE if view.phase.value != "offline" else 0)
        )
        number = int(view.part_id) if _is_number(view.part_id) else 0
        counts = view.counts
        head = struct.pack(
            ">HHHHIfHHIIHHHHI",
            word,
            int(view.reason),
            int(view.refusal),
            view.heartbeat & 0xFFFF,
            number,
            math.copysign(math.inf, view.score) if abs(view.score) > _LARGEST else view.score,
            self._numbers.get(view.recipe or "", 0),
            MAP_VERSION,
            counts.ok & 0xFFFFFFFF,
            counts.ng & 0xFFFFFFFF,
            counts.timeouts & 0xFFFF,
            counts.late & 0xFFFF,
            counts.refused & 0xFFFF,
            counts.withdrawn & 0xFFFF,
            0,
        )
        text = view.part_id.encode("ascii").ljust(2 * _TEXT, b"\0")
        words = struct.unpack(f">{(len(head) + len(text)) // 2}H", head + text)
        assert len(words) == STATUS_SIZE
        return list(words)


def _is_number(text: str) -> bool:
    """Whether the number alone gives this part id."""
    return text.isascii() and text.isdecimal() and text[0] != "0" and int(text) <= 0xFFFFFFFF


def text_of(words: Sequence[int]) -> str:
    """Text of two characters per register, the first in the high byte, up to the first zero; latin-1 takes any byte."""
    return struct.pack(f">{len(words)}H", *words).partition(b"\0")[0].decode("latin-1")
