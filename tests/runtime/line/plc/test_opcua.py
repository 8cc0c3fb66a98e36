"""The OPC UA server with real clients on loopback: methods, subscriptions, killed sides, writes of any kind."""

from __future__ import annotations

import asyncio
import math
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from asyncua import Client, ua
from asyncua.sync import Client as SyncClient

from saae_runtime.errors import DeviceError
from saae_runtime.line.handshake import Handshake
from saae_runtime.line.part import Verdict
from saae_runtime.line.plc.opcua import NAMESPACE, OpcuaServer
from saae_runtime.line.view import Reason, Reply

STATE = "VisionSystem.VisionStateMachine"
MODE = f"{STATE}.AutomaticModeStateMachine"
RESULTS = "VisionSystem.ResultManagement"
LATEST = f"{RESULTS}.Latest"
STATUS = "VisionSystem.Status"
RECIPES = "VisionSystem.RecipeManagement"


class Control:
    """A line's control as a client."""

    def __init__(self, url: str) -> None:
        self.client = SyncClient(url, timeout=20)
        try:
            self.client.connect()
        except BaseException:
            self.client.tloop.stop()  # its thread is no daemon: the process would never end
            raise
        self.index = self.client.get_namespace_index(NAMESPACE)

    def node(self, path: str) -> Any:
        return self.client.get_node(ua.NodeId(path, self.index))

    def call(self, path: str, *arguments: object) -> Any:
        parent, _, name = path.rpartition(".")
        return self.node(parent).call_method(f"{self.index}:{name}", *arguments)

    def latest(self) -> tuple[Any, ...]:
        """Valid, PartId, OK, NG, Score, Reason, ReasonText."""
        return tuple(self.call(f"{RESULTS}.GetLatestResult"))

    def until(self, path: str, value: object) -> None:
        end = time.monotonic() + 30
        while self.node(path).read_value() != value:
            assert time.monotonic() < end, (path, value)
            time.sleep(0.01)

    def close(self) -> None:
        self.client.disconnect()


@contextmanager
def serving(**options: Any) -> Iterator[tuple[Handshake, OpcuaServer]]:
    handshake = Handshake(**{"verdict_timeout": 60.0, "result_timeout": 3600.0} | options)
    server = OpcuaServer(handshake, "127.0.0.1:0")
    handshake.wait(0)
    try:
        yield handshake, server
    finally:
        server.close()
        handshake.close()


@pytest.fixture(scope="module")
def shared_server() -> Iterator[tuple[Handshake, OpcuaServer]]:
    with serving(recipes={"gear", "screw"}) as both:
        yield both


def test_a_part_from_start_to_acknowledge(shared_server: Any) -> None:
    handshake, server = shared_server
    control = Control(server.url)
    control.until(f"{STATUS}.Ready", True)
    assert control.node(f"{STATE}.CurrentState").read_value() == "Operational"
    assert control.node(f"{MODE}.CurrentState").read_value() == "Ready"
    assert control.call(f"{RECIPES}.PrepareRecipe", "nut") == Reply.BAD_RECIPE
    assert control.call(f"{RECIPES}.PrepareRecipe", "gear") == Reply.ACCEPTED
    control.until(f"{RECIPES}.ActiveRecipe", "gear")
    assert [(item.before, item.after, item.who) for item in handshake.choices()] == [(None, "gear", "opcua")]
    assert control.call(f"{MODE}.StartSingleJob", "A", "") == Reply.ACCEPTED
    assert control.call(f"{MODE}.StartSingleJob", "B", "") == Reply.BUSY
    control.until(f"{MODE}.CurrentState", "SingleExecution")
    assert control.latest()[:4] == (False, "A", False, False)
    trigger = handshake.wait(10)
    assert trigger is not None
    assert (trigger.part_id, trigger.recipe) == ("A", "gear")
    handshake.answer("A", Verdict.OK, 12.25)
    control.until(f"{LATEST}.Valid", True)
    read = {name: control.node(f"{LATEST}.{name}").read_value() for name in ("PartId", "OK", "NG", "Score", "Reason")}
    assert read == {"PartId": "A", "OK": True, "NG": False, "Score": 12.25, "Reason": Reason.SCORE}
    assert control.latest() == (True, "A", True, False, 12.25, Reason.SCORE, "score")
    assert control.call(f"{RESULTS}.AcknowledgeResult", "B") == Reply.WRONG_PART
    assert control.call(f"{RESULTS}.AcknowledgeResult", "A") == Reply.ACCEPTED
    control.until(f"{STATUS}.Ready", True)
    assert [control.node(f"{LATEST}.{name}").read_value() for name in ("Valid", "OK", "NG")] == [False] * 3
    assert math.isnan(control.node(f"{LATEST}.Score").read_value())
    # A fault, and the line's reset.
    handshake.fault("camera lost")
    control.until(f"{STATUS}.FaultText", "camera lost")
    assert control.node(f"{STATE}.CurrentState").read_value() == "Error"
    assert control.call(f"{MODE}.StartSingleJob", "C", "screw") == Reply.FAULT
    assert control.call(f"{STATE}.Reset") == Reply.ACCEPTED
    control.until(f"{STATE}.CurrentState", "Operational")
    control.close()


def test_a_subscription_sees_every_part_once_and_in_order(shared_server: Any) -> None:
    handshake, server = shared_server
    stop = threading.Event()

    def station() -> None:
        while not stop.is_set():
            found = handshake.wait(0.05)
            if found is not None:
                number = int(found.part_id)
                handshake.answer(found.part_id, Verdict.OK if number % 2 else Verdict.NG, float(number))

    thread = threading.Thread(target=station)
    thread.start()
    seen: list[tuple[str, object]] = []

    class Watch:
        def datachange_notification(self, node: Any, value: object, data: object) -> None:
            seen.append((str(node.nodeid.Identifier).rpartition(".")[2], value))

    async def line() -> None:
        async with Client(server.url, timeout=20) as client:
            index = await client.get_namespace_index(NAMESPACE)
            names = ("PartId", "Score", "NG", "OK", "Valid")
            nodes = [client.get_node(ua.NodeId(f"{LATEST}.{name}", index)) for name in names]
            watch = await client.create_subscription(10, Watch())
            await watch.subscribe_data_change(nodes, queuesize=100)
            mode = client.get_node(ua.NodeId(MODE, index))
            results = client.get_node(ua.NodeId(RESULTS, index))
            for number in range(1, 21):
                while await mode.call_method(f"{index}:StartSingleJob", str(number), ""):
                    await asyncio.sleep(0.005)
                while not (found := await results.call_method(f"{index}:GetLatestResult"))[0]:
                    await asyncio.sleep(0.005)
                assert found[1:5] == [str(number), number % 2 == 1, number % 2 == 0, float(number)]
                await asyncio.sleep(0.05)
                assert await results.call_method(f"{index}:AcknowledgeResult", str(number)) == 0
            await asyncio.sleep(0.3)

    asyncio.run(line())
    stop.set()
    thread.join(30)
    assert ("Valid", True) in seen
    assert ("PartId", "20") in seen
    # Notifications of several nodes come in no stated order, but those of one node do: as many valid as parts.
    assert [value for name, value in seen if name == "PartId" and value] == [str(number) for number in range(1, 21)]
    assert [value for name, value in seen if name == "Score" and not math.isnan(float(str(value)))] == [
        float(number) for number in range(1, 21)
    ]


CLIENT = """
import sys, time
from asyncua.sync import Client
from asyncua import ua
url, state, subscribed = sys.argv[1], sys.argv[2], sys.argv[3] == "yes"
client = Client(url, timeout=20)
client.connect()
index = client.get_namespace_index("urn:saae:machine-vision")
node = lambda path: client.get_node(ua.NodeId(path, index))
if subscribed:  # such a session outlives its connection
    class Watch:
        def datachange_notification(self, *arguments): pass
    client.create_subscription(50, Watch()).subscribe_data_change(node("VisionSystem.Status.Ready"))
if state != "idle":
    mode = node("VisionSystem.VisionStateMachine.AutomaticModeStateMachine")
    while mode.call_method(f"{index}:StartSingleJob", "old part", ""):
        time.sleep(0.01)
if state == "result":
    while not node("VisionSystem.ResultManagement.Latest.Valid").read_value():
        time.sleep(0.01)
print(state, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("state", "subscribed"), [("idle", "no"), ("triggered", "no"), ("busy", "yes"), ("result", "no"), ("result", "yes")]
)
def test_a_killed_client_leaves_no_verdict_to_the_next(state: str, subscribed: str, shared_server: Any) -> None:
    handshake, server = shared_server
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT, server.url, state, subscribed], stdout=subprocess.PIPE, text=True
    )
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
    control = Control(server.url)
    control.until(f"{LATEST}.PartId", "")
    assert control.latest()[:4] == (False, "", False, False)
    assert [control.node(f"{LATEST}.{name}").read_value() for name in ("Valid", "OK", "NG")] == [False] * 3
    if state == "busy":
        assert not handshake.answer("old part", Verdict.OK, 1.0)
    assert control.call(f"{MODE}.StartSingleJob", "new part", "") == Reply.ACCEPTED
    assert handshake.wait(30).part_id == "new part"
    assert handshake.answer("new part", Verdict.NG, 80.0)
    assert control.latest()[:4] == (True, "new part", False, True)
    assert control.call(f"{RESULTS}.AcknowledgeResult", "new part") == Reply.ACCEPTED
    control.close()


def test_a_server_that_went_and_came_back_has_no_verdict() -> None:
    with serving() as (handshake, server):
        control = Control(server.url)
        control.call(f"{MODE}.StartSingleJob", "A", "")
        handshake.wait(0)
        handshake.answer("A", Verdict.OK, 1.0)
        assert control.latest()[2]
        server.close()
        handshake.close()
        again = OpcuaServer(Handshake(), f"127.0.0.1:{server.port}")
        try:
            after = Control(again.url)
            assert after.latest()[:4] == (False, "", False, False)
            assert after.node(f"{STATE}.CurrentState").read_value() == "Preoperational"
            assert after.call(f"{MODE}.StartSingleJob", "A", "") == Reply.OFFLINE
            after.close()
        finally:
            again.close()
            with suppress(Exception):  # its server has gone
                control.close()


async def write_anything(url: str, rounds: int, check: Callable[[], None]) -> int:
    """Writes any value to any node and calls methods with any arguments; how many writes were taken."""
    rng = random.Random(rounds)
    taken = 0

    def value() -> object:
        kinds: list[Callable[[], object]] = [
            lambda: rng.random() < 0.5,
            lambda: rng.randrange(-(2**31), 2**31),
            lambda: rng.random() * 1e30,
            lambda: math.nan,
            lambda: "".join(chr(rng.randrange(1, 0x2000)) for _ in range(rng.randrange(100))),
            lambda: rng.randbytes(rng.randrange(100)),
            lambda: [rng.randrange(10) for _ in range(rng.randrange(1, 5))],
        ]
        return rng.choice(kinds)()

    async with Client(url, timeout=20) as client:
        client.set_user("admin")
        index = await client.get_namespace_index(NAMESPACE)
        names = ("PartId", "Score", "Reason", "ReasonText", "NG", "OK", "Valid")
        nodes = [client.get_node(ua.NodeId(f"{LATEST}.{name}", index)) for name in names]
        nodes += [client.get_node(ua.NodeId(f"{STATUS}.{name}", index)) for name in ("Ready", "Busy", "Refusal")]
        methods = [
            (MODE, "StartSingleJob"),
            (RECIPES, "PrepareRecipe"),
            (RESULTS, "AcknowledgeResult"),
            (RESULTS, "GetLatestResult"),
        ]
        for _ in range(rounds):
            try:
                if rng.random() < 0.5:
                    node = rng.choice(nodes)
                    await node.write_value(value())
                    taken += 1
                else:
                    parent, name = rng.choice(methods)
                    arguments = [value() for _ in range(rng.randrange(4))]
                    if "A" not in arguments:
                        await client.get_node(ua.NodeId(parent, index)).call_method(f"{index}:{name}", *arguments)
            except ua.UaError:
                pass
            check()
    return taken


@pytest.mark.parametrize("rounds", [500, pytest.param(10_000, marks=pytest.mark.fuzz)])
def test_writes_and_calls_of_any_kind_change_no_verdict(rounds: int, shared_server: Any) -> None:
    handshake, server = shared_server
    control = Control(server.url)
    assert control.call(f"{MODE}.StartSingleJob", "A", "") == Reply.ACCEPTED
    handshake.wait(10)
    handshake.answer("A", Verdict.NG, 99.0)
    control.until(f"{LATEST}.Valid", True)

    def check() -> None:
        view = handshake.view()
        assert (view.part_id, view.ok, view.ng, view.score) == ("A", False, True, 99.0)

    assert asyncio.run(write_anything(server.url, rounds, check)) == 0
    raw = random.Random(1)
    for _ in range(20):  # and bytes that are no OPC UA
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(
                raw.choice([b"", b"HEL", b"OPN", b"MSG", b"MSGF"]) + raw.randbytes(raw.randrange(1, 200))
            )
    assert server.alive
    assert control.latest()[:5] == (True, "A", False, True, 99.0)
    assert [control.node(f"{LATEST}.{name}").read_value() for name in ("PartId", "OK", "NG")] == ["A", False, True]
    assert control.call(f"{RESULTS}.AcknowledgeResult", "A") == Reply.ACCEPTED
    control.close()


def test_a_server_that_fails_is_started_again_on_its_port(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as (handshake, server):
        control = Control(server.url)
        control.call(f"{MODE}.StartSingleJob", "A", "")
        port, watch = server.port, handshake.watch
        failed = threading.Event()

        def fails(version: int, timeout: float) -> object:
            failed.set()
            raise RuntimeError("for the test")

        monkeypatch.setattr(handshake, "watch", fails)
        assert failed.wait(30)
        monkeypatch.setattr(handshake, "watch", watch)
        with suppress(Exception):  # its server has gone
            control.close()
        end = time.monotonic() + 60
        while True:
            try:
                again = Control(server.url)
                break
            except Exception:  # whatever the library has for a server that is not there
                assert time.monotonic() < end
                time.sleep(0.1)
        assert server.port == port
        assert server.alive
        assert again.latest()[:4] == (False, "", False, False)  # the client of the part before was lost with it
        again.close()


def test_where_it_cannot_listen_it_says_so() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(DeviceError, match="cannot listen on"):
            OpcuaServer(Handshake(), f"127.0.0.1:{taken.getsockname()[1]}")
