"""Which normal images a fitted model has not seen: compared by content, whatever the files are called now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import FitConfig
from .category import MIN_HELD_OUT, Category, Sample, content_digest, content_hashes, split_held_out

__all__ = ["Unseen", "unseen_images"]


@dataclass(frozen=True)
class Unseen:
    """Normal images to calibrate or test on.

    Attributes:
        samples: the images.
        honest: whether the model was fitted on none of them.
        note: what a person must know about the choice; empty where nothing is odd.
    """

    samples: tuple[Sample, ...]
    honest: bool
    note: str = ""


def unseen_images(facts: Mapping[str, Any], config: FitConfig, category: Category) -> Unseen:
    """The held-out part of a category's normal images by the model's own split, or those that it was not fitted on.

    Args:
        facts: of the checkpoint (`fitted_on`: sha256 of the fitted images; `digest`: of them all, in earlier versions).
        config: the checkpoint's; its share and seed make the split.
        category: the images at hand.

    Raises:
        DataError: too few images to split, or one that cannot be read.
    """
    fitting, held_out = split_held_out(category.train, config.held_out, seed=config.seed)
    if "fitted_on" not in facts:
        if facts.get("digest") == content_digest(fitting):
            return Unseen(held_out, True)
        return Unseen(
            held_out,
            False,
            "The model does not say which images it was fitted on: it may have seen some of those it is "
            "calibrated on. The bundle says so, too.",
        )
    seen = set(facts["fitted_on"])
    overlap = sum(key in seen for key in content_hashes(held_out))
    if not overlap:
        return Unseen(held_out, True)
    every = zip(content_hashes(category.train), category.train, strict=True)
    new = {key: sample for key, sample in every if key not in seen}
    if len(new) >= MIN_HELD_OUT:
        return Unseen(
            tuple(new[key] for key in sorted(new)),
            True,
            f"These are not just the images that the model was fitted on: taking the {len(new)} that it has not seen.",
        )
    return Unseen(
        held_out,
        False,
        f"{overlap} of the {len(held_out)} images to calibrate on were FITTED ON: thresholds come out too low, and "
        "good parts will be called defective. Add normal images that the model has not seen.",
    )
