"""The command `saae-export` as a person at a line meets it: exit codes, panels, Ctrl-C."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from folders import leftovers
from forked import Forks
from needs import need
from repeated_options import repeatable
from tiny_builds import CLI, draw
from tiny_models import tiny_detector
from typer.testing import CliRunner, Result

from saae_export.cli.command import app
from saae_runtime.bundle import open_bundle
from saae_train.cli.options import FitOptions
from saae_train.config import FitConfig
from saae_train.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parents[3]


def _command(*arguments: str, module: str = "saae_export.cli") -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def _environment(folder: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("SAAE_DATA", "SAAE_DEBUG")}
    cache = str(folder / "cache")
    return kept | {"PYTHONPATH": str(ROOT), "SAAE_CACHE": cache, "COLUMNS": "200", "HF_HUB_OFFLINE": "1"} | more


def _remembering(folder: Path, exported: Path) -> dict[str, str]:
    """For the module `remembering_export`, which is the command in a process of its own."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "support")))
    return _environment(folder, PYTHONPATH=paths, SAAE_TEST_EXPORTED=str(exported))


def _run(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _command(*arguments),
        cwd=folder,
        env=_environment(folder, **more),
        capture_output=True,
        text=True,
        timeout=300,
    )


def _invoke(folder: Path, *arguments: str, **more: str) -> Result:
    """A command in this process, which has its libraries already."""
    before = Path.cwd()
    os.chdir(folder)
    kept = {"SAAE_DATA": None, "SAAE_CACHE": str(folder / "cache"), "COLUMNS": "200"}
    try:
        return CliRunner().invoke(app, arguments, env=kept | more)
    finally:
        os.chdir(before)


def _refused(folder: Path, *arguments: str, **more: str) -> str:
    """What a command that ends with exit code 2 says, in one line."""
    done = _invoke(folder, *arguments, **more)
    assert done.exit_code == 2, done.output
    return " ".join(done.output.replace("│", " ").split())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with ./data/weave and a bundle built by the command from it."""
    folder = tmp_path_factory.mktemp("place")
    draw(folder / "data")
    done = _invoke(folder, "build", "--category", "weave", *CLI, "--precision", "fp32")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.strip() == "bundles/weave"
    return folder


@pytest.fixture(scope="module")
def forks(place: Path, exported_once: Path) -> Iterator[Forks]:
    """Processes that have the libraries of a build already."""
    libraries = ("exported_before", "saae_export.cli.command", "saae_export.pipeline.build", "onnxruntime")
    made = Forks(*libraries, environment=_remembering(place, exported_once))
    yield made
    made.close()


def test_build_finds_the_usual_folder_and_ends_with_a_summary(place: Path) -> None:
    done = _invoke(place, "build", "-c", "weave", *CLI, "--precision", "fp32")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.strip() == "bundles/weave"
    for expected in ("./data", "reused", "bundles/weave", "report.html", "ROC-AUC", "saae-run bundles/weave"):
        assert expected in done.stderr, expected
    assert "Traceback" not in done.stderr
    assert open_bundle(place / "bundles" / "weave", verify=True).manifest.category == "weave"


def test_the_folder_of_the_environment_comes_before_data(place: Path, tmp_path: Path) -> None:
    data = str(place / "data")
    assert "int4" in _refused(tmp_path, "build", "-c", "weave", *CLI, "--precision", "int4", SAAE_DATA=data)
    assert "did you mean weave" in _refused(tmp_path, "build", "-c", "weav", *CLI, SAAE_DATA=data)


STOPS = (
    (" fit", signal.SIGINT),
    (" export ONNX", signal.SIGINT),
    (" calibrate", signal.SIGTERM),
    (" engines", signal.SIGINT),
    (" parity", signal.SIGINT),
    (" evaluate", signal.SIGINT),
)


@pytest.mark.parametrize(("stage", "number"), STOPS)
def test_ctrl_c_leaves_what_was_there(
    place: Path, exported_once: Path, forks: Forks, stage: str, number: int, tmp_path: Path
) -> None:
    """A real signal to the real process, once the stage has begun."""
    before = open_bundle(place / "bundles" / "weave", verify=True).manifest
    # The stages behind the export need not wait for it.
    module = "saae_export.cli" if stage == " export ONNX" else "remembering_export"
    arguments = ["build", "-c", "weave", *CLI, "--precision", "fp32"]
    if stage == " fit":
        arguments[arguments.index("--steps") + 1] = "500"
        arguments.append("--refit")
    log = tmp_path / "log"
    with forks.begin(module, *arguments, log=log, cwd=place, env=_remembering(place, exported_once)) as process:
        deadline = time.monotonic() + 240
        # Of a fit not its first words, but a step well inside.
        while ("loss" if "fit" in stage else stage) not in log.read_text() and time.monotonic() < deadline:
            assert process.poll() is None, log.read_text()
            time.sleep(0.01)
        process.send_signal(number)
        code = process.wait()
    text = log.read_text()
    assert stage in text
    assert code == 130, text
    assert "Stopped" in text
    assert "Traceback" not in text
    assert open_bundle(place / "bundles" / "weave", verify=True).manifest == before
    assert leftovers(place) == []
    assert [path.name for path in (place / "runs" / "weave").iterdir()] == ["models"]
    for folder in (place / "runs" / "weave" / "models").iterdir():
        load_checkpoint(folder)


def test_errors_are_panels_with_exit_code_2(tmp_path: Path) -> None:
    done = _run(tmp_path, "inspect", "nothing")
    assert done.returncode == 2
    assert "BundleNotFoundError" in done.stderr
    assert "No bundle at nothing" in done.stderr
    assert "try:" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = _run(tmp_path, "--debug", "inspect", "nothing")
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_build_without_a_product_says_what_to_type(tmp_path: Path) -> None:
    assert "saae-export build --category zipper" in _refused(tmp_path, "build")


def test_unknown_category_names_near_ones(tmp_path: Path) -> None:
    assert "did you mean zipper" in _refused(tmp_path, "build", "--category", "ziper")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--category", "zipper", "--masks", "m"), "--masks is given without --normal"),
        (("--normal", "n", "--data", "d"), "--normal and --data"),
        (("--normal", "missing"), "missing"),
        (("--category", "zipper", "--preset", "slow"), "preset"),
        (("--category", "zipper", "--layers", "a,b"), "--layers a,b"),
        (("--category", "zipper", "--input-size", "wide"), "wide"),
        (("--data", "nowhere"), "nowhere"),
        (("--data", "a", "--data", "b"), "--data"),
        (("--normal", "n", "--set", "warm_up=3"), "did you mean warmup"),
        (("--normal", "n", "--steps", "3", "--set", "steps=4"), "--steps and --set steps exclude each other"),
        (("--normal", "n", "--parity-images", "0"), "--parity-images 8"),
    ],
)
def test_options_that_cannot_work(tmp_path: Path, options: tuple[str, ...], expected: str) -> None:
    assert expected in _refused(tmp_path, "build", *options)


@pytest.mark.parametrize("memory", [None, 40])
def test_a_given_model_takes_no_options_of_fitting(tmp_path: Path, memory: int | None) -> None:
    detector = tiny_detector(score="l2") if memory is None else tiny_detector(score="memory", memory=memory)
    config = FitConfig(score=detector.score, memory=memory, held_out=0.15 if memory is None else 0.0)
    save_checkpoint(tmp_path / "model", Checkpoint(detector, config, "part"))
    given = ("build", "--normal", "missing", "--checkpoint", "model")
    for words in (("--steps", "3"), ("--preset", "lite"), ("--device", "cpu"), ("--set", "clip=null"), ("--refit",)):
        assert f"{words[0]} and --checkpoint exclude each other" in _refused(tmp_path, *given, *words)
    assert "--seed, --refit and" in _refused(tmp_path, *given, "--refit", "--seed", "0")
    said = _refused(tmp_path, *given, "--texture")  # sets the thresholds of a model without a memory
    assert ("exclude each other" in said) is (memory is not None)
    assert "exclude each other" not in _refused(tmp_path, *given, "--white-level", "4095", "--exclude", "a")


def test_verify_and_inspect(place: Path) -> None:
    done = _invoke(place, "verify", "bundles/weave", "--backend", "onnxruntime:cpu")
    assert done.exit_code == 0, done.stderr
    assert "pass" in done.stdout
    done = _invoke(place, "inspect", "bundles/weave", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["category"] == "weave"


def test_verify_names_a_damaged_file(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "bundles" / "weave", tmp_path / "bundle")
    file = tmp_path / "bundle" / "model.onnx"
    file.write_bytes(file.read_bytes()[:-1])
    assert "model.onnx is truncated" in _refused(tmp_path, "verify", "bundle")


def test_onnx_alone(place: Path, tmp_path: Path) -> None:
    onnx = need("onnx")
    checkpoint = next((place / "runs" / "weave" / "models").iterdir())
    done = _invoke(tmp_path, "onnx", str(checkpoint), "--out", "m.onnx", "--precision", "fp16", "--frame-size", "96x80")
    assert done.exit_code == 0, done.stderr
    frame = onnx.load(str(tmp_path / "m.onnx")).graph.input[0]
    assert [side.dim_value for side in frame.type.tensor_type.shape.dim][1:] == [96, 80, 3]


def test_version(tmp_path: Path) -> None:
    done = _run(tmp_path, "--version")
    assert done.returncode == 0
    assert done.stdout.startswith("saae ")


def test_only_these_options_can_be_repeated() -> None:
    from saae_export.cli.command import app

    assert repeatable(app) == {
        "build": {"--normal", "--normal-test", "--abnormal", "--masks", "--set", "--exclude", "--keep"},
        "inspect": set(),
        "verify": set(),
        "calibrate": {"--normal", "--exclude"},
        "engine": set(),
        "doctor": set(),
        "onnx": set(),
        "triton": set(),
    }


def test_build_takes_several_folders_and_its_next_command_can_be_pasted(place: Path, tmp_path: Path) -> None:
    """Two folders of good parts whose files have the same names, below a folder with a blank in its name."""
    good = sorted((place / "data" / "weave" / "train" / "good").iterdir())
    for index, file in enumerate(good):
        folder = tmp_path / "my parts" / ("day", "night")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index // 2}.png").write_bytes(file.read_bytes())
    named = ["--normal", "my parts/day", "--normal", "my parts/night", "--category", "mine", "--out", "my bundle"]
    named.append("--texture")  # as `weave` is, so that the graph is one that was exported before
    done = _invoke(tmp_path, "build", *named, *CLI, "--precision", "fp32", "--samples", "0", COLUMNS="80")
    assert done.exit_code == 0, done.stderr
    manifest = open_bundle(tmp_path / "my bundle", verify=True).manifest
    (model,) = (tmp_path / "runs" / "mine" / "models").iterdir()
    record = load_checkpoint(model).record
    assert record.images == manifest.calibration.images == len(good)
    assert record.held_out == ()
    assert manifest.calibration.left_out
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("Next: "))
    program, *arguments = shlex.split(line.removeprefix("Next: "))
    assert program == "saae-run"
    scored = subprocess.run(
        [sys.executable, "-m", "saae_runtime.cli", *arguments], cwd=tmp_path, env=_environment(tmp_path), timeout=300
    )
    assert scored.returncode in (0, 1)
    assert list((tmp_path / "results").iterdir())


def test_fit_and_build_take_the_same_options_of_fitting() -> None:
    from saae_export.cli.command import app as export
    from saae_train.cli.command import app as train

    fit, build = typer.main.get_command(train).commands["fit"], typer.main.get_command(export).commands["build"]
    found = [{option.name: option for option in command.params} for command in (fit, build)]
    names = [entry.name for entry in dataclasses.fields(FitOptions)]
    assert len(names) > 15
    for name in [*names, "normal", "cache"]:
        for what in ("opts", "secondary_opts", "default", "multiple", "metavar", "help"):
            assert getattr(found[0][name], what) == getattr(found[1][name], what), (name, what)
