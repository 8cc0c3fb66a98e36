"""Authentication: users by token or session, and limits on failed logins."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .options import Role, User

__all__ = ["COOKIE", "LOCAL", "Access", "Throttled", "Who"]

COOKIE = "saae_session"

_SESSION = 12 * 3600.0  # seconds
_SESSIONS = 200
_FAILURES = 5  # wrong tokens of one address per minute, after which it is blocked
_ALL_FAILURES = 60  # wrong tokens of all addresses per minute that are reported
_MINUTE = 60.0
_ADDRESSES = 1000
_LEVELS: dict[Role, int] = {"operator": 1, "engineer": 2}


@dataclass(frozen=True)
class Who:
    """An authenticated user."""

    name: str
    role: Role

    def may(self, role: Role) -> bool:
        """Whether the user has the rights of this role."""
        return _LEVELS[self.role] >= _LEVELS[role]


LOCAL = Who("local", "engineer")
"""The user of all requests if no users are configured; then the service listens only on this machine."""


class Throttled(Exception):
    """Too many wrong tokens from one address, which is blocked for `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"{seconds:.0f}")
        self.seconds = seconds


class Access:
    """Authenticates users by their tokens and sessions.

    Args:
        users: none: everybody is `LOCAL`.
        failed: called with (address, how) for wrong tokens, at most 60 times a minute.
        clock: monotonic, in seconds.
    """

    def __init__(
        self,
        users: Sequence[User],
        failed: Callable[[str, str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._users = [(_digest(user.token), Who(user.name, user.role)) for user in users]
        self._failed, self._clock = failed, clock
        self._lock = threading.Lock()
        self._sessions: OrderedDict[bytes, tuple[Who, float]] = OrderedDict()
        self._tries: OrderedDict[str, list[float]] = OrderedDict()
        self._told: list[float] = []

    @property
    def open(self) -> bool:
        """Whether no token is needed."""
        return not self._users

    def by_token(self, token: str, address: str) -> Who | None:
        """The token's user; None for a wrong token, which is counted and reported.

        Raises:
            Throttled: too many wrong tokens from this address.
        """
        self._check(address)
        given = _digest(token)
        found = None
        for digest, who in self._users:  # compare with all of them, so that the time reveals nothing
            if hmac.compare_digest(digest, given):
                found = who
        if found is None:
            self._note(address)
        return found

    def login(self, token: str, address: str) -> str | None:
        """Open a session; return its secret for a cookie, or None for a wrong token.

        Raises:
            Throttled: see `by_token`.
        """
        who = self.by_token(token, address)
        if who is None:
            return None
        secret = secrets.token_urlsafe(32)
        with self._lock:
            self._sessions[_digest(secret)] = (who, self._clock() + _SESSION)
            while len(self._sessions) > _SESSIONS:
                self._sessions.popitem(last=False)
        return secret

    def by_session(self, secret: str) -> Who | None:
        """The session's user; None if it is unknown or expired."""
        with self._lock:
            found = self._sessions.get(_digest(secret))
            if found is None or found[1] < self._clock():
                return None
            return found[0]

    def logout(self, secret: str) -> None:
        """End a session."""
        with self._lock:
            self._sessions.pop(_digest(secret), None)

    def _check(self, address: str) -> None:
        with self._lock:
            recent = [at for at in self._tries.get(address, []) if at > self._clock() - _MINUTE]
            if len(recent) >= _FAILURES:
                raise Throttled(recent[0] + _MINUTE - self._clock())

    def _note(self, address: str) -> None:
        now = self._clock()
        with self._lock:
            recent = [at for at in self._tries.pop(address, []) if at > now - _MINUTE]
            self._tries[address] = [*recent, now]
            while len(self._tries) > _ADDRESSES:
                self._tries.popitem(last=False)
            self._told = [at for at in self._told if at > now - _MINUTE]
            tell = len(self._told) < _ALL_FAILURES
            if tell:
                self._told.append(now)
        if tell:
            self._failed(address, "wrong token")


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
