"""Chooses the matrix products to compute in INT8 by measuring each one on calibration frames."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from saae_runtime.errors import CalibrationError, ConfigError
from saae_runtime.files import write_bytes
from saae_runtime.progress import Progress, labelled, nth, silent

from ..graph.half_weights import whole_weights
from ..graph.onnx_file import check_onnx
from .qdq import Observed, insert_qdq, observe, run_frames, smooth, weighted_products

__all__ = ["LIMITS", "MIN_FRAMES", "Product", "Quantiser", "require_frames"]

MIN_FRAMES = 16
"""Fewest calibration frames for reliable ranges."""

LIMITS = (0.02, 0.01, 0.005, 0.0025)
"""Largest error of the map from one product alone, tried in turn until the quality gate passes."""

_MEASURED_ON = 3  # frames for each product's own error


@dataclass(frozen=True)
class Product:
    """One product and the map's error if only this product is quantised.

    Attributes:
        name: node.
        limit: the activation's best range.
        error: root-mean-square change of the map over its root-mean-square value, after the best common factor (a
            factor moves thresholds and maps alike).
        share: its share of the weights of all products, 0..1.
    """

    name: str
    limit: float
    error: float
    share: float


class Quantiser:
    """An FP32 graph, observed and measured once, from which INT8 graphs with more or fewer quantised products are made.

    Args:
        path: the FP32 graph, written by `saae_export.graph.onnx_file.export_onnx`.
        frames: normal images, uint8 H x W x 3 at the graph's frame size, `MIN_FRAMES` or more.
        frame_size: (H, W).
        progress: called with (done, total, of what).

    Raises:
        CalibrationError: too few frames.
        ConfigError: the graph has nothing to quantise.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        frames: Sequence[NDArray[np.uint8]],
        frame_size: tuple[int, int],
        progress: Progress = silent,
    ) -> None:
        require_frames(len(frames))
        self.frame_size = frame_size
        model = onnx.load(os.fspath(path))
        whole_weights(model)
        if not weighted_products(model):
            raise ConfigError(f"{path} has no product that INT8 could compute.", "", "build without --int8")
        observed = observe(model, frames, labelled(nth(progress, 0, 2), "ranges"))
        self._model = smooth(model, observed)
        observed = observe(self._model, frames, labelled(nth(progress, 1, 2), "ranges, smoothed"))
        spread = np.linspace(0, len(frames) - 1, _MEASURED_ON).round().astype(int)
        self.products = _measured(self._model, observed, [frames[index] for index in spread], progress)

    def chosen(self, limit: float) -> list[Product]:
        """The products whose own error is within a limit."""
        return [product for product in self.products if product.error <= limit]

    def write(self, path: str | os.PathLike[str], products: Sequence[Product]) -> Path:
        """Write the graph with these products in INT8 (atomically), and check it.

        Raises:
            ConfigError: ONNX Runtime refuses the graph.
            StorageError: the file could not be written.
        """
        model = insert_qdq(self._model, {product.name: product.limit for product in products})
        properties = {item.key: item.value for item in model.metadata_props}
        properties["saae.precision"] = "int8"
        del model.metadata_props[:]
        onnx.helper.set_model_props(model, {key: properties[key] for key in sorted(properties)})
        data = model.SerializeToString(deterministic=True)
        check_onnx(data, self.frame_size)
        target = Path(path)
        write_bytes(target, data)
        return target


def require_frames(count: int) -> None:
    """Raise CalibrationError for fewer than `MIN_FRAMES` images to take ranges from."""
    if count < MIN_FRAMES:
        raise CalibrationError(
            f"INT8 needs {MIN_FRAMES} normal images for its ranges; there are {count}.",
            "A range from few images clips the values of others.",
            "add normal images, or build without --int8",
        )


def _measured(
    model: onnx.ModelProto,
    observed: Mapping[str, Observed],
    frames: Sequence[NDArray[np.uint8]],
    progress: Progress,
) -> tuple[Product, ...]:
    """Measure each product alone in INT8, with the full and with the clipped range, against the original graph."""
    reference = _maps(model, frames)
    products = weighted_products(model)
    sizes = {item.name: int(np.prod(item.dims)) for item in model.graph.initializer}
    total = sum(sizes[weight] for _, weight in products.values())
    found = []
    for number, (name, (activation, weight)) in enumerate(products.items()):
        progress(number, len(products), "products measured")
        ranges = dict.fromkeys((observed[activation].largest, observed[activation].least_squares()))
        error, limit = min(
            (_error(reference, _maps(insert_qdq(model, {name: limit}), frames)), limit) for limit in ranges
        )
        found.append(Product(name, limit, error, sizes[weight] / total))
    progress(len(products), len(products), "products measured")
    return tuple(found)


def _maps(model: onnx.ModelProto, frames: Sequence[NDArray[np.uint8]]) -> NDArray[np.float64]:
    return np.stack([outputs["anomaly_map"][0] for outputs in run_frames(model, frames)]).astype(np.float64)


def _error(reference: NDArray[np.float64], found: NDArray[np.float64]) -> float:
    if not np.isfinite(found).all():
        return float("inf")
    factor = float((reference * found).sum() / max(float((found * found).sum()), 1e-30))
    return float(np.sqrt(np.square(factor * found - reference).mean() / max(np.square(reference).mean(), 1e-30)))
