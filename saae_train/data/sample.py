"""One entry of a data set (image and masks), and findings made while listing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from saae_runtime.errors import ImageError
from saae_runtime.images import read_image, read_mask

__all__ = ["GOOD", "Finding", "Sample"]

GOOD = "good"
"""The label of normal images, as in MVTec AD."""


@dataclass(frozen=True)
class Sample:
    """One image file.

    Attributes:
        path: the image.
        label: "good", or the defect type.
        mask: its ground-truth mask; None for normal images, or if there is none.
        is_anomalous: whether the image shows a defect.
        more_masks: further masks of the same image; the defect is what any of them marks.
        white_level: white of a 16-bit image, see `saae_runtime.images.read_image`.
    """

    path: Path
    label: str
    mask: Path | None
    is_anomalous: bool
    more_masks: tuple[Path, ...] = ()
    white_level: int | None = None

    def read(self) -> NDArray[np.uint8]:
        """The image as training, export and runtime read it: uint8 H x W x 3. Raises ImageError."""
        return read_image(self.path, self.white_level)

    @property
    def masks(self) -> tuple[Path, ...]:
        """All its masks."""
        return () if self.mask is None else (self.mask, *self.more_masks)

    def truth(self) -> NDArray[np.bool_] | None:
        """The union of its masks: bool H x W; None without a mask.

        Raises:
            ImageError: a mask cannot be read, or two of them differ in size.
        """
        found: NDArray[np.bool_] | None = None
        for path in self.masks:
            mask = read_mask(path)
            if found is not None and mask.shape != found.shape:
                raise ImageError(
                    f"{path}: the mask is {mask.shape[1]} x {mask.shape[0]} pixels.",
                    f"Another mask of {self.path}, {self.mask}, is {found.shape[1]} x {found.shape[0]}.",
                    "save both at the size of the image",
                )
            found = mask if found is None else found | mask
        return found


@dataclass(frozen=True)
class Finding:
    """A file or folder that looked wrong while a category was listed, and what is wrong with it."""

    path: Path
    what: str
