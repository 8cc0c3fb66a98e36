"""The Modbus server with real clients on loopback: the whole handshake, killed sides, writes of any kind."""

from __future__ import annotations

import math
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from plc_client import Plc, status_of

from saae_runtime.errors import ConfigError, DeviceError
from saae_runtime.line.handshake import Handshake
from saae_runtime.line.part import Verdict
from saae_runtime.line.plc.modbus import ModbusServer
from saae_runtime.line.plc.registers import CONTROL_SIZE, STATUS, STATUS_SIZE, Registers
from saae_runtime.line.view import Reason, Reply

pytestmark = pytest.mark.needs("pymodbus")


@contextmanager
def serving(**options: object) -> Iterator[tuple[Handshake, ModbusServer]]:
    """A server in front of a handshake whose station has waited once."""
    times = {"verdict_timeout": 60.0, "result_timeout": 3600.0}
    times |= {name: options.pop(name) for name in tuple(options) if name in times}  # type: ignore[misc]
    recipes = options.get("recipes")
    handshake = Handshake(recipes=recipes.values() if isinstance(recipes, dict) else None, **times)
    server = ModbusServer(handshake, "127.0.0.1:0", **options)  # type: ignore[arg-type]
    handshake.wait(0)
    try:
        yield handshake, server
    finally:
        server.close()
        handshake.close()


def test_a_part_from_trigger_to_acknowledge() -> None:
    with serving(recipes={3: "gear"}) as (handshake, server):
        plc = Plc(server.port)
        assert plc.read().bits == {"ready", "online"}
        plc.trigger("AB-0815", recipe=3)
        found = plc.read()
        assert (found.bits, found.part, found.recipe) == ({"busy", "online"}, "AB-0815", 3)
        trigger = handshake.wait(10)
        assert trigger is not None
        assert (trigger.part_id, trigger.recipe) == ("AB-0815", "gear")
        assert [(item.before, item.after, item.who) for item in handshake.choices()] == [(None, "gear", "modbus")]
        assert handshake.answer("AB-0815", Verdict.OK, 12.25)
        found = plc.read()
        assert (found.bits, found.part, found.score) == ({"valid", "ok", "online"}, "AB-0815", 12.25)
        assert (found.reason, found.ok_count) == (Reason.SCORE, 1)
        plc.release()
        plc.write(0, [2])
        found = plc.read()
        assert (found.bits, found.part) == ({"online"}, "")  # ready is shown when the acknowledgement is low
        assert math.isnan(found.score)
        plc.release()
        assert plc.read().bits == {"ready", "online"}
        plc.trigger("", number=70_000)
        assert handshake.wait(10).part_id == "70000"  # type: ignore[union-attr]
        handshake.answer("70000", Verdict.NG, 99.0)
        found = plc.read()
        assert (found.bits, found.number, found.part) == ({"valid", "ng", "online"}, 70_000, "70000")
        plc.close()


def test_what_is_refused_is_said() -> None:
    with serving(recipes={3: "gear"}) as (handshake, server):
        plc = Plc(server.port)
        for part, recipe, reply in (("", 0, Reply.BAD_PART), ("A", 4, Reply.BAD_RECIPE), ("A", 3, Reply.ACCEPTED)):
            plc.trigger(part, recipe)
            found = plc.read()
            assert found.refusal == reply
            assert ("refused" in found.bits) == (reply is not Reply.ACCEPTED)
            plc.release()
        plc.trigger("B")
        assert (plc.read().refusal, plc.read().part) == (Reply.BUSY, "A")
        handshake.wait(0)
        handshake.answer("A", Verdict.OK, 1.0)
        plc.acknowledge()  # the registers hold B
        found = plc.read()
        assert (found.refusal, found.part) == (Reply.WRONG_PART, "A")
        assert "ok" in found.bits
        plc.close()


def test_only_addresses_of_the_map_are_served_and_only_the_control_block_is_written() -> None:
    with serving() as (_, server):
        plc = Plc(server.port)
        client = plc.client
        for address, count in (
            (CONTROL_SIZE, 1),
            (0, CONTROL_SIZE + 1),
            (99, 2),
            (STATUS + STATUS_SIZE, 1),
            (60000, 5),
        ):
            assert client.read_holding_registers(address, count=count).isError()
        for address, count in ((STATUS, 1), (STATUS + 5, 3), (CONTROL_SIZE - 1, 2), (99, 1)):
            assert not plc.write(address, [0] * count)
        assert client.write_coil(0, True).isError()
        assert client.read_coils(0, count=1).isError()
        same = client.read_input_registers(STATUS, count=STATUS_SIZE)
        assert status_of(same.registers).bits == {"ready", "online"}
        assert plc.read().bits == {"ready", "online"}
        plc.close()


def test_a_client_that_comes_with_its_bits_set_triggers_nothing() -> None:
    with serving() as (handshake, server):
        plc = Plc(server.port, arm=False)
        for _ in range(3):  # a PLC writes in every cycle
            plc.trigger("A")
        found = plc.read()
        assert (found.refusal, found.part) == (Reply.NOT_ARMED, "")
        assert handshake.wait(0) is None
        plc.release()
        plc.trigger("A")
        assert plc.read().part == "A"
        plc.trigger("A")  # the bit does not rise
        assert handshake.view().counts.parts == 1
        plc.close()


def test_no_verdict_in_time_is_ng() -> None:
    with serving(verdict_timeout=0.1) as (handshake, server):
        plc = Plc(server.port)
        plc.trigger("A")
        found = plc.until("valid")
        assert (found.bits, found.reason, found.timeouts) == ({"valid", "ng", "online"}, Reason.TIMEOUT, 1)
        assert not handshake.answer("A", Verdict.OK, 1.0)
        assert "ng" in plc.read().bits
        plc.close()


def client_process(root: Path, port: int, state: str) -> subprocess.Popen[str]:
    environment = {"PYTHONPATH": f"{root}:{root / 'tests/support'}", "PATH": ""}
    command = [sys.executable, str(root / "tests/support/plc_client.py"), str(port), state]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("state", ["idle", "triggered", "busy", "result"])
def test_a_killed_client_leaves_no_verdict_to_the_next(repo_root: Path, state: str) -> None:
    with serving() as (handshake, server):
        client = client_process(repo_root, server.port, state)
        try:
            if state in ("busy", "result"):
                assert handshake.wait(60) is not None
            if state == "result":
                assert handshake.answer("old part", Verdict.OK, 1.0)
            assert client.stdout is not None
            assert client.stdout.readline().strip() == state
        finally:
            client.kill()
            client.wait()
        plc = Plc(server.port, arm=False)
        end = time.monotonic() + 30
        while plc.read().part and time.monotonic() < end:
            time.sleep(0.01)
        found = plc.read()
        assert found.bits <= {"ready", "online", "busy"}
        assert found.part == ""
        if state == "busy":  # the station still has it in hand; its verdict reaches nobody
            assert found.bits == {"busy", "online"}
            assert not handshake.answer("old part", Verdict.OK, 1.0)
        if state == "triggered":
            assert [trigger.part_id for trigger, _ in handshake.missed()] == ["old part"]
        plc.release()
        plc.trigger("new part")
        assert handshake.wait(30).part_id == "new part"  # type: ignore[union-attr]
        assert handshake.answer("new part", Verdict.NG, 80.0)
        found = plc.read()
        assert (found.bits, found.part) == ({"valid", "ng", "online"}, "new part")
        plc.close()


def test_a_part_of_one_client_survives_the_end_of_another() -> None:
    with serving() as (handshake, server):
        plc, page = Plc(server.port), Plc(server.port)
        plc.trigger("A")
        page.close()
        handshake.wait(0)
        handshake.answer("A", Verdict.OK, 1.0)
        time.sleep(0.1)
        assert plc.read().bits == {"valid", "ok", "online"}
        plc.close()


def test_a_connection_for_each_request_where_that_is_asked_for() -> None:
    with serving(keep_on_disconnect=True) as (handshake, server):
        for step in ("arm", "trigger", "read"):
            plc = Plc(server.port, arm=step == "arm")
            if step == "trigger":
                plc.trigger("A")
                handshake.wait(10)
                handshake.answer("A", Verdict.OK, 1.0)
            if step == "read":
                assert plc.read().bits == {"valid", "ok", "online"}
            plc.close()


@pytest.mark.parametrize("state", ["idle", "triggered", "busy", "result"])
def test_a_server_that_went_and_came_back_has_no_verdict(state: str) -> None:
    with serving() as (handshake, server):
        plc = Plc(server.port)
        if state != "idle":
            plc.trigger("A")
        if state in ("busy", "result"):
            handshake.wait(0)
        if state == "result":
            handshake.answer("A", Verdict.OK, 1.0)
        server.close()
        handshake.close()
        with pytest.raises(Exception):  # noqa: B017  (the library's own)
            plc.read()
        again = Handshake(verdict_timeout=60)
        with_same_port = ModbusServer(again, f"127.0.0.1:{server.port}")
        try:
            plc = Plc(server.port, arm=False)
            assert plc.read().bits == frozenset()
            plc.trigger("A")
            assert plc.read().bits == {"refused"}
            again.wait(0)
            assert plc.read().bits == {"online", "refused"}  # the bit is still set: ready comes when it is low
            plc.close()
        finally:
            with_same_port.close()


def test_a_read_is_of_one_moment() -> None:
    """While parts go through, every read block fits together: id, verdict and score."""
    with serving() as (handshake, server):
        stop = threading.Event()

        def station() -> None:
            while not stop.is_set():
                found = handshake.wait(0.05)
                if found is not None:
                    number = int(found.part_id)
                    handshake.answer(found.part_id, Verdict.OK if number % 2 else Verdict.NG, float(number))

        def watcher() -> None:
            page = Plc(server.port)
            while not stop.is_set():
                found = page.read()
                if "valid" in found.bits:
                    seen.append((found.number, found.score, "ok" in found.bits, "ng" in found.bits, found.part))
            page.close()

        seen: list[tuple[int, float, bool, bool, str]] = []
        threads = [threading.Thread(target=station), threading.Thread(target=watcher)]
        for thread in threads:
            thread.start()
        plc = Plc(server.port)
        for number in range(1, 61):
            plc.until("ready")
            plc.trigger("", number=number)
            found = plc.until("valid")
            assert (found.number, found.score, "ok" in found.bits) == (number, float(number), number % 2 == 1)
            plc.acknowledge()
        stop.set()
        for thread in threads:
            thread.join(30)
        plc.close()
        assert seen
        assert all(
            (score, ok, ng, part) == (float(number), number % 2 == 1, number % 2 == 0, str(number))
            for number, score, ok, ng, part in seen
        )


@pytest.mark.parametrize("rounds", [500, pytest.param(10_000, marks=pytest.mark.fuzz)])
def test_writes_and_bytes_of_any_kind_change_no_verdict(rounds: int) -> None:
    with serving() as (handshake, server):
        owner = Plc(server.port)
        owner.trigger("A")
        handshake.wait(0)
        handshake.answer("A", Verdict.NG, 99.0)
        rng = random.Random(rounds)
        plc = Plc(server.port, arm=False)
        raw = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        taken = 0
        for index in range(rounds):
            kind = rng.randrange(4)
            if kind == 0:
                # Never the bits of this client's own acknowledge and reset: those may end a part.
                address = rng.choice([1, 4, 30, rng.randrange(1, 0xFF00)])
                values = [rng.randrange(0x10000) for _ in range(rng.randrange(1, 60))]
                taken += plc.write(address, values)
            elif kind == 1:
                taken += plc.write(0, [rng.randrange(0x10000) & ~6])
            elif kind == 2:
                length = rng.randrange(1, 40)
                body = bytes([1, rng.choice([1, 3, 5, 6, 15, 16, 22, 23, 43, rng.randrange(256)])]) + rng.randbytes(
                    length
                )
                # Well-formed around any content; control words with acknowledge or reset are not sent by chance.
                if body[1] in (5, 6, 15, 16, 22, 23):
                    body = body[:2] + b"\x00\x01" + body[4:]
                if body[1] == 23:
                    body = body[:6] + b"\x00\x01" + body[8:]
                frame = struct.pack(">HHH", index & 0xFFFF, 0, len(body)) + body
                raw = _send(raw, frame, server.port)
            else:
                raw = _send(raw, rng.randbytes(rng.randrange(1, 300)), server.port)
            view = handshake.view()
            assert (view.part_id, view.ok, view.ng, view.score) == ("A", False, True, 99.0)
            if index % 50 == 0:
                found = owner.read()
                assert (found.part, found.bits - {"refused"}) == ("A", {"valid", "ng", "online"})
        assert server.alive
        assert taken > rounds / 5  # the server did answer
        owner.write(0, [0])
        owner.write(4, [0x4100])
        owner.acknowledge()
        assert not handshake.view().valid
        raw.close()
        plc.close()
        owner.close()


def _send(connection: socket.socket, data: bytes, port: int) -> socket.socket:
    """Sends, on a new connection where the server has ended the old one."""
    try:
        connection.sendall(data)
    except OSError:
        connection.close()
        connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    return connection


def test_the_register_block_keeps_what_a_plc_leaves_behind_the_end_of_a_text() -> None:
    handshake = Handshake()
    registers = Registers(handshake)
    handshake.wait(0)
    registers.write(0, [0])
    registers.write(4, [0x4142, 0x4300, 0x5A5A])  # "ABC", then the rest of an older text
    registers.write(0, [1])
    assert handshake.wait(0).part_id == "ABC"  # type: ignore[union-attr]
    handshake.answer("ABC", Verdict.NG, 1e300)
    found = status_of(registers.read(STATUS, STATUS_SIZE) or [])
    assert (found.part, found.score) == ("ABC", math.inf)


def test_where_it_cannot_listen_it_says_so() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(DeviceError, match="cannot listen on"):
            ModbusServer(Handshake(), f"127.0.0.1:{taken.getsockname()[1]}")
    for listen in ("127.0.0.1:port", "127.0.0.1:70000"):
        with pytest.raises(ConfigError):
            ModbusServer(Handshake(), listen)
    with pytest.raises(ConfigError, match="70000"):
        Registers(Handshake(), {70000: "gear"})
