"""Checks every request first: host, origin, size and time; and sets the answer's headers."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException

from .options import HttpOptions

__all__ = ["SECURITY_HEADERS", "Guard", "is_our_name", "problem"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}

_DRAIN_BYTES = 8 << 20
_DRAIN_SECONDS = 1.0
_SMALL_BODY = 1 << 20  # bytes of a request without an image
_SAFE = ("GET", "HEAD", "OPTIONS")


class Guard:
    """Refuses unusual requests, whatever their path.

    - Host: an IP address, `localhost` or one of `hosts`. Otherwise a page of another site could read from here by
      pointing its own name to this address (DNS rebinding).
    - Origin: the host, and `Sec-Fetch-Site` not another site, so that no other page can post here. Without CORS
      headers none can read.
    - Body: `max_body_mb` for images, else 1 MiB, counted as it arrives, within `timeout` seconds.
    - The client must read each piece of the answer within `timeout` seconds.

    Args:
        app: the application.
        options: `[http]`.
        pictures: paths whose bodies are images.
    """

    def __init__(self, app: App, options: HttpOptions, pictures: tuple[str, ...] = ("/v1/judge",)) -> None:
        self._app, self._options, self._pictures = app, options, pictures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] != "http":
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        started = False

        async def answer(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                given = {name.lower() for name, _ in message["headers"]}
                more = [(k.encode(), v.encode()) for k, v in SECURITY_HEADERS.items() if k.encode() not in given]
                message["headers"] = [*message["headers"], *more]
            try:
                await asyncio.wait_for(send(message), self._options.timeout)
            except asyncio.TimeoutError:
                raise ConnectionError("the client does not read") from None  # the server ends the connection

        refused = self._refused(scope, headers)
        if refused is not None:
            await _send(answer, *refused, close=True)
            return
        most = int(self._options.max_body_mb * 1e6) if scope["path"] in self._pictures else _SMALL_BODY
        if _length(headers) > most:
            if "expect" not in headers:
                await _drain(receive)
            await _send(answer, 413, _too_large(most), close=True)
            return
        try:
            await self._app(scope, _limited(receive, most, self._options.timeout), answer)
        except HTTPException as error:  # from the body, if it has not become an answer yet
            if started:
                raise
            await _send(answer, error.status_code, error.detail, close=True)  # type: ignore[arg-type]

    def _refused(self, scope: Scope, headers: dict[str, str]) -> tuple[int, dict[str, str]] | None:
        hosts = [value for name, value in scope["headers"] if name.lower() == b"host"]
        host = headers.get("host", "")
        if len(hosts) != 1 or not is_our_name(host, self._options):
            return 421, problem(
                "This service does not answer to that name.",
                f"Host: {host[:100]!r}",
                "use its address, or list the name in [http] hosts",
            )
        origin = headers.get("origin")
        if origin is not None and origin != "null":
            parts = urlsplit(origin)
            foreign = parts.netloc.lower() != host.lower()
        else:
            foreign = origin == "null"
        if foreign or headers.get("sec-fetch-site", "none") in ("cross-site", "same-site"):
            # A link to the page from another site is harmless; other requests are not.
            if scope["method"] in _SAFE and scope["path"] == "/" and origin is None:
                return None
            return 403, problem("Requests from other sites are refused.", "", "open this service's own page")
        if scope["method"] not in (*_SAFE, "POST"):
            return 405, problem(f"{scope['method'][:20]} is not supported.", "", "GET or POST; see /openapi.json")
        return None


def problem(what: str, why: str = "", cure: str = "") -> dict[str, str]:
    """The answer to an error."""
    return {"what": what, "why": why, "cure": cure}


def is_our_name(host: str, options: HttpOptions) -> bool:
    """Whether a Host header names this service: any IP address, `localhost`, its own address, or one of `hosts`."""
    name = host.lower()
    if name.startswith("["):
        name, closed, port = name[1:].partition("]")
        if not closed or (port and not _is_port(port[1:], port[0])):
            return False
    else:
        name, colon, port = name.partition(":")
        if colon and not _is_port(port, ":"):
            return False
    if name in ("localhost", options.host.lower(), *(item.lower() for item in options.hosts)):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_port(text: str, colon: str) -> bool:
    return colon == ":" and text.isascii() and text.isdigit() and len(text) <= 5


def _length(headers: dict[str, str]) -> int:
    text = headers.get("content-length", "0")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else 0


def _too_large(most: int) -> dict[str, str]:
    return problem("The request is too large.", f"At most {most:,} bytes are accepted.", "[http] max_body_mb")


def _limited(receive: Receive, most: int, seconds: float) -> Receive:
    """Count a body as it arrives, and end it if it takes too long; a wait for the disconnect is not limited."""
    count, done, end = 0, False, time.monotonic() + seconds

    async def take() -> Message:
        nonlocal count, done
        if done:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), max(end - time.monotonic(), 0.001))
        except asyncio.TimeoutError:
            words = problem("The request timed out.", f"It had {seconds:g} seconds.", "[http] timeout")
            raise HTTPException(408, words, {"connection": "close"}) from None  # type: ignore[arg-type]
        if message["type"] == "http.request":
            count += len(message.get("body", b""))
            done = not message.get("more_body", False)
            if count > most:
                raise HTTPException(413, _too_large(most), {"connection": "close"})  # type: ignore[arg-type]
        return message

    return take


async def _drain(receive: Receive) -> None:
    """Read the rest of a refused body, within limits: a client that still writes does not read the answer."""
    taken, end = 0, time.monotonic() + _DRAIN_SECONDS
    while taken < _DRAIN_BYTES:
        try:
            message = await asyncio.wait_for(receive(), max(end - time.monotonic(), 0.001))
        except asyncio.TimeoutError:
            return
        taken += len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body", False):
            return


async def _send(send: Send, status: int, body: dict[str, str], close: bool = False) -> None:
    data = json.dumps(body).encode("ascii")
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    if close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
