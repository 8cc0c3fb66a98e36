"""What a result says in words: the threshold that decided, in numbers that can be told apart."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from saae_runtime.result import decision

numbers = st.floats(-1e6, 1e6, width=32)


@given(numbers, numbers)
def test_the_sentence_agrees_with_the_verdict_and_its_own_numbers(score: float, limit: float) -> None:
    text = decision(score, limit)
    shown = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?", text)]
    assert len(shown) == 2
    assert text.startswith("defective" if score > limit else "clean")
    assert (shown[0] > shown[1]) == (score > limit)


def test_numbers_are_short_where_that_is_enough() -> None:
    assert decision(0.51234, 0.4) == "defective: image score 0.5123 is above the image threshold 0.4"
    assert decision(0.4000001, 0.4) == "defective: image score 0.4000001 is above the image threshold 0.4"
    assert decision(0.4, 0.4) == "clean: image score 0.4 is not above the image threshold 0.4"
