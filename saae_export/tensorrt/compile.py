"""Compiles a bundle's ONNX graph to a TensorRT engine in the bundle, also for another machine's GPU."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from saae_runtime.backends.cuda.api import CudaApi
from saae_runtime.backends.tensorrt.library import TrtLibrary, library_name, load_library, version_tuple
from saae_runtime.bundle import Bundle, open_bundle, update_bundle
from saae_runtime.errors import BackendError, ConfigError, DeviceError, StorageError
from saae_runtime.folders import may_write_folder
from saae_runtime.manifest import IN_BF16, Artefact, Profile

from .network import NetworkInfo, network_info, onnx_for_tensorrt, parse_network
from .progress import BuildProgress

__all__ = ["BuiltEngine", "CompiledEngine", "EngineOptions", "build_engine", "compile_engine", "engine_file"]

_LEVELS = range(6)
_SM = re.compile(r"sm\d{2,3}")


@dataclass(frozen=True)
class EngineOptions:
    """Options of a compilation.

    Attributes:
        min_batch, opt_batch, max_batch: smallest batch, the one that the engine is tuned for, and the largest.
        opt_level: the builder's effort, 0 to 5; None leaves it to the library (3).
        workspace: limit of scratch memory while building and running, in MiB; None: all of the GPU's.
        version_compatible: whether later releases of the library may run it (slower, TensorRT only).
        hardware_compatible: other GPUs that may run it: `ampere_plus` or `same_compute_capability` (TensorRT only, not
            on Jetson); None: only the target's kind.

    Raises:
        ConfigError: values out of range.
    """

    min_batch: int = 1
    opt_batch: int = 1
    max_batch: int = 8
    opt_level: int | None = None
    workspace: int | None = None
    version_compatible: bool = False
    hardware_compatible: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.min_batch <= self.opt_batch <= self.max_batch:
            raise ConfigError(
                f"Batch sizes {self.min_batch}, {self.opt_batch}, {self.max_batch} are not possible.",
                "They are the smallest, the usual and the largest batch.",
                "1 <= --min-batch <= --opt-batch <= --max-batch",
            )
        if self.opt_level is not None and self.opt_level not in _LEVELS:
            raise ConfigError(f"--opt-level {self.opt_level} is not possible.", "", "0 (fast build) to 5 (fast engine)")
        if self.workspace is not None and self.workspace < 1:
            raise ConfigError(f"--workspace {self.workspace} is not possible.", "", "give MiB, for instance 2048")

    @property
    def profile(self) -> Profile:
        """The batch sizes for the manifest."""
        return Profile(self.min_batch, self.opt_batch, self.max_batch)

    def for_manifest(self) -> dict[str, Any]:
        """The options that differ from the default, without batch sizes."""
        chosen = dataclasses.asdict(self)
        return {name: value for name, value in chosen.items() if not name.endswith("_batch") and value}


@dataclass(frozen=True)
class CompiledEngine:
    """One engine in memory.

    Attributes:
        data: the serialized engine, as trtexec and DeepStream load it.
        network: its inputs and outputs.
        timing_cache: measured kernel times for the next build; None if the library has no such cache.
        seconds: how long the build took.
    """

    data: bytes
    network: NetworkInfo
    timing_cache: bytes | None
    seconds: float


@dataclass(frozen=True)
class BuiltEngine:
    """An engine in its bundle.

    Attributes:
        bundle: with the engine in it.
        artefact: the engine.
        compiled: the compiled engine.
        before: the engines that it replaced.
        files: their bytes by name, to restore them if the new one fails its comparison.
    """

    bundle: Bundle
    artefact: Artefact
    compiled: CompiledEngine
    before: tuple[Artefact, ...] = ()
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)


def engine_file(library: str, version: str, sm: str, precision: str, options: EngineOptions) -> str:
    """The file's name: library, version, GPU, precision, smallest, usual and largest batch, and further options.

    For instance `tensorrt-10.3-sm87-fp16-b1-1-8.engine`, or `...-b1-1-1-o5-vc.engine` with `--opt-level 5` and
    `--version-compatible`.
    """
    parts = [_target(library, version, sm), precision, f"b{options.min_batch}-{options.opt_batch}-{options.max_batch}"]
    if options.opt_level is not None:
        parts.append(f"o{options.opt_level}")
    if options.workspace is not None:
        parts.append(f"w{options.workspace}")
    if options.version_compatible:
        parts.append("vc")
    if options.hardware_compatible is not None:
        parts.append(options.hardware_compatible)
    return "-".join(parts) + ".engine"


def _target(library: str, version: str, sm: str) -> str:
    return f"{library}-{'.'.join(str(number) for number in version_tuple(version)[:2])}-{sm}"


def build_engine(
    bundle: str | os.PathLike[str] | Bundle,
    *,
    library: str = "tensorrt",
    sms: Sequence[str] = (),
    precision: str = "fp16",
    options: EngineOptions | None = None,
    device: int = 0,
    console: Console | None = None,
) -> BuiltEngine:
    """Compile a bundle's graph and put the engine into the bundle, all or nothing.

    An engine of the same library release, GPU and precision is replaced, whatever its batch sizes and options, so that
    it is clear which one runs. Damaged engines are removed from the bundle.

    Args:
        bundle: the folder, or an opened bundle.
        library: `tensorrt` (builds on the GPU that the engine is for) or `tensorrt-rtx` (also without a GPU).
        sms: GPU generations to build for, such as `sm89`; empty: this machine's GPU.
        precision: of the ONNX graph; the engine has the graph's types.
        options: batch sizes and the builder's options.
        device: number of the GPU to build on.
        console: where progress is shown; None shows none.

    Raises:
        BundleError: no bundle there, or a damaged one.
        ConfigError: a precision that the bundle has no graph for, an option or GPU that the library does not support.
        BackendUnavailableError: the library is not installed.
        DeviceError: a GPU is needed and there is none.
        BackendError: the library does not take the graph, or the build fails.
        StorageError: the disk is full, or the bundle may not be written to.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle, mend=True)
    chosen = options or EngineOptions()
    may_write_folder(opened.path)  # fail before the work
    source = _graph(opened, precision)
    loaded = load_library(library_name(library))
    targets = _targets(loaded, sms, device)
    sm = "+".join(targets)
    target = _target(loaded.name, loaded.version, sm)
    cache_file = f"{target}.timing"
    cache = opened.file(cache_file).read_bytes() if cache_file in opened.manifest.files else b""
    model = onnx_for_tensorrt(opened.file(source.file))
    ahead_of_time = bool(sms) and bool(loaded.buildable_sms())
    with nullcontext() if ahead_of_time else CudaApi().on(device):
        compiled = compile_engine(
            loaded,
            model,
            name=source.file,
            sms=targets if loaded.buildable_sms() else (),
            options=chosen,
            timing_cache=cache,
            tf32=precision != "fp32",  # scores in TF32 would not fit the calibrated thresholds
            console=console,
        )
    opened = _as_it_is_now(opened, source, model)
    artefact = Artefact(
        file=engine_file(loaded.name, loaded.version, sm, precision, chosen),
        kind="engine",
        precision=precision,
        library=loaded.name,
        library_version=loaded.version,
        sm=sm,
        profile=chosen.profile,
        options={**chosen.for_manifest(), "source": source.file, "source_sha256": opened.sha256(source.file)},
    )
    files = {artefact.file: compiled.data}
    if compiled.timing_cache is not None:
        files[cache_file] = compiled.timing_cache
    replaced = tuple(
        item
        for item in opened.artefacts(kind="engine", library=loaded.name, precision=precision)
        if _target(loaded.name, item.library_version or "", item.sm or "") == target
    )
    kept = {item.file: opened.file(item.file).read_bytes() for item in replaced}
    return BuiltEngine(_add(opened, artefact, files, replaced), artefact, compiled, replaced, kept)


def compile_engine(
    library: TrtLibrary,
    model: bytes,
    *,
    name: str = "the graph",
    sms: Sequence[str] = (),
    options: EngineOptions | None = None,
    timing_cache: bytes = b"",
    tf32: bool = True,
    console: Console | None = None,
) -> CompiledEngine:
    """Compile a graph in memory.

    Args:
        library: the loaded flavour.
        model: ONNX, from `onnx_for_tensorrt`.
        name: the file's name, for messages.
        sms: GPU generations, if the library can build for other GPUs; empty: this machine's GPU.
        options: batch sizes and the builder's options.
        timing_cache: of an earlier build, or empty.
        tf32: whether FP32 products may use TF32, the library's default.
        console: where progress is shown.

    Raises:
        ConfigError, BackendError: as `build_engine`.
        KeyboardInterrupt: Ctrl-C; the builder has stopped.
    """
    chosen = options or EngineOptions()
    _check_options(library, chosen)
    started = time.monotonic()
    builder = library.module.Builder(library.logger)
    network, parser = parse_network(library, builder, model, name)
    info = network_info(library, network)
    config = builder.create_builder_config()
    _configure(library, builder, network, config, sms, chosen)
    if not tf32:
        config.clear_flag(library.module.BuilderFlag.TF32)
    cache = _load_cache(library, config, timing_cache)
    with BuildProgress(library, console) as progress:
        config.progress_monitor = progress.monitor
        library.take_messages()
        plan = builder.build_serialized_network(network, config)
    progress.check()
    if plan is None:
        raise _build_failed(library, name)
    del parser
    saved = bytes(memoryview(config.get_timing_cache().serialize())) if cache is not None else None
    return CompiledEngine(bytes(memoryview(plan)), info, saved, time.monotonic() - started)


def _graph(bundle: Bundle, precision: str) -> Artefact:
    have = [
        item.precision for item in bundle.artefacts(kind="onnx") if item.precision not in IN_BF16
    ]  # that is the FP32 file
    found = bundle.artefacts(kind="onnx", precision=precision) if precision in have else ()
    if not found:
        raise ConfigError(
            f"{bundle.path} has no ONNX graph at {precision}.",
            f"It has: {', '.join(have) or 'none'}. An engine keeps the types of the graph that it is compiled from.",
            f"--precision {have[0]}, or build the bundle again with {precision}" if have else "saae-export build",
        )
    return found[0]


def _targets(library: TrtLibrary, sms: Sequence[str], device: int) -> tuple[str, ...]:
    """The GPU generations to build for. Asks the driver only if none are named or the library needs the GPU."""
    wanted = tuple(dict.fromkeys(sm.strip().lower().replace(".", "") for sm in sms))
    for sm in wanted:
        if not _SM.fullmatch(sm):
            raise ConfigError(f"--for {sm} is not a GPU generation.", "", "sm and the compute capability: sm89 is 8.9")
    if not library.can_build:
        raise ConfigError(
            f"{library.title} has no builder.",
            "It only runs engines.",
            "--library tensorrt --version-compatible makes engines that it runs",
        )
    known = library.buildable_sms()
    if wanted and known:
        unknown = [sm for sm in wanted if sm not in known]
        if unknown:
            raise ConfigError(
                f"{library.title} does not build for {', '.join(unknown)}.",
                f"It builds for {', '.join(known)}.",
                "on the target itself: saae-export engine BUNDLE --library tensorrt",
            )
        return wanted
    # Create no builder before this check: without a driver some releases crash.
    here = _this_gpu(library, device, known)
    if wanted and wanted != (here,):
        raise ConfigError(
            f"{library.title} builds only for the GPU that it runs on: {here}, not {', '.join(wanted)}.",
            "It measures kernels on the GPU.",
            "run the same command on the target, or use --library tensorrt-rtx for RTX GPUs",
        )
    if known and here not in known:
        raise ConfigError(
            f"{library.title} does not support this GPU ({here}).",
            f"It builds for {', '.join(known)}.",
            "--library tensorrt",
        )
    return (here,)


def _this_gpu(library: TrtLibrary, device: int, known: Sequence[str]) -> str:
    """The generation of this machine's GPU; without a GPU, the error says how to name one."""
    try:
        api = CudaApi()
        api.check_driver(library.cuda_major())
        return api.device(device).sm
    except BackendError as error:
        if not known:
            raise
        raise DeviceError(
            f"There is no GPU here to build for with {library.title}.",
            f"{error.what} {error.why}".strip(),
            f"name the target's GPU: --for {known[-1]} (one of {', '.join(known)})",
        ) from error


def _check_options(library: TrtLibrary, options: EngineOptions) -> None:
    if options.version_compatible and not library.has_version_compatible:
        raise ConfigError(
            f"{library.title} has no version-compatible engines.",
            "Its engines run on the exact release that built them.",
            "leave --version-compatible out, and rebuild engines when the library is updated",
        )
    level = options.hardware_compatible
    if level is not None and level not in library.hardware_levels():
        have = library.hardware_levels()
        raise ConfigError(
            f"{library.title} has no hardware compatibility {level!r}.",
            f"It has: {', '.join(have)}." if have else "Name the GPUs with --for instead, several with commas.",
            f"--hardware-compatible {have[0]}" if have else "--for sm86,sm89,sm120",
        )


def _configure(
    library: TrtLibrary, builder: Any, network: Any, config: Any, sms: Sequence[str], options: EngineOptions
) -> None:
    module = library.module
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(int(side) for side in tensor.shape)
        if -1 in shape:
            sizes = (options.min_batch, options.opt_batch, options.max_batch)
            profile.set_shape(tensor.name, *(tuple(size if side == -1 else side for side in shape) for size in sizes))
    if config.add_optimization_profile(profile) < 0:
        raise _build_failed(library, "the batch sizes")
    if sms:
        library.target(config, sms)
    library.require_capturable(config)
    if options.opt_level is not None:
        config.builder_optimization_level = options.opt_level
    if options.workspace is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, options.workspace << 20)
    if options.version_compatible:
        config.set_flag(module.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible is not None:
        level = getattr(module.HardwareCompatibilityLevel, options.hardware_compatible.upper())
        config.hardware_compatibility_level = level


def _load_cache(library: TrtLibrary, config: Any, data: bytes) -> Any:
    """Put a timing cache into the configuration; a cache of another GPU or release is discarded."""
    if not library.has_timing_cache:
        return None
    cache = config.create_timing_cache(data)
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    library.take_messages()
    return cache


def _build_failed(library: TrtLibrary, name: str) -> BackendError:
    said = "; ".join(message for message in library.take_messages() if "CUDA driver" not in message)
    cure = "a newer release of the library, --precision fp32, or another --opt-level; saae-export doctor shows versions"
    if re.search(r"memory|workspace", said, re.IGNORECASE):
        cure = "a smaller --max-batch or --opt-batch, a larger --workspace, or free memory on the GPU"
    return BackendError(f"{library.title} could not build an engine from {name}.", said or "It gave no reason.", cure)


def _as_it_is_now(bundle: Bundle, source: Artefact, model: bytes) -> Bundle:
    """The bundle as it is after the compiling, which takes minutes; calibrated again, for example.

    Raises:
        StorageError: the graph that was compiled is no longer in it.
    """
    if bundle.is_current():
        return bundle
    found = open_bundle(bundle.path, mend=True)
    if source.file in found.manifest.files and onnx_for_tensorrt(found.file(source.file)) == model:
        return found
    raise StorageError(
        f"{bundle.path} was changed by another command meanwhile.",
        f"The engine was compiled from a {source.file} that is no longer in it.",
        "nothing was written; run it again",
    )


def _add(bundle: Bundle, artefact: Artefact, files: dict[str, bytes], replaced: Sequence[Artefact]) -> Bundle:
    """Write the bundle with the engine in it and without those that it replaces."""
    manifest = bundle.manifest
    artefacts = (*(item for item in manifest.artefacts if item not in replaced), artefact)
    tools = {**manifest.tools, str(artefact.library): str(artefact.library_version)}
    return update_bundle(
        bundle,
        dataclasses.replace(manifest, artefacts=artefacts, tools=tools),
        files,
        drop=tuple(item.file for item in replaced),
    )
