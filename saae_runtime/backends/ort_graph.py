"""One change to an ONNX file without the onnx package: an input's default value is taken out."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["without_default"]

# Field numbers of onnx.proto: ModelProto.graph, GraphProto.initializer, TensorProto.name.
_MODEL_GRAPH, _GRAPH_INITIALIZER, _TENSOR_NAME = 7, 5, 8
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def without_default(model: bytes, name: str) -> bytes:
    """The model with the initializer `name` removed, so that the graph input of that name has no default.

    OpenVINO's plug-in refuses a graph whose input is also an initializer. Protocol buffers are sequences of tagged
    fields, so leaving one out is a copy of the bytes around it.

    Args:
        model: a serialized ONNX ModelProto.
        name: the initializer's name; where there is none, the model comes back as it is.

    Raises:
        ValueError: the bytes are no ModelProto.
    """
    view = memoryview(model)
    for number, start, value, stop in _fields(view, 0, len(view)):
        if number != _MODEL_GRAPH:
            continue
        for kind, field_start, tensor, field_stop in _fields(view, value, stop):
            if kind == _GRAPH_INITIALIZER and _name(view, tensor, field_stop) == name:
                graph_size = (stop - value) - (field_stop - field_start)
                tag = _varint_bytes(_MODEL_GRAPH << 3 | _BYTES)
                return b"".join(
                    [
                        view[:start],
                        tag,
                        _varint_bytes(graph_size),
                        view[value:field_start],
                        view[field_stop:stop],
                        view[stop:],
                    ]
                )
    return model


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


def _name(view: memoryview, position: int, end: int) -> str:
    for number, _, value, stop in _fields(view, position, end):
        if number == _TENSOR_NAME:
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
