"""The wheel: what is in it, what it asks for, and that it scores frames in an environment without PyTorch."""

from __future__ import annotations

import email
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pytest
from needs import need
from PIL import Image
from tiny_bundle import expected_map, gray_frame, make_tiny_bundle
from uv_install import uv_install

pytestmark = pytest.mark.needs("onnx")

SMALL_EXTRAS = {
    "video": "from saae_runtime.sources.video import check_video; check_video()",
    "watch": """
import time
from pathlib import Path
from saae_runtime.sources.notices import Notices
notices = Notices([Path.cwd()], False)
(Path.cwd() / "a.png").write_bytes(b"")
end = time.monotonic() + 20
while not notices.take():  # without watchdog there never is one
    assert time.monotonic() < end
    time.sleep(0.05)
notices.close()
""",
    "triton": """
from saae_runtime import SaaeError, TritonEngine
try:
    TritonEngine("grpc://127.0.0.1:9", "x", timeout=1)
except SaaeError as error:
    assert "No Triton server answers" in str(error), error
""",
    "parquet": """
from pathlib import Path
from saae_runtime.cli.parquet import ParquetFile
ParquetFile(Path("r.parquet")).close()
assert Path("r.parquet").read_bytes()[:4] == b"PAR1"
""",
    "line": """
from saae_runtime.line.health import prometheus_text
from saae_runtime.line.config import load_config
import paho.mqtt.client, prometheus_client
""",
    "modbus": "import pymodbus.server, saae_runtime.line.plc.modbus",
    "opcua": "import asyncua, saae_runtime.line.plc.opcua",
    "serve": "import multipart, saae_runtime.line.http.service",
}
"""Extras that are quickly installed, and what must run with each. The environment of the tests has the larger ones;
tests/test_extras.py resolves all."""
PACKAGES = ("saae_runtime", "saae_train", "saae_export")
HEAVY = ("torch", "torchvision", "timm", "onnx", "onnxscript", "scipy", "sklearn", "safetensors", "jinja2")


def run(*command: str | os.PathLike[str], **options: object) -> subprocess.CompletedProcess[str]:
    """Runs a command in a clean environment: nothing of the checkout is on the path."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, env=environment, **options
    )  # type: ignore[call-overload,no-any-return]


def pip(commands: Path, *words: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Runs the pip that is here on the environment of these commands: one of its own takes seconds to install."""
    return run(sys.executable, "-m", "pip", "--python", commands / "python", *words, **options)


@pytest.fixture(scope="session")
def built(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel made from it, built from a copy, so that the checkout stays clean."""
    need("build")
    source = tmp_path_factory.mktemp("source") / "saae"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repo_root / name, source)
    for name in (*PACKAGES, "tests", "benchmarks", "docs"):
        shutil.copytree(repo_root / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    target = tmp_path_factory.mktemp("wheel")
    # The backend that is here serves if it is new enough; else one is fetched.
    try:
        isolated = int(version("setuptools").split(".")[0]) < 77
    except PackageNotFoundError:
        isolated = True
    if isolated:
        _need_pypi(tmp_path_factory.mktemp("probe"))
    options = [] if isolated else ["--no-isolation"]
    done = run(sys.executable, "-m", "build", *options, "--outdir", target, source)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


@pytest.fixture(scope="session")
def wheel(built: Path) -> Path:
    """The wheel."""
    (found,) = built.glob("*.whl")
    return found


def _need_pypi(folder: Path) -> None:
    done = run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", folder, "typer>=0.12")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        pytest.skip(f"PyPI cannot be reached from here: {last}")


@pytest.fixture(scope="session")
def locked(wheel: Path, repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a line PC installs: the wheel, requirements by hash, the bill of materials."""
    _need_pypi(tmp_path_factory.mktemp("probe"))
    folder = tmp_path_factory.mktemp("locked")
    done = run(sys.executable, repo_root / "deploy" / "lock.py", "--wheel", wheel, "--extras", "cpu", "--into", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def lean(locked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel and its extra `cpu`, nothing else; gives its folder of commands."""
    folder = tmp_path_factory.mktemp("lean")
    venv.create(folder, symlinks=os.name == "posix")
    commands = folder / ("Scripts" if os.name == "nt" else "bin")
    done = pip(commands, "install", "-q", "--no-compile", "--require-hashes", "-r", "requirements-line.txt", cwd=locked)
    assert done.returncode == 0, done.stderr
    return commands


@pytest.fixture(scope="session")
def fuller(lean: Path, wheel: Path) -> Path:
    """The same environment with the extras that are small; only for tests that stand behind those of `lean`.

    By uv, which unpacks them in a sixth of pip's time; a line PC's own road is pip's, as in `lean`.
    """
    extras = ",".join(SMALL_EXTRAS)
    done = run(*uv_install("--python", lean / "python", f"saae[{extras}] @ {wheel.as_uri()}"))
    assert done.returncode == 0, done.stderr
    return lean


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_tiny_bundle(tmp_path / "bundle")


# --- the wheel ---


@pytest.mark.slow
def test_contents(wheel: Path, repo_root: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    for package in PACKAGES:
        assert f"{package}/py.typed" in names
        # Every module and every template of the checkout, in sub-packages too.
        for file in (repo_root / package).rglob("*"):
            if file.suffix in (".py", ".html", ".css", ".json", ".js", ".svg"):
                assert str(file.relative_to(repo_root)) in names, file
    assert "saae_export/report/report.html" in names
    assert "saae_export/report/report.css" in names
    pages = {f"saae_runtime/line/http/page/{name}" for name in ("index.html", "page.css", "page.js", "icon.svg")}
    assert pages <= names
    allowed = (".py", ".typed", ".html", ".css", ".json", ".js", ".svg")
    assert [name for name in names if ".dist-info/" not in name and not name.endswith(allowed)] == []
    assert wheel.stat().st_size < 2 << 20
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_the_sdist_holds_the_sources_and_nothing_built(built: Path, wheel: Path) -> None:
    """The wheel was made from it, so nothing that the wheel holds can be missing."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO", *(f"{name}/py.typed" for name in PACKAGES)} <= names
    assert sdist.name.removesuffix(".tar.gz") == "-".join(wheel.name.split("-")[:2])
    assert [name for name in names if name.endswith((".pyc", ".onnx", ".whl", ".so"))] == []


@pytest.mark.slow
def test_the_version_stands_in_one_place(repo_root: Path, wheel: Path) -> None:
    version_here = wheel.name.split("-")[1]
    assert f'version = "{version_here}"' in (repo_root / "pyproject.toml").read_text(encoding="utf-8")
    modules = [file for name in PACKAGES for file in (repo_root / name).rglob("*.py")]
    pattern = re.compile(rf"""["']v?{re.escape(version_here)}["']|__version__\s*=""")
    assert [str(file) for file in modules if pattern.search(file.read_text(encoding="utf-8"))] == []


@pytest.mark.slow
def test_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
        scripts = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert metadata["Name"] == "saae"
    assert metadata["Requires-Python"] == ">=3.10"
    assert wheel.name.endswith("-py3-none-any.whl")
    extras = set(metadata.get_all("Provides-Extra", []))
    named = {"train", "export", "cpu", "cuda", "tensorrt", "tensorrt-rtx", "openvino", "demo", "dev"}
    assert named <= extras
    requirements = metadata.get_all("Requires-Dist", [])
    base = {line.split(";")[0].strip(" ()0123456789.<>=!~,").lower() for line in requirements if "extra ==" not in line}
    assert base == {"numpy", "pillow", "typer", "rich"}
    for script, module in (
        ("saae-run", "saae_runtime"),
        ("saae-line", "saae_runtime.line"),
        ("saae-train", "saae_train"),
        ("saae-export", "saae_export"),
    ):
        assert f"{script} = {module}.cli:main" in scripts


# --- what a line PC pins ---


@pytest.mark.slow
def test_the_lock_names_every_package_with_its_hash(locked: Path, lean: Path) -> None:
    text = (locked / "requirements-line.txt").read_text(encoding="utf-8")
    pinned = dict(re.findall(r"^(\S+)==(\S+) \\\n    --hash=sha256:[0-9a-f]{64}$", text, re.MULTILINE))
    assert re.search(r"^\./saae-\S+\.whl \\\n    --hash=sha256:[0-9a-f]{64}$", text, re.MULTILINE)
    listed = json.loads(pip(lean, "list", "--format", "json").stdout)
    installed = {item["name"]: item["version"] for item in listed if item["name"] not in ("pip", "setuptools", "saae")}
    assert {name.lower(): number for name, number in pinned.items()} == {
        name.lower(): number for name, number in installed.items()
    }
    assert {"numpy", "onnxruntime", "pillow"} <= {name.lower() for name in pinned}


@pytest.mark.slow
def test_another_file_under_the_same_name_is_refused(locked: Path, lean: Path, wheel: Path, tmp_path: Path) -> None:
    shutil.copy(locked / "requirements-line.txt", tmp_path)
    shutil.copy(wheel, tmp_path)
    with zipfile.ZipFile(tmp_path / wheel.name, "a") as archive:
        archive.writestr("saae_runtime/more.py", "")
    words = ("install", "--dry-run", "--require-hashes", "--force-reinstall", "--no-deps")
    done = pip(lean, *words, "-r", "requirements-line.txt", cwd=tmp_path)
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr


@pytest.mark.slow
def test_the_bill_of_materials_lists_the_same(locked: Path) -> None:
    bill = json.loads((locked / "sbom-line.json").read_text(encoding="utf-8"))
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5")
    assert bill["metadata"]["component"]["name"] == "saae"
    text = (locked / "requirements-line.txt").read_text(encoding="utf-8")
    for item in bill["components"]:
        assert f"{item['name']}=={item['version']}" in text
        assert item["hashes"][0]["content"] in text
        assert item["purl"].startswith("pkg:pypi/")
    assert len(bill["components"]) == text.count("--hash=") - 1


# --- the wheel in a new environment ---


@pytest.mark.slow
def test_nothing_heavy_comes_along(lean: Path, tmp_path: Path) -> None:
    code = f"""
import importlib.util, json, sys
here = [name for name in {HEAVY!r} if importlib.util.find_spec(name)]
import saae_runtime
loaded = [name for name in {(*HEAVY, "PIL", "onnxruntime", "typer", "rich")!r} if name in sys.modules]
print(json.dumps([here, loaded, saae_runtime.__file__]))
"""
    done = run(lean / "python", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    here, loaded, place = json.loads(done.stdout)
    assert here == []
    assert loaded == []
    assert Path(place).is_relative_to(lean.parent)


@pytest.mark.slow
def test_engine_scores_a_frame_there(lean: Path, bundle: Path, tmp_path: Path) -> None:
    frame = gray_frame(spot=(10, 20, 12, 16))
    np.save(tmp_path / "frame.npy", frame)
    code = f"""
import json, numpy as np
from saae_runtime import Engine
frame = np.load("frame.npy")
with Engine({str(bundle)!r}) as engine:
    result = engine(frame)
    np.save("map.npy", result.anomaly_map)
    result.heatmap(), result.overlay(frame)
    print(json.dumps([engine.backend.name, result.score, bool(result.is_anomalous), len(result.regions())]))
"""
    done = run(lean / "python", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    backend, score, is_anomalous, regions = json.loads(done.stdout)
    assert backend.startswith("onnxruntime")
    expected = expected_map(frame)
    np.testing.assert_allclose(np.load(tmp_path / "map.npy"), expected, atol=1e-3)
    assert score == pytest.approx(expected.max(), abs=1e-3)
    assert is_anomalous
    assert regions == 1


@pytest.mark.slow
def test_the_command_scores_frames_there(lean: Path, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    Image.fromarray(gray_frame()).save(tmp_path / "frames" / "good.png")
    clean = run(lean / "saae-run", bundle, "frames", "--json", "-", cwd=tmp_path)
    assert clean.returncode == 0, clean.stderr
    Image.fromarray(gray_frame(spot=(5, 5, 20, 20))).save(tmp_path / "frames" / "spot.png")
    found = run(lean / "saae-run", bundle, "frames", "--json", "-", "--out", "out", "--heatmaps", cwd=tmp_path)
    assert found.returncode == 1, found.stderr
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert len(lines) == 2
    assert [path.name for path in sorted((tmp_path / "out").rglob("*.png"))] != []


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("saae-export", "build", "--category", "zipper"),
        ("saae-train", "fit", "--category", "zipper"),
        ("saae-train", "evaluate", "x"),
    ],
)
def test_commands_that_need_pytorch_say_what_to_install(lean: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    done = run(lean / command[0], *command[1:], cwd=tmp_path)
    assert done.returncode == 2
    said = done.stdout + done.stderr
    assert "Traceback" not in said
    assert "pip install" in said
    assert "saae[" in said


@pytest.mark.slow
def test_a_bundle_can_be_inspected_there(lean: Path, bundle: Path, tmp_path: Path) -> None:
    done = run(lean / "saae-export", "inspect", bundle, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["category"] == "tiny"
    doctor = run(lean / "saae-export", "doctor", bundle, cwd=tmp_path)
    assert "Traceback" not in doctor.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", ["saae-run", "saae-line", "saae-train", "saae-export"])
def test_help_and_version_work_there(lean: Path, wheel: Path, tmp_path: Path, command: str) -> None:
    for option in ("--help", "--version"):
        done = run(lean / command, option, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
    assert wheel.name.split("-")[1] in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("extra", SMALL_EXTRAS)
def test_a_small_extra_brings_what_it_is_for(fuller: Path, tmp_path: Path, extra: str) -> None:
    done = run(fuller / "python", "-c", SMALL_EXTRAS[extra], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
