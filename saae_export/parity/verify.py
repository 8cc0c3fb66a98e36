"""`saae-export verify BUNDLE`: checks hashes, then parity of every artefact that this machine can run.

The reference is PyTorch if images and a checkpoint are given, the FP32 ONNX graph if only images are given, else the
frames in the bundle with PyTorch's results, which need only the runtime.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from saae_runtime import backends
from saae_runtime.bundle import Bundle, open_bundle, update_bundle
from saae_runtime.engine import Engine
from saae_runtime.errors import BackendError, ConfigError, DeviceError, EngineIncompatibleError, StorageError
from saae_runtime.images import read_image
from saae_runtime.manifest import Artefact, Manifest, Parity
from saae_runtime.reference import read_reference
from saae_runtime.result import Scored, Scorer
from saae_runtime.sources.folders import images_below

from .compare import ParityReport, bounds_of, compare

__all__ = [
    "Skipped",
    "Source",
    "Verification",
    "compare_artefact",
    "compare_engine",
    "record_parity",
    "stored_source",
    "verify",
]

Note = Callable[[str], None]
_MOST_IMAGES = 32
_REPEATS = 3  # the first run, the captured one, and a replayed one


@dataclass(frozen=True)
class Skipped:
    """An artefact or backend that could not run here, and why."""

    name: str
    why: str


@dataclass(frozen=True)
class Source:
    """The reference that artefacts are compared with.

    Attributes:
        manifest: of the whole bundle; it decides the bounds.
        scorer: the reference scorer.
        frames: yields (name, frame uint8 H x W x 3) pairs; may be called repeatedly.
        against: description of the scorer.
        own_file: (backend, precision) of the artefact that is the scorer itself.
    """

    manifest: Manifest
    scorer: Scorer
    frames: Callable[[], Iterable[tuple[str, NDArray[np.uint8]]]]
    against: str = "PyTorch FP32"
    own_file: tuple[str, str] | None = None


@dataclass(frozen=True)
class Verification:
    """The result of `verify`.

    Attributes:
        bundle: with recorded parity.
        reports: one for each artefact and backend that ran.
        skipped: what did not run, and why.
        recorded: engines whose parity was added to the manifest.
    """

    bundle: Bundle
    reports: tuple[ParityReport, ...]
    skipped: tuple[Skipped, ...]
    recorded: tuple[str, ...] = ()


def verify(
    bundle: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    backend: str | None = None,
    most_images: int = _MOST_IMAGES,
    note: Note = lambda text: None,
) -> Verification:
    """Check the hashes of a bundle and compare its artefacts with their reference.

    An engine that was compiled elsewhere has no parity in the manifest yet. The result is added to the manifest if the
    bundle can be written to.

    Args:
        bundle: the folder.
        data: folder of images, searched with its subfolders; None for the bundle's own reference frames.
        checkpoint: the fitted model, for a comparison with PyTorch on `data`.
        backend: only this backend; None: all that work here and that `auto` would consider.
        most_images: largest number of images of `data`, evenly spread.
        note: called with each step.

    Raises:
        BundleError: no bundle, or a damaged one.
        ConfigError: no images, or nothing that can run here.
        CheckpointError: a checkpoint that cannot be loaded or belongs to another bundle.
    """
    note("checking hashes")
    opened = open_bundle(bundle, verify=True)
    runs, skipped = _runs(opened, backend)
    if not runs:
        raise _nothing_runs(bundle, skipped)
    with ExitStack() as stack:
        source = _source(opened, data, checkpoint, most_images, stack)
        reports = []
        failed: list[Skipped] = []
        parity: dict[str, Parity] = {}
        for name, precision, artefact in runs:
            if source.own_file == (name, precision):
                skipped.append(Skipped(f"{name} {precision}", "it is the reference itself"))
                continue
            note(f"{name}, {precision}")
            try:
                engine = Engine(opened.only(artefact), backend=name, precision=precision, verify=False)
            except BackendError as error:  # libraries are only loaded when it is opened
                failed.append(_skipped(name, precision, error))
                continue
            with engine:
                try:
                    report = compare_artefact(engine, source, f"{artefact.file} ({name})")
                except DeviceError as error:  # outputs that are not finite are a fault, not a reason to skip
                    failed.append(_skipped(name, precision, error))
                    continue
            reports.append(report)
            if (
                artefact.kind == "engine"
                and artefact.parity is None
                and (artefact.file not in parity or not report.passed)
            ):
                parity[artefact.file] = report.summary()  # of several libraries that run it, one that fails counts
    skipped += failed
    if failed and not reports:
        raise _nothing_runs(bundle, skipped)
    if not reports:
        raise ConfigError(
            "Nothing was compared: what runs here is the reference itself.",
            "Without a checkpoint, images are compared with model.onnx on the CPU. The hashes are right.",
            "leave out --data to use the frames in the bundle, or give the fitted model: --checkpoint FOLDER",
        )
    recorded: tuple[str, ...] = ()
    if parity:
        try:
            opened, recorded = record_parity(opened, parity), tuple(parity)
        except StorageError as error:
            note(f"not recorded: {error.what}")
    return Verification(opened, tuple(reports), tuple(skipped), recorded)


def record_parity(bundle: Bundle, parity: Mapping[str, Parity]) -> Bundle:
    """Write the parity of artefacts, by file, into the manifest.

    Raises:
        StorageError: the bundle cannot be written to.
    """
    artefacts = tuple(
        dataclasses.replace(item, parity=parity.get(item.file, item.parity)) for item in bundle.manifest.artefacts
    )
    return update_bundle(bundle, dataclasses.replace(bundle.manifest, artefacts=artefacts), {})


def compare_engine(bundle: Bundle, artefact: Artefact, device: int = 0) -> ParityReport | Skipped:
    """Compare one engine with the bundle's reference frames, or return why it cannot run here.

    Raises:
        BackendError: its values are not finite, or it has other inputs or outputs than this graph.
    """
    name, alone = str(artefact.library), bundle.only(artefact)
    found = {item.name: item for item in backends.candidates(alone, device, artefact.precision)}[name]
    if found.why_not is not None:
        return Skipped(artefact.file, found.why_not)
    if not read_reference(bundle)[0]:
        return Skipped(artefact.file, "the bundle has no reference frames; saae-export verify --data FOLDER")
    try:
        engine = Engine(alone, backend=name, device=device, precision=artefact.precision, verify=False)
    except EngineIncompatibleError:
        raise
    except BackendError as error:
        return _skipped(name, artefact.precision, error)
    with engine:
        return compare_artefact(engine, stored_source(bundle))


def compare_artefact(engine: Engine, source: Source, name: str = "") -> ParityReport:
    """Compare an opened artefact with a source, at the engine's thresholds.

    Libraries have different kernels for each batch size, so every frame is scored alone and in the smallest, the usual
    and the largest batch. A compiled engine runs several times, because the first launches of a size differ from those
    that are replayed from a CUDA graph.

    Args:
        engine: opened on one artefact (`Bundle.only`).
        source: the reference.
        name: in the report; by default the artefact's file.

    Raises:
        ConfigError: no frames, or maps of a different shape.
        BackendError: the inference failed, or gave values that are not finite.
    """
    (artefact,) = engine.manifest.artefacts
    return compare(
        source.scorer,
        engine,
        source.frames(),
        threshold=engine.threshold,
        image_threshold=engine.image_threshold,
        artefact=name or artefact.file,
        precision=artefact.precision,
        against=source.against,
        bounds=bounds_of(source.manifest, artefact.precision),
        batches=_batches(artefact, engine.backend.max_batch),
        repeats=_REPEATS if artefact.kind == "engine" else 1,
    )


def _batches(artefact: Artefact, most: int | None) -> set[int]:
    """The sizes of batches to compare; `most` is the backend's own limit."""
    profile = artefact.profile
    sizes = {most or 1} if profile is None else {profile.min, profile.opt, profile.max}
    return {1, *(min(size, most or size) for size in sizes)}


def stored_source(bundle: Bundle, checkpoint: str | os.PathLike[str] | None = None) -> Source:
    """The bundle's reference frames, with the stored results or those of a fitted model.

    Raises:
        ConfigError: the bundle has none.
        CheckpointError: the checkpoint cannot be loaded or belongs to another bundle.
    """
    stored, against = read_reference(bundle)
    if not stored:
        raise ConfigError(
            f"{bundle.path} has no reference frames.", "It was built without them.", "give images: --data FOLDER"
        )
    pairs = [(item.name, item.frame) for item in stored]
    if checkpoint is not None:
        return Source(bundle.manifest, _torch_reference(bundle, checkpoint), lambda: pairs)
    answers = {id(item.frame): Scored(item.score, item.anomaly_map) for item in stored}
    return Source(bundle.manifest, lambda frame: answers[id(frame)], lambda: pairs, f"{against}, stored in the bundle")


def _runs(bundle: Bundle, only: str | None) -> tuple[list[tuple[str, str, Artefact]], list[Skipped]]:
    """(backend, precision, file) that work here, and those that do not, with the reason."""
    runs: list[tuple[str, str, Artefact]] = []
    skipped: list[Skipped] = []
    silent: list[Skipped] = []  # no backend can run them
    for artefact in bundle.manifest.artefacts:
        precision, told, reason = artefact.precision, False, ""
        for candidate in backends.candidates(bundle.only(artefact), 0, precision):
            wanted = candidate.name == only if only is not None else candidate.name in backends.AUTO_ORDER
            if not wanted or _kind(candidate.name) != artefact.kind:
                continue
            if candidate.artefact is None or candidate.artefact.precision != precision:
                reason = candidate.why_not or reason  # of the last one, which every machine can have
                continue
            told = True
            if candidate.why_not is None:
                runs.append((candidate.name, precision, artefact))
            else:
                skipped.append(Skipped(f"{candidate.name} {precision}", candidate.why_not))
        if not told and reason:
            silent.append(Skipped(f"{artefact.file} {precision}", reason))
    if only is not None and not runs and not skipped:
        # For unknown names and names without a file, the backend has a better error.
        backends.open_backend(bundle, only).close()
    return runs, skipped + silent


def _kind(backend: str) -> str:
    return "engine" if backends.BACKENDS[backend] == "tensorrt" else "onnx"


def _skipped(name: str, precision: str, error: BackendError) -> Skipped:
    return Skipped(f"{name} {precision}", f"{error.what} {error.why}".strip())


def _nothing_runs(bundle: str | os.PathLike[str], skipped: Iterable[Skipped]) -> ConfigError:
    reasons = "; ".join(f"{item.name}: {item.why}" for item in skipped)
    return ConfigError(f"Nothing in {bundle} can be run on this machine.", reasons, "pip install 'saae[cpu]'")


def _source(
    bundle: Bundle,
    data: str | os.PathLike[str] | None,
    checkpoint: str | os.PathLike[str] | None,
    most_images: int,
    stack: ExitStack,
) -> Source:
    if data is None:
        return stored_source(bundle, checkpoint)
    paths = _images(Path(data), most_images)

    def frames() -> Iterable[tuple[str, NDArray[np.uint8]]]:
        return ((path.name, read_image(path, bundle.manifest.frame.white_level)) for path in paths)

    if checkpoint is not None:
        return Source(bundle.manifest, _torch_reference(bundle, checkpoint), frames)
    if "fp32" not in bundle.manifest.precisions():
        raise ConfigError(
            f"{bundle.path} has no FP32 graph to compare with.", "", "give the fitted model: --checkpoint FOLDER"
        )
    own = ("onnxruntime:cpu", "fp32")
    engine = stack.enter_context(Engine(bundle, backend=own[0], precision=own[1], verify=False))
    return Source(bundle.manifest, engine, frames, "model.onnx on the CPU", own)


def _torch_reference(bundle: Bundle, checkpoint: str | os.PathLike[str]) -> Scorer:
    try:
        import torch  # noqa: F401  (only to tell its absence from a fault)
    except ImportError as error:
        raise ConfigError(
            "A comparison with PyTorch needs PyTorch.",
            str(error),
            "pip install 'saae[export]', or leave --checkpoint out",
        ) from error
    from .pytorch import load_reference

    return load_reference(bundle, checkpoint)


def _images(folder: Path, most: int) -> list[Path]:
    if folder.is_file():
        return [folder]
    found = sorted(images_below(folder, recursive=True))
    found = [path for path in found if "ground_truth" not in path.relative_to(folder).parts]
    if not found:
        raise ConfigError(f"{folder} holds no images.", "", "give a folder of images: --data FOLDER")
    if len(found) <= most:
        return found
    chosen = np.unique(np.linspace(0, len(found) - 1, most).round().astype(int))
    return [found[index] for index in chosen]
