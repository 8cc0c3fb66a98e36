"""The three flavours of TensorRT behind one interface; the only place that imports them or checks their version."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import BackendUnavailableError, ConfigError, DeviceError, EngineIncompatibleError
from ...manifest import Artefact, split_sms
from ..cuda.jetson import Jetson, find_jetson

__all__ = [
    "FLAVOURS",
    "TensorInfo",
    "TrtLibrary",
    "engine_library",
    "install_hint",
    "is_installed",
    "known_fault",
    "library_name",
    "load_library",
    "sm_problem",
    "version_problem",
    "version_tuple",
    "wheel_cuda_major",
]

FLAVOURS = ("tensorrt", "tensorrt_rtx", "tensorrt_lean")
"""Modules with TensorRT's Python API. `tensorrt_lean` only runs version-compatible engines that `tensorrt` built."""

TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX", "tensorrt_lean": "TensorRT lean runtime"}

_SM = re.compile(r"sm(\d{2,3})")
_JETSON = ("sm87", "sm101", "sm110")  # Orin, and Thor under its two numbers
_WRONG_MAPS = ((10, 3), (10, 4))
_LOG_KEPT = 40


@dataclass(frozen=True)
class TensorInfo:
    """One input or output of an engine; in `shape`, -1 is a free batch."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_input: bool


def library_name(name: str) -> str:
    """The module's name for an option: `tensorrt-rtx` and `tensorrt_rtx` are the same.

    Raises:
        ConfigError: no such library.
    """
    plain = name.strip().lower().replace("-", "_")
    if plain not in FLAVOURS:
        raise ConfigError(f"{name!r} is not a TensorRT library.", "", f"one of: {', '.join(FLAVOURS)}")
    return plain


def engine_library(flavour: str) -> str:
    """The library whose engines a flavour runs (the lean runtime runs those of `tensorrt`)."""
    return "tensorrt" if flavour == "tensorrt_lean" else flavour


def install_hint(flavour: str, jetson: Jetson | None = None) -> str:
    """What to type to get a flavour on this machine."""
    jetson = jetson or find_jetson()
    if jetson is not None:
        if flavour == "tensorrt":
            return (
                "JetPack's own package: sudo apt install nvidia-jetpack, then a venv that sees it: "
                "python3 -m venv --system-site-packages VENV (see docs/jetson.md)"
            )
        return f"{TITLES[flavour]} is not offered for Jetson; use the backend `tensorrt` of JetPack"
    if flavour == "tensorrt_rtx":
        return "pip install 'saae[tensorrt-rtx]'"
    if flavour == "tensorrt_lean":
        return "pip install tensorrt-lean cuda-python"
    return "pip install 'saae[tensorrt]' (pip needs to reach the vendor's own index, pypi.nvidia.com)"


def known_fault(flavour: str, version: str) -> tuple[str, str]:
    """Publicly reported faults of a release, and the cure; both empty if none are known.

    Source: NVIDIA/TensorRT issues 4558, 4723 and 4742 on GitHub.
    """
    if flavour != "tensorrt" or version_tuple(version)[:2] not in _WRONG_MAPS:
        return "", ""
    return (
        f"TensorRT {version} is reported to compute wrong values in vision transformers of DINO's kind",
        "TensorRT 10.14 or later, where it is reported cured (JetPack 7.2 has 10.16); else compare every engine: "
        "saae-export engine and verify do, with the bundle's frames, and --precision fp32 is the first thing to try",
    )


def wheel_cuda_major(flavour: str) -> int | None:
    """CUDA major version that a flavour's wheel was made for; None if unknown (as with JetPack's)."""
    names = {str(item.metadata["Name"]).lower().replace("-", "_") for item in importlib.metadata.distributions()}
    majors = {major for major in (11, 12, 13, 14) if f"{flavour}_cu{major}_libs" in names}
    return majors.pop() if len(majors) == 1 else None


def version_tuple(version: str) -> tuple[int, ...]:
    """Leading numbers of a version: `10.3.0.30+cuda12` is (10, 3, 0, 30)."""
    numbers = []
    for part in version.split("+")[0].split("."):
        found = re.match(r"[0-9]{1,9}", part)
        if found is None:
            break
        numbers.append(int(found[0]))
    return tuple(numbers)


def version_problem(artefact: Artefact, flavour: str, version: str) -> str | None:
    """Why an installed library cannot read an engine, or None where it can.

    An engine belongs to the exact release that built it. Version-compatible `tensorrt` engines also run on later
    releases of the same major version, and those of 10 on 11. If one side has fewer numbers, only the common ones are
    compared.
    """
    built, have = version_tuple(artefact.library_version or ""), version_tuple(version)
    wanted = f"{artefact.file} was built by {artefact.library} {artefact.library_version}"
    if artefact.library != engine_library(flavour):
        return f"{wanted}; this is {flavour} {version}"
    compatible = bool(artefact.options.get("version_compatible"))
    if flavour == "tensorrt_lean" and not compatible:
        return f"{wanted} without --version-compatible; the lean runtime only runs version-compatible engines"
    common = min(len(built), len(have))
    if common == 0:
        return f"{wanted}; installed is {version}: one of the two versions cannot be read"
    if built[:common] == have[:common]:
        return None
    if compatible and ((built[0] == have[0] and have >= built) or (built[0], have[0]) == (10, 11)):
        return None
    return f"{wanted}; installed is {flavour} {version}"


def sm_problem(artefact: Artefact, sm: str) -> str | None:
    """Why an engine cannot run on a GPU of generation `sm`, or None where it can."""
    targets = split_sms(artefact.sm)
    if not targets or sm in targets:
        return None
    # Hardware compatibility is for discrete GPUs: the builder and runtime of Jetson have none.
    if artefact.options.get("hardware_compatible") == "ampere_plus" and int(sm[2:]) >= 80 and sm not in _JETSON:
        return None
    return f"{artefact.file} was built for {artefact.sm}; this GPU is {sm}"


class TrtLibrary:
    """One loaded flavour: its module, version, the one logger that a process may have, and the version gates.

    Attributes:
        name: `tensorrt`, `tensorrt_rtx` or `tensorrt_lean`.
        module: the imported module.
        version: of the module.
    """

    def __init__(self, name: str, module: Any) -> None:
        self.name = name
        self.module = module
        self.version = str(module.__version__)
        self._messages: deque[str] = deque(maxlen=_LOG_KEPT)
        self._runtime: Any = None
        self._lock = threading.Lock()
        self.logger = _make_logger(module, self._messages)

    @property
    def title(self) -> str:
        """Display name and version."""
        return f"{TITLES[self.name]} {self.version}"

    # -- what the library said ---------------------------------------------------------------------------------------

    def take_messages(self) -> list[str]:
        """Errors and warnings logged since the last call, oldest first."""
        taken = []
        with suppress(IndexError):  # another thread may take the last one
            while True:
                taken.append(self._messages.popleft())
        return taken

    # -- running ----------------------------------------------------------------------------------------------------

    def cuda_major(self) -> int | None:
        """CUDA major version that the installed wheel was made for, see `wheel_cuda_major`."""
        return wheel_cuda_major(self.name)

    def deserialize(self, data: bytes, *, host_code: bool) -> Any:
        """Load the engine in `data`. The caller must have checked the driver, without which some releases crash.

        Args:
            data: the serialized engine, its hash checked.
            host_code: whether the engine contains its own runtime (built version-compatible).

        Raises:
            EngineIncompatibleError: the library does not take it.
            DeviceError: no memory for it.
        """
        with self._lock:  # a runtime per engine, because the permission below applies to the runtime
            if self._runtime is None:
                self._runtime = self.module.Runtime(self.logger)
            if hasattr(self._runtime, "engine_host_code_allowed"):
                self._runtime.engine_host_code_allowed = host_code
            self.take_messages()
            engine = self._runtime.deserialize_cuda_engine(data)
        if engine is not None:
            return engine
        said = "; ".join(self.take_messages())
        if re.search(r"out of memory|OutOfMemory", said):
            raise DeviceError(
                "The GPU is out of memory: the engine's weights do not fit.",
                said,
                "close what else uses the GPU (nvidia-smi; tegrastats on Jetson)",
            )
        raise EngineIncompatibleError(f"{self.title} does not load the engine.", said or "It gave no reason.", "")

    def tensors(self, engine: Any) -> tuple[TensorInfo, ...]:
        """Inputs and outputs of an engine, in its order."""
        found = []
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            mode = engine.get_tensor_mode(name)
            found.append(
                TensorInfo(
                    name=name,
                    shape=tuple(int(size) for size in engine.get_tensor_shape(name)),
                    dtype=np.dtype(self.module.nptype(engine.get_tensor_dtype(name))),
                    is_input=mode == self.module.TensorIOMode.INPUT,
                )
            )
        return tuple(found)

    def batch_range(self, engine: Any, name: str) -> tuple[int, int, int]:
        """min, opt and max of the first dimension of an input under the engine's first profile."""
        low, best, high = engine.get_tensor_profile_shape(name, 0)
        return int(low[0]), int(best[0]), int(high[0])

    @property
    def compiles_when_running(self) -> bool:
        """Whether kernels are compiled on the machine that runs the engine (TensorRT for RTX)."""
        return hasattr(self.module, "IRuntimeCache")

    @staticmethod
    def new_runtime_cache(engine: Any) -> Any:
        """An empty store for kernels that are compiled at run time; None if the library compiles none."""
        if not hasattr(engine, "create_runtime_config"):
            return None
        config = engine.create_runtime_config()
        return config.create_runtime_cache() if hasattr(config, "create_runtime_cache") else None

    def create_context(self, engine: Any, runtime_cache: Any = None) -> Any:
        """An execution context whose activation memory the caller provides.

        TensorRT for RTX compiles kernels when it runs. It is set to compile eagerly, so that a CUDA graph captures the
        kernels for the shape and not the fallback ones.

        Args:
            engine: the deserialized engine.
            runtime_cache: from `new_runtime_cache`, or None.

        Raises:
            DeviceError: not created, usually for lack of memory.
        """
        self.take_messages()
        strategy = self.module.ExecutionContextAllocationStrategy.USER_MANAGED
        specialization = getattr(self.module, "DynamicShapesKernelSpecializationStrategy", None)
        if specialization is not None and hasattr(engine, "create_runtime_config"):
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.dynamic_shapes_kernel_specialization_strategy = specialization.EAGER
            if runtime_cache is not None:
                config.set_runtime_cache(runtime_cache)
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context(strategy)
        if context is None:
            raise DeviceError(
                f"{self.title} could not create an execution context.",
                "; ".join(self.take_messages()) or "The GPU may be out of memory.",
                "free GPU memory (nvidia-smi shows who holds it), or build the engine with a smaller --max-batch",
            )
        return context

    @staticmethod
    def needs_memory(engine: Any) -> bool:
        """Whether an engine has activation memory; True if the release does not report it."""
        return int(getattr(engine, "device_memory_size_v2", getattr(engine, "device_memory_size", 1))) > 0

    @staticmethod
    def give_memory(context: Any, pointer: int, size: int) -> None:
        """Set a context's activation memory (older releases take the address alone)."""
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(pointer, size)
        else:
            context.device_memory = pointer

    # -- building ---------------------------------------------------------------------------------------------------

    @property
    def can_build(self) -> bool:
        """Whether the flavour has a builder and an ONNX parser."""
        return hasattr(self.module, "Builder") and hasattr(self.module, "OnnxParser")

    @property
    def has_timing_cache(self) -> bool:
        """Whether measured kernel times are kept between builds; TensorRT for RTX measures none."""
        return self.name == "tensorrt"

    @property
    def has_version_compatible(self) -> bool:
        """Whether engines for later releases can be built (TensorRT for RTX ties an engine to its release)."""
        return self.name == "tensorrt" and hasattr(self.module.BuilderFlag, "VERSION_COMPATIBLE")

    def hardware_levels(self) -> tuple[str, ...]:
        """Supported hardware-compatibility levels, lower case."""
        if self.name != "tensorrt" or not hasattr(self.module, "HardwareCompatibilityLevel"):
            return ()
        known = ("AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY")
        return tuple(level.lower() for level in known if hasattr(self.module.HardwareCompatibilityLevel, level))

    def buildable_sms(self) -> tuple[str, ...]:
        """GPU generations that can be built for without such a GPU; empty if the builder needs the GPU."""
        capability = getattr(self.module, "ComputeCapability", None)
        if capability is None or not hasattr(self.module.IBuilderConfig, "set_compute_capability"):
            return ()
        names = [name.lower() for name in dir(capability) if _SM.fullmatch(name.lower())]
        return tuple(sorted(names, key=lambda name: int(name[2:])))

    def strongly_typed_network(self, builder: Any) -> Any:
        """An empty network that keeps the graph's types: a flag in TensorRT 10, always in 11."""
        flag = getattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        return builder.create_network(0 if flag is None else 1 << int(flag))

    def target(self, config: Any, sms: Sequence[str]) -> None:
        """Set GPU generations other than this machine's.

        Raises:
            ConfigError: the library does not know one of them.
        """
        known = self.buildable_sms()
        unknown = [sm for sm in sms if sm not in known]
        if unknown:
            raise ConfigError(
                f"{self.title} cannot build for {', '.join(unknown)} here.",
                f"It builds ahead of time for {', '.join(known)}."
                if known
                else "It builds only on the GPU that the engine is for.",
                "choose one of these, or build on the target: saae-export engine BUNDLE --library tensorrt",
            )
        config.num_compute_capabilities = len(sms)
        for index, sm in enumerate(sms):
            config.set_compute_capability(getattr(self.module.ComputeCapability, sm.upper()), index)

    def require_capturable(self, config: Any) -> None:
        """Make an engine that only uses the caller's memory, which a CUDA graph needs, if that is an option."""
        flag = getattr(self.module.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)
        if flag is not None:
            config.set_flag(flag)


def _make_logger(module: Any, messages: deque[str]) -> Any:
    """A logger that keeps warnings and errors instead of printing them."""
    base = module.ILogger

    class KeepingLogger(base):  # type: ignore[misc, valid-type]  # the base is known at run time only
        def __init__(self) -> None:
            base.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (base.INTERNAL_ERROR, base.ERROR, base.WARNING):
                messages.append(" ".join(message.split()))

    return KeepingLogger()


_loaded: dict[str, TrtLibrary] = {}
_load_lock = threading.Lock()


def is_installed(name: str) -> bool:
    """Whether a flavour is installed; its import may still fail."""
    return name in _loaded or importlib.util.find_spec(name) is not None


def load_library(name: str) -> TrtLibrary:
    """Import a flavour, once in a process (a second logger would be ignored by the library).

    Raises:
        BackendUnavailableError: not installed, or its import fails.
    """
    name = library_name(name)
    with _load_lock:
        if name not in _loaded:
            try:
                module = importlib.import_module(name)
                _loaded[name] = TrtLibrary(name, module)
            except Exception as error:  # a broken wheel may raise anything
                missing = isinstance(error, ModuleNotFoundError) and error.name == name
                raise BackendUnavailableError(
                    f"{TITLES[name]} cannot be used.",
                    "It is not installed." if missing else f"Its import fails: {error}",
                    install_hint(name),
                ) from error
        return _loaded[name]
