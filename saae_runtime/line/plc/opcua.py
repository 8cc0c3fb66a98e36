"""An OPC UA server for a handshake, on asyncua (extra `opcua`): a subset of OPC 40100-1 Machine Vision."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

from ...errors import ConfigError
from ..handshake import Handshake
from ..view import Phase, Reply, View
from .server import PlcServer

__all__ = ["DEFAULT_PORT", "NAMESPACE", "OpcuaServer"]

DEFAULT_PORT = 4840
NAMESPACE = "urn:saae:machine-vision"
"""URI of the namespace; node ids in it are the paths below, such as `s=VisionSystem.ResultManagement.Latest.PartId`."""

_ROOT = "VisionSystem"
_LATEST = f"{_ROOT}.ResultManagement.Latest"
_STATUS = f"{_ROOT}.Status"
_LOOK = 0.2  # seconds between two checks for lost sessions

_session: ContextVar[object] = ContextVar("opcua_session", default=None)

_DETAILS: dict[str, tuple[str, Callable[[View], object]]] = {
    f"{_ROOT}.VisionStateMachine.CurrentState": ("String", lambda view: _outer_state(view)),
    f"{_ROOT}.VisionStateMachine.AutomaticModeStateMachine.CurrentState": ("String", lambda view: _inner_state(view)),
    f"{_ROOT}.RecipeManagement.ActiveRecipe": ("String", lambda view: view.recipe or ""),
    f"{_LATEST}.PartId": ("String", lambda view: view.part_id),
    f"{_LATEST}.Score": ("Float", lambda view: _float32(view.score)),
    f"{_LATEST}.Reason": ("Int32", lambda view: int(view.reason)),
    f"{_LATEST}.ReasonText": ("String", lambda view: view.text),
    f"{_STATUS}.Fault": ("Boolean", lambda view: bool(view.fault)),
    f"{_STATUS}.FaultText": ("String", lambda view: view.fault),
    f"{_STATUS}.Refusal": ("Int32", lambda view: int(view.refusal)),
    f"{_STATUS}.Heartbeat": ("UInt32", lambda view: view.heartbeat & 0xFFFFFFFF),
    f"{_STATUS}.PartsOK": ("UInt32", lambda view: view.counts.ok & 0xFFFFFFFF),
    f"{_STATUS}.PartsNG": ("UInt32", lambda view: view.counts.ng & 0xFFFFFFFF),
    f"{_STATUS}.Timeouts": ("UInt32", lambda view: view.counts.timeouts & 0xFFFFFFFF),
    f"{_STATUS}.Refused": ("UInt32", lambda view: view.counts.refused & 0xFFFFFFFF),
}
_BITS: dict[str, Callable[[View], bool]] = {
    f"{_LATEST}.NG": lambda view: view.ng,
    f"{_LATEST}.OK": lambda view: view.ok,
    f"{_LATEST}.Valid": lambda view: view.valid,
    f"{_STATUS}.Busy": lambda view: view.busy,
    f"{_STATUS}.Ready": lambda view: view.ready,
}
"""Written last, in this order, and reset before anything else of the result changes."""

_RESULT_BITS = tuple(name for name in _BITS if name.startswith(_LATEST))


class OpcuaServer(PlcServer):
    """Serves read-only nodes on `opc.tcp` from its own thread until `close`.

    If a session or its connection ends, the part that it started is withdrawn.

    Args:
        handshake: what the methods drive.
        listen: `host:port`; port 0: any free one. Connections are neither encrypted nor authenticated: give the address
            of the control's network, not 0.0.0.0.

    Attributes:
        host, port: where it listens.
        url: for clients.

    Raises:
        ConfigError: asyncua is missing, or `listen` is not an address.
        DeviceError: it cannot listen there.
    """

    name = "opcua"
    default_port = DEFAULT_PORT

    def __init__(self, handshake: Handshake, listen: str = "127.0.0.1:4840") -> None:
        self._owners: set[object] = set()
        self._nodes: dict[str, Any] = {}
        self._ua = _load()
        super().__init__(handshake, listen)

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"opc.tcp://{self.host}:{self.port}/saae"

    async def _serve(self, port: int, started: Callable[[int], None], stop: asyncio.Event) -> None:
        server = _new_server()
        await server.init()
        server.set_endpoint(f"opc.tcp://{self.host}:{port}/saae")
        server.set_server_name("saae")
        server.set_security_policy([self._ua.SecurityPolicyType.NoSecurity])
        await self._build(server)
        view = self._handshake.view()
        await self._show(None, view)
        await server.start()
        try:
            started(server.bserver.port)
            ended = asyncio.create_task(stop.wait())
            while not ended.done():
                look = asyncio.create_task(asyncio.to_thread(self._handshake.watch, view.version, _LOOK))
                await asyncio.wait({look, ended}, return_when=asyncio.FIRST_COMPLETED)
                if not look.done():
                    await look
                before, view = view, look.result()
                self._drop_lost(server)
                await self._show(before, view)
        finally:
            for owner in self._owners:
                self._handshake.lost(owner)
            self._owners = set()
            await server.stop()

    async def _show(self, before: View | None, view: View) -> None:
        """Write changed nodes: `Valid` is cleared first for an old result and set last for a new one."""
        if before is not None and (before.part_id, before.valid, before.ok) != (view.part_id, view.valid, view.ok):
            for name in reversed(_RESULT_BITS):
                await self._write(name, "Boolean", False)
            before = None
        for name, (kind, value) in _DETAILS.items():
            if before is None or not _same(value(before), value(view)):
                await self._write(name, kind, value(view))
        for name, bit in _BITS.items():
            if before is None or bit(before) != bit(view):
                await self._write(name, "Boolean", bit(view))

    async def _write(self, name: str, kind: str, value: object) -> None:
        await self._nodes[name].write_value(self._ua.Variant(value, self._ua.VariantType[kind]))

    def _drop_lost(self, server: Any) -> None:
        """Withdraw parts of sessions without a connection, which may live on for minutes."""
        if not self._owners:
            return
        there = {client.processor.session for client in server.bserver.clients if client.processor is not None}
        for owner in self._owners - there:
            self._owners.discard(owner)
            self._handshake.lost(owner)

    # --- address space ---

    async def _build(self, server: Any) -> None:
        index = await server.register_namespace(NAMESPACE)
        objects: dict[str, Any] = {}

        async def folder(path: str) -> Any:
            if path not in objects:
                parent, _, name = path.rpartition(".")
                above = await folder(parent) if parent else server.nodes.objects
                objects[path] = await above.add_object(self._ua.NodeId(path, index), f"{index}:{name}")
            return objects[path]

        for path, kind in [*((name, kind) for name, (kind, _) in _DETAILS.items()), *((n, "Boolean") for n in _BITS)]:
            parent, _, name = path.rpartition(".")
            empty: object = {"String": "", "Boolean": False, "Float": math.nan}.get(kind, 0)
            self._nodes[path] = await (await folder(parent)).add_variable(
                self._ua.NodeId(path, index),
                f"{index}:{name}",
                self._ua.Variant(empty, self._ua.VariantType[kind]),
            )
        for path, texts, method in (
            (f"{_ROOT}.VisionStateMachine.Reset", (), self._reset),
            (
                f"{_ROOT}.VisionStateMachine.AutomaticModeStateMachine.StartSingleJob",
                ("PartId", "RecipeId"),
                self._start,
            ),
            (f"{_ROOT}.RecipeManagement.PrepareRecipe", ("ExternalId",), self._prepare),
            (f"{_ROOT}.ResultManagement.AcknowledgeResult", ("PartId",), self._acknowledge),
            (f"{_ROOT}.ResultManagement.GetLatestResult", (), None),
        ):
            parent, _, name = path.rpartition(".")
            outputs = [("Error", "Int32")] if method is not None else _LATEST_OUTPUTS
            await (await folder(parent)).add_method(
                self._ua.NodeId(path, index),
                f"{index}:{name}",
                self._method(method, len(texts)) if method is not None else self._latest,
                [self._argument(text, "String") for text in texts],
                [self._argument(text, kind) for text, kind in outputs],
            )

    def _argument(self, name: str, kind: str) -> Any:
        argument = self._ua.Argument()
        argument.Name = name
        argument.DataType = self._ua.NodeId(getattr(self._ua.ObjectIds, kind))
        argument.ValueRank = -1
        return argument

    def _method(self, act: Callable[..., Reply], count: int) -> Callable[..., Awaitable[Any]]:
        """A method of so many strings that gives the reply's number."""
        ua = self._ua

        async def call(parent: Any, *arguments: Any) -> Any:
            values = [argument.Value for argument in arguments]
            if len(values) != count:
                codes = ua.StatusCodes
                return ua.StatusCode(codes.BadArgumentsMissing if len(values) < count else codes.BadTooManyArguments)
            if not all(value is None or isinstance(value, str) for value in values):
                return ua.StatusCode(ua.StatusCodes.BadInvalidArgument)
            reply = act(*(value or "" for value in values))
            return [ua.Variant(int(reply), ua.VariantType.Int32)]

        return call

    def _start(self, part_id: str, recipe: str) -> Reply:
        owner = _session.get()
        reply = self._handshake.trigger(part_id, recipe or None, owner, who=self.name)
        if reply.accepted:
            self._owners = {owner}
        return reply

    def _prepare(self, recipe: str) -> Reply:
        return self._handshake.select(recipe or None, who=self.name)

    def _acknowledge(self, part_id: str) -> Reply:
        return self._handshake.acknowledge(part_id)

    def _reset(self) -> Reply:
        return self._handshake.reset()

    async def _latest(self, parent: Any, *arguments: Any) -> Any:
        """Read the complete result at once."""
        if arguments:
            return self._ua.StatusCode(self._ua.StatusCodes.BadTooManyArguments)
        view = self._handshake.view()
        values = (view.valid, view.part_id, view.ok, view.ng, _float32(view.score), int(view.reason), view.text)
        kinds = [kind for _, kind in _LATEST_OUTPUTS]
        return [self._ua.Variant(value, self._ua.VariantType[kind]) for value, kind in zip(values, kinds, strict=True)]


_LATEST_OUTPUTS = [
    ("Valid", "Boolean"),
    ("PartId", "String"),
    ("OK", "Boolean"),
    ("NG", "Boolean"),
    ("Score", "Float"),
    ("Reason", "Int32"),
    ("ReasonText", "String"),
]


def _outer_state(view: View) -> str:
    if view.fault:
        return "Error"
    return "Preoperational" if view.phase is Phase.OFFLINE else "Operational"


def _inner_state(view: View) -> str:
    if view.busy:
        return "SingleExecution"
    return "Ready" if view.ready else "Initialized"


def _float32(value: float) -> float:
    return math.copysign(math.inf, value) if abs(value) > 3.4e38 else value


def _same(one: object, other: object) -> bool:
    return one == other or (one != one and other != other)  # nan equals nan here


def _load() -> Any:
    try:
        from asyncua import ua
    except ImportError as error:
        raise ConfigError(
            "OPC UA is not available.", f"asyncua cannot be imported: {error}", "pip install 'saae[opcua]'"
        ) from error
    # Each mistake of a client would be a traceback in the log.
    logging.getLogger("asyncua.server").setLevel(logging.CRITICAL)
    return ua


def _new_server() -> Any:
    """A server whose methods know the calling session, and where no user name gives administrator rights."""
    from asyncua import Server
    from asyncua.crypto.permission_rules import User, UserRole
    from asyncua.server.internal_server import InternalServer
    from asyncua.server.user_managers import UserManager

    class Everybody(UserManager):
        def get_user(self, *arguments: Any, **options: Any) -> Any:
            return User(role=UserRole.User)

    class Internal(InternalServer):
        def create_session(self, *arguments: Any, **options: Any) -> Any:
            session = super().create_session(*arguments, **options)
            inner = session.call

            async def call(params: Any) -> Any:
                token = _session.set(session)
                try:
                    return await inner(params)
                finally:
                    _session.reset(token)

            session.call = call
            return session

    return Server(iserver=Internal(user_manager=Everybody()))
