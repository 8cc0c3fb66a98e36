"""Writes a bundle as Triton model repositories, one for each kind of server, each model all or nothing."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from saae_runtime.backends import ON_CPU
from saae_runtime.bundle import Bundle, open_bundle, update_bundle
from saae_runtime.errors import BackendError, ConfigError
from saae_runtime.folders import atomic_directory
from saae_runtime.manifest import IN_BF16, Artefact, Manifest
from saae_runtime.shell import shell_line
from saae_runtime.triton.known import SCHEMA, known_frame

from ..artefacts import open_artefact
from ..parity.compare import bounds_of
from .config import ServerOptions, config_text
from .graph import serving_graph
from .plan import compile_plan

__all__ = ["KINDS", "Exported", "Left", "export_triton"]

KINDS = ("onnx", "tensorrt", "python")
"""Kinds of models. Each has its own repository, because they need different servers, and a server that cannot load one
model does not start."""

_BACKENDS = {"onnx": "onnxruntime", "tensorrt": "tensorrt", "python": "python"}
_CONFIG = "config.pbtxt"
_OURS = 'key: "saae"'
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_SLACK = 10.0  # times a precision's bound for scores: the known frame is not an image of a part


@dataclass(frozen=True)
class Exported:
    """A written model: its kind, its folder, and the command that serves its repository."""

    kind: str
    folder: Path
    serve: str


@dataclass(frozen=True)
class Left:
    """A kind that was not written: why, and what to type instead."""

    kind: str
    why: str
    cure: str = ""


def export_triton(
    bundle: str | os.PathLike[str] | Bundle,
    repository: str | os.PathLike[str],
    *,
    name: str | None = None,
    kinds: Sequence[str] = KINDS,
    precision: str | None = None,
    options: ServerOptions | None = None,
    backend: str = "auto",
    environment: str | None = None,
    console: Console | None = None,
) -> tuple[list[Exported], list[Left]]:
    """Write `repository/KIND/NAME` for each kind: `repository/onnx` is what a server is given.

    - `onnx`: the graph without threshold and mask, for a Triton with its onnxruntime backend.
    - `tensorrt`: the same graph as a plan, if the bundle holds a TensorRT engine and this machine can compile one;
      never for `device` cpu.
    - `python`: the bundle itself and a model.py that runs it with saae's runtime, for any Triton with Python.

    A model of the same name that was written before is replaced.

    Args:
        bundle: the folder, or an opened bundle.
        repository: the folder that holds one repository per kind.
        name: the model's name; None: the bundle's category.
        kinds: some of `KINDS`.
        precision: of the graph that is served; None: the first of the bundle's graphs.
        options: batches, instances and devices.
        backend: of saae, for `python`; `auto` becomes one of the CPU for `device` cpu.
        environment: folder or archive of the Python environment, on the server, for `python`.
        console: where the progress of a compilation is shown.

    Returns:
        What was written, and what was left out and why.

    Raises:
        BundleError: no bundle there, or a damaged one.
        ConfigError: an impossible name, kind, option, precision or backend, or a folder that holds something else.
        BackendUnavailableError: the package onnx is not installed.
        StorageError: the disk is full, or the place may not be written to.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    chosen = options or ServerOptions()
    _check_kinds(kinds)
    model = _model_name(name, opened.manifest.category)
    artefact = _artefact(opened, precision, kinds)
    engine = _engine_options(backend, artefact, chosen) if "python" in kinds else {}
    root = Path(repository)
    for kind in kinds:
        _refuse_foreign(root / kind / model)
    check = _known_score(opened, artefact)
    frame = opened.manifest.frame
    written: list[Exported] = []
    left: list[Left] = []
    for kind in kinds:
        fill = _content(opened, artefact, kind, chosen, console, root / "onnx" / model, "onnx" in kinds)
        if isinstance(fill, Left):
            left.append(fill)
            continue
        about = _about(opened.manifest, artefact, kind, check)
        if kind == "python":
            about["options"] = engine
        parameters = _parameters(kind, chosen, environment)
        text = config_text(model, _BACKENDS[kind], (frame.height, frame.width), chosen, about, parameters)
        folder = root / kind / model
        with atomic_directory(folder, last=_CONFIG) as temporary:
            (temporary / "1").mkdir()
            fill(temporary / "1")
            (temporary / _CONFIG).write_text(text, encoding="ascii")
        written.append(Exported(kind, folder, shell_line("tritonserver", f"--model-repository={(root / kind)}")))
    return written, left


def _engine_options(backend: str, artefact: Artefact, options: ServerOptions) -> dict[str, Any]:
    """How model.py opens its engine. Triton's `KIND_CPU` does not keep it from a GPU; the backend's name does."""
    if options.device == "cpu":
        if backend == "auto" and artefact.precision in IN_BF16:
            backend = "openvino"
        elif backend in ("auto", "onnxruntime"):
            backend = "onnxruntime:cpu"
        if backend not in ON_CPU:
            raise ConfigError(
                f"--backend {backend} does not fit --device cpu.",
                "It is not one that computes on the CPU.",
                f"--backend {' or '.join(sorted(ON_CPU))}, or another --device",
            )
    opened = {"name": backend, "precision": artefact.precision, "max_batch": options.max_batch}
    return opened if options.threads is None else {**opened, "threads": options.threads}


def _parameters(kind: str, options: ServerOptions, environment: str | None) -> dict[str, str]:
    """The `parameters` of Triton's own backend."""
    if kind == "onnx" and options.threads is not None:
        return {"intra_op_thread_count": str(options.threads)}
    if kind == "python" and environment is not None:
        return {"EXECUTION_ENV_PATH": environment}
    return {}


def _check_kinds(kinds: Sequence[str]) -> None:
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ConfigError(
            f"There is no kind {unknown[0]!r} of model." if unknown else "No kind of model is named.",
            "",
            f"--kind {','.join(KINDS)}, or some of them",
        )


def _model_name(name: str | None, category: str) -> str:
    model = re.sub(r"[^A-Za-z0-9_.-]", "_", category).lstrip(".-")[:100] or "saae" if name is None else name
    if not _NAME.fullmatch(model):
        raise ConfigError(
            f"{model!r} is not a name for a model.",
            "It becomes a folder and part of a URL.",
            "letters, digits, _ - and .",
        )
    return model


def _artefact(bundle: Bundle, precision: str | None, kinds: Sequence[str]) -> Artefact:
    """The graph that is served. The bf16 precisions have no file of their own: only `python` serves them."""
    graphs = bundle.artefacts(kind="onnx")
    fitting = [item for item in graphs if item.precision not in IN_BF16 or tuple(kinds) == ("python",)]
    found = [item for item in fitting if precision in (None, item.precision)]
    if not found:
        have = ", ".join(dict.fromkeys(item.precision for item in fitting)) or "none"
        asked = "no ONNX graph" if precision is None else f"no ONNX graph at {precision} for {', '.join(kinds)}"
        raise ConfigError(
            f"{bundle.path} has {asked}.",
            f"It has: {have}." + (" Only OpenVINO computes bf16." if precision in IN_BF16 else ""),
            "--kind python" if precision in IN_BF16 and graphs else "another --precision, or saae-export build",
        )
    return found[0]


def _known_score(bundle: Bundle, artefact: Artefact) -> dict[str, float] | None:
    """The known frame's score and the tolerance of a server's; None if this machine cannot compute it."""
    frame = bundle.manifest.frame
    try:
        with open_artefact(bundle, artefact) as engine:
            score = engine(known_frame((frame.height, frame.width))).score
    except BackendError:
        return None
    bounds = bounds_of(bundle.manifest, artefact.precision)
    return {"score": score, "tolerance": min(_SLACK * bounds.score, 0.5)}


def _about(manifest: Manifest, artefact: Artefact, kind: str, check: Mapping[str, float] | None) -> dict[str, Any]:
    """What a client reads from the server: how frames are judged, without details of the build."""
    slim = dataclasses.replace(
        manifest,
        thresholds={artefact.precision: manifest.thresholds[artefact.precision]},
        artefacts=(artefact,),
        metrics={},
        tools={},
        files={},
    )
    return {"schema": SCHEMA, "kind": kind, "manifest": slim.to_json(), "check": check}


def _content(
    bundle: Bundle,
    artefact: Artefact,
    kind: str,
    options: ServerOptions,
    console: Console | None,
    onnx: Path,
    onnx_written: bool,
) -> Callable[[Path], None] | Left:
    """What fills the folder of a version, or why this kind is left out."""
    if kind == "python":
        return _python_model(bundle, artefact)
    if kind == "tensorrt" and options.device == "cpu":
        return Left(
            kind, "A TensorRT plan needs a GPU, and --device is cpu.", "--kind onnx,python, or another --device"
        )
    graph = serving_graph(bundle.file(artefact.file))
    if kind == "onnx":
        return _one_file("model.onnx", graph)
    engines = bundle.artefacts(kind="engine", library="tensorrt", precision=artefact.precision)
    if not engines:
        return Left(
            kind,
            f"The bundle holds no TensorRT engine at {artefact.precision}.",
            f"on the server's GPU: saae-export engine {bundle.path} --precision {artefact.precision}",
        )
    try:
        plan = compile_plan(engines[0], graph, artefact.file, options.max_batch, console)
    except BackendError as error:
        frame = bundle.manifest.frame
        shape = f"{frame.height}x{frame.width}x3"
        return Left(
            kind,
            f"{error.what} {error.why}".strip(),
            ("" if onnx_written else "write its graph, too, with --kind onnx,tensorrt; then ")
            + "in the server's container: trtexec --stronglyTyped "
            + ("--noTF32 " if engines[0].precision == "fp32" else "")
            + shell_line(f"--onnx={onnx / '1' / 'model.onnx'}", "--saveEngine=model.plan")
            + f" --minShapes=frame:1x{shape} --optShapes=frame:1x{shape} --maxShapes=frame:{options.max_batch}x{shape}",
        )
    return _one_file("model.plan", plan)


def _one_file(name: str, data: bytes) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return fill


def _python_model(bundle: Bundle, artefact: Artefact) -> Callable[[Path], None]:
    """model.py and the part of the bundle that serves: the graph and the engines of its precision."""

    def fill(folder: Path) -> None:
        shutil.copyfile(Path(__file__).with_name("python_model.py"), folder / "model.py")
        kept = [item for item in bundle.manifest.artefacts if item.precision == artefact.precision]
        files = {item.file for item in kept}
        manifest = dataclasses.replace(bundle.manifest, artefacts=tuple(kept))
        drop = tuple(name for name in bundle.manifest.files if name not in files)
        update_bundle(bundle, manifest, {}, drop=drop, target=folder / "bundle")

    return fill


def _refuse_foreign(folder: Path) -> None:
    """Refuse to replace a folder that this command did not write."""
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return
    config = folder / _CONFIG
    try:
        ours = _OURS in config.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        ours = False
    if not ours:
        raise ConfigError(
            f"{folder} holds something else.",
            f"It has no {_CONFIG} that saae has written, and would be replaced.",
            "choose another --name or --repository, or remove it",
        )
