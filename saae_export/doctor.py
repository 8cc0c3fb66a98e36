"""Reports what this machine can run, what is missing and what to type: driver, GPUs, libraries, files of a bundle."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import saae_runtime
from saae_runtime.backends.cuda.api import cuda_install_hint
from saae_runtime.backends.cuda.jetson import Jetson, find_jetson
from saae_runtime.backends.onnxruntime.backend import INSTALL
from saae_runtime.backends.tensorrt.choose import engine_problem
from saae_runtime.backends.tensorrt.library import (
    FLAVOURS,
    engine_library,
    install_hint,
    known_fault,
    wheel_cuda_major,
)
from saae_runtime.bundle import open_bundle
from saae_runtime.errors import SaaeError
from saae_runtime.manifest import Artefact, rebuild_command

__all__ = ["ArtefactCheck", "Diagnosis", "Finding", "doctor", "print_diagnosis"]

_TIMEOUT = 120  # seconds for one probe; a cold disk of a Jetson takes tens of them

# Foreign code is loaded in separate processes: a broken library may crash instead of raising. The answer is the last
# line: a library may print others when it is imported.
_PROBES = {
    "cuda": "import cuda.bindings as b; print(b.__version__)",
    "tensorrt": "import tensorrt as t; print(t.__version__)",
    "tensorrt_rtx": "import tensorrt_rtx as t; print(t.__version__)",
    "tensorrt_lean": "import tensorrt_lean as t; print(t.__version__)",
    "onnxruntime": """
import json, pathlib
import onnxruntime as ort
from saae_runtime.backends.onnxruntime.gpu import load_tensorrt
providers = ort.get_available_providers()
missing = load_tensorrt(pathlib.Path(ort.__file__).parent) if "TensorrtExecutionProvider" in providers else ""
print(json.dumps({"version": ort.__version__, "providers": providers, "missing": missing}))
""",
    "openvino": """
import json
from saae_runtime.backends.openvino.library import load_library
from saae_runtime.errors import SaaeError
said = {"words": "", "problem": "", "cure": ""}
try:
    library = load_library()
    device = library.device("CPU")
    computes = ", ".join(name for name in ("FP32", "BF16", "FP16", "INT8") if name in device.capabilities)
    said["words"] = f"{library.version}: {', '.join(library.core.available_devices)} ({device.name}: {computes})"
except SaaeError as error:
    said["problem"], said["cure"] = error.why or error.what, error.cure
print(json.dumps(said))
""",
    "gpus": """
import dataclasses, json
from saae_runtime.backends.cuda.api import CudaApi
from saae_runtime.errors import SaaeError
said = {"gpus": [], "driver": [0, 0], "problem": "", "cure": ""}
try:
    api = CudaApi()
    said["driver"] = api.driver_version()
    api.check_driver()
    said["gpus"] = [dataclasses.asdict(api.device(index)) for index in range(api.device_count())]
except SaaeError as error:
    said["problem"], said["cure"] = f"{error.what} {error.why}".strip(), error.cure
print(json.dumps(said))
""",
}
_CANDIDATES = """
import json, sys
from saae_runtime.backends import candidates
from saae_runtime.bundle import open_bundle
print(json.dumps([
    [item.name, item.artefact.file if item.artefact else "", item.why_not, item.cure]
    for item in candidates(open_bundle({path!r}, verify=False))
]))
"""


@dataclass(frozen=True)
class Finding:
    """One item that was checked.

    Attributes:
        name: of the item.
        ok: whether it is usable.
        detail: version or reason.
        cure: what to type if it is not usable or has a known fault.
    """

    name: str
    ok: bool
    detail: str
    cure: str = ""


@dataclass(frozen=True)
class ArtefactCheck:
    """A file or backend of a bundle: whether it runs here, or why not, and the cure."""

    name: str
    file: str
    ok: bool
    why_not: str = ""
    cure: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """The result of `doctor`; `to_json` for machines.

    Attributes:
        system: Python, platform and, on a Jetson, its model and release.
        findings: driver, GPUs, libraries and providers.
        bundle: the bundle's path, empty without one.
        bundle_problem: why the bundle could not be read; empty if it could.
        engines: each compiled engine of the bundle.
        backends: each backend of the runtime with this bundle.
    """

    system: dict[str, str]
    findings: tuple[Finding, ...]
    bundle: str = ""
    bundle_problem: str = ""
    engines: tuple[ArtefactCheck, ...] = ()
    backends: tuple[ArtefactCheck, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As dicts and lists."""
        return dataclasses.asdict(self)


Probe = Callable[[str, str], "tuple[bool, list[str]]"]


def doctor(
    bundle: str | os.PathLike[str] | None = None, *, root: str | Path = "/", probe: Probe | None = None
) -> Diagnosis:
    """Check this machine, and a bundle if one is given. Never raises for what it finds.

    Args:
        bundle: the bundle's folder.
        root: root of the file system, for tests.
        probe: called with a name and Python code, returns (success, lines of output); for tests.
    """
    run = probe or run_probe
    jetson = find_jetson(root)
    found = {name: run(name, code) for name, code in _PROBES.items()}
    machine = _machine(found["gpus"])
    findings = [
        *_gpu_findings(found["cuda"], machine, jetson),
        *(_flavour(name, found[name], machine, jetson) for name in FLAVOURS),
        *_onnxruntime(found["onnxruntime"], jetson),
        _openvino(found["openvino"]),
    ]
    system = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "jetson": str(jetson) if jetson else "",
    }
    diagnosis = Diagnosis(system, tuple(findings))
    if bundle is None:
        return diagnosis
    versions = {name: found[name][1][-1] for name in FLAVOURS if found[name][0] and found[name][1]}
    sms = [str(gpu["sm"]) for gpu in machine["gpus"]]
    return _with_bundle(diagnosis, bundle, versions, sms, run)


def run_probe(name: str, code: str) -> tuple[bool, list[str]]:
    """Run Python code in a separate process; return success, and its output or the end of its error."""
    # The process must import the same saae, installed or not.
    paths = [str(Path(saae_runtime.__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, [f"{name}: {error}"]
    if done.returncode == 0:
        return True, done.stdout.splitlines()
    if done.returncode < 0:
        return False, [f"importing it crashes (signal {-done.returncode})"]
    return False, done.stderr.strip().splitlines()[-1:] or ["importing it fails"]


def print_diagnosis(found: Diagnosis, console: Console) -> None:
    """Print a diagnosis as tables."""
    console.print(f"Python {found.system['python']} on {escape(found.system['platform'])}")
    if found.system["jetson"]:
        console.print(escape(found.system["jetson"]))
    console.print(_table("", [(item.ok, item.name, item.detail, item.cure) for item in found.findings]))
    if not found.bundle:
        return
    if found.bundle_problem:
        console.print(f"[red]{escape(found.bundle_problem)}[/red]")
        return
    for title, checks in (("Engines of the bundle", found.engines), ("Ways to run the bundle", found.backends)):
        rows = [(item.ok, item.name, item.why_not or item.file, item.cure) for item in checks]
        console.print(_table(title, rows) if rows else f"{title}: none")


def _table(title: str, rows: Sequence[tuple[bool, str, str, str]]) -> Table:
    table = Table(title=title or None, show_header=False, box=None, padding=(0, 2, 0, 0), title_justify="left")
    for ok, name, detail, cure in rows:
        mark = "[green]yes[/green]" if ok else "[yellow]no[/yellow]"
        text = escape(detail) + (f"\n[cyan]try:[/cyan] {escape(cure)}" if cure else "")
        table.add_row(mark, escape(name), text)
    return table


def _machine(probed: tuple[bool, list[str]]) -> dict[str, Any]:
    """Findings on driver and GPUs from the probe; a crashed probe is a finding, too."""
    ok, said = probed
    try:
        if ok:
            machine: dict[str, Any] = json.loads(said[-1])
            return machine
    except (ValueError, IndexError):
        said = ["the probe of the driver gave no answer"]
    cure = "reinstall the NVIDIA driver and cuda-python"
    return {"gpus": [], "driver": [0, 0], "problem": _last(said), "cure": cure}


def _gpu_findings(cuda: tuple[bool, list[str]], machine: dict[str, Any], jetson: Jetson | None) -> list[Finding]:
    ok, said = cuda
    if not ok:
        return [Finding("cuda-python", False, _last(said), cuda_install_hint())]
    findings = [Finding("cuda-python", True, said[-1] if said else "")]
    if machine["problem"]:
        cure = "JetPack brings the driver: flash the device again" if jetson else machine["cure"]
        return [*findings, Finding("NVIDIA driver", False, machine["problem"], cure)]
    findings.append(Finding("NVIDIA driver", True, "supports CUDA {}.{}".format(*machine["driver"])))
    for gpu in machine["gpus"]:
        memory = f"{gpu['memory'] / (1 << 30):.1f} GiB" + (" shared with the host" if gpu["integrated"] else "")
        findings.append(Finding(f"GPU {gpu['index']}", True, f"{gpu['name']}, {gpu['sm']}, {memory}"))
    if not machine["gpus"]:
        findings.append(Finding("GPU", False, "the driver shows none", "check CUDA_VISIBLE_DEVICES and nvidia-smi"))
    return findings


def _flavour(name: str, probed: tuple[bool, list[str]], machine: dict[str, Any], jetson: Jetson | None) -> Finding:
    ok, said = probed
    if not ok:
        return Finding(name, False, _last(said), install_hint(name, jetson))
    version = said[-1] if said else ""
    made_for, driver = wheel_cuda_major(name), machine["driver"][0]
    if made_for is not None and 0 < driver < made_for:
        why = f"{version} is made for CUDA {made_for}; the driver supports CUDA {driver}"
        return Finding(name, False, why, f"update the driver, or pip install {name}-cu{driver}")
    fault, cure = known_fault(name, version)
    words = f"{version}: {fault}" if fault else version
    if not machine["gpus"]:
        return Finding(name, True, f"{words} (loads; runs nothing without a GPU)", cure)
    return Finding(name, True, words, cure)


def _onnxruntime(probed: tuple[bool, list[str]], jetson: Jetson | None) -> list[Finding]:
    ok, said = probed
    gpu_cure = "pip uninstall onnxruntime, then pip install 'saae[cuda]'"
    if jetson is not None:
        gpu_cure = f"the wheel for JetPack {jetson.jetpack or '?'} from NVIDIA's Jetson index (see docs/jetson.md)"
    version = ""
    try:
        if ok:
            answer = json.loads(said[-1])
            version, providers, missing = answer["version"], answer["providers"], answer["missing"]
    except (ValueError, IndexError, KeyError, TypeError):
        said = ["asking for it gave no answer"]
    if not version:
        cure = "pip install 'saae[cpu]' for the CPU; for the GPU: " + gpu_cure.rpartition("then ")[2]
        return [Finding("onnxruntime", False, _last(said), cure)]
    findings = [Finding("onnxruntime", True, version)]
    for name, title in (
        ("CPUExecutionProvider", "CPU"),
        ("CUDAExecutionProvider", "CUDA"),
        ("TensorrtExecutionProvider", "TensorRT"),
    ):
        words, cure = ("offered", "") if name in providers else ("not in this wheel", gpu_cure)
        if title == "TensorRT" and missing:
            words, cure = f"in this wheel, but {missing}", INSTALL["onnxruntime:tensorrt"]
        findings.append(Finding(f"onnxruntime {title}", words == "offered", words, cure))
    return findings


def _openvino(probed: tuple[bool, list[str]]) -> Finding:
    """Finding from the backend itself: whether it is installed, and what the processor computes with it."""
    ok, said = probed
    try:
        if ok:
            answer: dict[str, str] = json.loads(said[-1])
            return Finding("openvino", not answer["problem"], answer["words"] or answer["problem"], answer["cure"])
    except (ValueError, IndexError, KeyError, TypeError):
        said = ["asking for it gave no answer"]
    return Finding("openvino", False, _last(said), "pip install --force-reinstall openvino")


def _with_bundle(
    found: Diagnosis, path: str | os.PathLike[str], versions: dict[str, str], sms: Sequence[str], run: Probe
) -> Diagnosis:
    try:
        bundle = open_bundle(path)
    except SaaeError as error:
        return dataclasses.replace(found, bundle=str(path), bundle_problem=str(error))
    engines = []
    for artefact in bundle.artefacts(kind="engine"):
        why, cure = _engine_verdict(artefact, versions, sms, str(path))
        engines.append(ArtefactCheck(artefact.file, artefact.file, not why, why, cure))
    ok, said = run("backends", _CANDIDATES.format(path=str(bundle.path)))
    ways = []
    try:
        for name, file, why, cure in json.loads(said[-1]) if ok else ():
            ways.append(ArtefactCheck(name, file, why is None, why or "", cure if why else ""))
    except (ValueError, IndexError):
        ok = False
    if not ok:
        cure = "reinstall the libraries marked `no` above"
        ways = [ArtefactCheck("backends", "", False, f"asking for them failed: {_last(said)}", cure)]
    return dataclasses.replace(found, bundle=str(path), engines=tuple(engines), backends=tuple(ways))


def _engine_verdict(artefact: Artefact, versions: dict[str, str], gpus: Sequence[str], bundle: str) -> tuple[str, str]:
    """Why an engine does not run here and the cure; both empty if an installed library and a GPU take it."""
    able = [name for name in FLAVOURS if engine_library(name) == artefact.library]
    installed = [name for name in able if name in versions]
    if not installed:
        return f"{artefact.library} is not installed", install_hint(str(artefact.library))
    rebuild = rebuild_command(str(artefact.library), gpus[0] if gpus else artefact.sm, artefact.precision, bundle)
    if not gpus:
        problems = [engine_problem(artefact, name, versions[name], None) for name in installed]
        wrong = "; ".join(problem for problem in problems if problem)
        if None not in problems:
            return wrong, rebuild
        return f"no NVIDIA GPU is usable here; the engine is for {artefact.sm}", "run it on a machine with that GPU"
    problems = [engine_problem(artefact, name, versions[name], sm) for name in installed for sm in gpus]
    if None in problems:
        return "", ""
    return "; ".join(dict.fromkeys(problem for problem in problems if problem)), rebuild


def _last(said: Sequence[str]) -> str:
    last = said[-1] if said else ""
    return "not installed" if not last or last.startswith("ModuleNotFoundError") else last
