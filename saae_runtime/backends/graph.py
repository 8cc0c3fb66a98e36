"""Removes or changes an input's default in an ONNX file, without the onnx package."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["with_default", "without_default"]

# Field numbers of onnx.proto.
_MODEL_GRAPH, _GRAPH_INITIALIZER = 7, 5
_TENSOR_TYPE, _TENSOR_FLOATS, _TENSOR_NAME, _TENSOR_RAW = 2, 4, 8, 9
_FLOAT = 1  # TensorProto.DataType
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def without_default(model: bytes, name: str) -> bytes:
    """The model with the initializer `name` removed, so that the graph input of that name has no default.

    OpenVINO and TensorRT treat an input that is also an initializer as a constant. Protocol buffers are sequences of
    tagged fields, so a field is removed by copying the bytes around it.

    Args:
        model: a serialized ONNX ModelProto.
        name: the initializer's name; without such an initializer, the model is returned unchanged.

    Raises:
        ValueError: the bytes are no ModelProto.
    """
    view = memoryview(model)
    place = _find(view, name)
    if place is None:
        return model
    graph_size = (place.graph_stop - place.graph_value) - (place.stop - place.start)
    return b"".join(
        [
            view[: place.graph_start],
            _varint_bytes(_MODEL_GRAPH << 3 | _BYTES),
            _varint_bytes(graph_size),
            view[place.graph_value : place.start],
            view[place.stop :],
        ]
    )


def with_default(model: bytes, name: str, value: float) -> bytes:
    """The model with another number in the initializer `name`, one float32; every other byte stays.

    Args:
        model: a serialized ONNX ModelProto.
        name: the initializer's name.
        value: the number, rounded to float32.

    Raises:
        ValueError: the bytes are no ModelProto, or hold no float32 initializer of this name with one element.
    """
    view = memoryview(model)
    place = _find(view, name)
    if place is None:
        raise ValueError(f"there is no initializer {name!r}")
    kind, numbers = 0, []
    for number, start, data, stop in _fields(view, place.value, place.stop):
        if number == _TENSOR_TYPE:
            kind, _ = _varint(view, data, stop)
        elif number in (_TENSOR_RAW, _TENSOR_FLOATS) and stop > data and view[start] & 7 in (_BYTES, _FIXED32):
            numbers.append((data, stop))
    if kind != _FLOAT or len(numbers) != 1 or numbers[0][1] - numbers[0][0] != 4:
        raise ValueError(f"the initializer {name!r} is not one float32 number")
    return b"".join([view[: numbers[0][0]], struct.pack("<f", value), view[numbers[0][1] :]])


@dataclass(frozen=True)
class _Place:
    """Where an initializer lies: its field in the graph, and the graph's field in the model."""

    graph_start: int
    graph_value: int
    graph_stop: int
    start: int
    value: int
    stop: int


def _find(view: memoryview, name: str) -> _Place | None:
    for number, start, value, stop in _fields(view, 0, len(view)):
        if number != _MODEL_GRAPH:
            continue
        for kind, field_start, tensor, field_stop in _fields(view, value, stop):
            if kind == _GRAPH_INITIALIZER and _name(view, tensor, field_stop) == name:
                return _Place(start, value, stop, field_start, tensor, field_stop)
    return None


def _fields(view: memoryview, position: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(number, start of the field, start of its value, end) of each field of the message in view[position:end]."""
    while position < end:
        start = position
        tag, position = _varint(view, position, end)
        wire = tag & 7
        value = position
        if wire == _VARINT:
            _, position = _varint(view, position, end)
        elif wire == _FIXED64:
            position += 8
        elif wire == _FIXED32:
            position += 4
        elif wire == _BYTES:
            size, value = _varint(view, position, end)
            position = value + size
        else:
            raise ValueError(f"not an ONNX model: wire type {wire} at byte {start}")
        if position > end:
            raise ValueError(f"not an ONNX model: the field at byte {start} is cut off")
        yield tag >> 3, start, value, position


def _name(view: memoryview, position: int, end: int, field: int = _TENSOR_NAME) -> str:
    for number, _, value, stop in _fields(view, position, end):
        if number == field:
            return bytes(view[value:stop]).decode("utf-8", "replace")
    return ""


def _varint(view: memoryview, position: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while position < end and shift < 64:
        byte = view[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError("not an ONNX model: a number is cut off")


def _varint_bytes(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
