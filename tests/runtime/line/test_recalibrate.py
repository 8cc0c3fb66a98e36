"""Recalibration, whole: confirmed parts, saae-export in its own process, a new version, and the line switched to it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from http_client import Client
from line_parts import line_text, wait_until
from needs import need
from tiny_bundle import make_tiny_bundle
from typer.testing import CliRunner, Result

from saae_runtime.errors import ConfigError, DataError
from saae_runtime.line.audit import verify
from saae_runtime.line.cli.command import app
from saae_runtime.line.config import RecipeConfig
from saae_runtime.line.overrides import Overrides
from saae_runtime.line.part import Part, Verdict, now
from saae_runtime.line.recalibrate import GoodParts, recalibrate
from saae_runtime.line.recipes import RecipeBook
from saae_runtime.render import save_png

SINKS = '[[sink]]\nkind = "{kind}"\npath = "out.{kind}"\n'
HTTP = "\n[http]\nport = 0\n"
ARCHIVE = '\n[archive]\nfolder = "pictures"\nok_share = 0.0\nmin_free_gb = 0.0\n'


def draw(folder: Path, count: int, level: int, seed: int = 0) -> Path:
    """Noisy gray pictures; the tiny bundle scores their distance from 128."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        pixels = rng.normal(level, 6, (64, 96, 3)).round().clip(0, 255).astype(np.uint8)
        save_png(folder / f"{number:02d}.png", pixels)
    return folder


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def line(tmp_path: Path) -> Path:
    """A line.toml whose lamp has grown brighter: its good parts are NG. The archive holds another product's, too."""
    for library in ("torch", "fastapi", "uvicorn", "python_multipart"):
        need(library)
    make_tiny_bundle(tmp_path / "tiny")
    draw(tmp_path / "frames", 12, 185)
    draw(tmp_path / "pictures" / "OK" / "other" / "2026-03-04", 5, 250)
    file = tmp_path / "line.toml"
    file.write_text(line_text(Path("tiny"), more=SINKS.format(kind="sqlite") + HTTP + ARCHIVE), encoding="utf-8")
    return file


@pytest.mark.parametrize("kind", ["sqlite", "jsonl"])
def test_from_the_command_line(line: Path, tmp_path: Path, kind: str) -> None:
    line.write_text(line_text(Path("tiny"), more=SINKS.format(kind=kind) + HTTP + ARCHIVE), encoding="utf-8")
    assert invoke("run", line, "--quiet").exit_code == 0
    refused = invoke("recalibrate", line)
    assert isinstance(refused.exception, DataError) or refused.exit_code == 2
    draw(tmp_path / "http" / "pool" / "first" / "good", 12, 195, seed=1)
    draw(tmp_path / "pictures" / "OK" / "first" / "2026-03-04", 3, 195, seed=2)
    tried = invoke("recalibrate", line)
    assert tried.exit_code == 0, tried.output
    assert "Recipe first, 15 images of good parts" in tried.output
    assert "12 of the last 12 parts" in tried.output
    assert "NG -> OK" in tried.output
    assert "Nothing was written." in tried.output
    assert not list(tmp_path.glob("tiny.recal-*"))
    before = (tmp_path / "tiny" / "manifest.json").read_bytes()
    done = invoke("recalibrate", line, "--write")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "tiny.recal-1" / "manifest.json").is_file()
    assert (tmp_path / "tiny" / "manifest.json").read_bytes() == before
    assert not list(tmp_path.glob(".recal-*"))


def test_an_overlooked_defect_in_the_archive_is_no_good_part(line: Path, tmp_path: Path) -> None:
    good = draw(tmp_path / "pictures" / "OK" / "first" / "2026-03-04", 8, 150, seed=2)
    overlooked = draw(good.parent / "2026-03-05", 2, 250, seed=3)
    other = draw(tmp_path / "elsewhere", 1, 150, seed=4)
    overrides = Overrides(tmp_path / "http")
    for number in range(2):
        picture = f"OK/first/2026-03-05/0{number}.png"
        part = Part(f"P-{number}", "one", now(), Verdict.OK, "score", recipe="first", bundle="b", picture=picture)
        overrides.mark(part.to_dict(), Verdict.NG, "anna", "a scratch")
    gone = Part("gone", "one", now(), Verdict.OK, "score", recipe="first", picture="OK/first/2026-03-04/gone.png")
    overrides.mark(gone.to_dict(), Verdict.NG, "anna")

    def done(*words: object) -> tuple[int, float]:
        found = invoke("recalibrate", line, *words)
        assert found.exit_code == 0, found.output
        row = re.search(r"^\W*images\W+[\d.]+\W+([\d.]+)", found.output, re.MULTILINE)
        assert row is not None
        return int(found.output.partition("Recipe first, ")[2].split()[0]), float(row[1])

    pictures, threshold = done()
    assert pictures == 8
    assert threshold < 60  # gray 250 scores 122
    assert done("--no-archive", "--normal", good.parent) == (8, threshold)
    assert done("--no-archive", "--normal", other, "--normal", good)[0] == 9
    refused = invoke("recalibrate", line, "--no-archive", "--normal", overlooked)
    assert refused.exit_code == 2
    assert "no images" in refused.output
    overrides.undo(part.key, "ben")  # the second one
    pictures, threshold = done()
    assert pictures == 9
    assert threshold > 100
    overrides.close()


def test_what_cannot_be_recalibrated_is_said(tiny: Path, tmp_path: Path) -> None:
    book = RecipeBook([RecipeConfig("r", str(tiny), threshold=3.0, threads=1)], tmp_path)
    try:
        with pytest.raises(ConfigError, match="sets its threshold as a number"):
            recalibrate(tiny, book.get("r"), GoodParts((tmp_path,)))
        with pytest.raises(DataError, match="no images"):
            recalibrate(tiny, book.change("r", false_alarms=0.1)[1], GoodParts((tmp_path / "none",)))
    finally:
        book.close()
    assert invoke("recalibrate", tmp_path / "none.toml").exit_code == 2


def test_a_running_line_is_recalibrated_switched_and_stopped(line: Path, tmp_path: Path) -> None:
    """By the command as it is started on a line, over HTTP, with a page open; SIGTERM ends it within two seconds."""
    text = line.read_text().replace(
        'camera = "frames"', 'camera = "frames"\ncamera_options = { repeat = true, interval = 0.02 }'
    )
    line.write_text(text, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "saae_runtime.line.cli", "run", line, "--quiet"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stderr is not None
        page = next(line for line in process.stderr if line.startswith("page: "))
        client = Client(int(page.strip().rstrip("/").rpartition(":")[2]))
        assert wait_until(lambda: len(client.get("/v1/parts").json) >= 12)
        keys = {record["part_id"]: record["key"] for record in client.get("/v1/parts", verdict="NG").json}
        assert len(keys) == 12
        for key in keys.values():
            assert client.post("/v1/overrides", {"key": key, "verdict": "OK"}).status == 200
        assert client.get("/v1/bundle", recipe="first").json["pool"] == {"good": 12, "bad": 0}

        def job(dry: bool) -> dict:
            assert client.post("/v1/recalibration", {"recipe": "first", "dry_run": dry}).status == 202
            assert client.post("/v1/recalibration", {"recipe": "first"}).status == 400  # one at a time
            assert wait_until(lambda: client.get("/v1/recalibration").json["state"] != "running", 120)
            return client.get("/v1/recalibration").json

        tried = job(dry=True)
        assert tried["state"] == "done", tried
        assert (tried["before"], tried["written"], tried["pictures"]) == (40.0, None, 12)
        assert tried["after"] > 60
        assert tried["changes"] == tried["judged"] > 11
        made = job(dry=False)
        assert made["written"] == "tiny.recal-1"
        client.post("/v1/bundle", {"recipe": "first", "bundle": "tiny.recal-1"})
        latest = client.get("/v1/parts", last=1).json[0]["number"]
        assert wait_until(lambda: client.get("/v1/parts", last=1).json[0]["number"] > latest + 14)
        assert {record["verdict"] for record in client.get("/v1/parts", last=10).json} == {"OK"}
        assert client.get("/readyz").status == 200

        stream = threading.Thread(target=lambda: client.get("/v1/events"), daemon=True)
        stream.start()
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0  # how soon is measured in benchmarks/, not here
        assert json.loads((tmp_path / "http" / "in-force.json").read_text())["first"]["changes"] == {
            "bundle": "tiny.recal-1"
        }
    finally:
        process.kill()
        process.wait()
    log = tmp_path / "http" / "audit.jsonl"
    assert verify(log).problems == ()
    checked = invoke("audit", "verify", log)
    assert (checked.exit_code, "chain intact" in checked.output) == (0, True)
    log.write_bytes(log.read_bytes().replace(b'"local"', b'"nobody"', 1))
    assert invoke("audit", "verify", log).exit_code == 2
    shutil.rmtree(tmp_path / "tiny.recal-1")  # as if it had been tidied away: the line starts with its own bundle
    assert invoke("check", line).exit_code == 0
