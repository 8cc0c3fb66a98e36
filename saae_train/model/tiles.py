"""Tiles: overlapping windows over a large input, so that a ViT sees small defects at its usual scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["MOST_TOKENS", "Tiles", "tiles_for"]

_OVERLAPS = (4, 5, 6, 7)
"""Positions that neighbouring windows share, tried in this order."""

MOST_TOKENS = 1024
"""Largest number of patches that the SAAE's transformer sees, if a patch size makes that possible."""

_ZOOM = 2.0
"""Image pixels per model pixel up to which defects are seen well enough without more tiles."""

_MOST = 4
"""Largest number of tiles along one side that is chosen automatically."""


@dataclass(frozen=True)
class Tiles:
    """Windows of `window` positions that cover a grid, each position taken from the window where it is most central.

    Attributes:
        window: (h, w) of one window, in positions.
        counts: (rows, columns) of windows.
        grid: (h, w) of the whole, in positions.
        saae_patch: side of the patches, in positions, that keeps the SAAE's transformer small.
    """

    window: tuple[int, int]
    counts: tuple[int, int] = (1, 1)
    grid: tuple[int, int] = (0, 0)
    saae_patch: int = 1

    @classmethod
    def over(cls, window: tuple[int, int], counts: tuple[int, int] = (1, 1)) -> Tiles:
        """Make windows that overlap by 4 to 7 positions, so that a patch of the SAAE divides the grid."""
        plain = _cover(window, counts, 1)
        assert plain is not None
        for patch in range(1, max(counts) + 1):
            grid = _cover(window, counts, patch)
            if grid is not None and grid[0] * grid[1] <= MOST_TOKENS * patch**2:
                return cls(window, counts, grid, patch)
        return cls(window, counts, plain)

    def __len__(self) -> int:
        return self.counts[0] * self.counts[1]

    def places(self) -> list[tuple[int, int]]:
        """(row, column) of each window's first position, row by row."""
        rows, columns = (_starts(*axis) for axis in zip(self.window, self.counts, self.grid, strict=True))
        return [(row, column) for row in rows for column in columns]

    def cut(self, x: Tensor, step: int, axis: int = 2) -> Tensor:
        """The windows of a batch.

        Args:
            x: N x ... with rows along `axis` and columns behind it.
            step: pixels of one position.
            axis: of the rows.

        Returns:
            (N * windows) x ..., the windows of a frame together.
        """
        height, width = (side * step for side in self.window)
        parts = [
            x.narrow(axis, row * step, height).narrow(axis + 1, column * step, width) for row, column in self.places()
        ]
        return torch.stack(parts, dim=1).flatten(0, 1)

    def index(self, prefix: int = 0) -> Tensor:
        """Row of each grid position among the rows of all windows.

        Args:
            prefix: rows of other tokens before each window's positions.

        Returns:
            int64, h * w: numbers below windows * (prefix + positions of a window).
        """
        rows, columns = (
            _most_central(torch.tensor(_starts(*axis)), axis[0], axis[2])
            for axis in zip(self.window, self.counts, self.grid, strict=True)
        )
        (window_row, row), (window_column, column) = rows, columns
        window = window_row[:, None] * self.counts[1] + window_column[None]
        inside = row[:, None] * self.window[1] + column[None]
        return (window * (prefix + self.window[0] * self.window[1]) + prefix + inside).flatten()

    def join(self, rows: Tensor, index: Tensor) -> Tensor:
        """The positions of whole frames: (N * windows) x rows x C -> N x (h*w) x C, by `index`."""
        return rows.reshape(-1, len(self) * rows.shape[1], rows.shape[2]).index_select(1, index)


def tiles_for(size: tuple[int, int], window: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of windows for images of a size.

    As many as it takes for one model pixel to cover about two image pixels at most, up to four along a side.

    Args:
        size: (height, width) of the images, pixels.
        window: (height, width) of the model's input, pixels.
    """
    rows, columns = (
        min(max(round(side / (_ZOOM * pixels)), 1), _MOST) for side, pixels in zip(size, window, strict=True)
    )
    return rows, columns


def _cover(window: tuple[int, int], counts: tuple[int, int], patch: int) -> tuple[int, int] | None:
    """The grid that the windows cover, with sides that are multiples of `patch`; None if no overlap allows that."""
    sides = []
    for side, count in zip(window, counts, strict=True):
        found = [count * side - (count - 1) * overlap for overlap in _OVERLAPS if count == 1 or overlap < side]
        fitting = [total for total in found or [count * side] if total % patch == 0]
        if not fitting:
            return None
        sides.append(fitting[0])
    return sides[0], sides[1]


def _starts(window: int, count: int, total: int) -> list[int]:
    return [round(index * (total - window) / max(1, count - 1)) for index in range(count)]


def _most_central(starts: Tensor, window: int, total: int) -> tuple[Tensor, Tensor]:
    """For each position along one side: its window, and its index in that window; int64, total each."""
    place = torch.arange(total)[:, None] - starts[None]
    off_centre = (2 * place - (window - 1)).abs()
    chosen = off_centre.masked_fill((place < 0) | (place >= window), 4 * (window + total)).argmin(dim=1)
    return chosen, place.gather(1, chosen[:, None])[:, 0]
