"""The meter: counts, percentiles of the latest times, the latest error, from many threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from saae_runtime.errors import ConfigError
from saae_runtime.meter import Meter, one_line


def test_it_shows_nothing_before_the_first() -> None:
    reading = Meter().read()
    assert (reading.counts, reading.latency_ms, reading.last_error, reading.error_age) == ({}, {}, None, None)


def test_threads_lose_no_count() -> None:
    meter = Meter()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: [meter.count("a"), meter.count("b", 2), meter.take(1.0)], range(2000)))
    assert meter.read().counts == {"a": 2000, "b": 4000}


def test_percentiles_are_of_the_latest() -> None:
    meter = Meter()
    for value in [*[1e6] * 500, *range(1, 2001)]:
        meter.take(value)
    found = meter.read().latency_ms
    assert found[50] == pytest.approx(1000.5)
    assert found[95] == pytest.approx(1900, abs=1)
    assert meter.read().to_dict()["latency_ms"].keys() == {"p50", "p95", "p99"}


def test_errors_are_one_line() -> None:
    meter = Meter()
    meter.fail(ConfigError("It failed.", "why\nnot", "try"))
    assert meter.read().last_error == "It failed. why: why not try: try"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line("x" * 1000)) == 300
    assert one_line("T\udcfcr.png is\nbad") == r"T\udcfcr.png is bad"
