"""Format of records in a file of the spool: length, checksum, JSON."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

__all__ = ["LARGEST", "Record", "frame", "records_in", "records_of"]

LARGEST = 8 << 20
"""Bytes of the largest record."""

_HEADER = struct.Struct("<III")  # length, crc32 of number and payload, its complement (so zeros are not a header)
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Record:
    """One record: its number in the spool, from 1, and its JSON."""

    number: int
    payload: bytes

    @cached_property
    def data(self) -> dict[str, Any]:
        """The JSON, parsed."""
        found: dict[str, Any] = json.loads(self.payload)
        return found

    @property
    def key(self) -> str:
        """Unique key of the record."""
        return str(self.data.get("key", self.number))


def frame(number: int, payload: bytes) -> bytes:
    """A record in the file's format."""
    check = zlib.crc32(payload, zlib.crc32(struct.pack("<Q", number)))
    return _HEADER.pack(len(payload), check, check ^ 0xFFFFFFFF) + payload


def records_of(path: Path, first: int) -> Iterator[tuple[Record, int]]:
    """The records of a file up to the first damaged one, each with its end."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield from records_in(file, 0, os.fstat(file).st_size, first)
    finally:
        os.close(file)


def records_in(file: int, offset: int, size: int, number: int) -> Iterator[tuple[Record, int]]:
    """The records of an open file from `offset` to `size`, the first of them `number`; see `records_of`."""
    buffer, at = b"", offset  # the bytes from `at` on
    while offset < size:
        if offset + _HEADER.size > at + len(buffer):
            buffer, at = os.pread(file, min(_CHUNK, size - offset), offset), offset
            if len(buffer) < _HEADER.size:
                return
        length, check, complement = _HEADER.unpack_from(buffer, offset - at)
        if check ^ complement != 0xFFFFFFFF or length > LARGEST:
            return
        end = offset + _HEADER.size + length
        if end > size:
            return
        if end > at + len(buffer):
            buffer, at = os.pread(file, max(_CHUNK, end - offset), offset), offset
            if len(buffer) < end - offset:
                return
        payload = buffer[offset + _HEADER.size - at : end - at]
        if zlib.crc32(payload, zlib.crc32(struct.pack("<Q", number))) != check:
            return
        yield Record(number, payload), end
        offset, number = end, number + 1
