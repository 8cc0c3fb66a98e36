"""What all requests share: the line, users, the latest parts, the batcher; and errors as JSON."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from ...errors import (
    BackendError,
    BundleError,
    ConfigError,
    DataError,
    FrameError,
    ImageError,
    SaaeError,
    StorageError,
)
from ..service import Line
from .access import COOKIE, LOCAL, Access, Throttled, Who
from .control import Control
from .guard import problem
from .judging import Batcher, BusyError
from .options import HttpOptions, Role
from .recent import Recent

__all__ = ["Context", "bearer", "refuse"]

bearer = HTTPBearer(auto_error=False, description="A user's token; without users in [http] none is needed.")

_STATUS: tuple[tuple[type[SaaeError], int], ...] = (  # the first that fits
    (BusyError, 503),
    (ImageError, 422),
    (FrameError, 422),
    (DataError, 404),
    (StorageError, 507),
    (ConfigError, 400),
    (BundleError, 409),
    (BackendError, 500),
)
_HEALTH_AGE = 0.5  # seconds


class Context:
    """One running HTTP service.

    Args:
        line: the line.
        options: `[http]`.
        access: users and sessions.
        recent: the latest parts.
        control: changes by users.
        batcher: judges images.

    Attributes:
        stopping: set when the service ends.
    """

    def __init__(
        self, line: Line, options: HttpOptions, access: Access, recent: Recent, control: Control, batcher: Batcher
    ) -> None:
        self.line, self.options, self.access = line, options, access
        self.recent, self.control, self.batcher = recent, control, batcher
        self.stopping = threading.Event()
        self._health: tuple[float, Mapping[str, Any]] | None = None
        self._lock = threading.Lock()

    def health(self) -> Mapping[str, Any]:
        """`Line.health`, at most half a second old, so that requests do not burden the line."""
        with self._lock:
            if self._health is None or time.monotonic() - self._health[0] > _HEALTH_AGE:
                self._health = (time.monotonic(), self.line.health())
            return self._health[1]

    async def operator(self, request: Request) -> Who:
        """Require the rights of an operator."""
        return self._let_in(request, "operator")

    async def engineer(self, request: Request) -> Who:
        """Require the rights of an engineer."""
        return self._let_in(request, "engineer")

    def who(self, request: Request) -> Who | None:
        """The request's user; None if unknown."""
        if self.access.open:
            return LOCAL
        given = request.headers.get("authorization")
        try:
            if given is not None:
                kind, _, token = given.partition(" ")
                return self.access.by_token(token.strip() if kind.lower() == "bearer" else "", address_of(request))
            session = request.cookies.get(COOKIE)
            return None if session is None else self.access.by_session(session)
        except Throttled as error:
            raise throttled(error) from None

    def _let_in(self, request: Request, role: Role) -> Who:
        found = self.who(request)
        if found is None:
            raise refuse(401, "A token is needed.", "", "Authorization: Bearer TOKEN", {"www-authenticate": "Bearer"})
        if not found.may(role):
            raise refuse(403, f"This needs the role {role}.", f"{found.name} is an {found.role}.", f"ask an {role}")
        return found

    def install(self, app: FastAPI) -> None:
        """Make the app answer every error as JSON: what, why, cure."""
        app.add_exception_handler(SaaeError, self._saae_error)
        app.add_exception_handler(HTTPException, self._http_error)
        app.add_exception_handler(RequestValidationError, self._not_valid)
        app.add_exception_handler(Exception, self._fault)

    async def _saae_error(self, request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, SaaeError)
        status = next((code for kind, code in _STATUS if isinstance(error, kind)), 500)
        if status == 500:
            self.line.meter.fail(error)
        headers = {"retry-after": "1"} if status == 503 else None
        return JSONResponse(problem(error.what, error.why, error.cure), status, headers)

    async def _http_error(self, request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        body: Any = error.detail
        if not isinstance(body, dict):
            body = problem(f"{body}.", "", "the paths are in /openapi.json")
        return JSONResponse(body, error.status_code, error.headers)

    async def _not_valid(self, request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        found = [
            f"{'.'.join(str(part) for part in item['loc'])[:100]}: {str(item['msg'])[:200]}"
            for item in error.errors()[:10]
        ]
        words = problem("The request is invalid.", "; ".join(found), "see /openapi.json")
        return JSONResponse(words, 422)

    async def _fault(self, request: Request, error: Exception) -> JSONResponse:
        self.line.meter.fail(error)
        words = problem("Internal error.", type(error).__name__, "see the log; no change was applied in part")
        return JSONResponse(words, 500)


def refuse(
    status: int, what: str, why: str = "", cure: str = "", headers: dict[str, str] | None = None
) -> HTTPException:
    """An exception that ends a request with an error."""
    return HTTPException(status, problem(what, why, cure), headers)  # type: ignore[arg-type]


def throttled(error: Throttled) -> HTTPException:
    """The answer to an address with too many wrong tokens."""
    seconds = max(1, round(error.seconds))
    return refuse(429, "Too many wrong tokens.", "", f"try again in {seconds} seconds", {"retry-after": str(seconds)})


def address_of(request: Request) -> str:
    """The address of a request's client."""
    return request.client.host if request.client else "unknown"
