"""Writes config.pbtxt, the text of Triton's ModelConfig message for one model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from saae_runtime.errors import ConfigError

__all__ = ["MOST_BATCH", "ServerOptions", "config_text"]

MOST_BATCH = 1024


@dataclass(frozen=True)
class ServerOptions:
    """How a model is served.

    Attributes:
        max_batch: frames of the largest batch that the server forms from waiting requests.
        queue_delay: microseconds that a request may wait for others; 0: only requests that wait already.
        instances: copies of the model that compute at the same time, on each GPU or on the CPU.
        device: `auto` (GPUs if there are any), `cpu` or `gpu`.
        threads: CPU threads of one instance; None leaves it to the library.

    Raises:
        ConfigError: values out of range.
    """

    max_batch: int = 8
    queue_delay: int = 0
    instances: int = 1
    device: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("max-batch", self.max_batch, 1, MOST_BATCH),
            ("queue-delay", self.queue_delay, 0, 10_000_000),
            ("instances", self.instances, 1, 64),
            ("threads", 1 if self.threads is None else self.threads, 1, 1024),
        ):
            if not low <= value <= high:
                raise ConfigError(f"--{name} {value} is not possible.", "", f"give {low} to {high}")
        if self.device not in ("auto", "cpu", "gpu"):
            raise ConfigError(f"--device {self.device} is not known.", "", "auto, cpu or gpu")


@dataclass(frozen=True)
class _Field:
    """One nested message of the text format: its name and its lines."""

    name: str
    lines: list[str] = field(default_factory=list)

    def text(self) -> list[str]:
        return [f"{self.name} {{", *(f"  {line}" for line in self.lines), "}"]


def config_text(
    name: str,
    backend: str,
    frame_size: tuple[int, int],
    options: ServerOptions,
    about: Mapping[str, Any],
    parameters: Mapping[str, str] | None = None,
) -> str:
    """The text of config.pbtxt.

    The inputs and outputs are those of `serving_graph`. `score` has only the batch dimension, for which Triton needs
    `reshape`. The model warms up with one frame and with a full batch.

    Args:
        name: the model's name, which is that of its folder.
        backend: Triton's: `onnxruntime`, `tensorrt` or `python`.
        frame_size: (height, width) of the graph's input.
        options: batches, instances and devices.
        about: what `saae_runtime.triton` reads from the server, as JSON in the parameter `saae`.
        parameters: further parameters of the backend.
    """
    height, width = frame_size
    kind = {"auto": "KIND_AUTO", "cpu": "KIND_CPU", "gpu": "KIND_GPU"}[options.device]
    if backend == "python" and options.device == "auto":
        kind = "KIND_CPU"  # for the Python process itself; its engine finds a GPU on its own
    frame = f"data_type: TYPE_UINT8  dims: [ {height}, {width}, 3 ]"
    messages = [
        _Field("input", ['name: "frame"', frame]),
        _Field("output", ['name: "anomaly_map"', f"data_type: TYPE_FP32  dims: [ {height}, {width} ]"]),
        _Field("output", ['name: "score"', "data_type: TYPE_FP32  dims: [ 1 ]", "reshape { shape: [ ] }"]),
        _Field("dynamic_batching", [f"max_queue_delay_microseconds: {options.queue_delay}"]),
        _Field("instance_group", [f"count: {options.instances}  kind: {kind}"]),
    ]
    for batch in dict.fromkeys((1, options.max_batch)):
        warm = f'inputs {{ key: "frame"  value {{ {frame}  zero_data: true }} }}'
        messages.append(_Field("model_warmup", [f'name: "batch of {batch}"', f"batch_size: {batch}", warm]))
    for key, value in {**(parameters or {}), "saae": json.dumps(about, allow_nan=False)}.items():
        messages.append(_Field("parameters", [f'key: "{key}"', f"value {{ string_value: {_quoted(value)} }}"]))
    head = [f"name: {_quoted(name)}", f"backend: {_quoted(backend)}", f"max_batch_size: {options.max_batch}"]
    return "\n".join([*head, *(line for message in messages for line in message.text())]) + "\n"


def _quoted(text: str) -> str:
    """A string of the text format: ASCII, with quotes, backslashes and other characters escaped."""
    escaped = []
    for byte in text.encode("utf-8"):
        letter = chr(byte)
        if letter in '"\\':
            escaped.append(f"\\{letter}")
        elif 32 <= byte < 127:
            escaped.append(letter)
        else:
            escaped.append(f"\\{byte:03o}")
    return f'"{"".join(escaped)}"'
