"""Sinks for records: files, SQLite, MQTT, webhooks."""

from __future__ import annotations

from pathlib import Path

from ..config import SinkConfig
from .base import Sink
from .lines import CsvOptions, CsvSink, JsonlOptions, JsonlSink
from .mqtt import MqttOptions, MqttSink
from .sqlite import SqliteOptions, SqliteSink
from .webhook import WebhookOptions, WebhookSink

__all__ = ["KINDS", "make_sink"]

KINDS: dict[str, type] = {
    "jsonl": JsonlOptions,
    "csv": CsvOptions,
    "sqlite": SqliteOptions,
    "mqtt": MqttOptions,
    "webhook": WebhookOptions,
}
"""kind in line.toml -> dataclass of its options."""


def make_sink(config: SinkConfig, folder: Path, line: str, looking: bool = False) -> Sink:
    """Make the sink of a `[[sink]]`, not opened yet.

    Args:
        config: of line.toml.
        folder: folder of relative paths.
        line: the line's name.
        looking: it is opened only for a check, and must not disturb the line that may be running.
    """
    options = config.options
    if isinstance(options, JsonlOptions):
        return JsonlSink(options, folder)
    if isinstance(options, CsvOptions):
        return CsvSink(options, folder)
    if isinstance(options, SqliteOptions):
        return SqliteSink(options, folder)
    if isinstance(options, MqttOptions):
        return MqttSink(options, folder, line, config.name, looking)
    assert isinstance(options, WebhookOptions)
    return WebhookSink(options, folder)
