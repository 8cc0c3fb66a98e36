"""MQTT against a real broker: everything arrives, whether it is dead, killed or restarted; and the line's last word."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from line_parts import wait_until

from saae_runtime.line.cli.check import check_line
from saae_runtime.line.config import HealthConfig, LineConfig, LineOptions, SinkConfig
from saae_runtime.line.part import Part, Verdict, now
from saae_runtime.line.sinks import KINDS, make_sink
from saae_runtime.line.sinks.delivery import Delivery
from saae_runtime.line.spool import Spool

pytestmark = pytest.mark.needs("paho")

BROKER = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")


class Broker:
    """A mosquitto on a port of its own."""

    def __init__(self, folder: Path) -> None:
        if BROKER is None:
            pytest.skip("needs a broker: apt-get install mosquitto")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._config = folder / "mosquitto.conf"
        user = "\nuser root" if os.geteuid() == 0 else ""
        self._config.write_text(f"listener {self.port} 127.0.0.1\nallow_anonymous true{user}\n")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert BROKER is not None
        self._process = subprocess.Popen(
            [BROKER, "-c", self._config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

        def answers() -> bool:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                return False
            return True

        assert wait_until(answers)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class Listener:
    """Notes everything that is published."""

    def __init__(self, port: int) -> None:
        import paho.mqtt.client as mqtt

        self.records: list[dict[str, Any]] = []
        self.topics: set[str] = set()
        self.status: list[tuple[str, bool]] = []
        self._ready = threading.Event()
        self._client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)

        def connected(client: Any, *_: Any) -> None:
            client.subscribe("saae/#", qos=1)

        def message(_: Any, __: Any, found: Any) -> None:
            if found.topic.endswith("/status"):
                self.status.append((found.payload.decode(), bool(found.retain)))
            else:
                self.topics.add(found.topic)
                self.records.append(json.loads(found.payload))

        self._client.on_connect, self._client.on_message = connected, message
        self._client.on_subscribe = lambda *_: self._ready.set()
        self._client.reconnect_delay_set(1, 1)
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        assert self._ready.wait(10)

    @property
    def ids(self) -> list[str]:
        """Of the parts in order, without those that came twice."""
        return list(dict.fromkeys(record["part_id"] for record in self.records))

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    made = Broker(tmp_path)
    yield made
    made.kill()


def put(spool: Spool, numbers: range) -> None:
    for number in numbers:
        item = Part(f"p{number}", "one", now(), Verdict.NG if number % 2 else Verdict.OK, "score", score=1.0)
        spool.append(item.key, item.to_json().encode())


def delivery(spool: Spool, port: int, name: str = "mqtt", **options: Any) -> Delivery:
    config = SinkConfig("mqtt", name, KINDS["mqtt"](host="127.0.0.1", port=port, **options))
    return Delivery(name, make_sink(config, Path(), "l1"), spool.reader(name), 0.05)


def names(numbers: range) -> list[str]:
    return [f"p{number}" for number in numbers]


def test_everything_arrives_in_order_and_the_status_is_retained(broker: Broker, tmp_path: Path) -> None:
    broker.start()
    listener = Listener(broker.port)
    spool = Spool(tmp_path / "spool")
    sink = delivery(spool, broker.port)
    put(spool, range(500))
    assert wait_until(lambda: sink.state()["backlog"] == 0)
    assert wait_until(lambda: len(listener.records) >= 500)
    assert [record["part_id"] for record in listener.records] == names(range(500))
    assert listener.topics == {"saae/l1/one/parts"}
    late = Listener(broker.port)
    assert wait_until(lambda: late.status)
    assert late.status == [("online", True)]
    sink.finish(time.monotonic() + 5)
    spool.close()
    assert wait_until(lambda: late.status[-1][0] == "offline")
    listener.close()
    late.close()


def test_a_broker_that_is_dead_for_the_whole_run_gets_everything_afterwards(broker: Broker, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    sink = delivery(spool, broker.port)
    put(spool, range(300))
    assert wait_until(lambda: sink.state()["last_error"])
    begin = time.monotonic()
    sink.finish(time.monotonic() + 1.0)
    assert time.monotonic() - begin < 10  # no timing, but an end: it does not wait for the broker
    spool.close()
    broker.start()
    listener = Listener(broker.port)
    spool = Spool(tmp_path / "spool")
    sink = delivery(spool, broker.port)
    put(spool, range(300, 310))
    assert wait_until(lambda: len(listener.ids) == 310)
    assert [record["part_id"] for record in listener.records] == names(range(310))
    sink.finish(time.monotonic() + 5)
    spool.close()
    listener.close()


def test_a_broker_that_is_killed_and_restarted_loses_nothing(broker: Broker, tmp_path: Path) -> None:
    broker.start()
    spool = Spool(tmp_path / "spool")
    sink = delivery(spool, broker.port)
    got: set[str] = set()
    done = 0
    for _ in range(3):
        listener = Listener(broker.port)
        put(spool, range(done, done + 400))
        done += 400
        wait_until(lambda listener=listener: len(listener.records) > 20)
        broker.kill()
        put(spool, range(done, done + 50))
        done += 50
        listener.close()
        got |= set(listener.ids)
        # A broker without a disk forgets what it had acknowledged and not handed on yet.
        broker.start()
    assert wait_until(lambda: sink.state()["backlog"] == 0, 60)
    assert sink.state()["delivered"] >= done
    last = Listener(broker.port)
    put(spool, range(done, done + 5))
    assert wait_until(lambda: set(names(range(done, done + 5))) <= set(last.ids))
    sink.finish(time.monotonic() + 5)
    spool.close()
    last.close()
    assert got


def test_only_ng(broker: Broker, tmp_path: Path) -> None:
    broker.start()
    listener = Listener(broker.port)
    spool = Spool(tmp_path / "spool")
    sink = delivery(spool, broker.port, only_ng=True)
    put(spool, range(20))
    assert wait_until(lambda: sink.state()["backlog"] == 0)
    assert wait_until(lambda: len(listener.records) == 10)
    assert {record["verdict"] for record in listener.records} == {"NG"}
    sink.finish(time.monotonic() + 5)
    spool.close()
    listener.close()


def test_two_sinks_of_a_line_do_not_disconnect_each_other(broker: Broker, tmp_path: Path) -> None:
    broker.start()
    spool = Spool(tmp_path / "spool")
    sinks = [delivery(spool, broker.port, name=name, topic=f"saae/{name}") for name in ("a", "b")]
    put(spool, range(3))
    assert wait_until(lambda: all(sink.state()["connected"] and sink.state()["backlog"] == 0 for sink in sinks))
    assert stay_connected(sinks)
    for sink in sinks:
        sink.finish(time.monotonic() + 5)
    spool.close()


@pytest.mark.parametrize("options", [{}, {"client_id": "press-7"}])
def test_a_check_does_not_disturb_the_line_that_runs(broker: Broker, tmp_path: Path, options: dict[str, str]) -> None:
    broker.start()
    spool = Spool(tmp_path / "spool")
    sink = delivery(spool, broker.port, **options)
    assert wait_until(lambda: sink.state()["connected"])
    listener = Listener(broker.port)
    assert wait_until(lambda: listener.status)
    config = SinkConfig("mqtt", "mqtt", KINDS["mqtt"](host="127.0.0.1", port=broker.port, **options))
    line = LineConfig(tmp_path / "line.toml", LineOptions(name="l1"), (), (), (config,), None, HealthConfig())
    found = check_line(line)
    first = next(found)  # and its connection is open still
    assert (first.what, first.good) == ("sink mqtt", True)
    assert "connected True" in first.words
    assert stay_connected([sink])
    assert all(item.good for item in found)
    put(spool, range(2))
    assert wait_until(lambda: listener.ids == names(range(2)))
    assert listener.status == [("online", True)]
    sink.finish(time.monotonic() + 5)
    spool.close()
    listener.close()


def stay_connected(sinks: list[Delivery]) -> bool:
    """Whether none loses its connection within a second and a half; a client that was thrown off comes back in one."""
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        if not all(sink.state()["connected"] for sink in sinks):
            return False
        time.sleep(0.005)
    return True


def test_the_last_will_says_offline(broker: Broker, tmp_path: Path) -> None:
    broker.start()
    listener = Listener(broker.port)
    support = str(Path(__file__).parents[3] / "support")
    code = f"""
import importlib.util, sys, time
from pathlib import Path
sys.path.insert(0, {support!r})
spec = importlib.util.spec_from_file_location("mqtt_test", {__file__!r})
module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
spool = module.Spool(Path({str(tmp_path)!r}) / "spool")
sink = module.delivery(spool, {broker.port})
module.put(spool, range(3))
module.wait_until(lambda: sink.state()["backlog"] == 0)
print("there", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        assert wait_until(lambda: listener.status and listener.status[-1][0] == "online")
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert wait_until(lambda: listener.status[-1][0] == "offline", 40)
    listener.close()
