"""The ways to run a bundle: their names, which of them work here, and opening one."""

from __future__ import annotations

import difflib
import importlib
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from ..bundle import Bundle
from ..errors import BackendError, BackendUnavailableError, ConfigError, shown
from ..manifest import PRECISIONS
from .base import Backend, BackendOptions, Candidate, RawOutputs, Ticket

__all__ = [
    "AUTO_ORDER",
    "BACKENDS",
    "Backend",
    "BackendOptions",
    "Candidate",
    "RawOutputs",
    "Ticket",
    "candidates",
    "explain",
    "open_backend",
]

BACKENDS: dict[str, str] = {
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt",
    "tensorrt_lean": "tensorrt",
    "onnxruntime:tensorrt": "onnxruntime",
    "onnxruntime:cuda": "onnxruntime",
    "onnxruntime:cpu": "onnxruntime",
    "openvino": "openvino",
}
"""Backend names and the module of this package that has each."""

AUTO_ORDER: tuple[str, ...] = (
    "tensorrt",
    "tensorrt_rtx",
    "tensorrt_lean",
    "onnxruntime:cuda",
    "openvino",
    "onnxruntime:cpu",
)
"""Fastest first. `onnxruntime:tensorrt` is left out: its first start compiles for minutes, so only on request."""


def candidates(bundle: Bundle, device: int = 0, precision: str | None = None) -> list[Candidate]:
    """Every way to run a bundle on this machine, fastest first; what is missing says why and what to install.

    Args:
        bundle: an opened bundle.
        device: GPU number.
        precision: only artefacts of this precision; None: each backend's own choice.
    """
    found: dict[str, Candidate] = {}
    for module in _modules().values():
        for candidate in module.candidates(bundle, device, precision):
            found[candidate.name] = candidate
    order = [*AUTO_ORDER, *(name for name in BACKENDS if name not in AUTO_ORDER)]
    return [found[name] for name in order if name in found]


def open_backend(
    bundle: Bundle,
    name: str = "auto",
    device: int = 0,
    precision: str | None = None,
    **options: Any,
) -> Backend:
    """Opens a backend.

    Args:
        bundle: an opened bundle.
        name: one of `BACKENDS`; `onnxruntime` for the best of its providers that is there; `auto` for the fastest of
            all. Only these two choose; a name asked for is opened or is an error.
        device: GPU number.
        precision: one of `saae_runtime.manifest.PRECISIONS`; None: the backend's own choice.
        options: see `BackendOptions`.

    Raises:
        ConfigError: an unknown name, precision or option.
        BackendUnavailableError: not installed or not usable here; says what to install.
        BackendError: there, but it cannot load the bundle's file.
    """
    chosen = BackendOptions.from_mapping(options)
    _check(name, device, precision)
    if name in BACKENDS:
        backend: Backend = _modules()[BACKENDS[name]].open_backend(bundle, name, device, precision, chosen)
        return backend
    return _open_best(bundle, name, device, precision, chosen)


def explain(tried: Sequence[Candidate], chosen: str) -> str:
    """Candidates as text, one line each: which was taken, and why the others were not."""
    names = [candidate.name for candidate in tried]
    lines = []
    for candidate in tried:
        file = candidate.artefact.file if candidate.artefact else "no file for it"
        if candidate.name == chosen:
            verdict, mark = f"in use: {file}", "*"
        elif candidate.why_not is not None:
            verdict, mark = f"not here: {candidate.why_not}" + (f" -> {candidate.cure}" if candidate.cure else ""), " "
        elif chosen in names and names.index(candidate.name) > names.index(chosen):
            verdict, mark = f"works, slower: {file}", " "
        else:
            verdict, mark = f"works: {file}", " "
        lines.append(f"{mark} {candidate.name}: {verdict}" + (f" ({candidate.note})" if candidate.note else ""))
    return "\n".join(lines)


def _open_best(bundle: Bundle, name: str, device: int, precision: str | None, options: BackendOptions) -> Backend:
    reasons = []
    for candidate in candidates(bundle, device, precision):
        if candidate.name not in AUTO_ORDER or (name != "auto" and not candidate.name.startswith(f"{name}:")):
            continue
        if candidate.why_not is not None:
            reasons.append(f"{candidate.name}: {candidate.why_not}")
            continue
        if (disagrees := _disagrees(candidate)) is not None:
            reasons.append(f"{candidate.name}: {disagrees}")
            warnings.warn(f"saae: {candidate.name} is passed over. {disagrees}", stacklevel=4)
            continue
        try:
            backend: Backend = _modules()[BACKENDS[candidate.name]].open_backend(
                bundle, candidate.name, device, precision, options
            )
        except BackendError as error:
            # It looked usable and is not: the next one is taken, but never without a word.
            reasons.append(f"{candidate.name}: {error.what} {error.why}".strip())
            warnings.warn(f"saae: {candidate.name} is passed over. {error.what} {error.why}", stacklevel=4)
            continue
        return backend
    raise BackendUnavailableError(
        f"No backend can run {bundle.path} here.",
        "; ".join(reasons) or "none is known",
        "pip install 'saae[cpu]' runs on every machine",
    )


def _disagrees(candidate: Candidate) -> str | None:
    """Why a file is not taken unasked: it was compared with its reference and failed."""
    parity = candidate.artefact.parity if candidate.artefact else None
    if candidate.artefact is None or parity is None or parity.passed:
        return None
    return (
        f"{candidate.artefact.file} disagreed with {parity.reference} when it was compared "
        f"(worst image: {parity.worst_image}); compile it again, or ask for it by name."
    )


def _check(name: str, device: int, precision: str | None) -> None:
    names = ["auto", "onnxruntime", *BACKENDS]
    if not isinstance(name, str) or name not in names:
        near = difflib.get_close_matches(shown(name, 200), names, 1)
        raise ConfigError(
            f"There is no backend {shown(name)}.",
            f"Known are: {', '.join(names)}.",
            f"did you mean {near[0]}?" if near else "use backend='auto'",
        )
    if precision is not None and (not isinstance(precision, str) or precision not in PRECISIONS):
        raise ConfigError(f"There is no precision {shown(precision)}.", "", f"one of: {', '.join(PRECISIONS)}")
    if isinstance(device, bool) or not isinstance(device, int) or not 0 <= device < 1024:
        raise ConfigError(f"device={shown(device)} is not possible.", "It is the number of a GPU.", "device=0")


def _modules() -> dict[str, ModuleType]:
    return {name: importlib.import_module(f"{__name__}.{name}") for name in dict.fromkeys(BACKENDS.values())}
