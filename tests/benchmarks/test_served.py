"""benchmarks/served.py: what a turn counts, and that a failure in a client ends it."""

from __future__ import annotations

import threading
import time

import pytest

from benchmarks.served import turn


def test_a_turn_counts_every_request_but_the_first_of_each_client() -> None:
    asked = []

    def ask() -> None:
        asked.append(threading.get_ident())
        time.sleep(0.002)

    times, wall = turn(ask, 3, 0.1)
    assert len(asked) == len(times) + 3
    assert len(set(asked)) == 3
    assert min(times) >= 0.002
    assert wall >= 0.1


@pytest.mark.parametrize("first", [True, False])
def test_a_failure_in_one_client_is_raised(first: bool) -> None:
    calls = []

    def ask() -> None:
        calls.append(None)
        time.sleep(0.001)
        if first or len(calls) > 6:
            raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        turn(ask, 2, 0.1)
