"""`saae-export inspect BUNDLE`: prints the manifest as tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from saae_runtime.bundle import Bundle
from saae_runtime.manifest import IN_BF16, Artefact, Calibration, Manifest
from saae_train.evaluation.ranking import METRIC_NAMES

from ..artefacts import stores_half

__all__ = ["bundle_view", "print_bundle"]

_RATES = (0.0, 1e-4, 1e-3, 5e-3, 1e-2, 5e-2)
_COUNTS = {"images": "test images", "defective": "of them defective"}


def print_bundle(bundle: Bundle, console: Console) -> None:
    """Print the manifest of an opened bundle."""
    console.print(bundle_view(bundle))


def bundle_view(bundle: Bundle) -> RenderableType:
    """The manifest of an opened bundle as rich tables."""
    manifest = bundle.manifest
    parts: list[RenderableType] = []
    if manifest.synthetic:
        parts.append(
            Panel(Text("Built from drawn demo images. Its numbers say nothing about a real line."), style="yellow")
        )
    parts += [_facts(bundle), _artefacts(manifest.artefacts), _thresholds(manifest)]
    if manifest.metrics:
        parts.append(_metrics(manifest))
    parts.append(_files(manifest))
    return Group(*parts)


def _facts(bundle: Bundle) -> Table:
    manifest = bundle.manifest
    model, frame = manifest.model, manifest.frame
    origin = "the camera's own size, resized inside the graph" if frame.baked else "the model's size"
    space = f", {model.components} principal components" if model.components else ""
    rows = {
        "bundle": str(bundle.path),
        "category": manifest.category + (" (synthetic)" if manifest.synthetic else ""),
        "built": f"{manifest.created} by saae {manifest.saae_version}",
        "frame": f"{frame.height} x {frame.width} pixels, {origin}",
        "model": f"{model.height} x {model.width} pixels, patch {model.patch}, grid {model.grid[0]} x {model.grid[1]}",
        "features": f"{manifest.backbone.name}, layers {', '.join(map(str, model.layers))}{space}",
        "weights": f"{manifest.backbone.weights_source}, sha256 {manifest.backbone.weights_sha256[:16]}...",
        "autoencoder": f"{model.autoencoder}, V = {model.latent_dim}, loss {model.loss}, score {model.score}",
        "preset": model.preset,
        "calibration": _calibrated_on(manifest.calibration),
        "made with": ", ".join(f"{name} {version}" for name, version in manifest.tools.items()),
    }
    table = _table("Bundle", "", "")
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def _calibrated_on(calibration: Calibration) -> str:
    words = "held-out normal images" if calibration.held_out else "normal images that were fitted on, too"
    if calibration.left_out:
        words = "normal images, each left out of the memory"
        if calibration.near_copies:
            words += f" with the {calibration.near_copies} before and after it (near-copies)"
    if calibration.given_later:
        words = "normal images given after the build (saae-export calibrate)"
    return f"{calibration.images} {words}, digest {calibration.digest[:16]}..."


def _artefacts(artefacts: Iterable[Artefact]) -> Table:
    table = _table("Artefacts", "file", "precision", "runs on", "batch", "parity")
    for item in artefacts:
        if item.kind == "onnx":
            place, batch = _runs_on(item.precision), "any"
        else:
            place = " ".join(part for part in (item.library, item.library_version, item.sm) if part)
            batch = f"{item.profile.min} to {item.profile.max}" if item.profile else "any"
        precision = f"{item.precision}, FP16 weights" if stores_half(item) else item.precision
        table.add_row(Text(item.file), Text(precision), Text(place), batch, _parity(item))
    return table


def _runs_on(precision: str) -> str:
    if precision in IN_BF16:
        return "OpenVINO, on a processor with bf16"
    return "ONNX Runtime, OpenVINO; source of engines"


def _parity(item: Artefact) -> Text:
    parity = item.parity
    if parity is None:
        return Text("not checked on this machine", style="yellow")
    verdict = f"map {parity.map_rel_error:.1e}, score {parity.score_rel_error:.1e}, {parity.flips} flips"
    text = (
        f"{'passed' if parity.passed else 'FAILED'}: {verdict} over {parity.images} images against {parity.reference}"
    )
    return Text(text, style="green" if parity.passed else "bold red")


def _thresholds(manifest: Manifest) -> Table:
    table = _table("Thresholds by acceptable false-positive rate", "precision", "of", "default", *map(_rate, _RATES))
    for precision, pair in manifest.thresholds.items():
        for name, entry in (("pixels", pair.pixel), ("images", pair.image)):
            default = f"{entry.at():.5g} (FPR {_rate(entry.default_fpr)})"
            # Lower rates would repeat the threshold of FPR 0.
            values = ["-" if rate and entry.is_too_low(rate) else f"{entry.at(rate):.5g}" for rate in _RATES]
            table.add_row(precision, name, default, *values)
    return table


def _rate(rate: float) -> str:
    return f"{rate:g}"


def _metrics(manifest: Manifest) -> Table:
    metrics: Mapping[str, Any] = manifest.metrics
    label = f" ({metrics['label']})" if "label" in metrics else ""
    table = _table(f"Metrics{label}", "", "")
    for name, title in METRIC_NAMES.items():
        if isinstance(metrics.get(name), (int, float)):
            table.add_row(title, f"{100 * metrics[name]:.2f} %")
    for name, value in metrics.items():  # counts, and metrics of other versions
        if name not in METRIC_NAMES and name != "label" and isinstance(value, (str, int, float)):
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            table.add_row(Text(_COUNTS.get(name, name)), Text(shown))
    simulated = metrics.get("self_test")
    if isinstance(simulated, Mapping):
        for name, title in (("large_strong", "large, strong SIMULATED defects"), ("found", "all SIMULATED defects")):
            share = simulated.get(name)
            if isinstance(share, Mapping) and share.get("count"):
                table.add_row(title, Text(f"{share.get('found')} of {share['count']} found"))
    return table


def _files(manifest: Manifest) -> Table:
    table = _table("Files", "file", "size", "sha256")
    for name, entry in manifest.files.items():
        table.add_row(Text(name), _size(entry.size), entry.sha256[:16])
    return table


def _size(count: int) -> str:
    if count < 1000:
        return f"{count} B"
    return f"{count / 1000:.1f} kB" if count < 1_000_000 else f"{count / 1e6:.1f} MB"


def _table(title: str, *headings: str) -> Table:
    table = Table(title=Text(title, style="table.title"), title_justify="left", show_header=any(headings))
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table
