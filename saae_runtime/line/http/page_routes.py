"""Routes of the page, its events and pictures, and of health."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from importlib import resources
from typing import Annotated, Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field

from ..health import is_live, is_ready, prometheus_text
from .access import COOKIE, Throttled, Who
from .context import Context, address_of, bearer, refuse, throttled
from .pictures import Layer, jpeg, picture

__all__ = ["router"]

_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_STREAMS = 16  # largest number of open pages
_PAUSE = 0.1  # seconds between two events
_STATE = 2.0  # seconds between two events of the state
_MOST = 50  # largest number of parts in one event
_DRAWN = 32  # drawn pictures in memory
_DRAWING = 2  # pictures drawn at once
_LONGEST_SESSION = 12 * 3600

Any_ = dict[str, Any]


class LoginBody(BaseModel):
    """A token, for a session of the page."""

    token: str = Field(max_length=500)


def router(context: Context) -> APIRouter:
    """All of them."""
    routes = APIRouter()
    _add_files(routes)
    _add_health(routes, context)
    _add_sessions(routes, context)
    _add_parts(routes, context)
    _add_events(routes, context)
    return routes


def _add_files(routes: APIRouter) -> None:
    folder = resources.files(__package__) / "page"
    for place, (name, kind) in _FILES.items():  # read once: no request names a file
        routes.add_api_route(place, _serving((folder / name).read_bytes(), kind), include_in_schema=False)


def _serving(data: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def serve() -> Response:
        return Response(data, media_type=kind)

    return serve


def _add_health(routes: APIRouter, context: Context) -> None:
    @routes.get("/livez", tags=["health"])
    def livez() -> Response:
        """200 while every station's thread is alive; 503: only a restart helps."""
        return _yes_or_no(is_live(context.health()))

    @routes.get("/readyz", tags=["health"])
    def readyz() -> Response:
        """200 while every station can judge, else 503."""
        return _yes_or_no(is_ready(context.health()))

    @routes.get("/v1/health", tags=["health"], dependencies=[Depends(bearer)])
    def health(who: Who = Depends(context.operator)) -> Any_:
        """Health of the line."""
        return dict(context.health())

    @routes.get("/metrics", tags=["health"], dependencies=[Depends(bearer)])
    def metrics(who: Who = Depends(context.operator)) -> Response:
        """Metrics for Prometheus."""
        return Response(prometheus_text(context.health()), media_type="text/plain; version=0.0.4; charset=utf-8")


def _yes_or_no(good: bool) -> Response:
    return JSONResponse({"ok": good}, 200 if good else 503)


def _add_sessions(routes: APIRouter, context: Context) -> None:
    @routes.get("/v1/me", tags=["session"])
    async def me(request: Request) -> Any_:
        """The user and their role; `needs_token` for an unknown user."""
        who = context.who(request)
        if who is None:
            return {"name": None, "role": None, "needs_token": True}
        return {"name": who.name, "role": who.role, "needs_token": not context.access.open}

    @routes.post("/v1/login", tags=["session"])
    def login(body: LoginBody, request: Request) -> Response:
        """Open a session by cookie, for the page."""
        try:
            secret = context.access.login(body.token, address_of(request))
        except Throttled as error:
            raise throttled(error) from None
        if secret is None:
            raise refuse(401, "The token is wrong.", "", "see [[http.user]] in line.toml")
        answer = JSONResponse({"ok": True})
        answer.set_cookie(
            COOKIE,
            secret,
            max_age=_LONGEST_SESSION,
            httponly=True,
            samesite="strict",
            secure=context.options.certificate is not None,
        )
        return answer

    @routes.post("/v1/logout", tags=["session"])
    async def logout(request: Request) -> Response:
        """End the session."""
        context.access.logout(request.cookies.get(COOKIE, ""))
        answer = JSONResponse({"ok": True})
        answer.delete_cookie(COOKIE)
        return answer


def _add_parts(routes: APIRouter, context: Context) -> None:
    recent = context.recent
    drawing = threading.Semaphore(_DRAWING)
    drawn: OrderedDict[tuple[int, str | None, Layer, int], bytes] = OrderedDict()
    lock = threading.Lock()

    @routes.get("/v1/parts", tags=["parts"], dependencies=[Depends(bearer)])
    def parts(
        last: Annotated[int, Query(ge=1, le=100_000)] = 100,
        station: Annotated[str | None, Query(max_length=64)] = None,
        recipe: Annotated[str | None, Query(max_length=64)] = None,
        verdict: Literal["OK", "NG"] | None = None,
        who: Who = Depends(context.operator),
    ) -> list[Any_]:
        """Records of the latest parts, the latest first."""
        return [_shown(context, record) for record in recent.records(last, station, recipe, verdict)]

    @routes.get("/v1/parts/{number}/picture", tags=["parts"], dependencies=[Depends(bearer)])
    def part_picture(
        number: Annotated[int, Path(ge=1, le=2**53)],
        layer: Layer = "overlay",
        size: Annotated[int, Query(ge=16, le=2048, description="Pixels of the longer side at most.")] = 1280,
        key: Annotated[
            str | None, Query(max_length=8192, description="The part's key: numbers begin again with the service.")
        ] = None,
        who: Who = Depends(context.operator),
    ) -> Response:
        """A part's frame as JPEG: the frame itself, with heat and outline, or only the heat."""
        wanted = (number, key, layer, size)
        with lock:
            data = drawn.get(wanted)
        if data is None:
            seen = recent.seen(number)
            if seen is None or (key is not None and key != seen.record["key"]):
                raise refuse(
                    404,
                    f"The frame of part number {number} is not in memory.",
                    "",
                    "raise [http] frames_mb to keep more",
                )
            with drawing:
                data = jpeg(picture(seen.frame, seen.result, layer, size))
            with lock:
                drawn[wanted] = data
                while len(drawn) > _DRAWN:
                    drawn.popitem(last=False)
        return Response(data, media_type="image/jpeg")


def _add_events(routes: APIRouter, context: Context) -> None:
    recent = context.recent
    streams = 0

    @routes.get("/v1/events", tags=["parts"], dependencies=[Depends(bearer)])
    async def events(who: Who = Depends(context.operator)) -> Response:
        """Server-sent events: `parts` (a list of new records, oldest first), and `state` every two seconds."""
        nonlocal streams
        if streams >= _STREAMS:
            raise refuse(503, f"{streams} pages are open.", "", "close one", {"retry-after": "10"})

        async def stream() -> AsyncIterator[bytes]:
            nonlocal streams
            streams += 1
            loop, changed = asyncio.get_running_loop(), asyncio.Event()

            def wake() -> None:
                if not changed.is_set():
                    with suppress(RuntimeError):  # the loop has ended
                        loop.call_soon_threadsafe(changed.set)

            end = recent.watch(wake)
            try:
                last, due = recent.latest, 0.0
                yield b"retry: 2000\n\n"
                while not context.stopping.is_set():
                    if loop.time() >= due:
                        yield _event("state", await to_thread.run_sync(_state, context))
                        due = loop.time() + _STATE
                    with suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(changed.wait(), 0.25)
                    changed.clear()
                    if recent.latest > last:
                        found = await to_thread.run_sync(_new_parts, context, last)
                        last = found[-1]["number"]
                        yield _event("parts", found)
                        await asyncio.sleep(_PAUSE)
            finally:
                end()
                streams -= 1

        return StreamingResponse(stream(), media_type="text/event-stream")


def _shown(context: Context, record: Any_) -> Any_:
    """A record with the part's override."""
    found = context.control.overrides.get(record["key"])
    said = (
        None if found is None else {"verdict": found.verdict, "who": found.who, "time": found.time, "note": found.note}
    )
    return {**record, "override": said}


def _new_parts(context: Context, after: int) -> list[Any_]:
    """The latest parts behind a number, as they are shown, oldest first."""
    return [_shown(context, record) for record in reversed(context.recent.records(_MOST, after=after))]


def _event(kind: str, data: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps(data, allow_nan=False)}\n\n".encode("ascii")


def _state(context: Context) -> Any_:
    """State of the line for the page."""
    health = context.health()
    stations = [
        {
            key: item[key]
            for key in ("name", "recipe", "ready", "live", "finished", "fault", "camera_connected", "counts")
        }
        | {"latency_ms": item["latency_ms"], "last_error": item["last_error"]}
        | {"recipes": list(context.line.stations[item["name"]].config.recipes)}
        for item in health["stations"]
    ]
    return {
        "line": health["line"],
        "time": health["time"],
        "ready": health["ready"],
        "live": health["live"],
        "stations": stations,
        "sinks": [
            {key: sink[key] for key in ("name", "working", "backlog", "lost", "refused")} for sink in health["sinks"]
        ],
        "drift": [item for item in health["drift"] if item["alarm"]],
        "last_error": health["last_error"],
        "recipes": health["recipes"],
        "counters": context.recent.counters(),
        "with_frames": context.recent.with_frames()[-200:],
    }
