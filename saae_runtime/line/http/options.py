"""`[http]` of line.toml: address, users and limits of the service; needs no web library."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from datetime import time
from typing import Literal

from ...errors import ConfigError
from ...images import FORMATS

__all__ = ["HttpOptions", "User", "UserOptions", "is_loopback", "users_of"]

Role = Literal["operator", "engineer"]

_SHORTEST_TOKEN = 16
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")


@dataclass(frozen=True)
class UserOptions:
    """`[[http.user]]`.

    Attributes:
        name: in the audit log.
        role: `operator` judges, triggers, switches recipes and overrides verdicts; `engineer` changes thresholds and
            bundles, too.
        token_env: the environment variable that holds this user's token, 16 characters at least.
    """

    name: str
    role: Role
    token_env: str

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError("`name`: letters, digits, `.`, `_` and `-` are possible, 40 at most")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.token_env):
            raise ValueError("`token_env` is not a valid name of an environment variable")


@dataclass(frozen=True)
class HttpOptions:
    """`[http]`.

    Attributes:
        host: address to listen on. Other than 127.0.0.1 and ::1, users with tokens are needed.
        port: 0: any free one.
        user: users and their roles; none: everybody on this machine may do everything.
        hosts: names of the service, besides its address and `localhost`.
        certificate, key: PEM files, for https.
        folder: of audit log, overrides, pool and changes; created if missing.
        formats: accepted image formats; some of PNG, JPEG, BMP, TIFF, WEBP, PPM.
        max_body_mb: of a request.
        max_pixels: of an image.
        timeout: seconds that a request may take, from its first byte to the answer.
        batch: largest number of images judged together.
        waiting: images that may wait; more are refused with 503.
        record: whether posted images become parts in the records.
        frames_mb: memory for the last frames, for the page and for overrides.
        parts: records kept for the page.
        pool_mb: size of the pool of confirmed images.
        shifts: when shifts begin, HH:MM, local time.
    """

    host: str = "127.0.0.1"
    port: int = 8484
    user: tuple[UserOptions, ...] = ()
    hosts: tuple[str, ...] = ()
    certificate: str | None = None
    key: str | None = None
    folder: str = "http"
    formats: tuple[str, ...] = ("PNG", "JPEG", "BMP", "PPM")
    max_body_mb: float = 32.0
    max_pixels: int = 50_000_000
    timeout: float = 10.0
    batch: int = 8
    waiting: int = 32
    record: bool = False
    frames_mb: float = 256.0
    parts: int = 2000
    pool_mb: float = 5000.0
    shifts: tuple[str, ...] = ("06:00", "14:00", "22:00")

    def __post_init__(self) -> None:
        for name, least, most in (
            ("port", 0, 65535),
            ("batch", 1, 256),
            ("waiting", 1, 10_000),
            ("parts", 10, 100_000),
            ("max_pixels", 1, 10**9),
        ):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"`{name}` is {getattr(self, name)}; allowed: {least} to {most}")
        for name, limit in (("max_body_mb", 2000), ("timeout", 600), ("frames_mb", 1e6), ("pool_mb", 1e9)):
            if not 0 < getattr(self, name) <= limit:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be above 0 and at most {limit:g}")
        unknown = [name for name in self.formats if name not in FORMATS]
        if unknown or not self.formats:
            raise ValueError(f"`formats` {', '.join(unknown) or 'is empty'}; allowed: {', '.join(FORMATS)}")
        if (self.certificate is None) != (self.key is None):
            raise ValueError("`certificate` and `key` belong together")
        names = [user.name for user in self.user]
        if len(set(names)) != len(names):
            raise ValueError("two users have the same name")
        if not self.shifts or sorted(set(self.shift_times)) != list(self.shift_times):
            raise ValueError("`shifts` must be times of day in ascending order, such as 06:00")
        if not self.user and not is_loopback(self.host):
            raise ValueError(
                f"`host` {self.host} accepts other machines; that requires users with tokens: [[http.user]] name, "
                "role, token_env"
            )

    @property
    def shift_times(self) -> tuple[time, ...]:
        """When shifts begin.

        Raises:
            ValueError: one that is not HH:MM.
        """
        for text in self.shifts:
            if not re.fullmatch(r"\d\d:\d\d", text):
                raise ValueError(f"`shifts`: {text!r} is not HH:MM")
        return tuple(time.fromisoformat(text) for text in self.shifts)


@dataclass(frozen=True)
class User:
    """A user with name, role and token."""

    name: str
    role: Role
    token: str


def users_of(options: HttpOptions) -> tuple[User, ...]:
    """The users, with their tokens from the environment.

    Raises:
        ConfigError: a token is missing or too short, or two are the same.
    """
    found = []
    for user in options.user:
        token = os.environ.get(user.token_env, "")
        if len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
            raise ConfigError(
                f"User {user.name} of [http] has no usable token.",
                f"The environment variable {user.token_env} is "
                + ("not set." if not token else f"no {_SHORTEST_TOKEN} plain characters or more."),
                f"export {user.token_env}=$(openssl rand -hex 24)",
            )
        found.append(User(user.name, user.role, token))
    if len({user.token for user in found}) != len(found):
        raise ConfigError(
            "Two users of [http] have the same token.",
            "The audit log could not distinguish them.",
            "give each user a token",
        )
    return tuple(found)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
