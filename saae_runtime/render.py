"""Pictures of results: heatmaps, overlays with mask outlines, side-by-side sheets, PNG files.

One colour scale for all of them. The pixel threshold T always has the same colour (the middle of the ramp), so
frames of one bundle can be compared by eye: cold is below T, hot is above.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import FrameError
from .files import write_bytes

__all__ = [
    "colorize",
    "encode_png",
    "font_of_size",
    "heat_position",
    "heatmap",
    "outline",
    "overlay",
    "ramp",
    "save_png",
    "sheet",
]

DEFECT_COLOR = (64, 240, 255)
"""Outline of the predicted mask: cyan, the one hue that the ramp does not contain."""
TRUTH_COLOR = (120, 255, 90)
"""Outline of the ground truth."""
_INVALID_COLOR = (128, 128, 128)

# (position, lightness, chroma, hue in degrees) in OKLCh. Lightness rises evenly, so the ramp also reads in gray
# print; the hue turns fastest around 0.5, where T sits: blue and violet below it, red to pale yellow above.
_ANCHORS = (
    (0.00, 0.13, 0.035, 265.0),
    (0.25, 0.30, 0.120, 278.0),
    (0.45, 0.42, 0.170, 308.0),
    (0.50, 0.505, 0.185, 350.0),
    (0.56, 0.57, 0.200, 386.0),
    (0.75, 0.74, 0.165, 420.0),
    (0.90, 0.89, 0.150, 455.0),
    (1.00, 0.97, 0.060, 465.0),
)


@lru_cache(maxsize=1)
def ramp() -> NDArray[np.uint8]:
    """The colour ramp, cold to hot.

    Returns:
        uint8 array of shape 256 x 3, RGB (read-only); entry 128 is the colour of T.
    """
    position, lightness, chroma, hue = np.asarray(_ANCHORS, np.float64).T
    t = np.linspace(0.0, 1.0, 256)
    light = np.interp(t, position, lightness)
    radius = np.interp(t, position, chroma)
    angle = np.deg2rad(np.interp(t, position, hue))
    table = _oklab_to_srgb(light, radius * np.cos(angle), radius * np.sin(angle))
    table.setflags(write=False)
    return table


def _oklab_to_srgb(lightness: NDArray[np.float64], a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.uint8]:
    """OKLab (Ottosson 2020) to 8-bit sRGB, out-of-gamut values clipped."""
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = np.stack(
        [
            4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
            -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
            -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
        ],
        axis=-1,
    ).clip(0.0, 1.0)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(encoded * 255.0).astype(np.uint8)


def colorize(anomaly_map: NDArray[Any], vmin: float, vmax: float) -> NDArray[np.uint8]:
    """Colour a map linearly between two values; values outside are clipped, NaN is gray.

    Args:
        anomaly_map: H x W, any real dtype.
        vmin: value of the coldest colour.
        vmax: value of the hottest colour.

    Returns:
        uint8 array of shape H x W x 3, RGB.

    Raises:
        FrameError: the map is not H x W.
    """
    values = _checked_map(anomaly_map)
    span = max(float(vmax) - float(vmin), float(np.finfo(np.float32).tiny))
    with np.errstate(over="ignore", invalid="ignore"):
        return _lookup((values - np.float32(vmin)) / np.float32(span))


def heat_position(anomaly_map: NDArray[Any], threshold: float) -> NDArray[np.float32]:
    """Position of each value on the ramp: 0 at zero, 0.5 at T, towards 1 above it.

    Linear up to T; above T the curve 1 - exp(1 - A/T) / 2 continues with the same slope and never clips, so a
    strong defect still shows its hottest place.

    Args:
        anomaly_map: A, H x W.
        threshold: T in force.

    Returns:
        float32 array of shape H x W in 0..1 (NaN where the map is NaN).
    """
    values = _checked_map(anomaly_map)
    if np.isposinf(threshold):
        return np.where(np.isnan(values), np.nan, np.float32(0.0)).astype(np.float32)
    scale = max(abs(float(threshold)), float(np.finfo(np.float32).tiny))
    with np.errstate(over="ignore", invalid="ignore"):
        excess = ((values - np.float32(threshold)) / np.float32(scale)).astype(np.float32)
        above = 1.0 - 0.5 * np.exp(-np.maximum(excess, 0.0))
        below = np.maximum(0.5 * (1.0 + excess), 0.0)
    return np.where(excess > 0, above, below).astype(np.float32)


def heatmap(anomaly_map: NDArray[Any], threshold: float) -> NDArray[np.uint8]:
    """The anomaly map in colours, T at the middle of the ramp (see `heat_position`).

    Args:
        anomaly_map: H x W.
        threshold: T in force.

    Returns:
        uint8 array of shape H x W x 3, RGB.

    Raises:
        FrameError: the map is not H x W.
    """
    return _lookup(heat_position(anomaly_map, threshold))


def overlay(
    frame: NDArray[np.uint8],
    anomaly_map: NDArray[Any],
    mask: NDArray[Any] | None = None,
    *,
    threshold: float | None = None,
    strength: float = 0.6,
    truth: NDArray[Any] | None = None,
) -> NDArray[np.uint8]:
    """The frame with heat laid over it and the mask outlined.

    The heat fades in with the score, so that areas far below T show the product.

    Args:
        frame: uint8, H x W x 3 or H x W.
        anomaly_map: H x W, the frame's own size.
        mask: H x W, nonzero where defective; outlined in cyan. None: no outline.
        threshold: T in force; None puts half the map's largest value at T's colour.
        strength: opacity of the hottest colour, 0..1.
        truth: H x W ground-truth mask, outlined in green.

    Returns:
        uint8 array of shape H x W x 3, RGB.

    Raises:
        FrameError: sizes differ or the frame is not a picture.
    """
    picture = _checked_frame(frame)
    values = _checked_map(anomaly_map)
    _same_size("anomaly map", values.shape, picture)
    if threshold is None:
        finite = values[np.isfinite(values)]
        threshold = 0.5 * float(finite.max()) if finite.size else 1.0
    position = heat_position(values, threshold)
    # transparent below half of T, full strength from a little above T
    fade = np.clip((np.nan_to_num(position, nan=0.5) - 0.25) / 0.4, 0.0, 1.0)
    alpha = (np.float32(strength) * fade)[:, :, None]
    blended = picture * (1.0 - alpha) + _lookup(position) * alpha
    result = np.rint(blended).astype(np.uint8)
    for region, color in ((truth, TRUTH_COLOR), (mask, DEFECT_COLOR)):
        if region is not None:
            _draw_outline(result, region, color)
    return result


def outline(mask: NDArray[Any], width: int = 1) -> NDArray[np.bool_]:
    """The inner border of a mask, `width` pixels wide; the picture's edge counts as border.

    Args:
        mask: H x W, nonzero inside.
        width: pixels, at least 1.

    Returns:
        bool array of shape H x W.
    """
    inside = np.asarray(mask) != 0
    core = inside
    for _ in range(max(width, 1)):
        padded = np.pad(core, 1)
        core = core & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inside & ~core


def sheet(
    frame: NDArray[np.uint8],
    anomaly_map: NDArray[Any],
    mask: NDArray[Any] | None,
    threshold: float,
    *,
    truth: NDArray[Any] | None = None,
    title: str = "",
    captions: Sequence[str] = ("input", "heatmap", "overlay", "ground truth"),
) -> NDArray[np.uint8]:
    """One picture: input | heatmap | overlay [| ground truth], captions, colour scale with T marked.

    Args:
        frame: uint8, H x W x 3 or H x W.
        anomaly_map: H x W, the frame's own size.
        mask: H x W, nonzero where defective, or None.
        threshold: T in force.
        truth: H x W ground-truth mask; adds a fourth panel.
        title: a line above the panels.
        captions: the panels' names.

    Returns:
        uint8 RGB array; panels keep the frame's proportions and are about 240 to 512 pixels high.

    Raises:
        FrameError: sizes differ or the frame is not a picture.
    """
    from PIL import Image, ImageDraw

    picture = _checked_frame(frame)
    panels = [picture, heatmap(anomaly_map, threshold), overlay(picture, anomaly_map, mask, threshold=threshold)]
    if truth is not None:
        shown = (picture * 0.35).astype(np.uint8)
        inside = np.asarray(truth) != 0
        _same_size("ground truth", inside.shape, picture)
        shown[inside] = picture[inside]
        _draw_outline(shown, inside, TRUTH_COLOR)
        panels.append(shown)
    height, width = picture.shape[:2]
    # Small frames are enlarged by a whole factor, so that each pixel stays a square.
    scale = min(max(1, 240 // height), 512 / height, 768 / width)
    scale = int(scale) if scale > 1 else scale
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    filtering = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BILINEAR
    gap, line, bar = 8, 22, 14
    top = gap + line * (2 if title else 1)
    ruler = size[1] + top + gap
    total = (gap + len(panels) * (size[0] + gap) + bar + 5 * gap, ruler)
    canvas = Image.new("RGB", total, (250, 250, 250))
    pen = ImageDraw.Draw(canvas)
    font, ink = font_of_size(14), (30, 30, 30)
    if title:
        pen.text((gap, 4), title, fill=ink, font=font)
    for index, panel in enumerate(panels):
        left = gap + index * (size[0] + gap)
        pen.text((left, top - line + 2), captions[index], fill=(90, 90, 90), font=font)
        canvas.paste(Image.fromarray(panel).resize(size, filtering), (left, top))
    left = gap + len(panels) * (size[0] + gap)
    strip = np.repeat(ramp()[::-1][:, None, :], bar, axis=1)
    canvas.paste(Image.fromarray(strip).resize((bar, size[1])), (left, top))
    middle = top + size[1] // 2
    pen.line((left - 2, middle, left + bar + 3, middle), fill=ink, width=2)
    pen.text((left + bar + 6, middle - 9), "T", fill=ink, font=font)
    return np.asarray(canvas)


def encode_png(picture: NDArray[Any]) -> bytes:
    """PNG bytes of a picture.

    Args:
        picture: uint8 H x W x 3 (RGB) or H x W (gray), or bool H x W (written as 0 and 255).

    Raises:
        FrameError: another dtype or shape.
    """
    from PIL import Image

    values = np.asarray(picture)
    if values.dtype == np.bool_ and values.ndim == 2:
        values = values.astype(np.uint8) * 255
    if values.dtype != np.uint8 or not (values.ndim == 2 or (values.ndim == 3 and values.shape[2] == 3)):
        raise FrameError(
            f"A picture of shape {values.shape} and type {values.dtype} cannot be written as PNG.",
            "Pictures are uint8 H x W x 3 or H x W, or bool H x W.",
            "convert it first, for example with saae_runtime.render.heatmap",
        )
    buffer = io.BytesIO()
    # Level 1: a quarter to a half of the default's time for at most half as many bytes more. A line writes many.
    Image.fromarray(np.ascontiguousarray(values)).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def save_png(path: str | os.PathLike[str], picture: NDArray[Any]) -> None:
    """Write a picture as PNG, atomically (folders are made).

    Raises:
        FrameError: not a picture (see `encode_png`).
        StorageError: the disk is full, or the place may not be written to.
    """
    write_bytes(path, encode_png(picture))


def _lookup(position: NDArray[Any]) -> NDArray[np.uint8]:
    with np.errstate(invalid="ignore"):
        index = np.clip(np.nan_to_num(position, nan=0.0) * 255.0 + 0.5, 0, 255).astype(np.uint8)
    colors = ramp()[index]
    invalid = np.isnan(position)
    if invalid.any():
        colors[invalid] = _INVALID_COLOR
    return colors


def _draw_outline(picture: NDArray[np.uint8], mask: NDArray[Any], color: tuple[int, int, int]) -> None:
    """Outline a mask in place: colour inside the border, a dark line outside, visible on any background."""
    inside = np.asarray(mask) != 0
    _same_size("mask", inside.shape, picture)
    if not inside.any():
        return
    width = max(1, round(min(picture.shape[:2]) / 300))
    picture[outline(~inside, width) & _near(inside, width)] = (20, 20, 20)
    picture[outline(inside, width)] = color


def _near(inside: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    grown = inside
    for _ in range(width):
        padded = np.pad(grown, 1)
        grown = grown | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return grown


def _checked_map(anomaly_map: NDArray[Any]) -> NDArray[np.float32]:
    values = np.asarray(anomaly_map)
    if values.ndim != 2 or values.dtype.kind not in "fiub":
        raise FrameError(
            f"An anomaly map of shape {values.shape} and type {values.dtype} cannot be drawn.",
            "One map is H x W real numbers.",
            "pass one frame's result.anomaly_map",
        )
    return values.astype(np.float32, copy=False)


def _checked_frame(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    picture = np.asarray(frame)
    if picture.dtype == np.uint8 and picture.ndim == 2:
        return np.repeat(picture[:, :, None], 3, axis=2)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise FrameError(
            f"A frame of shape {picture.shape} and type {picture.dtype} cannot be drawn.",
            "A frame is uint8, H x W x 3 (RGB) or H x W (gray).",
            "read it with saae_runtime.images.read_image",
        )
    return picture


def _same_size(name: str, shape: tuple[int, ...], picture: NDArray[np.uint8]) -> None:
    if tuple(shape) != picture.shape[:2]:
        raise FrameError(
            f"The {name} is {shape[0]} x {shape[-1]}, the frame {picture.shape[0]} x {picture.shape[1]}.",
            "Both must have the frame's size to be laid over each other.",
            "pass the frame that this result came from",
        )


def font_of_size(size: int) -> Any:
    """Pillow's own font, about `size` pixels high."""
    from PIL import ImageFont

    try:
        return ImageFont.load_default(size)
    except (TypeError, ImportError, OSError):  # Pillow before 10.1, or built without FreeType: the bitmap font
        return ImageFont.load_default()
