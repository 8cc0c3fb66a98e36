"""config.pbtxt is what Triton reads: parsed by the protocol's own messages."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from needs import need

from saae_export.triton.config import ServerOptions, config_text
from saae_runtime.errors import ConfigError

pytestmark = pytest.mark.needs("tritonclient")


def parsed(text: str):
    """The text as a ModelConfig message; a field that Triton does not know is an error."""
    messages = need("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    return text_format.Parse(text, messages.ModelConfig())


def test_every_part_of_the_message() -> None:
    options = ServerOptions(max_batch=4, queue_delay=250, instances=2, device="gpu")
    found = parsed(config_text("gear", "onnxruntime", (512, 640), options, {"schema": 1}, {"a": "b"}))
    assert (found.name, found.backend, found.max_batch_size) == ("gear", "onnxruntime", 4)
    assert [(item.name, list(item.dims)) for item in found.input] == [("frame", [512, 640, 3])]
    assert not any(item.optional for item in found.input)
    types = type(found.input[0]).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_name
    assert found.input[0].data_type == types["TYPE_UINT8"].number
    assert [(item.name, list(item.dims)) for item in found.output] == [("anomaly_map", [512, 640]), ("score", [1])]
    assert {item.data_type for item in found.output} == {types["TYPE_FP32"].number}
    assert found.output[1].HasField("reshape")
    assert list(found.output[1].reshape.shape) == []
    assert found.dynamic_batching.max_queue_delay_microseconds == 250
    (group,) = found.instance_group
    assert (group.count, group.Kind.Name(group.kind)) == (2, "KIND_GPU")
    assert [item.batch_size for item in found.model_warmup] == [1, 4]
    for item in found.model_warmup:
        assert item.inputs["frame"].zero_data
        assert list(item.inputs["frame"].dims) == [512, 640, 3]
    assert found.parameters["a"].string_value == "b"
    assert json.loads(found.parameters["saae"].string_value) == {"schema": 1}


@pytest.mark.parametrize(
    ("backend", "device", "expected"),
    [("onnxruntime", "auto", "KIND_AUTO"), ("python", "auto", "KIND_CPU"), ("python", "gpu", "KIND_GPU")],
)
def test_where_instances_run(backend: str, device: str, expected: str) -> None:
    found = parsed(config_text("x", backend, (8, 8), ServerOptions(device=device), {}))
    assert found.instance_group[0].Kind.Name(found.instance_group[0].kind) == expected


@settings(deadline=None)
@given(st.dictionaries(st.text(), st.text() | st.integers(-(2**50), 2**50) | st.floats(-1e300, 1e300)))
def test_any_text_survives_the_quoting(about: dict) -> None:
    found = parsed(config_text("x", "python", (8, 8), ServerOptions(), about, {"path": str(about)}))
    assert json.loads(found.parameters["saae"].string_value) == about
    assert found.parameters["path"].string_value == str(about)


@pytest.mark.parametrize(
    "options",
    [{"max_batch": 0}, {"max_batch": 5000}, {"queue_delay": -1}, {"instances": 0}, {"threads": 0}, {"device": "npu"}],
)
def test_options_that_cannot_work(options: dict) -> None:
    with pytest.raises(ConfigError):
        ServerOptions(**options)
