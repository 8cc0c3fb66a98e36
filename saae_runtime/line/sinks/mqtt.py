"""Publishes records to an MQTT broker, QoS 1, with a retained status of the line."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ConfigError, FetchError
from ..spool_records import Record
from .base import Hurry

__all__ = ["MqttOptions", "MqttSink"]

_CONNECT = 1.0  # seconds for a connection until it counts as an error (attempts go on)
_ACKNOWLEDGE = 30.0  # seconds for a batch's acknowledgements until it counts as an error (the wait goes on)
_HURRIED = 0.5  # the same while the service ends
_KEEP_ALIVE = 15  # seconds


@dataclass(frozen=True)
class MqttOptions:
    """`[[sink]]` of kind `mqtt`.

    Attributes:
        host, port: of the broker.
        topic: parts go to `TOPIC/STATION/parts`, other records to `TOPIC/STATION/events`; `TOPIC/status` says `online`
            or `offline`, retained. None: `saae/` and the line's name.
        username, password_env: the password is the value of this environment variable.
        tls: whether the connection is encrypted; `ca`: file of trusted certificates, instead of the system's.
        client_id: each client of a broker needs its own. None: `saae-`, the line's name, `-`, the sink's name.
        only_ng: only NG parts.
    """

    host: str
    port: int = 1883
    topic: str | None = None
    username: str | None = None
    password_env: str | None = None
    tls: bool = False
    ca: str | None = None
    client_id: str | None = None
    only_ng: bool = False

    def __post_init__(self) -> None:
        if not self.host:
            raise ValueError("`host` is empty")
        if not 1 <= self.port <= 65535:
            raise ValueError(f"`port` is {self.port}; allowed: 1 to 65535")
        if self.topic is not None and (not self.topic.strip("/") or any(letter in self.topic for letter in "#+\0")):
            raise ValueError(f"`topic` is {self.topic!r}; `#` and `+` are not allowed")
        if self.ca is not None and not self.tls:
            raise ValueError("`ca` needs `tls = true`")


class MqttSink:
    """Publishes records; a record is delivered when the broker has acknowledged it.

    One batch is in flight at a time, so that memory stays bounded while the broker is down; the library sends it again
    afterwards. The broker may get a record twice, with the same `key`.

    Args:
        options: of the sink.
        folder: folder of relative paths.
        line: the line's name.
        name: the sink's name.
        looking: only look whether the broker accepts the connection: under an id of its own (the broker would
            disconnect a running line with the same id), and without a word about the line's status.
    """

    batch = 100
    refused = 0
    refusal = ""

    def __init__(self, options: MqttOptions, folder: Path, line: str, name: str, looking: bool = False) -> None:
        self._options, self._folder, self._looking = options, folder, looking
        self._topic = (options.topic or f"saae/{line}").strip("/")
        self._name = (options.client_id or f"saae-{line}-{name}") + ("-check" if looking else "")
        self._client: Any = None
        self._connected = threading.Event()
        self._why = ""
        self._flying: set[int] = set()  # messages in flight, by message id
        self._acknowledged: set[int] = set()
        self._last = 0  # number of the last record in flight

    def open(self) -> None:
        """Start to connect and wait a while; the library goes on trying. See `Sink`."""
        if self._client is None:
            self._client = self._begin()
        if not self._connected.wait(_CONNECT):
            raise self._error(self._why or "no connection yet")

    def write(self, records: Sequence[Record], hurry: Hurry) -> int:
        """Publish and wait for the acknowledgements; see `Sink`."""
        if not self._flying:
            if not self._connected.is_set():
                raise self._error(self._why)
            self._acknowledged.clear()
            for record in records:
                if not (self._options.only_ng and record.data.get("verdict") == "OK"):
                    self._flying.add(self._publish(record))
            self._last = records[-1].number
        # Otherwise these are given again. The library has them and sends them itself; others may have been added.
        end = time.monotonic() + _ACKNOWLEDGE
        while not self._flying <= self._acknowledged:
            if hurry.is_set():
                end = min(end, time.monotonic() + _HURRIED)
            if time.monotonic() > end:
                raise self._error(self._why or "it does not acknowledge")
            time.sleep(0.002)
        self._flying = set()
        return sum(record.number <= self._last for record in records)

    def _publish(self, record: Record) -> int:
        data = record.data
        what = "parts" if data.get("type") == "part" else "events"
        station = str(data.get("station") or "line")
        # Without a connection this returns an error code, but the message is queued.
        return int(self._client.publish(f"{self._topic}/{station}/{what}", record.payload, qos=1).mid)

    def _begin(self) -> Any:
        try:
            import paho.mqtt.client as mqtt
        except ImportError as error:
            raise ConfigError("MQTT is not available.", str(error), "pip install 'saae[line]'") from error
        client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id=self._name)
        options = self._options
        if options.username is not None:
            password = os.environ.get(options.password_env) if options.password_env else None
            if options.password_env and not password:
                raise ConfigError(f"The broker's password is missing: ${options.password_env} is empty.")
            client.username_pw_set(options.username, password)
        if options.tls:
            try:
                client.tls_set(ca_certs=None if options.ca is None else str(self._folder / options.ca))
            except (OSError, ValueError) as error:
                raise ConfigError(f"The certificates {options.ca} cannot be used.", str(error)) from error
        if not self._looking:
            client.will_set(f"{self._topic}/status", "offline", qos=1, retain=True)
        client.max_inflight_messages_set(self.batch)
        client.max_queued_messages_set(0)  # at most one batch is queued
        client.reconnect_delay_set(1, 10)

        def connected(client: Any, _: Any, __: Any, reason: Any, ___: Any) -> None:
            if reason.is_failure:
                self._why = f"it rejects the connection: {reason}"
                return
            if not self._looking:
                client.publish(f"{self._topic}/status", "online", qos=1, retain=True)
            self._connected.set()

        def disconnected(_: Any, __: Any, ___: Any, reason: Any, ____: Any) -> None:
            self._connected.clear()
            self._why = f"the connection was lost: {reason}"

        def failed(_: Any, __: Any) -> None:
            self._why = "no answer"

        def published(_: Any, __: Any, number: int, ___: Any, ____: Any) -> None:
            self._acknowledged.add(number)

        client.on_publish = published
        client.on_connect, client.on_disconnect, client.on_connect_fail = connected, disconnected, failed
        client.connect_async(options.host, options.port, _KEEP_ALIVE)
        client.loop_start()
        return client

    def _error(self, why: str) -> FetchError:
        where = f"{self._options.host}:{self._options.port}"
        return FetchError(f"The MQTT broker {where} does not accept records.", why, "check broker and network")

    def sync(self) -> None:
        """Do nothing: the broker has acknowledged the records."""

    def state(self) -> dict[str, Any]:
        """See `Sink`."""
        return {"broker": f"{self._options.host}:{self._options.port}", "connected": self._connected.is_set()}

    def close(self) -> None:
        """Say `offline` and disconnect; see `Sink`."""
        client, self._client = self._client, None
        if client is None:
            return
        if self._connected.is_set() and not self._looking:
            number = client.publish(f"{self._topic}/status", "offline", qos=1, retain=True).mid
            end = time.monotonic() + _HURRIED
            while number not in self._acknowledged and time.monotonic() < end:
                time.sleep(0.005)
        client.disconnect()
        client.loop_stop()
        self._connected.clear()
