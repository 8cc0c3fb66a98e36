"""Downloads one file over HTTP. It resumes after an interruption, and the file appears only when it is complete."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

from saae_runtime.errors import ConfigError, FetchError
from saae_runtime.files import storage_error, write_json

__all__ = ["Progress", "download"]

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total), in bytes."""

TIMEOUT_S = 30.0
"""Seconds without a byte after which a connection counts as lost."""

FRUITLESS_TRIES = 4
"""Give up after this many connections in a row without data; received data resets the count."""

_CHUNK = 1 << 18


class _Interrupted(Exception):
    """The connection was lost; the received part is in the .part file."""


def download(
    url: str,
    target: Path,
    *,
    cure: str,
    progress: Progress | None = None,
    room: Callable[[int], None] | None = None,
    pause_s: float = 1.0,
) -> None:
    """Download `url` to `target`.

    Bytes are collected in `<target>.part`; an interrupted call, Ctrl-C included, leaves it there, and the next call
    asks for the rest with an HTTP range request. `<target>.part.json` remembers the version (ETag or date) and the
    length, so that parts of two versions are never joined; a server without ranges starts from the beginning.

    Args:
        url: http or https address.
        target: file to write; its folder is made.
        cure: what the user can do when it fails, for the error message.
        progress: called with ("download", bytes so far, bytes in all or 0 if unknown).
        room: called once per connection with the bytes still to come; may raise StorageError.
        pause_s: seconds before the second try, doubled each time.

    Raises:
        ConfigError: not an http(s) address.
        FetchError: no connection, or the server refuses.
        StorageError: the disk is full or the folder may not be written to.
    """
    scheme = urllib.parse.urlsplit(url).scheme
    if scheme not in ("http", "https"):
        raise ConfigError(f"Cannot download from {url!r}.", "Only http and https addresses work.", "check the address")
    part = target.with_name(target.name + ".part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(part, error) from error
    host = urllib.parse.urlsplit(url).netloc
    tries = 0
    while True:
        before = _size(part)
        try:
            _continue(url, part, scheme, progress, room)
            break
        except urllib.error.HTTPError as error:
            error.close()
            if error.code < 500 and error.code not in (408, 429):
                gone = " The publisher may have moved the file." if error.code in (403, 404, 410) else ""
                raise FetchError(
                    f"Could not download {target.name}: {host} answered {error.code} {error.reason}.",
                    f"The address was {url}.{gone}",
                    cure,
                ) from error
            reason: Exception = error
        except (_Interrupted, urllib.error.URLError, HTTPException, ConnectionError, TimeoutError) as error:
            reason = error
        tries = 1 if _size(part) > before else tries + 1
        if tries >= FRUITLESS_TRIES:
            kept = f" {_size(part) / 1e6:.1f} MB are kept and will be continued." if _size(part) else ""
            why = getattr(reason, "reason", None) or reason
            raise FetchError(f"Could not download {target.name} from {host}.", f"{why}.{kept}", cure) from reason
        time.sleep(pause_s * 2 ** (tries - 1))
    try:
        part.replace(target)
        _notes(part).unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(target, error) from error


def _continue(url: str, part: Path, scheme: str, progress: Progress | None, room: Callable[[int], None] | None) -> None:
    """One connection: appends to `part` until it is complete; _Interrupted when the connection ends early."""
    have = _size(part)
    version, known_total = _read_notes(part)
    if have and have == known_total:  # stopped between the last byte and the renaming
        return
    request = urllib.request.Request(url, headers={"User-Agent": "saae-train", "Accept-Encoding": "identity"})
    if have and known_total:
        request.add_header("Range", f"bytes={have}-")
        if version:
            request.add_header("If-Range", version)
    else:
        have = 0
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # the part is longer than the file: it is of a different version
            error.close()
            part.unlink(missing_ok=True)
            raise _Interrupted("the server has no more bytes than are here; starting again") from error
        raise
    with response:
        final = urllib.parse.urlsplit(response.url)
        if scheme == "https" and final.scheme != "https":
            raise urllib.error.URLError(f"redirected to an unencrypted address at {final.netloc}")
        length = _number(response.headers.get("Content-Length"))
        if response.status == 206:
            start, total = _content_range(response.headers.get("Content-Range"))
            if start != have or total != known_total:
                part.unlink(missing_ok=True)
                raise _Interrupted("the server sent another part than asked for; starting again")
        else:
            have, total = 0, length
        if room is not None and total:
            room(total - have)
        _write_notes(part, response.headers, total)
        try:
            with part.open("ab" if have else "wb") as out:
                while chunk := _read(response):
                    out.write(chunk)
                    have += len(chunk)
                    if progress is not None:
                        progress("download", have, total or 0)
        except OSError as error:
            if isinstance(error, (ConnectionError, TimeoutError)):
                raise
            raise storage_error(part, error) from error
    if total is not None and have < total:
        raise _Interrupted(f"the connection was lost after {have} of {total} bytes")


def _read(response: Any) -> bytes:
    try:
        data: bytes = response.read(_CHUNK)
        return data
    except (OSError, HTTPException) as error:
        # Kept apart from errors of the disk, which are OSErrors as well.
        raise _Interrupted(f"the connection was lost ({error})") from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _notes(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _write_notes(part: Path, headers: Any, total: int | None) -> None:
    etag = headers.get("ETag", "")
    # If-Range takes strong validators only; without any, an equal length has to do (the hash is checked in the end).
    version = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", "")
    write_json(_notes(part), {"version": version, "total": total})


def _read_notes(part: Path) -> tuple[str, int | None]:
    """Version and full length that the server stated when `part` was begun."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        notes = json.loads(_notes(part).read_text(encoding="utf-8"))
        return str(notes["version"]), int(notes["total"])
    return "", None


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def _content_range(text: str | None) -> tuple[int | None, int | None]:
    """Start and total of a Content-Range header such as `bytes 100-199/500`."""
    span, _, total = (text or "").removeprefix("bytes").strip().partition("/")
    return _number(span.partition("-")[0]), _number(total)
