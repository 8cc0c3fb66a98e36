"""Backends `tensorrt`, `tensorrt_rtx` and `tensorrt_lean`: finds a bundle's engine that runs here, and opens it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ...errors import BackendUnavailableError, BundleCorruptError, EngineIncompatibleError, SaaeError
from ...files import sha256_bytes
from ...manifest import IN_BF16, Artefact, rebuild_command
from ..base import Backend, BackendOptions, Candidate
from ..cache import cache_folder
from ..cuda.api import CudaApi, GpuInfo
from .backend import TensorRTBackend
from .kernels import kernel_file
from .library import (
    FLAVOURS,
    TITLES,
    TrtLibrary,
    engine_library,
    install_hint,
    is_installed,
    library_name,
    load_library,
    sm_problem,
    version_problem,
)

if TYPE_CHECKING:
    from ...bundle import Bundle

__all__ = ["candidates", "engine_problem", "open_backend"]

_PREFERENCE = ("fp16", "int8", "bf16", "fp32")


def candidates(bundle: Bundle, device: int = 0, precision: str | None = None) -> list[Candidate]:
    """The backends of all flavours of TensorRT for a bundle; never raises for missing ones.

    Args:
        bundle: the bundle.
        device: number of the GPU.
        precision: only engines of this precision.
    """
    return [_candidate(bundle, flavour, device, precision) for flavour in FLAVOURS]


def open_backend(
    bundle: Bundle,
    name: str,
    device: int = 0,
    precision: str | None = None,
    options: BackendOptions | None = None,
    api: CudaApi | None = None,
) -> Backend:
    """Open a bundle's engine.

    Library, version and GPU generation are compared with the manifest before anything touches the GPU, and the
    engine's hash before it is deserialized: an engine is code.

    Args:
        bundle: the bundle.
        name: `tensorrt`, `tensorrt_rtx` or `tensorrt_lean`.
        device: number of the GPU.
        precision: `fp16`, `int8` or `fp32`; None takes the first of these that fits and has
            not failed its comparison; one that failed only where there is no other.
        options: see `BackendOptions`.
        api: CUDA, for callers that watch its calls; None: a new one.

    Raises:
        BackendUnavailableError: the library or cuda-python is missing, or the bundle has no engine for it.
        EngineIncompatibleError: built for another library, version or GPU; both sides are named.
        BundleCorruptError: the engine's bytes differ from the manifest.
        DeviceError: no driver, a driver that is too old, no such GPU, or not enough memory.
    """
    flavour = library_name(name)
    artefacts = _engines(bundle, flavour, precision)
    if not artefacts:
        raise BackendUnavailableError(*_no_engine(bundle, flavour, precision))
    library = load_library(flavour)
    _require(bundle, artefacts, lambda item: version_problem(item, flavour, library.version), library, None)
    api = CudaApi() if api is None else api
    api.check_driver(library.cuda_major())
    gpu = api.device(device)
    artefact = _require(bundle, artefacts, lambda item: _problem(item, library, gpu), library, gpu)
    return _open(bundle, flavour, artefact, library, api, gpu, options or BackendOptions())


def engine_problem(artefact: Artefact, flavour: str, version: str, sm: str | None) -> str | None:
    """Why an engine does not run with a library and GPU; None if it does. `sm` None ignores the GPU."""
    problem = version_problem(artefact, flavour, version)
    if problem is None and sm is not None:
        problem = sm_problem(artefact, sm)
    return problem


def _open(
    bundle: Bundle,
    flavour: str,
    artefact: Artefact,
    library: TrtLibrary,
    api: CudaApi,
    gpu: GpuInfo,
    options: BackendOptions,
) -> Backend:
    data = bundle.file(artefact.file).read_bytes()
    if sha256_bytes(data) != bundle.sha256(artefact.file):
        raise BundleCorruptError(
            f"{artefact.file} was changed after the bundle was written.",
            "Its hash is not the one in the manifest; an engine is code, so it is not loaded.",
            rebuild_command(engine_library(flavour), gpu.sm, artefact.precision, str(bundle.path)),
        )
    frame = bundle.manifest.frame
    with api.on(gpu.index):
        try:
            engine = library.deserialize(data, host_code=bool(artefact.options.get("version_compatible")))
        except EngineIncompatibleError as error:
            raise EngineIncompatibleError(
                f"{artefact.file} does not load with {library.title} on {gpu.name} ({gpu.sm}).",
                error.why,
                rebuild_command(engine_library(flavour), gpu.sm, artefact.precision, str(bundle.path)),
            ) from error
    folder = cache_folder(bundle, options.cache) if library.compiles_when_running else None
    return TensorRTBackend(
        name=flavour,
        library=library,
        engine=engine,
        api=api,
        gpu=gpu,
        precision=artefact.precision,
        frame_size=(frame.height, frame.width),
        options=options,
        label=artefact.file,
        kernels=None if folder is None else folder / kernel_file(artefact.file, gpu.name),
    )


def _engines(bundle: Bundle, flavour: str, precision: str | None) -> list[Artefact]:
    """The engines for a flavour, the preferred precision first, those that failed their comparison last."""
    found = bundle.artefacts(kind="engine", library=engine_library(flavour), precision=precision)
    return sorted(found, key=lambda item: (_failed(item), _PREFERENCE.index(item.precision)))


def _failed(artefact: Artefact) -> bool:
    return artefact.parity is not None and not artefact.parity.passed


def _graph_precision(bundle: Bundle, wanted: str | None) -> str:
    """A precision of the bundle's graphs for an engine: the wanted one, else FP16, else any."""
    held = [item.precision for item in bundle.artefacts(kind="onnx") if item.precision not in IN_BF16]
    for precision in (wanted, "fp16", *held):
        if precision in held:
            return str(precision)
    return wanted if wanted is not None and wanted not in IN_BF16 else "fp16"


def _problem(artefact: Artefact, library: TrtLibrary, gpu: GpuInfo) -> str | None:
    return engine_problem(artefact, library.name, library.version, gpu.sm)


def _require(
    bundle: Bundle,
    artefacts: Sequence[Artefact],
    problem: Callable[[Artefact], str | None],
    library: TrtLibrary,
    gpu: GpuInfo | None,
) -> Artefact:
    """The first engine without a problem."""
    problems = []
    for artefact in artefacts:
        found = problem(artefact)
        if found is None:
            return artefact
        problems.append(found)
    sm = gpu.sm if gpu else artefacts[0].sm
    here = f"{library.title} on {gpu.name} ({gpu.sm})" if gpu else library.title
    raise EngineIncompatibleError(
        f"No engine of {bundle.path} runs with {here}.",
        "; ".join(problems),
        rebuild_command(
            engine_library(library.name), sm, _graph_precision(bundle, artefacts[0].precision), str(bundle.path)
        ),
    )


def _no_engine(bundle: Bundle, flavour: str, precision: str | None) -> tuple[str, str, str]:
    library = engine_library(flavour)
    others = sorted({str(item.library) for item in bundle.artefacts(kind="engine")} - {library})
    wanted = f" at {precision}" if precision else ""
    return (
        f"{bundle.path} has no engine for {TITLES[library]}{wanted}.",
        f"It has engines for: {', '.join(others)}." if others else "",
        rebuild_command(library, None, _graph_precision(bundle, precision), str(bundle.path)),
    )


def _candidate(bundle: Bundle, flavour: str, device: int, precision: str | None) -> Candidate:
    artefacts = _engines(bundle, flavour, precision)
    if not artefacts:
        what, _, cure = _no_engine(bundle, flavour, precision)
        return Candidate(flavour, None, what, cure=cure)
    if not is_installed(flavour):
        return Candidate(flavour, artefacts[0], f"{TITLES[flavour]} is not installed", cure=install_hint(flavour))
    try:
        library = load_library(flavour)
        _require(bundle, artefacts, lambda item: version_problem(item, flavour, library.version), library, None)
        api = CudaApi()
        api.check_driver(library.cuda_major())
        gpu = api.device(device)
        artefact = _require(bundle, artefacts, lambda item: _problem(item, library, gpu), library, gpu)
    except SaaeError as error:
        return Candidate(flavour, artefacts[0], f"{error.what} {error.why}".strip(), cure=error.cure)
    return Candidate(flavour, artefact, note=f"{library.title} on {gpu.name} ({gpu.sm})")
