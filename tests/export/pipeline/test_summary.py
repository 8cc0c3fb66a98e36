"""What a build says of its verdicts: what to expect, and a warning only where good images contradict it."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from saae_export.pipeline.measure import say_verdicts
from saae_export.pipeline.summary import promise
from saae_runtime.terminal import Stages
from saae_runtime.thresholds import ThresholdTable

SCORES = [1.0 + 0.01 * number for number in range(40)]


def quantile(rate: float) -> ThresholdTable:
    return ThresholdTable.from_samples(SCORES, rate)


def estimated(rate: float) -> ThresholdTable:
    return ThresholdTable.estimated(SCORES, rate)


@pytest.mark.parametrize(
    ("table", "held_out", "words"),
    [
        (estimated(0.05), False, "50 of 1000 good parts rejected by the default threshold, estimated from 40 images"),
        (estimated(0.0), False, "about 0.1 of 1000 good parts rejected"),
        (estimated(1e-6), False, "about 0.1 of 1000 good parts rejected"),
        (
            quantile(0.0),
            True,
            "threshold above all of 40 held-out images, so that about 1 in 41 good parts is rejected",
        ),
        (quantile(0.01), True, "threshold above all of 40 held-out images"),
        (quantile(0.5), None, "threshold that 50 % of 40 good images exceed"),
        (quantile(0.0), False, "40 good images (the model was FITTED on some of them)"),
    ],
)
def test_what_is_promised(table: ThresholdTable, held_out: bool | None, words: str) -> None:
    assert promise(table, held_out).startswith(words) or words in promise(table, held_out)


def said(table: ThresholdTable, alarms: int, good: int) -> str:
    images = [SimpleNamespace(score=9.0 if number < alarms else 0.0, is_anomalous=False) for number in range(good)]
    evaluation: Any = SimpleNamespace(images=images, image_threshold=5.0)
    console = Console(file=io.StringIO(), width=400)
    say_verdicts(evaluation, table, Stages(console, 1))
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("alarms", "warned"), [(0, False), (1, False), (2, False), (8, True)])
def test_a_false_alarm_or_two_above_the_largest_of_forty_is_no_surprise(alarms: int, warned: bool) -> None:
    words = said(quantile(0.0), alarms, 28)
    assert f"{alarms} of 28 good ones called defective" in words
    assert ("WARNING" in words) == warned
    if warned:
        assert "where 1 in 41 were expected" in words
        assert "saae-export calibrate BUNDLE --normal FOLDER" in words


@pytest.mark.parametrize(("alarms", "warned"), [(3, False), (15, True)])
def test_many_false_alarms_contradict_an_estimate(alarms: int, warned: bool) -> None:
    words = said(estimated(0.05), alarms, 28)
    assert ("WARNING" in words) == warned
    assert ("where 5.0% were expected" in words) == warned
