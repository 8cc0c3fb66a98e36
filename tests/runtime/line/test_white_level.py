"""White levels: every camera of a station scales its pixels as the bundles of its recipes were fitted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from line_parts import line_text, wait_until
from needs import need
from PIL import Image
from tiny_bundle import tiny_graph, tiny_manifest

from saae_runtime.bundle import write_bundle
from saae_runtime.errors import ConfigError
from saae_runtime.line.camera import Camera
from saae_runtime.line.config import LineConfig, load_config
from saae_runtime.line.recipes import RecipeBook
from saae_runtime.line.service import Line
from saae_runtime.line.sinks import KINDS
from saae_runtime.line.wiring import SECTIONS, open_any_camera

SINK = '[[sink]]\nkind = "jsonl"\npath = "out.jsonl"\n'


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with bundles of 12 bits, 10 bits, and no level of their own."""
    need("onnxruntime")
    manifest = tiny_manifest()
    for name, level in (("twelve", 4095), ("ten", 1023), ("plain", None)):
        fitted = dataclasses.replace(manifest, frame=dataclasses.replace(manifest.frame, white_level=level))
        write_bundle(tmp_path / name, fitted, {"model.onnx": tiny_graph()})
    (tmp_path / "frames").mkdir()
    Image.fromarray(np.full((64, 96), 2056, np.uint16)).save(tmp_path / "frames" / "gray.png")  # of 4095
    return tmp_path


def config(place: Path, bundle: str = "twelve", more: str = SINK, **options: str) -> LineConfig:
    (place / "line.toml").write_text(line_text(Path(bundle), more=more, **options))
    return load_config(place / "line.toml", KINDS, SECTIONS)


@pytest.mark.parametrize("camera", ["frames", "frames/gray.png", "watch:frames"])
@pytest.mark.parametrize(
    ("bundle", "station", "verdict"),
    [
        ("twelve", "", "OK"),
        ("plain", "", "NG"),  # nearly black
        ("plain", "camera_options = { white_level = 4095 }", "OK"),
        ("twelve", "camera_options = { white_level = 1023 }", "NG"),  # white
    ],
)
def test_files_are_scaled_as_the_bundle_was_fitted(
    place: Path, camera: str, bundle: str, station: str, verdict: str
) -> None:
    with Line(config(place, bundle, camera=camera, station=station), open_any_camera) as line:
        line.start()
        assert wait_until(lambda: line.stations["one"].reading().counts[verdict])
    record = json.loads((place / "out.jsonl").read_text())
    assert (record["verdict"], record["reason"]) == (verdict, "score")
    assert (record["score"] == 0.0) == (verdict == "OK")


@pytest.mark.parametrize("camera", ["frames", "watch:frames", "pylon:"])
def test_recipes_of_different_levels_cannot_share_a_camera(place: Path, camera: str) -> None:
    more = '[[recipe]]\nname = "second"\nbundle = "ten"\n'

    def line(options: str = "") -> LineConfig:
        found = config(place, camera=camera, more=more, station=options)
        station = dataclasses.replace(found.stations[0], recipes=("first", "second"))
        return dataclasses.replace(found, stations=(station,))

    with pytest.raises(ConfigError, match=r"first: 4095, second: 1023") as caught:
        open_any_camera(line(), line().stations[0])
    assert "camera_options = { white_level" in caught.value.cure
    if camera != "pylon:":
        found = line("camera_options = { white_level = 4095 }")
        open_any_camera(found, found.stations[0]).close()


def test_an_impossible_level_is_refused(place: Path) -> None:
    for value, said in (("12", "white level"), ("true", "white level"), ('"4095"', "white_level")):
        found = config(place, station=f"camera_options = {{ white_level = {value} }}")
        with pytest.raises(ConfigError, match=said):
            open_any_camera(found, found.stations[0])


def test_an_industrial_camera_takes_the_level_of_the_bundle(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("pypylon")
    monkeypatch.setenv("PYLON_CAMEMU", "1")
    nodes = 'nodes = { TestImageSelector = "Testimage1", Width = 300, Height = 20 }'

    def frame(bundle: str, more: str = "") -> np.ndarray:
        options = f'camera_options = {{ pixel_format = "Mono16", {nodes}{more} }}'
        found = config(place, bundle, camera="pylon:", station=options)
        camera: Camera = open_any_camera(found, found.stations[0])
        try:
            return np.sort(camera.grab(20).frame, axis=None)  # the picture moves
        finally:
            camera.close()

    whole, twelve = frame("plain"), frame("twelve")
    assert (whole == 255).mean() < 0.05  # all 16 bits
    assert (twelve == 255).mean() > 0.8  # whatever is above 4095
    assert np.array_equal(frame("plain", ", white_level = 4095"), twelve)


def test_a_running_camera_keeps_its_level(place: Path) -> None:
    found = config(place)
    book = RecipeBook(found.recipes, place)
    try:
        with pytest.raises(ConfigError, match="another white level") as caught:
            book.change("first", bundle="ten")
        assert "restart the line" in caught.value.cure
        assert book.get("first").version == 1
        book.change("first", bundle=str(place / "twelve"))
    finally:
        book.close()
