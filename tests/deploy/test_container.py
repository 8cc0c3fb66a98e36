"""The container recipe where an engine runs: built, started without root on a read-only root, judging pictures."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from needs import need
from tiny_bundle import gray_frame, make_tiny_bundle

from saae_runtime.render import save_png

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
SPOT = (10, 20, 9, 14)
NO_TIMER = ["--health-interval", "disable"]  # podman has systemd ask for health; the tests ask
LINE = """
[line]
name = "line-1"
spool = "/state/spool"
[[station]]
name = "station-1"
camera = "watch:/config/arriving"
trigger = "free"
recipes = ["recipe-1"]
[[recipe]]
name = "recipe-1"
bundle = "bundles/tiny"
[[sink]]
kind = "jsonl"
path = "/state/records.jsonl"
"""


def call(*words: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=seconds)


def no_such_image(said: str) -> bool:
    return re.search(r"resolve|pull|registry|timeout|connection", said, re.IGNORECASE) is not None


@pytest.fixture(params=["docker", "podman"], scope="module")
def engine(request: pytest.FixtureRequest) -> str:
    """A container engine that runs here."""
    name: str = request.param
    if shutil.which(name) is None:
        pytest.skip(f"there is no {name}")
    done = call(name, "info")
    if done.returncode != 0:
        pytest.skip(f"{name} does not run: {(done.stderr.strip().splitlines() or ['it does not say why'])[-1]}")
    return name


@pytest.fixture(scope="module")
def image(engine: str) -> str:
    """The image for a PC without a GPU, built as the documentation says."""
    name = "saae-test:cpu"
    build = [engine, "build", *(["--format", "docker"] if engine == "podman" else [])]
    done = call(*build, "-f", str(DEPLOY / "Dockerfile"), "--target", "cpu", "-t", name, str(ROOT), seconds=900)
    if done.returncode and no_such_image(done.stderr):
        pytest.skip(f"the base image cannot be fetched: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return name


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """What is mounted at /config: a line, its bundle, and the folder in which images arrive."""
    need("onnx")
    folder = tmp_path / "config"
    make_tiny_bundle(folder / "bundles" / "tiny")
    (folder / "line.toml").write_text(LINE, encoding="utf-8")
    (folder / "arriving").mkdir()
    return folder


@pytest.fixture
def line(engine: str, image: str, config: Path) -> Iterator[str]:
    """The name of a container in which the line service runs, shut in as compose.yaml does."""
    name = f"saae-test-{uuid.uuid4().hex[:12]}"
    own = NO_TIMER if engine == "podman" else []
    shut = ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--tmpfs", "/tmp", *own]
    done = call(engine, "run", "-d", "--name", name, *shut, "-v", f"{config}:/config:ro", image)
    assert done.returncode == 0, done.stderr
    yield name
    call(engine, "rm", "-f", "-v", name)


def wait_for(what: Callable[[], bool], told: Callable[[], str], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, told()
        time.sleep(0.5)


def test_the_service_judges_a_picture_and_stops_in_order(engine: str, line: str, config: Path) -> None:
    def inside(*words: str) -> subprocess.CompletedProcess[str]:
        return call(engine, "exec", line, *words)

    def said() -> str:
        logs = call(engine, "logs", line)
        return logs.stdout + logs.stderr

    wait_for(lambda: inside("python", "/opt/saae/supervise.py", "--check").returncode == 0, said)
    save_png(config / "arriving" / "a.png", gray_frame(spot=SPOT))
    save_png(config / "arriving" / "b.png", gray_frame())
    wait_for(lambda: inside("cat", "/state/records.jsonl").stdout.count("\n") == 2, said)
    found = map(json.loads, inside("cat", "/state/records.jsonl").stdout.splitlines())
    assert {record["part_id"]: record["verdict"] for record in found} == {"a": "NG", "b": "OK"}

    code = "import os; print(os.getuid()); open('/state/x', 'w'); open('/tmp/x', 'w'); open('/opt/saae/x', 'w')"
    tried = inside("python", "-c", code)
    assert tried.stdout.split() == ["10001"]
    assert "Read-only file system: '/opt/saae/x'" in tried.stderr

    assert call(engine, "stop", "-t", "30", line).returncode == 0
    assert call(engine, "inspect", "--format", "{{.State.ExitCode}}", line).stdout.strip() == "0", said()
    assert "stopping as asked" in said()


def test_the_engine_itself_sees_that_the_service_is_well(engine: str, line: str) -> None:
    """docker runs the check by itself; podman's timer is systemd's, so it is asked to."""

    def healthy() -> bool:
        if engine == "podman":
            return call(engine, "healthcheck", "run", line).returncode == 0
        return call(engine, "inspect", "--format", "{{.State.Health.Status}}", line).stdout.strip() == "healthy"

    wait_for(healthy, lambda: call(engine, "logs", line).stderr)


def test_a_command_judges_a_folder_once(engine: str, image: str, config: Path) -> None:
    """As docs/container.md says; nothing but the mounted folder is written."""
    save_png(config / "arriving" / "a.png", gray_frame(spot=SPOT))
    results = config.parent / "results"
    results.mkdir(mode=0o777)
    results.chmod(0o777)
    places = ["-v", f"{config}:/config:ro", "-v", f"{results}:/results"]
    words = ["/config/bundles/tiny", "/config/arriving", "--json", "/results/r.jsonl"]
    own = NO_TIMER if engine == "podman" else []
    shut = ["--rm", "--read-only", "--tmpfs", "/tmp", "--entrypoint", "saae-run"]
    done = call(engine, "run", *shut, *own, *places, image, *words)
    assert done.returncode == 1, done.stderr  # a defect was found
    (found,) = map(json.loads, (results / "r.jsonl").read_text(encoding="utf-8").splitlines())
    assert found["is_anomalous"] is True


def test_the_image_needs_no_options_to_say_its_version(engine: str, image: str) -> None:
    own = NO_TIMER if engine == "podman" else []
    found = call(engine, "run", "--rm", *own, image, "saae-line", "--version")
    assert found.returncode == 0, found.stderr


def test_compose_starts_the_line_and_its_broker(image: str, engine: str, config: Path) -> None:
    if engine != "docker":
        pytest.skip("compose.yaml is for docker compose")
    compose = ["docker", "compose"] if call("docker", "compose", "version").returncode == 0 else ["docker-compose"]
    if compose == ["docker-compose"] and shutil.which("docker-compose") is None:
        pytest.skip("there is no docker compose")
    project = f"saae-test-{uuid.uuid4().hex[:12]}"
    make_tiny_bundle(config / "bundles" / "zipper")  # the name in deploy/line.toml
    command = ["env", f"BUNDLES={config / 'bundles'}", f"ARRIVING={config / 'arriving'}", *compose]
    built = config.parent / "built.yaml"
    built.write_text(f"services:\n  line:\n    image: {image}\n", encoding="utf-8")
    command += ["-f", str(DEPLOY / "compose.yaml"), "-f", str(built), "-p", project]
    listen = ["exec", "-T", "broker", "mosquitto_sub", "-t", "saae/line-1/station-1/parts", "-C", "1", "-W", "60"]
    try:
        done = call(*command, "up", "-d", seconds=900)
        if done.returncode and no_such_image(done.stderr):
            pytest.skip(f"an image cannot be fetched: {done.stderr.strip().splitlines()[-1]}")
        assert done.returncode == 0, done.stderr
        with subprocess.Popen([*command, *listen], stdout=subprocess.PIPE, text=True) as listener:
            for index in range(90):  # until it listens
                save_png(config / "arriving" / f"{index:03d}.png", gray_frame(spot=SPOT))
                with suppress(subprocess.TimeoutExpired):
                    listener.wait(1)
                    break
            told, _ = listener.communicate(timeout=10)
        assert json.loads(told)["verdict"] == "NG"
    finally:
        call(*command, "down", "-v", "-t", "30")
