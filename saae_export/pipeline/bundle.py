"""Graphs, manifest and thresholds of an unfinished bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from saae_runtime.bundle import Bundle, update_bundle, write_bundle
from saae_runtime.manifest import SCHEMA, Artefact, Backbone, Calibration, Frame, Manifest, Model, Thresholds
from saae_runtime.progress import Progress, silent
from saae_runtime.thresholds import ThresholdTable
from saae_runtime.version import library_versions, saae_version
from saae_train.model.checkpoint import Checkpoint

from ..artefacts import onnx_artefact, onnx_file, set_threshold
from ..graph.fused import FusedGraph
from ..graph.half_weights import store_half
from ..graph.onnx_file import export_onnx

__all__ = [
    "describe",
    "provisional_bundle",
    "with_thresholds",
    "without_artefact",
    "write_graphs",
]

_TOOLS = ("torch", "timm", "onnx", "onnxscript", "onnxruntime", "numpy", "Pillow")


def write_graphs(
    checkpoint: Checkpoint,
    folder: Path,
    frame_size: tuple[int, int] | None,
    precisions: Sequence[str],
    progress: Progress = silent,
    half_weights: bool = False,
) -> dict[str, Path]:
    """Write one ONNX file per precision, still without thresholds.

    `half_weights`: the FP32 graph's large weights are stored in FP16 (`half_weights.store_half`).

    Raises:
        ConfigError: the graph cannot be exported at a precision.
        StorageError: the disk is full.
    """
    files = {}
    for number, precision in enumerate(precisions):
        progress(number, len(precisions))
        graph = FusedGraph(checkpoint.detector, frame_size, precision)
        metadata = {
            "saae.category": checkpoint.category,
            "saae.schema": str(SCHEMA),
            "saae.version": saae_version(),
            "saae.backbone": checkpoint.detector.backbone.name,
            "saae.weights_sha256": checkpoint.detector.backbone.weights.sha256,
            "saae.layers": ",".join(map(str, checkpoint.detector.backbone.layers)),
            "saae.input": f"{graph.model_size[0]}x{graph.model_size[1]}",
            "saae.frame": f"{graph.frame_size[0]}x{graph.frame_size[1]}",
        }
        # Until calibration, T is so high that the graph finds nothing.
        path = export_onnx(graph, folder / onnx_file(precision), np.finfo(np.float32).max, metadata)
        files[precision] = store_half(path, graph.frame_size) if half_weights and precision == "fp32" else path
    return files


def describe(
    checkpoint: Checkpoint,
    *,
    synthetic: bool,
    frame_size: tuple[int, int] | None,
    calibration: Calibration,
    thresholds: Mapping[str, Thresholds],
) -> Manifest:
    """The manifest of a bundle with the ONNX graphs of the precisions in `thresholds`, not compared yet."""
    detector, config = checkpoint.detector, checkpoint.config
    backbone = detector.backbone
    height, width = frame_size or backbone.input_size
    return Manifest(
        saae_version=saae_version(),
        created=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        category=checkpoint.category,
        synthetic=synthetic,
        frame=Frame(
            height,
            width,
            baked=frame_size is not None and frame_size != backbone.input_size,
            white_level=config.white_level,
        ),
        model=Model(
            height=backbone.input_size[0],
            width=backbone.input_size[1],
            patch=backbone.patch,
            grid=backbone.grid,
            latent_dim=detector.saae.latent,
            layers=tuple(backbone.layers),
            components=None if detector.space.basis is None else detector.space.channels,
            loss=config.loss,
            score=detector.score,
            preset=config.preset,
            config=config.to_json(),
        ),
        backbone=Backbone(backbone.name, backbone.weights.source, backbone.weights.sha256),
        thresholds=dict(thresholds),
        calibration=calibration,
        artefacts=tuple(onnx_artefact(name) for name in thresholds),
        tools=library_versions(_TOOLS),
    )


def provisional_bundle(folder: Path, manifest: Manifest, files: Mapping[str, Path]) -> Bundle:
    """A bundle with thresholds that nothing exceeds, so that calibration runs on the files that will be deployed."""
    top = float(np.finfo(np.float32).max)
    table = ThresholdTable((0.0,), (top,), 0.0, 1)
    thresholds = {artefact.precision: Thresholds(table, table) for artefact in manifest.artefacts}
    return write_bundle(
        folder,
        dataclasses.replace(manifest, thresholds=thresholds),
        {onnx_file(precision): path for precision, path in files.items()},
    )


def with_thresholds(
    folder: Path, manifest: Manifest, files: Mapping[str, Path], thresholds: Mapping[str, Thresholds]
) -> Bundle:
    """The bundle with its final thresholds, in the manifest and as the graphs' defaults."""
    for precision, path in files.items():
        set_threshold(path, thresholds[precision].pixel.at())
    return write_bundle(
        folder,
        dataclasses.replace(manifest, thresholds=dict(thresholds)),
        {onnx_file(precision): path for precision, path in files.items()},
    )


def without_artefact(bundle: Bundle, artefact: Artefact) -> Bundle:
    """The bundle without one ONNX artefact and its thresholds; its file is removed if no other artefact needs it."""
    manifest = bundle.manifest
    kept = tuple(item for item in manifest.artefacts if item != artefact)
    used = {item.precision for item in kept}
    thresholds = {name: value for name, value in manifest.thresholds.items() if name in used}
    drop = () if any(item.file == artefact.file for item in kept) else (artefact.file,)
    changed = dataclasses.replace(manifest, artefacts=kept, thresholds=thresholds)
    return update_bundle(bundle, changed, {}, drop)
