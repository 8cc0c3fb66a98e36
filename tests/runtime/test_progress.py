"""Progress handed on: with other words, and as one part of several."""

from __future__ import annotations

from saae_runtime.progress import labelled, nth, silent


def test_words_are_put_to_the_numbers() -> None:
    calls: list[tuple[int, int, str]] = []
    labelled(lambda done, total, text="": calls.append((done, total, text)), "ranges")(3, 7)
    assert calls == [(3, 7, "ranges")]


def test_parts_count_on() -> None:
    calls: list[tuple[int, int, str]] = []
    for number in range(3):
        nth(lambda done, total, text="": calls.append((done, total, text)), number, 3)(2, 4, "images")
    assert calls == [(2, 12, "images"), (6, 12, "images"), (10, 12, "images")]


def test_nobody_is_told() -> None:
    silent(1, 2, "x")
