"""Health of the line as a snapshot, and its metrics for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import ConfigError

__all__ = ["is_live", "is_ready", "prometheus_text"]


def is_ready(health: Mapping[str, Any]) -> bool:
    """Whether every station can judge: its camera is connected and its verdicts are not stuck."""
    return all(station["ready"] for station in health["stations"])


def is_live(health: Mapping[str, Any]) -> bool:
    """Whether every station's thread is alive; if not, only a restart helps."""
    return all(station["live"] for station in health["stations"])


def prometheus_text(health: Mapping[str, Any]) -> bytes:
    """A snapshot in Prometheus's text format, from a separate registry.

    Args:
        health: from `saae_runtime.line.service.Line.health`.

    Raises:
        ConfigError: prometheus-client is not installed.
    """
    try:
        from prometheus_client import CollectorRegistry, generate_latest
    except ImportError as error:
        raise ConfigError("Metrics are not available.", str(error), "pip install 'saae[line]'") from error

    class Collector:
        def collect(self) -> Iterator[Any]:
            yield from _metrics(health)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector())
    return bytes(generate_latest(registry))


def _metrics(health: Mapping[str, Any]) -> Iterator[Any]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    parts = CounterMetricFamily("saae_parts", "Parts by verdict.", labels=["station", "verdict"])
    failed = CounterMetricFamily("saae_parts_failed", "Parts that are NG without a score.", labels=["station", "why"])
    missed = CounterMetricFamily("saae_parts_missed", "Requested parts that no station took.", labels=["station"])
    dropped = CounterMetricFamily("saae_frames_dropped", "Frames that were not judged.", labels=["station"])
    latency = GaugeMetricFamily(
        "saae_latency_seconds", "From trigger to verdict, of the latest parts.", labels=["station", "quantile"]
    )
    flags = GaugeMetricFamily("saae_station", "1: yes, 0: no.", labels=["station", "state"])
    for station in health["stations"]:
        name, counts = station["name"], station["counts"]
        for verdict in ("OK", "NG"):
            parts.add_metric([name, verdict], counts.get(verdict, 0))
        for why in ("timeout", "error"):
            failed.add_metric([name, why], counts.get(why, 0))
        missed.add_metric([name], counts.get("missed", 0))
        dropped.add_metric([name], counts.get("dropped", 0))
        for rank, value in station["latency_ms"].items():
            latency.add_metric([name, f"0.{rank[1:]}"], value / 1000)
        for state in ("ready", "live", "camera_connected"):
            flags.add_metric([name, state], float(station[state]))
    yield from (parts, failed, missed, dropped, latency, flags)
    for key, text in (
        ("delivered", "Records delivered."),
        ("lost", "Records that did not arrive: the spool was full, or they were damaged."),
        ("refused", "Records that the other side will never take."),
    ):
        family = CounterMetricFamily(f"saae_sink_{key}", text, labels=["sink"])
        for sink in health["sinks"]:
            family.add_metric([sink["name"]], sink[key])
        yield family
    backlog = GaugeMetricFamily("saae_sink_backlog", "Records that wait.", labels=["sink"])
    working = GaugeMetricFamily("saae_sink_working", "0 while it fails.", labels=["sink"])
    for sink in health["sinks"]:
        backlog.add_metric([sink["name"]], sink["backlog"])
        working.add_metric([sink["name"]], float(sink["working"]))
    yield from (backlog, working)
    spool = health["spool"]
    yield GaugeMetricFamily("saae_spool_bytes", "Size of the records on disk.", value=spool["bytes"])
    yield CounterMetricFamily("saae_spool_lost", "Records that could not be stored.", value=spool["lost"])
    yield CounterMetricFamily("saae_spool_doubled", "Records refused as repeats.", value=spool["doubled"])
    yield CounterMetricFamily("saae_spool_damaged", "Records that could not be read.", value=spool["damaged"])
    drift = GaugeMetricFamily("saae_drift_alarm", "1 while scores have drifted.", labels=["station", "recipe"])
    for item in health["drift"]:
        drift.add_metric([item["station"], item["recipe"]], float(item["alarm"]))
    yield drift
    if health.get("archive"):
        archive = health["archive"]
        yield GaugeMetricFamily("saae_archive_bytes", "Size of the images on disk.", value=archive["bytes"])
        yield CounterMetricFamily("saae_archive_left_out", "Images that were not kept.", value=archive["left_out"])
