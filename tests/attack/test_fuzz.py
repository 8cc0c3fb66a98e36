"""Every loader under damaged inputs: 500 each here, 10,000 each by `python -m pytest tests/attack -m fuzz -s`."""

from __future__ import annotations

import fuzz_loaders
import pytest


@pytest.mark.parametrize("name", fuzz_loaders.FUZZERS)
@pytest.mark.parametrize("inputs", [500, pytest.param(10_000, marks=pytest.mark.fuzz)])
def test_damaged_inputs_end_in_results_or_named_errors(name: str, inputs: int) -> None:
    count = fuzz_loaders.run(name, inputs, seed=inputs)
    print(f"\n{name}: {count}")
    assert not count.violations
    assert count.inputs == inputs
    assert sum(count.errors.values()) > inputs // 20  # the damage reaches the loader
