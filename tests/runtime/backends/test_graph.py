"""Taking an input's default out of an ONNX file, or changing it, against the onnx package."""

from __future__ import annotations

import contextlib

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bundle import tiny_graph

from saae_runtime.backends.graph import with_default, without_default

MODEL = tiny_graph((16, 24))


def test_equals_what_onnx_does() -> None:
    expected = onnx.load_from_string(MODEL)
    (default,) = [item for item in expected.graph.initializer if item.name == "threshold"]
    expected.graph.initializer.remove(default)
    changed = onnx.load_from_string(without_default(MODEL, "threshold"))
    assert changed == expected
    onnx.checker.check_model(changed)


@settings(deadline=None)
@given(st.integers(0, 300), st.sampled_from(["a", "threshold", "b" * 200, "größe"]))
def test_any_size_of_graph_and_name(padding: int, name: str) -> None:
    # The graph's length changes by one initializer, so its own length field may change its width.
    model = onnx.load_from_string(MODEL)
    model.graph.doc_string = "x" * padding
    extra = model.graph.initializer.add()
    extra.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(model.graph.initializer[0]), name + "!"))
    with_extra = model.SerializeToString()
    model.graph.initializer.remove(extra)
    assert onnx.load_from_string(without_default(with_extra, name + "!")) == model


def test_nothing_to_take_out() -> None:
    assert without_default(MODEL, "no such initializer") == MODEL


@pytest.mark.parametrize("length", [1, 3, 5, len(MODEL) // 2, len(MODEL) - 1])
def test_cut_off(length: int) -> None:
    with pytest.raises(ValueError, match="not an ONNX model"):
        without_default(MODEL[:length], "no such initializer")


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_arbitrary_bytes_are_an_error_or_unchanged(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert without_default(data, "threshold") == data


@settings(deadline=None)
@given(st.floats(width=32, allow_nan=False), st.booleans())
def test_another_number_as_onnx_would_write_it(value: float, raw: bool) -> None:
    expected = onnx.load_from_string(MODEL)
    (default,) = [item for item in expected.graph.initializer if item.name == "threshold"]
    if not raw:  # the other way to store it
        default.CopyFrom(onnx.helper.make_tensor("threshold", onnx.TensorProto.FLOAT, [1], [7.0]))
    changed = with_default(expected.SerializeToString(), "threshold", value)
    if raw:
        default.raw_data = np.float32(value).tobytes()
    else:
        default.float_data[0] = value
    assert onnx.load_from_string(changed) == expected


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("no such initializer", None),
        ("threshold", np.zeros(2, np.float32)),
        ("threshold", np.zeros(0, np.float32)),
        ("threshold", np.zeros(1, np.int32)),
        ("threshold", np.zeros(2, np.float16)),
    ],
)
def test_what_is_not_one_number_is_not_changed(name: str, values: np.ndarray | None) -> None:
    model = onnx.load_from_string(MODEL)
    if values is not None:
        (default,) = [item for item in model.graph.initializer if item.name == name]
        default.CopyFrom(onnx.numpy_helper.from_array(values, name))
    with pytest.raises(ValueError, match=name):
        with_default(model.SerializeToString(), name, 1.0)


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_a_number_is_never_written_into_arbitrary_bytes(data: bytes) -> None:
    with pytest.raises(ValueError):
        with_default(data, "threshold", 1.0)
