"""What a fit says about itself: the same after the disk, also from other versions; a wrong value is named."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saae_train.record import FitRecord

WHOLE = FitRecord(
    images=7,
    digest="ab",
    fitted_on=("1", "2"),
    held_out=("größer.png",),
    synthetic=False,
    texture=True,
    device="cpu",
    precision="bf16",
    captured_steps=3,
    seconds_features=1.5,
    seconds_fit=2.5,
    loss=((1, 0.5), (2, 0.25)),
    tools={"torch": "2.0"},
)


@pytest.mark.parametrize("record", [WHOLE, FitRecord(), FitRecord(fitted_on=())])
def test_the_same_after_the_disk(record: FitRecord) -> None:
    assert FitRecord.from_json(json.loads(json.dumps(record.to_json()))) == record


def test_the_keys_on_disk() -> None:
    values = WHOLE.to_json()
    assert values["bf16"] is True
    assert values["loss"] == [[1, 0.5], [2, 0.25]]
    assert "digest" not in FitRecord().to_json()


def test_keys_of_other_versions_do_not_matter() -> None:
    assert FitRecord.from_json({"digest": "ab", "seconds_fit": 3, "later": [1]}) == FitRecord(
        digest="ab", seconds_fit=3.0
    )


@given(
    st.sampled_from(["images", "fitted_on", "texture", "seconds_fit", "loss", "tools", "precision"]),
    st.sampled_from([{"a": 1}, ["x", 1], [[1, 2, 3]], 1.5j, object()]),
)
def test_a_value_of_another_type_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"facts.{name}: expected"):
        FitRecord.from_json({name: value})


def test_something_else_than_an_object() -> None:
    with pytest.raises(ValueError, match="expected an object"):
        FitRecord.from_json([1])
