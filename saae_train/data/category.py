"""Finds the images of one product, in the MVTec AD tree or in plain folders."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from saae_runtime.errors import DataError
from saae_runtime.images import IMAGE_SUFFIXES

from .layouts import GOOD_NAMES, Listing, is_category, list_category, pooled_masks, samples_in, subfolders
from .sample import GOOD, Finding, Sample

__all__ = [
    "GOOD",
    "SYNTHETIC_STAMP",
    "Category",
    "Finding",
    "Sample",
    "distinct_names",
    "find_category",
    "from_folders",
    "list_categories",
]

SYNTHETIC_STAMP = ".saae-demo.json"
"""A category folder that holds this file was drawn, not photographed."""

Folder: TypeAlias = "str | os.PathLike[str]"
Folders: TypeAlias = "Folder | Sequence[Folder]"
"""One folder or several."""


@dataclass(frozen=True)
class Category:
    """The images of one product.

    Attributes:
        name: the product's name; it names cache entries and bundles.
        root: the folder with the images; for several folders, their common parent.
        train: normal images to fit and calibrate on, folder by folder as they were given, each sorted by path.
        test: normal and defective images to evaluate on (may be empty), good first, then by defect type and path.
        synthetic: whether the images were drawn by `saae_train.data.demo`.
        findings: what looked wrong in the folders; `saae_train.data.check.check` reports it.
        layout: description of how the folders were read.
        ignored: other files beside the images (.json, .txt).
    """

    name: str
    root: Path
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]
    synthetic: bool = False
    findings: tuple[Finding, ...] = ()
    layout: str = ""
    ignored: tuple[Path, ...] = ()

    def with_white_level(self, white_level: int | None) -> Category:
        """The same images, read with this white level (`saae_runtime.images.read_image`)."""
        if white_level is None:
            return self
        train, test = (
            tuple(dataclasses.replace(sample, white_level=white_level) for sample in part)
            for part in (self.train, self.test)
        )
        return dataclasses.replace(self, train=train, test=test)

    @property
    def defect_types(self) -> tuple[str, ...]:
        """The labels of the defective test images, sorted."""
        return tuple(sorted({sample.label for sample in self.test if sample.is_anomalous}))

    @property
    def has_masks(self) -> bool:
        """Whether any defective test image has a ground-truth mask."""
        return any(sample.mask is not None for sample in self.test)


def list_categories(root: str | os.PathLike[str]) -> list[str]:
    """Names of the categories under `root` (folders in a layout that `find_category` reads), sorted.

    Raises:
        DataError: `root` is not a folder.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise DataError(
            f"There is no data folder {folder}.",
            "It is missing, or it is a file." if not folder.exists() else "It is a file.",
            "give the folder that holds the categories, or get data with `saae-train fetch` or `saae-train demo`",
        )
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and is_category(entry))


def find_category(root: str | os.PathLike[str], name: str) -> Category:
    """List a category of a published data set, or of a tree like one.

    The layouts are those of `saae_train.data.layouts.list_category`: MVTec AD (`<root>/<name>/train/good`,
    `test/<defect>`, `ground_truth/<defect>`), MVTec AD 2, MVTec LOCO AD, VisA, BTAD, KolektorSDD and KolektorSDD2. The
    mask of `test/<defect>/007.png` is called `007_mask.png` or `007.png`, with `_gt`, `_seg` or `_label` in place of
    `_mask`, in any image format; of several masks the union counts. Only names are read here (KolektorSDD's masks as
    well, which alone tell normal images from defective ones); `saae_train.data.check.check` opens the files.

    Args:
        root: the folder that holds the categories (the category's own folder is taken as well).
        name: the category.

    Raises:
        DataError: no such folder or category (near names are suggested), or no training images.
    """
    root = Path(root)
    there = list_categories(root)
    folder = root / name
    if name not in there:
        if root.resolve().name == name and is_category(root):
            folder = root
        else:
            raise _no_category(root, name, there)
    listing = list_category(folder)
    if not listing.train:
        good = folder / "train" / GOOD
        state = "holds no images" if good.is_dir() else "is missing"
        raise DataError(
            f"The category {name!r} has no normal training images: {good} {state}.",
            f"Images are files that end in {', '.join(sorted(IMAGE_SUFFIXES))}.",
            f"put the normal images into {good}",
            problems=[f"{finding.path}: {finding.what}" for finding in listing.findings],
        )
    return _category(name, folder, listing, (folder / SYNTHETIC_STAMP).is_file())


def from_folders(
    normal: Folders,
    abnormal: Folders | None = None,
    masks: Folders | None = None,
    name: str | None = None,
    normal_test: Folders | None = None,
) -> Category:
    """List images in the user's own folders; each argument is one folder or several.

    Args:
        normal: normal images to fit on, with those in the folders below.
        abnormal: defective images; the subfolders of such a folder, where it has any, name the defect types, but
            `good`, `ok` and `normal`, which hold good images for testing.
        masks: their masks, one folder for each of `abnormal` in the same order, with the same subfolders or
            flat; names as in `find_category`.
        name: the product's name; by default the name of the folder `normal`, of several that of the one around them.
        normal_test: further normal images to evaluate on.

    Raises:
        DataError: a folder is missing, holds no images, is given twice or lies in another one, or the folders of masks
            are not as many as those of defective images.
    """
    listing = Listing("own folders")
    folders = _folders(normal, "normal images")
    listing.train = _normal(folders, "normal images", listing)
    listing.test = _normal(_folders(normal_test, "normal test images"), "normal test images", listing)
    bad, truth = _folders(abnormal, "defective images"), _folders(masks, "masks", nested_too=True)
    if truth and not bad:
        raise DataError(
            f"Masks were given ({', '.join(map(str, truth))}) without the defective images that they belong to.",
            cure="give the folder of defective images as well",
        )
    if truth and len(truth) != len(bad):
        raise DataError(
            f"There are {len(bad)} folders of defective images, and {len(truth)} of masks.",
            "A folder of masks belongs to one folder of defective images: the first to the first, and so on.",
            "give --masks as often as --abnormal, in the same order",
        )
    for index, folder in enumerate(bad):
        listing.test += _defective(folder, truth[index] if truth else None, listing)
    root = folders[0] if len(folders) == 1 else Path(os.path.commonpath([folder.resolve() for folder in folders]))
    title = name or root.resolve().name or folders[0].resolve().name
    return _category(title, root, listing, False)


def _folders(given: Folders | None, what: str, nested_too: bool = False) -> list[Path]:
    """Check that the given folders exist, and that none is given twice or lies in another one."""
    if given is None:
        return []
    named = [given] if isinstance(given, (str, os.PathLike)) else given
    folders = [_folder(Path(folder), what) for folder in named]
    places = [folder.resolve() for folder in folders]
    for later, place in enumerate(places):
        for earlier, other in enumerate(places[:later]):
            outer, inner = (earlier, later) if other in place.parents else (later, earlier)
            if place == other:
                raise DataError(f"The folder of {what} is given twice: {folders[later]}", cure="give it once")
            if not nested_too and places[outer] in places[inner].parents:
                raise DataError(
                    f"The folder of {what} {folders[inner]} lies in {folders[outer]}, which is given as well.",
                    "Its images would be taken twice.",
                    "leave one of the two out: folders are read with those below them",
                )
    return folders


def _normal(folders: Sequence[Path], what: str, listing: Listing) -> list[Sample]:
    samples: list[Sample] = []
    for folder in folders:
        found = samples_in(folder, GOOD, listing, nested=True)
        if not found:
            raise _empty(folder, what)
        samples += found
    return samples


def _defective(bad: Path, truth: Path | None, listing: Listing) -> list[Sample]:
    """Defective images in a folder and its subfolders, which name the types, with masks in a tree or flat.

    A subfolder called `good`, `ok` or `normal` holds good images, as in a category of a tree.
    """
    loose = "defect"
    types = subfolders(bad)
    own = {entry.name for entry in types if truth is not None and (truth / entry.name).is_dir()}
    pooled = samples_in(bad, loose, listing, skip_folders=True)
    found: list[Sample] = []
    good: list[Sample] = []
    for entry in types:
        label = entry.name
        if label.lower() in GOOD_NAMES:  # the test folder of an MVTec tree, given whole
            good += samples_in(entry, GOOD, listing)
            continue
        if truth is not None and entry.name in own:
            found += samples_in(entry, label, listing, truth / entry.name)
        else:
            pooled += samples_in(entry, label, listing)
    if not found and not pooled:
        raise _empty(bad, "defective images")
    if truth is not None:
        pooled = pooled_masks(pooled, truth, listing, leave_out=own)
    return good + sorted([*pooled, *found], key=lambda sample: (sample.label != loose, sample.label, sample.path))


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The files' names; equal ones get as many parent folders as tell them apart."""
    names = [path.name for path in paths]
    for depth in range(2, max((len(path.parts) for path in paths), default=0) + 1):
        count = Counter(names)
        if len(count) == len(names):
            break
        names = [
            "/".join(path.parts[-depth:]) if count[name] > 1 else name for name, path in zip(names, paths, strict=True)
        ]
    return names


def _category(name: str, root: Path, listing: Listing, synthetic: bool) -> Category:
    return Category(
        name,
        root,
        tuple(listing.train),
        tuple(listing.test),
        synthetic,
        tuple(listing.findings),
        listing.layout,
        tuple(listing.ignored),
    )


def _folder(path: Path, what: str) -> Path:
    if not path.is_dir():
        state = "is not a folder" if path.exists() else "is missing"
        raise DataError(f"The folder of {what} {state}: {path}", cure="check the path")
    return path


def _empty(folder: Path, what: str) -> DataError:
    return DataError(
        f"The folder of {what} holds no images: {folder}",
        f"Images are files that end in {', '.join(sorted(IMAGE_SUFFIXES))}.",
        "check the path, or put images there",
    )


def _no_category(root: Path, name: str, there: list[str]) -> DataError:
    near = difflib.get_close_matches(name.lower(), [t.lower() for t in there], n=3, cutoff=0.5)
    suggested = [t for t in there if t.lower() in near]
    if suggested:
        cure = "did you mean " + " or ".join(suggested) + "?"
    elif there:
        cure = "use one of the existing categories"
    else:
        place = root / (name or "NAME") / "train" / GOOD
        cure = f"put the images into {place}, or run `saae-train demo` or `saae-train fetch`"
    listed = ", ".join(there) if there else "no category (no folder in a known layout)"
    return DataError(f"There is no category {name!r} in {root}.", f"It has: {listed}.", cure)
