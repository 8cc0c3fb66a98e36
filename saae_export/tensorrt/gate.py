"""The gate of `saae-export engine`: removes an engine that disagrees with the bundle's frames, restores the old one."""

from __future__ import annotations

import dataclasses

from saae_runtime.bundle import update_bundle
from saae_runtime.errors import DeviceError

from ..parity.compare import ParityReport, require
from ..parity.verify import Skipped, compare_engine, record_parity
from .compile import BuiltEngine

__all__ = ["gate"]


def gate(built: BuiltEngine, device: int = 0) -> ParityReport | Skipped:
    """Compare a new engine with the reference if this machine can run it, and record the result in the manifest.

    Args:
        built: from `build_engine`.
        device: number of the GPU to run it on.

    Returns:
        The comparison, or why there is none: the engine is for another machine, or the bundle has no frames.

    Raises:
        ParityError: it disagrees; it is removed from the bundle, and the engine that it replaced is restored.
        BackendError: its values are not finite, or it is no engine of this graph; it is removed likewise.
        StorageError: the disk is full, or the bundle may not be written to.
    """
    try:
        found = compare_engine(built.bundle, built.artefact, device)
        if isinstance(found, Skipped):
            return found
        require([found], "--precision fp32, another --opt-level, or a newer release of the library")
    except DeviceError as error:  # says nothing about the engine's results
        return Skipped(built.artefact.file, f"{error.what} {error.why}".strip())
    except BaseException:  # also a Ctrl-C: an engine that nobody compared must not stay in place of one that passed
        _take_out(built)
        raise
    record_parity(built.bundle, {built.artefact.file: found.summary()})
    return found


def _take_out(built: BuiltEngine) -> None:
    manifest = built.bundle.manifest
    others = tuple(item for item in manifest.artefacts if item.file != built.artefact.file)
    restored = dataclasses.replace(manifest, artefacts=(*others, *built.before))
    update_bundle(built.bundle, restored, dict(built.files), drop=(built.artefact.file,))
