"""Recognises the folder layouts of published data sets and lists their normal images, test images and masks."""

from __future__ import annotations

import csv
import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from saae_runtime.images import IMAGE_SUFFIXES, read_mask
from saae_runtime.sources.folders import folders_below

from .sample import GOOD, Finding, Sample

__all__ = ["GOOD_NAMES", "Listing", "is_category", "list_category", "pooled_masks", "samples_in", "subfolders"]

GOOD_NAMES = frozenset({GOOD, "ok", "normal"})
"""Folder names, in lower case, that hold normal images."""

_MASK_WORD = re.compile(r"[_-](?:mask|masks|gt|seg|label)$", re.IGNORECASE)
_MASK_NUMBER = re.compile(r"[_-]\d+$")

_SIDE_FILES = frozenset(
    {"", ".csv", ".db", ".htm", ".html", ".ini", ".json", ".log", ".md", ".md5", ".pdf", ".sha256", ".txt", ".url"}
    | {".xml", ".yaml", ".yml"}
)
"""Endings of side files that are ignored."""

_EVERY = 5
"""Without a published split, one normal group in this many is for testing."""


@dataclass
class Listing:
    """What was found in a category's folder.

    Attributes:
        layout: the layout's name, with a remark on how it was read if that is not evident.
        train, test: the images, sorted.
        findings: what looks wrong.
        ignored: side files.
    """

    layout: str = ""
    train: list[Sample] = field(default_factory=list)
    test: list[Sample] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    ignored: list[Path] = field(default_factory=list)


def is_category(folder: Path) -> bool:
    """Whether `list_category` can read this folder."""
    return (folder / "train").is_dir() or _visa_images(folder) is not None or _is_kolektor(folder)


def list_category(folder: Path) -> Listing:
    """List the images of a category's folder by the layout that it has.

    MVTec AD (`train/good`, `test/<defect>`, `ground_truth/<defect>`), MVTec LOCO AD (several masks an image, in a
    folder of its name), MVTec AD 2 (`test_public`), BTAD (`ok` and `ko`), VisA (`Data/Images`, split by
    `split_csv/1cls.csv` beside the categories where that is there), KolektorSDD (a folder a part) and KolektorSDD2
    (`train` and `test`, masks beside the images).
    """
    if _visa_images(folder) is not None:
        return _visa(folder)
    if (folder / "train").is_dir() and not _good_folders(folder / "train") and _labels_beside(folder / "train"):
        return _kolektor2(folder)
    if not (folder / "train").is_dir() and _is_kolektor(folder):
        return _kolektor(folder)
    return _mvtec(folder)


def samples_in(
    folder: Path,
    label: str,
    listing: Listing,
    masks: Path | None = None,
    *,
    nested: bool = False,
    skip_folders: bool = False,
) -> list[Sample]:
    """The images directly in `folder` (and below it if `nested`), with their masks when a mask folder is given.

    Args:
        folder: where.
        label: of the images; anything but "good" is a defect.
        listing: takes what looks wrong.
        masks: folder of their masks, see `_assigned` for the names.
        nested: whether folders below are read too.
        skip_folders: leave out folders without a finding.
    """
    images: list[Path] = []
    if nested:  # the runtime's rule: links to folders are followed, and no folder is read twice
        for below in folders_below(folder):
            if below != folder:
                images += [s.path for s in samples_in(below, label, listing, skip_folders=True)]
    for entry in entries(folder):
        if entry.is_dir():
            if not nested and not skip_folders:
                listing.findings.append(Finding(entry, "is a folder among images; what is inside is not used"))
        elif _is_image(entry, listing, "is not an image file (by its name)"):
            images.append(entry)
    images.sort()
    if masks is None:
        return [Sample(image, label, None, label != GOOD) for image in images]
    return _with_masks([Sample(image, label, None, label != GOOD) for image in images], masks, listing)


def pooled_masks(
    samples: Sequence[Sample], folder: Path, listing: Listing, leave_out: Collection[str] = ()
) -> list[Sample]:
    """Defective samples of any types with the masks that all lie in one folder.

    Args:
        samples: without masks.
        folder: of the masks.
        listing: takes what looks wrong; a name that several of the images share is a finding.
        leave_out: folders inside that hold the masks of other images.
    """
    stems = Counter(sample.path.stem for sample in samples)
    alone = [sample for sample in samples if stems[sample.path.stem] == 1]
    for sample in samples:
        if stems[sample.path.stem] > 1:
            what = f"has no mask of its own: {stems[sample.path.stem]} defective images share this name, and so a mask"
            listing.findings.append(Finding(sample.path, what))
    found = {s.path: s for s in _with_masks(alone, folder, listing, leave_out)}
    return [found.get(sample.path, sample) for sample in samples]


def subfolders(folder: Path) -> list[Path]:
    """Subfolders, sorted by name, without hidden ones."""
    return [entry for entry in entries(folder) if entry.is_dir()]


def entries(folder: Path) -> list[Path]:
    """Entries of a folder, sorted by name, without hidden files; none if it is missing."""
    if not folder.is_dir():
        return []
    return sorted(e for e in folder.iterdir() if not e.name.startswith("."))


def _mvtec(folder: Path) -> Listing:
    listing = Listing("MVTec AD")
    words = []
    good = _good_folders(folder / "train")
    for place in good:
        listing.train += samples_in(place, GOOD, listing)
    for other in entries(folder / "train"):
        if other not in good and not _is_side_file(other, listing):
            what = f"is not used: training takes normal images only, from train/{GOOD}"
            listing.findings.append(Finding(other, what))
    for place in _good_folders(folder / "validation"):
        more = samples_in(place, GOOD, listing)
        listing.train += more
        words.append(f"{len(more)} normal images of validation taken for training and calibration")
    test, truth = folder / "test", folder / "ground_truth"
    if not test.is_dir() and (folder / "test_public").is_dir():
        test, truth = folder / "test_public", folder / "test_public" / "ground_truth"
        listing.layout = "MVTec AD 2"
        words.append("test_public is the test set; the private ones have no labels")
    elif any(place.name.lower() == "ok" for place in good):
        listing.layout = "BTAD"
    _mvtec_test(test, truth, listing)
    if any(sample.mask is not None and sample.mask.parent.parent.parent == truth for sample in listing.test):
        listing.layout = "MVTec LOCO AD"
    listing.layout = ": ".join([listing.layout, *(["; ".join(words)] if words else [])])
    return listing


def _mvtec_test(test: Path, truth: Path, listing: Listing) -> None:
    for entry in entries(test):
        if not entry.is_dir() and not _is_side_file(entry, listing):
            what = "lies outside the folders of test images (test/good, test/<defect>)"
            listing.findings.append(Finding(entry, what))
    types = [entry for entry in subfolders(test) if entry != truth and entry.name.lower() not in GOOD_NAMES]
    for entry in _good_folders(test):
        listing.test += samples_in(entry, GOOD, listing)
    if any(entries(truth)) and not any((truth / entry.name).is_dir() for entry in types):
        good = {entry.name for entry in _good_folders(truth)}
        listing.test += pooled_masks(
            [sample for entry in types for sample in samples_in(entry, entry.name, listing)], truth, listing, good
        )
        return
    for entry in types:
        listing.test += samples_in(entry, entry.name, listing, truth / entry.name if truth.is_dir() else None)
    labels = {sample.label for sample in listing.test}
    for entry in entries(truth):
        known = entry.name in labels or entry.name.lower() in GOOD_NAMES or _is_side_file(entry, listing)
        if not known and (not entry.is_dir() or any(entries(entry))):
            what = f"belongs to no test images: there is no test/{entry.name} with images"
            listing.findings.append(Finding(entry, what))


def _visa(folder: Path) -> Listing:
    images = _visa_images(folder)
    assert images is not None
    listing = Listing("VisA")
    table = folder.parent / "split_csv" / "1cls.csv"
    places = {entry.name.lower(): entry for entry in entries(images)}
    good = samples_in(places["normal"], GOOD, listing)
    masks = images.parent / "Masks" / places["anomaly"].name if "anomaly" in places else None
    bad = (
        samples_in(places["anomaly"], "anomaly", listing, masks if masks is not None and masks.is_dir() else None)
        if "anomaly" in places
        else []
    )
    held: set[str] = set()
    if table.is_file():
        with table.open(newline="", encoding="utf-8-sig") as stream:
            for row in csv.DictReader(stream):
                if row.get("object") == folder.name and row.get("split") == "test":
                    held.add(Path(row.get("image") or "").as_posix())
        listing.layout += f": split by {table.parent.name}/{table.name}"
    testing = [s for s in good if s.path.relative_to(folder.parent).as_posix() in held]
    if not testing:
        testing = good[_EVERY - 1 :: _EVERY]
        listing.layout = f"VisA: no split of its own, every {_EVERY}th normal image is for testing"
    chosen = {sample.path for sample in testing}
    listing.train = [sample for sample in good if sample.path not in chosen]
    listing.test = [*testing, *bad]
    return listing


def _kolektor(folder: Path) -> Listing:
    listing = Listing(f"KolektorSDD: no split of its own, the normal images of every {_EVERY}th part are for testing")
    for number, part in enumerate(subfolders(folder)):
        good, bad = _beside(part, listing)
        (listing.test if number % _EVERY == _EVERY - 1 else listing.train).extend(good)
        listing.test += bad
    listing.test.sort(key=lambda sample: sample.is_anomalous)
    for entry in entries(folder):
        if not entry.is_dir() and not _is_side_file(entry, listing):
            listing.findings.append(Finding(entry, "lies outside the folders of the parts"))
    return listing


def _kolektor2(folder: Path) -> Listing:
    listing = Listing("KolektorSDD2")
    good, bad = _beside(folder / "train", listing)
    listing.train = good
    if bad:
        listing.layout += f": {len(bad)} defective images of train are left out"
    good, bad = _beside(folder / "test", listing)
    listing.test = [*good, *bad]
    return listing


def _beside(folder: Path, listing: Listing) -> tuple[list[Sample], list[Sample]]:
    """Normal and defective images of a folder in which every image has a mask beside it, black for a normal one."""
    files = [e for e in entries(folder) if _is_image(e, listing, "is not an image file (by its name)")]
    masks = [file for file in files if _MASK_WORD.search(file.stem)]
    images = [Sample(file, "defect", None, True) for file in files if not _MASK_WORD.search(file.stem)]
    good: list[Sample] = []
    bad: list[Sample] = []
    for sample in _joined(images, masks, folder, listing):
        if sample.mask is not None and not any(_marks(mask) for mask in sample.masks):
            good.append(Sample(sample.path, GOOD, None, False))
        elif sample.mask is not None:
            bad.append(sample)
    return good, bad


def _marks(mask: Path) -> bool:
    """Whether a mask marks anything; True if it cannot be read, because `check` reports that."""
    try:
        return bool(read_mask(mask).any())
    except Exception:  # `check` reports it, with the reason
        return True


def _with_masks(
    samples: Sequence[Sample], folder: Path, listing: Listing, leave_out: Collection[str] = ()
) -> list[Sample]:
    """Samples with the masks in a folder, and in folders inside it that are named after an image."""
    masks: list[Path] = []
    for entry in entries(folder):
        if entry.is_dir() and entry.name not in leave_out:
            inner = [e for e in entries(entry) if e.suffix.lower() in IMAGE_SUFFIXES]
            masks += inner
            if not inner:
                listing.findings.append(Finding(entry, "is not a mask file (by its name)"))
        elif not entry.is_dir() and _is_image(entry, listing, "is not a mask file (by its name)"):
            masks.append(entry)
    return _joined(samples, masks, folder, listing)


def _joined(samples: Sequence[Sample], masks: Sequence[Path], folder: Path, listing: Listing) -> list[Sample]:
    """Samples with their masks; an image without one, and a mask without an image, is a finding."""
    owner = _assigned(masks, {sample.path.stem for sample in samples}, folder)
    of: dict[str, list[Path]] = {}
    for mask, stem in owner.items():
        of.setdefault(stem, []).append(mask)
    result = []
    for sample in samples:
        found = sorted(of.get(sample.path.stem, []))
        if not found:
            wanted = folder / f"{sample.path.stem}_mask.png"
            listing.findings.append(Finding(sample.path, f"has no mask: {wanted} is missing"))
        first, more = (found[0], tuple(found[1:])) if found else (None, ())
        result.append(dataclasses.replace(sample, mask=first, more_masks=more))
    for mask in masks:
        if mask not in owner:
            listing.findings.append(Finding(mask, "is a mask without an image"))
    return result


def _assigned(masks: Iterable[Path], stems: set[str], folder: Path) -> dict[Path, str]:
    """Mask -> stem of its image.

    The mask of `7.png` is called `7`, or `7` with `_mask`, `_gt`, `_seg` or `_label` (in any letter case); of several,
    each has a number before or behind that word, or they lie in a folder called `7`.
    """
    found: dict[Path, str] = {}
    for mask in masks:
        if mask.parent != folder:
            names = [mask.parent.name]
        else:
            plain = _MASK_WORD.sub("", mask.stem)
            bare = _MASK_NUMBER.sub("", mask.stem)
            names = [mask.stem, plain, _MASK_WORD.sub("", bare), _MASK_NUMBER.sub("", plain)]
        stem = next((name for name in names if name in stems), None)
        if stem is not None:
            found[mask] = stem
    return found


def _good_folders(folder: Path) -> list[Path]:
    return [entry for entry in entries(folder) if entry.name.lower() in GOOD_NAMES and entry.is_dir()]


def _visa_images(folder: Path) -> Path | None:
    images = folder / "Data" / "Images"
    return images if any(entry.name.lower() == "normal" for entry in entries(images)) else None


def _is_kolektor(folder: Path) -> bool:
    """Whether the folders inside hold images with their masks beside them."""
    inner = subfolders(folder)
    return bool(inner) and _labels_beside(inner[0])


def _labels_beside(folder: Path) -> bool:
    stems = {entry.stem for entry in entries(folder) if entry.suffix.lower() in IMAGE_SUFFIXES}
    return any(_MASK_WORD.search(stem) and _MASK_WORD.sub("", stem) in stems for stem in stems)


def _is_image(entry: Path, listing: Listing, otherwise: str) -> bool:
    """Whether a file is an image by its name; a side file is set aside, any other is a finding."""
    if entry.suffix.lower() in IMAGE_SUFFIXES:
        return True
    if not _is_side_file(entry, listing):
        listing.findings.append(Finding(entry, otherwise))
    return False


def _is_side_file(entry: Path, listing: Listing) -> bool:
    if entry.is_dir() or entry.suffix.lower() not in _SIDE_FILES:
        return False
    listing.ignored.append(entry)
    return True
