"""`doctor`: it explains whatever it meets, crashes of foreign libraries included, and never fails."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from tiny_bundle import make_tiny_bundle, tiny_graph, tiny_manifest
from typer.testing import CliRunner

from saae_export.doctor import doctor, print_diagnosis, run_probe
from saae_runtime import Engine
from saae_runtime.bundle import write_bundle
from saae_runtime.errors import BackendUnavailableError
from saae_runtime.manifest import Artefact, Profile

pytestmark = pytest.mark.needs("onnx")

ADA = {"index": 0, "name": "RTX 4000 Ada", "sm": "sm89", "memory": 20 << 30, "integrated": False}
ORIN = {"index": 0, "name": "Orin", "sm": "sm87", "memory": 8 << 30, "integrated": True}


def machine(*gpus, driver=(13, 0), problem="", cure="", **said):
    """A probe of a machine: `said` gives the lines of a library that loads, or an exception's last line."""

    def probe(name, code):
        if name == "gpus":
            found = {"gpus": list(gpus), "driver": list(driver), "problem": problem, "cure": cure}
            return True, [json.dumps(found)]
        if name == "backends":
            return run_probe(name, code)
        answer = said.get(name, "ModuleNotFoundError: No module named 'it'")
        return (True, list(answer)) if isinstance(answer, tuple) else (False, [answer])

    return probe


def onnxruntime(version, providers, missing=""):
    """The answer of its probe."""
    return (json.dumps({"version": version, "providers": providers.split(","), "missing": missing}),)


def findings(diagnosis):
    return {item.name: item for item in diagnosis.findings}


def text(diagnosis):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    print_diagnosis(diagnosis, console)
    return console.export_text()


def test_a_machine_with_everything():
    found = doctor(
        probe=machine(
            ADA,
            cuda=("13.4.4",),
            tensorrt=("10.13.3.9",),
            onnxruntime=onnxruntime("1.25.0", "TensorrtExecutionProvider,CUDAExecutionProvider,CPUExecutionProvider"),
        )
    )
    seen = findings(found)
    assert seen["tensorrt"].ok
    assert seen["tensorrt"].detail == "10.13.3.9"
    assert "RTX 4000 Ada, sm89, 20.0 GiB" in seen["GPU 0"].detail
    assert seen["onnxruntime CUDA"].ok
    assert not seen["tensorrt_rtx"].ok
    assert "not installed" in seen["tensorrt_rtx"].detail
    assert "pip install" in seen["tensorrt_rtx"].cure


def test_a_provider_without_its_library_is_not_offered():
    """onnxruntime-gpu lists its TensorRT provider on machines without TensorRT."""
    providers = "TensorrtExecutionProvider,CUDAExecutionProvider,CPUExecutionProvider"
    missing = "TensorRT (libnvinfer.so.10) is not installed"
    seen = findings(doctor(probe=machine(ADA, onnxruntime=onnxruntime("1.31.1", providers, missing))))
    assert not seen["onnxruntime TensorRT"].ok
    assert missing in seen["onnxruntime TensorRT"].detail
    assert "pip install" in seen["onnxruntime TensorRT"].cure
    assert seen["onnxruntime CUDA"].ok
    assert findings(doctor(probe=machine(ADA, onnxruntime=onnxruntime("1.31.1", providers))))["onnxruntime TensorRT"].ok


def test_a_library_that_prints_when_it_is_imported(tmp_path, monkeypatch):
    """The real probes, with modules in the libraries' place: only what they print last is read."""
    fakes = {
        "onnxruntime": "def get_available_providers(): return ['CUDAExecutionProvider', 'CPUExecutionProvider']\n",
        "tensorrt": "",
    }
    for name, code in fakes.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"print('a message')\n__version__ = '10.13.3'\n{code}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    seen = findings(doctor(probe=lambda name, code: run_probe(name, code) if name in fakes else (False, [])))
    assert seen["onnxruntime"].detail == "10.13.3"
    assert seen["onnxruntime CPU"].ok
    assert seen["onnxruntime CUDA"].ok
    assert not seen["onnxruntime TensorRT"].ok
    assert seen["tensorrt"].detail.startswith("10.13.3")


def test_a_probe_without_an_answer_is_no_library():
    seen = findings(doctor(probe=machine(onnxruntime=("a message",))))["onnxruntime"]
    assert (seen.ok, seen.detail) == (False, "asking for it gave no answer")


def test_a_machine_with_nothing_has_a_cure_for_everything():
    found = doctor(probe=machine())
    assert found.findings
    for item in found.findings:
        assert not item.ok
        assert item.cure, item
    assert "try:" in text(found)


def test_openvino_says_itself_what_it_is_and_has():
    answer = {"words": "2026.4.1: CPU (AMD EPYC: FP32, BF16, INT8)", "problem": "", "cure": ""}
    seen = findings(doctor(probe=machine(openvino=(json.dumps(answer),))))["openvino"]
    assert (seen.ok, seen.detail, seen.cure) == (True, answer["words"], "")
    answer = {"words": "", "problem": "the package openvino is not installed", "cure": "pip install 'saae[openvino]'"}
    seen = findings(doctor(probe=machine(openvino=(json.dumps(answer),))))["openvino"]
    assert (seen.ok, seen.detail, seen.cure) == (False, answer["problem"], answer["cure"])
    seen = findings(doctor(probe=machine(openvino="importing it crashes (signal 11)")))["openvino"]
    assert (seen.ok, seen.detail) == (False, "importing it crashes (signal 11)")
    assert "reinstall" in seen.cure


def test_doctor_and_the_backend_say_the_same_of_openvino(tmp_path):
    """For real: what is said to work is opened, and what is not has the same reason in the error."""
    bundle = make_tiny_bundle(tmp_path / "b", (16, 24))
    asked = ("openvino", "backends")
    found = doctor(bundle, probe=lambda name, code: run_probe(name, code) if name in asked else (False, []))
    seen, way = findings(found)["openvino"], {item.name: item for item in found.backends}["openvino"]
    assert seen.ok is way.ok
    if seen.ok:
        Engine(bundle, backend="openvino").close()
        return
    for _ in range(2):
        with pytest.raises(BackendUnavailableError) as caught:
            Engine(bundle, backend="openvino")
        assert caught.value.why == way.why_not == seen.detail


def test_a_jetson_is_told_of_jetpack(tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text("# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic\n")
    found = doctor(probe=machine(ORIN, cuda=("12.6.2",), driver=(12, 6)), root=tmp_path)
    assert "JetPack 6" in found.system["jetson"]
    seen = findings(found)
    assert "--system-site-packages" in seen["tensorrt"].cure
    assert "nvidia-jetpack" in seen["tensorrt"].cure
    assert "shared with the host" in seen["GPU 0"].detail
    assert "JetPack 6" in seen["onnxruntime"].cure


def test_a_driver_problem_is_passed_on():
    found = doctor(probe=machine(cuda=("13.4.4",), problem="The NVIDIA driver is too old. 12.2 < 13", cure="update it"))
    assert findings(found)["NVIDIA driver"] == replace(
        findings(found)["NVIDIA driver"], ok=False, detail="The NVIDIA driver is too old. 12.2 < 13", cure="update it"
    )


def test_a_wheel_for_a_newer_cuda_than_the_driver(monkeypatch):
    monkeypatch.setattr("saae_export.doctor.wheel_cuda_major", lambda name: 13 if name == "tensorrt" else None)
    seen = findings(doctor(probe=machine(ADA, driver=(12, 4), cuda=("12.9",), tensorrt=("10.13.3.9",))))
    assert not seen["tensorrt"].ok
    assert "CUDA 13" in seen["tensorrt"].detail
    assert "CUDA 12" in seen["tensorrt"].detail
    assert "tensorrt-cu12" in seen["tensorrt"].cure


@pytest.mark.parametrize(("version", "warned"), [("10.3.0", True), ("10.4.0.26", True), ("10.14.1", False)])
def test_releases_with_wrong_maps_are_named_with_the_way_out(version, warned):
    seen = findings(doctor(probe=machine(ORIN, cuda=("12.6.2",), tensorrt=(version,))))["tensorrt"]
    assert seen.ok
    assert ("DINO" in seen.detail) is warned
    assert ("10.14 or later" in seen.cure) is warned


def test_a_library_that_crashes_does_not_take_doctor_with_it():
    assert run_probe("x", "import os; os.kill(os.getpid(), 11)") == (False, ["importing it crashes (signal 11)"])
    assert run_probe("x", "raise OSError('libnvinfer.so.10: cannot open')")[1] == [
        "OSError: libnvinfer.so.10: cannot open"
    ]
    ok, said = run_probe("x", "print('1.2'); print('more')")
    assert ok
    assert said == ["1.2", "more"]


def test_the_process_of_a_probe_finds_this_saae(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    ok, said = run_probe("x", "import saae_runtime; print(saae_runtime.__file__)")
    import saae_runtime

    assert ok
    assert said == [saae_runtime.__file__]


def test_a_probe_that_says_nonsense_is_a_finding():
    def probe(name, code):
        return True, ["what?"] if name == "gpus" else ["1.0"]

    seen = findings(doctor(probe=probe))
    assert not seen["NVIDIA driver"].ok
    assert seen["NVIDIA driver"].cure


@pytest.fixture
def engines(tmp_path: Path) -> Path:
    """A bundle with an engine for an RTX and one for an Orin; their bytes do not matter here."""
    manifest = tiny_manifest(size=(8, 16), precisions=("fp16",))
    made = [
        Artefact(name, "engine", "fp16", library=library, library_version=version, sm=sm, profile=Profile(1, 1, 8))
        for name, library, version, sm in (
            ("rtx.engine", "tensorrt_rtx", "1.7.1.116", "sm86+sm89"),
            ("orin.engine", "tensorrt", "10.3.0", "sm87"),
        )
    ]
    manifest = replace(manifest, artefacts=(*manifest.artefacts, *made))
    files = {artefact.file: b"engine" for artefact in made}
    files["model.fp16.onnx"] = tiny_graph((8, 16), precision="fp16")
    return write_bundle(tmp_path / "bundle", manifest, files).path


@pytest.mark.parametrize(
    ("probe", "rtx", "orin"),
    [
        (machine(ADA, cuda=("13",), tensorrt_rtx=("1.7.1.116",)), "", "not installed"),
        (machine(ADA, cuda=("13",), tensorrt=("10.3.0",), tensorrt_rtx=("1.6.1.120",)), "1.6.1.120", "sm87"),
        (machine(ORIN, cuda=("12.6",), tensorrt=("10.3.0",)), "not installed", ""),
        (machine(ORIN, cuda=("12.6",), tensorrt=("10.7.0",)), "not installed", "10.7.0"),
        (machine(cuda=("13",), tensorrt_rtx=("1.7.1.116",)), "no NVIDIA GPU", "not installed"),
    ],
)
def test_which_engines_of_a_bundle_run_here(engines, probe, rtx, orin):
    found = {check.name: check for check in doctor(engines, probe=probe).engines}
    for name, word in (("rtx.engine", rtx), ("orin.engine", orin)):
        assert found[name].ok == (word == "")
        assert word in found[name].why_not
        assert bool(found[name].cure) == bool(word)


def test_ways_to_run_the_bundle_are_listed(engines):
    found = doctor(engines, probe=machine(ADA))
    names = [way.name for way in found.backends]
    assert {"tensorrt", "tensorrt_rtx", "onnxruntime:cpu"} <= set(names)
    assert all(way.ok or way.cure for way in found.backends)
    assert "Engines of the bundle" in text(found)


def test_backends_that_crash_are_reported(engines):
    def probe(name, code):
        return (False, ["importing it crashes (signal 6)"]) if name == "backends" else machine(ADA)(name, code)

    (way,) = doctor(engines, probe=probe).backends
    assert not way.ok
    assert "signal 6" in way.why_not


@pytest.mark.parametrize("damage", ["missing", "truncated", "not json"])
def test_a_bundle_that_cannot_be_read_is_explained(engines, tmp_path, damage):
    path = tmp_path / "nothing" if damage == "missing" else engines
    if damage == "truncated":
        (engines / "rtx.engine").write_bytes(b"eng")
    if damage == "not json":
        (engines / "manifest.json").write_text("{")
    found = doctor(path, probe=machine(ADA))
    assert found.bundle_problem
    assert "try:" in text(found)


def test_the_command_on_this_machine(tmp_path):
    import typer

    from saae_export.cli.engine import add_commands
    from saae_runtime.terminal import GuardedGroup

    app = typer.Typer(cls=GuardedGroup, pretty_exceptions_enable=False)
    add_commands(app)
    bundle = make_tiny_bundle(tmp_path / "tiny", size=(8, 16))
    done = CliRunner().invoke(app, ["doctor", str(bundle), "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["bundle"] == str(bundle)
    assert said["bundle_problem"] == ""
    assert {"tensorrt", "tensorrt_rtx", "tensorrt_lean", "onnxruntime"} <= {item["name"] for item in said["findings"]}
    assert {way["name"] for way in said["backends"]} >= {"tensorrt", "onnxruntime:cpu"}
    plain = CliRunner().invoke(app, ["doctor"])
    assert plain.exit_code == 0
    assert "Python" in plain.stdout
