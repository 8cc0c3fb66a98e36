"""The backends: their names, which of them work here, and opening one."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import logging
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ..bundle import Bundle
from ..errors import BackendError, BackendUnavailableError, ConfigError, shown
from ..manifest import PRECISIONS
from ..version import saae_version
from .answers import answer_check
from .base import Backend, BackendOptions, Candidate, RawOutputs, Ticket
from .cache import cache_folder, user_cache
from .machine import loaded_versions, machine_facts
from .timing import Figures, Way, find, keep, take

__all__ = [
    "AUTO_ORDER",
    "BACKENDS",
    "Backend",
    "BackendOptions",
    "Candidate",
    "ON_CPU",
    "RawOutputs",
    "Ticket",
    "candidates",
    "explain",
    "measure",
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
"""Backend name -> its module in this package."""

AUTO_ORDER: tuple[str, ...] = (
    "tensorrt",
    "tensorrt_rtx",
    "tensorrt_lean",
    "onnxruntime:cuda",
    "openvino",
    "onnxruntime:cpu",
)
"""The backends that `auto` chooses from, in its order without timings. `onnxruntime:tensorrt` is not among them,
because its first start compiles for minutes."""

ON_CPU = frozenset({"openvino", "onnxruntime:cpu"})
"""Those of `AUTO_ORDER` that need no GPU."""

_QUICKEST = ("int8-bf16", "int8", "bf16", "fp16", "fp32")  # timed first, in case time runs out
_log = logging.getLogger("saae_runtime")
_clock = time.perf_counter


def candidates(bundle: Bundle, device: int = 0, precision: str | None = None) -> list[Candidate]:
    """Every backend for a bundle, in `auto`'s fixed order; for missing ones, why and what to install.

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
    """Open a backend.

    Args:
        bundle: an opened bundle.
        name: one of `BACKENDS`; `onnxruntime` for the fastest of its providers; `auto` for the fastest of all. Only
            these two choose, by timings on this machine, see `BackendOptions.measure`; any other name is opened or
            is an error.
        device: GPU number.
        precision: one of `saae_runtime.manifest.PRECISIONS`; None: the backend's own choice.
        options: see `BackendOptions`.

    Raises:
        ConfigError: an unknown name, precision or option.
        BackendUnavailableError: not installed or not usable here; says what to install.
        BackendError: it cannot load the bundle's file.
    """
    chosen = BackendOptions.from_mapping(options)
    _check(name, device, precision)
    if name in BACKENDS:
        return _open(bundle, name, device, precision, chosen)
    return _open_best(bundle, name, device, precision, chosen)


def measure(
    bundle: Bundle, name: str = "auto", device: int = 0, precision: str | None = None, **options: Any
) -> Figures | None:
    """The speed of every backend that `auto` may choose here, timed now if unknown; None if nothing is timed.

    Timings are kept in the bundle's cache folder, if `options` allow one, and in this process, for every bundle of the
    same files. Arguments are those of `open_backend`.
    """
    chosen = BackendOptions.from_mapping(options)
    _check(name, device, precision)
    return _measured(_asked(bundle, name, device, precision, chosen), lambda text: None, without_cache=True)


def explain(bundle: Bundle, backend: Backend, device: int = 0, precision: str | None = None, **options: Any) -> str:
    """The backends for a bundle as text, one line each: which is in use, the time of each, and why others are missing.

    Args:
        bundle: the bundle.
        backend: the backend in use.
        device, precision, options: those that it was opened with.
    """
    asked = _asked(bundle, "auto", device, precision, BackendOptions.from_mapping(options))
    figures = None if asked.why_not else find(asked.key, asked.folder)
    running = {item.name: item.artefact for item in candidates(bundle, device, backend.precision)}[backend.name]
    lines, passed = [], False
    for candidate in candidates(bundle, device, precision):
        rows = figures.of(candidate.name) if figures else []
        file = candidate.artefact.file if candidate.artefact else "no file for it"
        if candidate.name == backend.name:
            verdict, mark, passed = f"in use: {running.file if running else file}", "*", True
        elif candidate.why_not is not None:
            verdict, mark = f"not here: {candidate.why_not}" + (f" -> {candidate.cure}" if candidate.cure else ""), " "
        else:
            verdict, mark = f"works, slower: {file}" if passed and not rows else f"works: {file}", " "
        verdict += f" ({candidate.note})" if candidate.note else ""
        verdict += "".join(
            f"{', ' if place else '; '}{row.precision} {row.ms:.3g} ms" for place, row in enumerate(rows)
        )
        lines.append(f"{mark} {candidate.name}: {verdict}")
    return "\n".join([*lines, _about(figures, asked)])


def _about(figures: Figures | None, asked: _Asked) -> str:
    if figures is None:
        nowhere = "there is no folder to keep timings in" if asked.folder is None else "nothing has been timed here yet"
        return f"  not timed, so auto goes by a fixed order: {asked.why_not or nowhere}"
    left = [f"; {row.backend} {row.precision} not timed: {row.why}" for row in figures.rows if row.ms is None]
    return f"  timed here on {figures.date}, one frame at the graph's size{''.join(left)}"


@dataclass(frozen=True)
class _Asked:
    """The candidates of `auto`, and where their timings are kept.

    Attributes:
        ways: usable backends and precisions that did not fail their comparison, the probably fastest first.
        key: everything that their speed depends on.
        folder: where timings are kept; None: nowhere.
        why_not: why they are not timed; empty if they are.
    """

    bundle: Bundle
    device: int
    options: BackendOptions
    ways: tuple[Candidate, ...]
    key: dict[str, Any]
    folder: Path | None
    why_not: str


def _asked(bundle: Bundle, name: str, device: int, precision: str | None, options: BackendOptions) -> _Asked:
    why = ""
    if options.measure is False or (options.measure is None and os.environ.get("SAAE_MEASURE") == "0"):
        why = "measuring is switched off"
    elif options.arithmetic is not None or options.device_type is not None:
        why = "arithmetic= or device_type= was given"
    if why:
        return _Asked(bundle, device, options, (), {}, None, why)
    ways = _ways(bundle, name, device, precision)
    if len(ways) < 2:
        return _Asked(bundle, device, options, ways, {}, None, "there is no choice")
    return _Asked(
        bundle, device, options, ways, _key(bundle, ways, device, options), cache_folder(bundle, options.cache), ""
    )


def _ways(bundle: Bundle, name: str, device: int, precision: str | None) -> tuple[Candidate, ...]:
    found = []
    for wanted in bundle.manifest.precisions() if precision is None else (precision,):
        for item in candidates(bundle, device, wanted):
            fits = item.artefact is not None and item.artefact.precision == wanted
            if _considered(item, name) and item.why_not is None and fits and not _disagrees(item):
                found.append((wanted, item))
    exact = {item.name for wanted, item in found if wanted == "fp32"}
    # On a CPU an FP16 graph is computed in FP32 or emulated.
    found = [(wanted, item) for wanted, item in found if not (wanted == "fp16" and item.name in ON_CPU & exact)]
    found.sort(key=lambda pair: (_QUICKEST.index(pair[0]), AUTO_ORDER.index(pair[1].name)))
    return tuple(item for _, item in found)


def _key(bundle: Bundle, ways: Sequence[Candidate], device: int, options: BackendOptions) -> dict[str, Any]:
    libraries = [name.partition(":")[0] for name in dict.fromkeys(item.name for item in ways)]
    files = [(item.name, item.artefact) for item in ways if item.artefact is not None]
    return {
        "saae": saae_version(),
        "machine": machine_facts(),
        "libraries": loaded_versions(libraries),
        "ways": [[name, item.precision, bundle.sha256(item.file)] for name, item in files],
        "notes": sorted({f"{item.name}: {item.note}" for item in ways if item.note}),
        "device": device,
        "options": [options.threads, options.hint, options.slots, options.cuda_graph],
    }


def _measured(asked: _Asked, say: Callable[[str], None], without_cache: bool = False) -> Figures | None:
    """The timings, measured now if unknown; None if nothing is to be timed.

    Args:
        asked: the candidates.
        say: called before they are timed.
        without_cache: whether to time them even if the timings cannot be stored.
    """
    if asked.why_not:
        return None
    found = find(asked.key, asked.folder)
    if found is not None:
        return keep(asked.key, found, asked.folder)
    if asked.folder is None and not without_cache:
        return None
    options = dataclasses.replace(asked.options, max_batch=1, warm_up=True)

    wrong = answer_check(asked.bundle)

    def way(candidate: Candidate) -> Way:
        artefact = candidate.artefact
        assert artefact is not None  # `_ways` leaves out candidates without a file
        return Way(
            candidate.name,
            artefact.precision,
            lambda: _open(asked.bundle, candidate.name, asked.device, artefact.precision, options),
            lambda backend: wrong(backend, artefact),
        )

    place = user_cache() or asked.folder
    lock = None if place is None else place / "timing.lock"
    return take(asked.key, asked.folder, lock, [way(item) for item in asked.ways], say, _clock)


def _open(bundle: Bundle, name: str, device: int, precision: str | None, options: BackendOptions) -> Backend:
    backend: Backend = _modules()[BACKENDS[name]].open_backend(bundle, name, device, precision, options)
    return backend


def _open_best(bundle: Bundle, name: str, device: int, precision: str | None, options: BackendOptions) -> Backend:
    reasons: list[str] = []

    def opened(candidate: str, precision: str | None) -> Backend | None:
        try:
            return _open(bundle, candidate, device, precision, options)
        except BackendError as error:
            # It looked usable but is not: take the next one, with a warning.
            reasons.append(f"{candidate}: {error.what} {error.why}".strip())
            warnings.warn(f"saae: {candidate} is passed over. {error.what} {error.why}", stacklevel=5)
            return None

    figures = _measured(_asked(bundle, name, device, precision, options), _log.warning)
    for row in figures.fastest() if figures else ():
        if (backend := opened(row.backend, row.precision)) is not None:
            return backend
    tried = {row.backend for row in figures.fastest()} if figures else set()
    for candidate in candidates(bundle, device, precision):
        if not _considered(candidate, name) or candidate.name in tried:
            continue
        if candidate.why_not is not None:
            reasons.append(f"{candidate.name}: {candidate.why_not}")
        elif disagrees := _disagrees(candidate) or (figures.refused(candidate.name) if figures else ""):
            reasons.append(f"{candidate.name}: {disagrees}")
            warnings.warn(f"saae: {candidate.name} is passed over. {disagrees}", stacklevel=4)
        elif (backend := opened(candidate.name, precision)) is not None:
            return backend
    raise BackendUnavailableError(
        f"No backend can run {bundle.path} here.",
        "; ".join(reasons) or "none is known",
        "pip install 'saae[cpu]' runs on every machine",
    )


def _considered(candidate: Candidate, name: str) -> bool:
    """Whether `auto`, or `onnxruntime` for its own providers, may choose a candidate."""
    return candidate.name in AUTO_ORDER and (name == "auto" or candidate.name.startswith(f"{name}:"))


def _disagrees(candidate: Candidate) -> str:
    """Why a file is not chosen automatically: its comparison with the reference failed. Empty if it did not fail."""
    parity = candidate.artefact.parity if candidate.artefact else None
    if candidate.artefact is None or parity is None or parity.passed:
        return ""
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
