"""Sends records to a web server, one POST each."""

from __future__ import annotations

import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from ...errors import ConfigError, FetchError
from ..spool_records import Record
from .base import Hurry

__all__ = ["WebhookOptions", "WebhookSink"]

_AGAIN = (401, 403, 404, 405, 407, 408, 425, 429)  # 4xx codes that are not about the record: access, address, "later"
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # of a header, RFC 9110, section 5.6.2
_VALUE = re.compile(r"[ -~]*")  # of a header: printable ASCII, no line break
_HURRIED = 0.5  # seconds for an answer while the service ends


@dataclass(frozen=True)
class WebhookOptions:
    """`[[sink]]` of kind `webhook`.

    Attributes:
        url: http or https.
        timeout: seconds for an answer.
        headers: additional headers, printable ASCII.
        token_env: name of an environment variable whose value is sent as `Authorization: Bearer ...`.
        proxy: URL of a proxy; the environment's proxies are not used.
        only_ng: only NG parts.
    """

    url: str
    timeout: float = 5.0
    headers: Mapping[str, str] = field(default_factory=dict)
    token_env: str | None = None
    proxy: str | None = None
    only_ng: bool = False

    def __post_init__(self) -> None:
        for name, url in (("url", self.url), ("proxy", self.proxy)):
            if url is not None and (urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname):
                raise ValueError(f"`{name}` is {url!r}; it must begin with http:// or https://")
        if not 0 < self.timeout <= 600:
            raise ValueError(f"`timeout` is {self.timeout}; it must be above 0 and at most 600")
        for name, value in self.headers.items():
            if not _NAME.fullmatch(name):
                raise ValueError(f"`headers` has an invalid name: {name!r}")
            if not _VALUE.fullmatch(value):  # which may be a secret
                raise ValueError(f"`headers`: the value of {name} must be printable ASCII without line breaks")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: a redirected POST would become a GET, and the record would be lost unnoticed."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class WebhookSink:
    """Sends each record as the body of a POST, with its key as `Idempotency-Key`, because it may be sent twice.

    An answer of 2xx takes the record. 4xx refuses it for good (it is counted and skipped), except the codes that say
    nothing about the record (`_AGAIN`, such as 401 for an expired token); after these, 5xx and no answer it is sent
    again later.
    """

    batch = 20

    def __init__(self, options: WebhookOptions, folder: Path) -> None:
        self._options = options
        self.refused = 0
        self.refusal = ""
        proxies = {} if options.proxy is None else {"http": options.proxy, "https": options.proxy}
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies), _NoRedirect)

    def open(self) -> None:
        """Look for the token; see `Sink`."""
        name = self._options.token_env
        if name is None:
            return
        token = os.environ.get(name)
        if not token:
            raise ConfigError(f"The webhook's token is missing: ${name} is empty.", "", f"export {name}=...")
        if not _VALUE.fullmatch(token):
            raise ConfigError(
                f"The webhook's token cannot be sent: ${name} is not printable ASCII.",
                "it holds a line break, a control character or a letter with an accent",
                f"export {name}=..., without a line break at its end",
            )

    def write(self, records: Sequence[Record], hurry: Hurry) -> int:
        """Send one POST per record; see `Sink`."""
        for count, record in enumerate(records):
            if count and hurry.is_set():
                return count
            try:
                self._post(record, _HURRIED if hurry.is_set() else self._options.timeout)
            except FetchError:
                if count:
                    return count
                raise
        return len(records)

    def _post(self, record: Record, timeout: float) -> None:
        if self._options.only_ng and record.data.get("verdict") == "OK":
            return
        headers = {
            "Content-Type": "application/json",
            "Idempotency-Key": quote(record.key, safe="/:"),
            "User-Agent": "saae-line",
            **self._options.headers,
        }
        if self._options.token_env is not None:
            headers["Authorization"] = f"Bearer {os.environ.get(self._options.token_env, '')}"
        request = urllib.request.Request(self._options.url, record.payload, headers, method="POST")
        try:
            with self._opener.open(request, timeout=timeout) as answer:
                answer.read(1 << 16)
        except urllib.error.HTTPError as error:
            with error:
                if 400 <= error.code < 500 and error.code not in _AGAIN:
                    self.refused += 1
                    self.refusal = (
                        f"The webhook {self._options.url} refuses the record {record.key} for good: "
                        f"it answered {error.code} {error.reason}."
                    )
                    return
                raise self._error(f"it answered {error.code} {error.reason}") from error
        except OSError as error:
            raise self._error(f"{type(error).__name__}: {getattr(error, 'reason', error)}") from error
        except ValueError as error:  # its text may quote the token
            raise self._error(f"{type(error).__name__}: the URL or a header cannot be sent") from None
        except Exception as error:  # http.client's error for an invalid answer
            raise self._error(f"{type(error).__name__}: {error}") from error

    def _error(self, why: str) -> FetchError:
        return FetchError(f"The webhook {self._options.url} does not accept records.", why, "check the server")

    def sync(self) -> None:
        """Do nothing: the server has answered."""

    def state(self) -> dict[str, Any]:
        """See `Sink`."""
        return {"url": self._options.url}

    def close(self) -> None:
        """Do nothing: there is no open connection."""
