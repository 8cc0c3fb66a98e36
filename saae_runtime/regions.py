"""Connected regions of a mask, with numpy only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Region", "defect_mask", "find_regions", "region_masks"]


@dataclass(frozen=True)
class Region:
    """One connected defect.

    Attributes:
        bbox: (left, top, right, bottom) in pixels; right and bottom are one past the last pixel.
        area: number of pixels.
        peak: (x, y) of the highest anomaly value, in pixels.
        score: the anomaly value there.
    """

    bbox: tuple[int, int, int, int]
    area: int
    peak: tuple[int, int]
    score: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"bbox": list(self.bbox), "area": self.area, "peak": list(self.peak), "score": self.score}


def find_regions(mask: NDArray[np.bool_], anomaly_map: NDArray[np.float32], min_area: int = 1) -> tuple[Region, ...]:
    """The 8-connected regions of a mask, strongest first.

    Works on horizontal runs of pixels, of which a frame has few: touching runs of neighbouring rows are joined, and a
    region's highest value is that of its runs.

    Args:
        mask: bool H x W.
        anomaly_map: float32 H x W.
        min_area: smaller regions are left out.
    """
    return tuple(region for _, region in _labelled(mask, anomaly_map, min_area)[0])


def region_masks(
    mask: NDArray[np.bool_], anomaly_map: NDArray[np.float32], min_area: int = 1
) -> Iterator[tuple[Region, NDArray[np.bool_]]]:
    """The regions of `find_regions`, each with its own pixels, bool H x W."""
    found, labels = _labelled(mask, anomaly_map, min_area)
    pixels = np.full(mask.shape, -1, np.int64)
    pixels[mask] = labels
    for index, region in found:
        left, top, right, bottom = region.bbox
        own = np.zeros(mask.shape, np.bool_)
        own[top:bottom, left:right] = pixels[top:bottom, left:right] == index
        yield region, own


def _labelled(
    mask: NDArray[np.bool_], anomaly_map: NDArray[np.float32], min_area: int
) -> tuple[list[tuple[int, Region]], NDArray[np.int64]]:
    """(label, region), strongest first, and the label of each of the mask's pixels in reading order."""
    row, start, stop = _runs(mask)
    if row.size == 0:
        return [], np.empty(0, np.int64)
    label = _components(row.size, *_touching(row, start, stop, mask.shape[1]))
    _, label = np.unique(label, return_inverse=True)
    label = label.reshape(-1)
    count = int(label.max()) + 1
    left, top = np.full(count, mask.shape[1]), np.full(count, mask.shape[0])
    right, bottom = np.zeros(count, np.int64), np.zeros(count, np.int64)
    np.minimum.at(left, label, start)
    np.minimum.at(top, label, row)
    np.maximum.at(right, label, stop)
    np.maximum.at(bottom, label, row + 1)
    area = np.bincount(label, weights=stop - start, minlength=count).astype(np.int64)

    # Boolean indexing gives the pixels row by row, which is the order of the runs.
    values = anomaly_map[mask]
    first = np.cumsum(stop - start) - (stop - start)  # of each run, among these pixels
    highest = np.maximum.reduceat(values, first)
    score = np.full(count, -np.inf, values.dtype)
    np.maximum.at(score, label, highest)
    # The first pixel in reading order of equal ones: in the first run that holds the region's highest value.
    holders = np.flatnonzero(highest == score[label])
    _, where = np.unique(label[holders], return_index=True)
    peak_run = holders[where]
    regions = [
        (
            i,
            Region(
                bbox=(int(left[i]), int(top[i]), int(right[i]), int(bottom[i])),
                area=int(area[i]),
                peak=_peak(values, first[peak_run[i]], start[peak_run[i]], stop[peak_run[i]], row[peak_run[i]]),
                score=float(score[i]),
            ),
        )
        for i in range(count)
        if area[i] >= min_area
    ]
    regions.sort(key=lambda item: (-item[1].score, item[1].bbox))
    return regions, np.repeat(label, stop - start)


def defect_mask(
    anomaly_map: NDArray[np.float32], threshold: float, image_threshold: float, score: float
) -> NDArray[np.bool_]:
    """Mask of the defects that make a frame anomalous.

    One rule for verdict and mask: a frame is anomalous if its score, the largest value of the map, is above the image
    threshold. Its defects are the 8-connected areas above the pixel threshold T whose peak is above the image
    threshold, too. A frame that is not anomalous has no defect. (Hysteresis: peaks decide, T outlines. If T is higher
    than the image threshold, the image threshold outlines.)

    Args:
        anomaly_map: float32 H x W.
        threshold: pixel threshold T.
        image_threshold: image threshold.
        score: of the frame.

    Returns:
        bool H x W.
    """
    if not score > image_threshold:
        return np.zeros(anomaly_map.shape, np.bool_)
    # A resized map can peak slightly below the score; its peak is still a defect.
    peak = min(float(anomaly_map.max()), float(np.nextafter(np.float32(image_threshold), np.float32(np.inf))))
    mask: NDArray[np.bool_] = anomaly_map > np.float32(threshold)
    if not np.float32(threshold) < np.float32(peak):  # as the mask compares
        return anomaly_map >= np.float32(peak)
    row, start, stop = _runs(mask)
    label = _components(row.size, *_touching(row, start, stop, mask.shape[1]))
    values = anomaly_map[mask]
    first = np.concatenate([[0], np.cumsum(stop - start)[:-1]])
    highest = np.full(row.size, -np.inf, np.float32)
    np.maximum.at(highest, label, np.maximum.reduceat(values, first))
    mask[mask] = np.repeat((highest >= np.float32(peak))[label], stop - start)
    return mask


def _peak(values: NDArray[np.float32], first: int, start: int, stop: int, row: int) -> tuple[int, int]:
    """(x, y) of a run's highest value; its values begin at `first`."""
    return int(start + np.argmax(values[first : first + stop - start])), int(row)


def _runs(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Row, first column and one-past-last column of every horizontal run, in reading order."""
    padded = np.zeros((mask.shape[0], mask.shape[1] + 2), np.int8)
    padded[:, 1:-1] = mask
    change = np.diff(padded, axis=1)
    row, start = np.nonzero(change == 1)
    stop = np.nonzero(change == -1)[1]
    return row, start, stop


def _touching(
    row: NDArray[np.int64], start: NDArray[np.int64], stop: NDArray[np.int64], width: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs (upper run, lower run) of neighbouring rows that touch, corners included."""
    stride = width + 2
    above = (row - 1) * stride
    # Upper runs that end at or after the lower one's start ... and begin at or before its end: a contiguous range.
    low = np.searchsorted(row * stride + stop, above + start, side="left")
    high = np.searchsorted(row * stride + start, above + stop, side="right")
    lengths = np.maximum(high - low, 0)
    lower = np.repeat(np.arange(row.size), lengths)
    offset = np.arange(lower.size) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.repeat(low, lengths) + offset, lower


def _components(count: int, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    """A label for each of `count` nodes, equal for nodes that edges a[i]-b[i] connect."""
    label = np.arange(count)
    while True:
        label_a, label_b = label[a], label[b]
        if np.array_equal(label_a, label_b):
            return label
        smaller, larger = np.minimum(label_a, label_b), np.maximum(label_a, label_b)
        np.minimum.at(label, larger, smaller)  # hooks each root below the smallest root that it touches
        while not np.array_equal(label, shorter := label[label]):
            label = shorter
