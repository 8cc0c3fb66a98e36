"""Images of good parts to calibrate on: find them, check them, and tell what their number means for the thresholds."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from saae_runtime.errors import ConfigError, DataError
from saae_runtime.progress import Progress, silent
from saae_runtime.sources.files import find_sources
from saae_runtime.sources.video import VIDEO_SUFFIXES
from saae_runtime.thresholds import ThresholdTable
from saae_train.data.category import GOOD, Category, Sample
from saae_train.data.check import check
from saae_train.data.split import MIN_HELD_OUT, content_hashes

__all__ = ["about_images", "check_images", "find_images", "without_fitted"]

_SHOWN = 1000  # unreadable images named in one error


def find_images(names: Sequence[str], excluded: Sequence[str] = ()) -> tuple[Sample, ...]:
    """The images that files, folders (with those below them) and glob patterns name, each once.

    Args:
        names: the files, folders and patterns.
        excluded: paths of images among them to leave out.

    Raises:
        ConfigError: a name that is none of these, or a video or a camera; an excluded one that is not among them.
        DataError: a folder or pattern without images; nothing is left.
    """
    for name in names:
        if name.startswith("camera:") or Path(name).suffix.lower() in VIDEO_SUFFIXES:
            raise _no_image(name)
    found: dict[Path, Sample] = {}
    for source in find_sources(names, recursive=True):
        if source.path is None or source.kind != "image":
            raise _no_image(source.name)
        found.setdefault(source.path.resolve(), Sample(source.path, GOOD, None, False))
    for name in excluded:
        if found.pop(Path(name).resolve(), None) is None:
            raise ConfigError(
                f"--exclude {name} is none of the images.",
                f"There are {len(found)}, such as {next(iter(found), 'none')}.",
                "give the path of an image that --normal names, once",
            )
    if excluded and not found:
        raise DataError("No image is left to calibrate on.", "--exclude leaves out all of them.", "give more images")
    return tuple(found.values())


def check_images(category: str, samples: Sequence[Sample], progress: Progress = silent) -> tuple[str, ...]:
    """Open every image; return warnings, one line each.

    Args:
        category: the product's name, for messages.
        samples: the images.
        progress: called with (done, total).

    Raises:
        DataError: too few different images, or unusable ones, which are listed.
    """
    root = samples[0].path.parent if samples else Path()
    report = check(Category(category, root, tuple(samples), ()), progress=progress)
    report.raise_if_bad(_SHOWN)
    different = len(set(content_hashes(samples)))
    if different < MIN_HELD_OUT:
        raise DataError(
            f"Thresholds cannot be calibrated on {different} different image{'' if different == 1 else 's'}.",
            f"At least {MIN_HELD_OUT} are needed; 50 or more are advisable.",
            "give more images of good parts: --normal FOLDER",
        )
    return tuple(str(problem) for problem in report.warnings)


def without_fitted(samples: Sequence[Sample], fitted: Collection[str]) -> tuple[list[Sample], tuple[str, ...]]:
    """The images that a memory was not made from, and a remark if there are others.

    A memory holds patches of its images, so their distances are next to nothing, and a threshold from them would reject
    good parts.

    Args:
        samples: the images.
        fitted: sha256 of the files that the memory was made from, see `saae_export.fitted`.

    Raises:
        DataError: all of them are in the memory.
    """
    new = [sample for sample, key in zip(samples, content_hashes(samples), strict=True) if key not in fitted]
    if len(new) == len(samples):
        return new, ()
    if not new:
        raise DataError(
            "The model was fitted on all of these images.",
            "Its memory holds their patches: their scores are next to nothing, and thresholds would come out too low.",
            "give images of good parts that it has not seen",
        )
    count = len(samples) - len(new)
    return new, (
        f"{count} of the {len(samples)} images are in the model's memory and do not count: their scores would make the "
        "thresholds too low",
    )


def about_images(samples: Sequence[Sample], scores: Sequence[float], table: ThresholdTable) -> tuple[str, ...]:
    """What the number of images means for the image T, and which image decides it; empty for many images.

    Args:
        samples: the images, at least two.
        scores: their image scores, of one precision.
        table: of these scores.
    """
    count, rate = len(samples), table.default_fpr
    if rate * count >= 1.0 or table.rule == "log-normal":  # its T rests on all of them
        return ()
    first = int(np.argmax(scores))
    second = float(np.partition(np.asarray(scores), -2)[-2])
    notes = []
    if rate > 0.0:
        notes.append(
            f"an image FPR of {rate:g} cannot be told from 0 with {count} images (1/{count} is {1.0 / count:.2g}): "
            "the image T lies just above the largest score"
        )
    notes.append(
        f"the image T rests on {samples[first].path} (score {scores[first]:.4g}, the next {second:.4g}): "
        "make sure that it shows a good part"
    )
    notes.append(
        f"up to 1 in {count + 1} further good parts like these will lie above it: it is the largest of {count}"
    )
    return tuple(notes)


def _no_image(name: str) -> ConfigError:
    return ConfigError(
        f"{name}: thresholds are calibrated on images.", "This is a video or a camera.", "save its frames as images"
    )
