"""A PLC as tests play it: the documented register map over a real pymodbus client."""

from __future__ import annotations

import math
import struct
import sys
import time
from dataclasses import dataclass
from typing import Any

STATUS_SIZE = 52
BITS = ("ready", "busy", "valid", "ok", "ng", "fault", "refused", "online")


@dataclass(frozen=True)
class Status:
    """The status block of one read."""

    bits: frozenset[str]
    reason: int
    refusal: int
    heartbeat: int
    number: int
    score: float
    recipe: int
    ok_count: int
    ng_count: int
    timeouts: int
    refused_count: int
    part: str


def status_of(words: list[int]) -> Status:
    """Reads the 52 registers from address 100 on."""
    raw = struct.pack(f">{len(words)}H", *words)
    word, reason, refusal, beat, number, score, recipe, _, ok, ng, timeouts, _, refused = struct.unpack(
        ">HHHHIfHHIIHHH", raw[:34]
    )
    bits = frozenset(name for bit, name in enumerate(BITS) if word >> bit & 1)
    part = raw[40:].partition(b"\0")[0].decode("ascii")
    return Status(bits, reason, refusal, beat, number, score, recipe, ok, ng, timeouts, refused, part)


class Plc:
    """One connection of a PLC, armed: its first write was a control word of 0."""

    def __init__(self, port: int, arm: bool = True) -> None:
        from pymodbus.client import ModbusTcpClient

        self.client: Any = ModbusTcpClient("127.0.0.1", port=port, timeout=10, retries=0)
        assert self.client.connect()
        if arm:
            self.write(0, [0])

    def write(self, address: int, values: list[int]) -> bool:
        return not self.client.write_registers(address, values).isError()

    def read(self) -> Status:
        found = self.client.read_holding_registers(100, count=STATUS_SIZE)
        assert not found.isError(), found
        return status_of(found.registers)

    def trigger(self, part: str, recipe: int = 0, number: int = 0) -> None:
        """All in one write: word, recipe, number, text."""
        text = part.encode().ljust(64, b"\0")
        self.write(0, [1, recipe, number >> 16, number & 0xFFFF, *struct.unpack(">32H", text)])

    def release(self) -> None:
        self.write(0, [0])

    def acknowledge(self) -> None:
        self.write(0, [2])
        self.write(0, [0])

    def until(self, *bits: str, seconds: float = 30.0) -> Status:
        """Reads until all these bits are set."""
        end = time.monotonic() + seconds
        while True:
            found = self.read()
            if set(bits) <= found.bits:
                return found
            assert time.monotonic() < end, found
            time.sleep(0.005)

    def close(self) -> None:
        self.client.close()


def main() -> None:
    """A PLC in a process of its own, to be killed: goes to a state and stays there. Arguments: port, state."""
    port, state = int(sys.argv[1]), sys.argv[2]
    plc = Plc(port)
    if state != "idle":
        plc.until("ready")
        plc.trigger("old part")
    if state == "result":
        found = plc.until("valid")
        assert not math.isnan(found.score)
    print(state, flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main()
