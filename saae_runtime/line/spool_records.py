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

import numpy as np

__all__ = ["LARGEST", "Record", "cut_off", "frame", "records_in", "records_of"]

LARGEST = 8 << 20
"""Bytes of the largest record."""

_HEADER = struct.Struct("<III")  # length, crc32 of number and payload, its complement (so zeros are not a header)
_LEAST = _HEADER.size + 2  # bytes of the smallest record, `{}`
_CHUNK = 1 << 20
_SEARCH = 1 << 30  # bytes of checksums at most in one search for the next record; about a second


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
    """The intact records of a file, each with its end; numbers jump where records are damaged."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield from records_in(file, 0, os.fstat(file).st_size, first)
    finally:
        os.close(file)


def records_in(file: int, offset: int, size: int, number: int) -> Iterator[tuple[Record, int]]:
    """The records of an open file from `offset` to `size`, the first of them `number`; see `records_of`."""
    while True:
        for record, end in _up_to_damage(file, offset, size, number):
            yield record, end
            offset, number = end, record.number + 1
        if offset >= size or (behind := _behind_damage(file, offset, size, number)) is None:
            return
        offset, number = behind


def cut_off(path: Path, offset: int) -> bool:
    """Whether the bytes from `offset` on are the begin of a record that was not written completely."""
    with path.open("rb") as stream:
        stream.seek(offset)
        head = stream.read(_HEADER.size)
        left = os.fstat(stream.fileno()).st_size - offset - _HEADER.size
    if len(head) < _HEADER.size or not any(head):  # zeros: the disk kept the file's size without its bytes
        return True
    length, check, complement = _HEADER.unpack(head)
    return bool(check ^ complement == 0xFFFFFFFF and left < length <= LARGEST)


def _behind_damage(file: int, offset: int, size: int, number: int) -> tuple[int, int] | None:
    """Offset and number of the first intact record behind a damaged one; None if there is none."""
    near, whole = min(_CHUNK, size - offset), size - offset
    return _intact(os.pread(file, near, offset), offset, number) or (
        _intact(os.pread(file, whole, offset), offset, number) if whole > near else None
    )


def _intact(data: bytes, offset: int, number: int) -> tuple[int, int] | None:
    """The same for the bytes from `offset` on."""
    left = _SEARCH
    for start in _headers(data):
        length, check, _ = _HEADER.unpack_from(data, start)
        payload = data[start + _HEADER.size : start + _HEADER.size + length]
        if len(payload) < length:
            continue
        for candidate in range(number, number + start // _LEAST + 1):  # so many records may be damaged before it
            if zlib.crc32(payload, zlib.crc32(struct.pack("<Q", candidate))) == check:
                return offset + start, candidate
            left -= length + 1024
            if left < 0:
                return None
    return None


def _headers(data: bytes) -> list[int]:
    """Places that may be headers: a length, a checksum and its complement. No place within JSON text is one."""
    found: list[int] = []
    for shift in range(min(4, len(data))):
        words = np.frombuffer(data, "<u4", (len(data) - shift) // 4, shift)
        if words.size >= 3:
            like = ((words[1:-1] ^ words[2:]) == 0xFFFFFFFF) & (words[:-2] <= LARGEST)
            found += (4 * np.flatnonzero(like) + shift).tolist()
    return sorted(found)


def _up_to_damage(file: int, offset: int, size: int, number: int) -> Iterator[tuple[Record, int]]:
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
