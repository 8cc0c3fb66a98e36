"""Bundles on disk: every kind of damage has its named error, and writing never leaves half a bundle."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from pathlib import Path

import pytest
from tiny_bundle import CATEGORY, make_tiny_bundle, tiny_graph, tiny_manifest

from saae_runtime import bundle as bundle_module
from saae_runtime.bundle import is_bundle, open_bundle, update_bundle, write_bundle
from saae_runtime.errors import (
    BundleCorruptError,
    BundleError,
    BundleNotFoundError,
    BundlePathError,
    BundleVersionError,
    ConfigError,
    StorageError,
)
from saae_runtime.files import sha256_file
from saae_runtime.manifest import SCHEMA, Artefact


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_bundle(tmp_path / "bundles" / "tiny")


def edit_manifest(folder: Path, change) -> None:
    data = json.loads((folder / "manifest.json").read_text())
    change(data)
    (folder / "manifest.json").write_text(json.dumps(data))


def test_written_bundle_opens(folder: Path) -> None:
    bundle = open_bundle(folder)
    assert bundle.manifest.category == "tiny"
    assert set(bundle.manifest.files) == {"model.onnx"}
    assert bundle.sha256("model.onnx") == sha256_file(bundle.file("model.onnx"))
    assert [a.file for a in bundle.artefacts(kind="onnx", precision="fp32")] == ["model.onnx"]
    assert bundle.artefacts(precision="fp16") == ()
    assert is_bundle(folder)


def test_nothing_there_names_neighbours(folder: Path) -> None:
    with pytest.raises(BundleNotFoundError) as caught:
        open_bundle(folder.parent / "tinny")
    assert str(folder) in caught.value.cure


def test_a_file_is_no_bundle(folder: Path) -> None:
    with pytest.raises(BundleNotFoundError, match="is a file"):
        open_bundle(folder / "model.onnx")


def test_parent_folder_names_the_bundles_inside(folder: Path) -> None:
    with pytest.raises(BundleNotFoundError, match=r"no manifest\.json") as caught:
        open_bundle(folder.parent)
    assert str(folder) in caught.value.cure


def test_one_byte_changed(folder: Path) -> None:
    model = folder / "model.onnx"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    with pytest.raises(BundleCorruptError, match=r"model\.onnx was changed"):
        open_bundle(folder)
    open_bundle(folder, verify=False)  # sizes alone cannot see it


@pytest.mark.parametrize("verify", [True, False])
def test_truncated(folder: Path, verify: bool) -> None:
    model = folder / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1])
    with pytest.raises(BundleCorruptError, match="truncated"):
        open_bundle(folder, verify=verify)


def test_missing_file(folder: Path) -> None:
    (folder / "model.onnx").unlink()
    with pytest.raises(BundleCorruptError, match=r"model\.onnx is missing"):
        open_bundle(folder)


def test_newer_schema(folder: Path) -> None:
    edit_manifest(folder, lambda data: data.update(schema=99, new_key={}))
    with pytest.raises(BundleVersionError, match="schema 99"):
        open_bundle(folder)


@pytest.mark.parametrize("text", ["", "{", "not json", "[" * 100_000, "\x00\x01", '{"name": "npm package"}'])
def test_foreign_or_cut_manifest(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(BundleCorruptError):
        open_bundle(folder)
    assert not is_bundle(folder)


def test_nan_threshold(folder: Path) -> None:
    edit_manifest(folder, lambda data: data["thresholds"]["fp32"]["pixel"]["threshold"].__setitem__(0, float("nan")))
    assert "NaN" in (folder / "manifest.json").read_text()
    with pytest.raises(BundleCorruptError, match=r"thresholds\.fp32\.pixel\.threshold\[0\]"):
        open_bundle(folder)


@pytest.mark.parametrize(
    "name", ["../outside.onnx", "/etc/hostname", "a/../../outside.onnx", "..\\outside.onnx", "C:/outside", "", "a\0b"]
)
def test_paths_out_of_the_bundle(folder: Path, name: str) -> None:
    (folder.parent / "outside.onnx").write_bytes(b"secret")
    entry = {"sha256": "0" * 64, "size": 6}
    edit_manifest(folder, lambda data: data["files"].update({name: entry}))
    with pytest.raises(BundlePathError):
        open_bundle(folder)
    with pytest.raises(BundlePathError):
        make_bundle_again(folder).file(name)


def make_bundle_again(folder: Path):
    return open_bundle(make_tiny_bundle(folder.parent / "again"))


@pytest.mark.parametrize("whole_directory", [False, True])
def test_symbolic_link_out_of_the_bundle(folder: Path, whole_directory: bool) -> None:
    outside = folder.parent / "elsewhere"
    outside.mkdir()
    (outside / "model.onnx").write_bytes((folder / "model.onnx").read_bytes())
    if whole_directory:
        (folder / "inner").symlink_to(outside, target_is_directory=True)
        entry = {"sha256": sha256_file(outside / "model.onnx"), "size": (outside / "model.onnx").stat().st_size}
        edit_manifest(folder, lambda data: data["files"].update({"inner/model.onnx": entry}))
    else:
        (folder / "model.onnx").unlink()
        (folder / "model.onnx").symlink_to(outside / "model.onnx")
    with pytest.raises(BundlePathError, match="leads out of the bundle"):
        open_bundle(folder)


def test_manifest_itself_linked_from_elsewhere(folder: Path) -> None:
    other = folder.parent / "manifest-of-another.json"
    (folder / "manifest.json").rename(other)
    (folder / "manifest.json").symlink_to(other)
    with pytest.raises(BundleCorruptError, match="link out of the bundle"):
        open_bundle(folder)


def test_a_link_to_the_whole_bundle_is_fine(folder: Path) -> None:
    current = folder.parent / "current"
    current.symlink_to(folder, target_is_directory=True)
    assert open_bundle(current).path == folder.resolve()


def test_artefact_without_file_or_thresholds(folder: Path) -> None:
    edit_manifest(folder, lambda data: data["artefacts"][0].update(file="other.onnx"))
    with pytest.raises(BundleCorruptError, match=r"other\.onnx"):
        open_bundle(folder)
    edit_manifest(folder, lambda data: data["artefacts"][0].update(file="model.onnx", precision="fp16"))
    with pytest.raises(BundleCorruptError, match="no thresholds at its precision"):
        open_bundle(folder)


def test_writing_replaces_a_bundle_but_no_other_folder(tmp_path: Path) -> None:
    target = tmp_path / "photos"
    target.mkdir()
    (target / "holiday.jpg").write_bytes(b"precious")
    with pytest.raises(ConfigError, match="is not a bundle"):
        make_tiny_bundle(target)
    assert (target / "holiday.jpg").read_bytes() == b"precious"
    (target / "holiday.jpg").unlink()
    make_tiny_bundle(target)
    make_tiny_bundle(target, threshold=50.0)
    assert open_bundle(target).manifest.thresholds["fp32"].pixel.at() == 50.0


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_failed_write_leaves_the_old_bundle(folder: Path, failure: type[BaseException]) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fill(temporary: Path) -> None:
        (temporary / "model.onnx").write_bytes(b"half")
        raise failure

    with pytest.raises(failure):
        write_bundle(folder, tiny_manifest(), fill)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    open_bundle(folder)


def test_full_disk_leaves_the_old_bundle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("saae_runtime.files.os.fsync", full)
    with pytest.raises(StorageError, match="disk is full"):
        make_tiny_bundle(folder, threshold=99.0)
    monkeypatch.undo()
    assert open_bundle(folder).manifest.thresholds["fp32"].pixel.at() == 40.0
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]


def test_an_artefact_that_was_not_written(tmp_path: Path) -> None:
    with pytest.raises(BundleCorruptError, match=r"model\.onnx"):
        write_bundle(tmp_path / "b", tiny_manifest(), {"report.html": b"<html>"})
    assert list(tmp_path.iterdir()) == []


def test_links_and_escapes_are_not_written(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "model.onnx").symlink_to("/etc/hostname")

    with pytest.raises(BundlePathError, match="symbolic link"):
        write_bundle(tmp_path / "b", tiny_manifest(), fill)
    with pytest.raises(BundlePathError):
        write_bundle(tmp_path / "b", tiny_manifest(), {"../b.onnx": b""})
    with pytest.raises(ConfigError, match=r"manifest\.json"):
        write_bundle(tmp_path / "b", tiny_manifest(), {"model.onnx": b"", "manifest.json": b"{}"})
    assert list(tmp_path.iterdir()) == []


def test_update_adds_files_and_keeps_the_others(folder: Path) -> None:
    bundle = open_bundle(folder)
    inode = (folder / "model.onnx").stat().st_ino
    fp16 = Artefact("model.fp16.onnx", "onnx", "fp16")
    tables = dict(bundle.manifest.thresholds, fp16=bundle.manifest.thresholds["fp32"])
    manifest = dataclasses.replace(bundle.manifest, artefacts=(*bundle.manifest.artefacts, fp16), thresholds=tables)
    update_bundle(bundle, manifest, {"model.fp16.onnx": tiny_graph(precision="fp16")})
    updated = open_bundle(folder)
    assert set(updated.manifest.files) == {"model.onnx", "model.fp16.onnx"}
    assert (folder / "model.onnx").stat().st_ino == inode  # linked, not copied


def test_update_replaces_a_file_without_touching_the_old_one(folder: Path) -> None:
    bundle = open_bundle(folder)
    old = bundle.file("model.onnx").open("rb")  # as an engine in another process would hold it

    def fill(temporary: Path) -> None:
        (temporary / "model.onnx").write_bytes(b"new")

    update_bundle(bundle, bundle.manifest, fill)
    assert open_bundle(folder).file("model.onnx").read_bytes() == b"new"
    with old:
        assert old.read() == tiny_graph()


def test_what_another_command_wrote_is_not_undone(folder: Path, tmp_path: Path) -> None:
    """Compiling an engine takes minutes: with the manifest from before, it would bring old thresholds back."""
    opened = open_bundle(folder)
    newer = update_bundle(opened, opened.manifest, {"report.html": b"<html>"})
    with pytest.raises(StorageError, match="changed by another command"):
        update_bundle(opened, opened.manifest, {"late": b"x"})
    assert "late" not in open_bundle(folder).manifest.files
    update_bundle(opened, opened.manifest, {"late": b"x"}, target=tmp_path / "other")
    update_bundle(newer, newer.manifest, {"late": b"x"})
    assert {"late", "report.html"} <= set(open_bundle(folder).manifest.files)


def test_update_drops_files(folder: Path) -> None:
    bundle = open_bundle(folder)
    update_bundle(bundle, bundle.manifest, {"report.html": b"<html>"})
    with_report = open_bundle(folder)
    assert "report.html" in with_report.manifest.files
    update_bundle(with_report, with_report.manifest, {}, drop=("report.html",))
    assert set(open_bundle(folder).manifest.files) == {"model.onnx"}


def test_what_is_written_is_of_this_schema(folder: Path) -> None:
    edit_manifest(folder, lambda data: data.update(schema=1))
    bundle = open_bundle(folder)
    assert bundle.manifest.schema == 1
    assert update_bundle(bundle, bundle.manifest, {}).manifest.schema == SCHEMA
    assert open_bundle(folder).manifest.schema == SCHEMA


def test_an_update_may_go_elsewhere(folder: Path, tmp_path: Path) -> None:
    bundle = open_bundle(folder)
    before = (folder / "manifest.json").read_bytes()
    written = update_bundle(bundle, bundle.manifest, {"report.html": b"<html>"}, target=tmp_path / "other")
    assert written.path == (tmp_path / "other").resolve()
    assert set(open_bundle(tmp_path / "other", verify=True).manifest.files) == {"model.onnx", "report.html"}
    assert (folder / "manifest.json").read_bytes() == before
    assert open_bundle(folder, verify=True).manifest == bundle.manifest


def test_a_bundle_whose_replacement_was_killed_opens(folder: Path) -> None:
    folder.rename(folder.with_name(f".{folder.name}.0123abcd.old"))
    assert open_bundle(folder).manifest.category == CATEGORY
    assert folder.is_dir()


def test_a_bundle_that_may_not_be_put_back_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aside = folder.with_name(f".{folder.name}.0123abcd.old")
    folder.rename(aside)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(BundleNotFoundError, match=r"0123abcd\.old") as caught:
        open_bundle(folder)
    assert caught.value.cure.startswith("mv ")


def test_a_bundle_that_is_replaced_while_it_is_opened_is_opened_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = make_tiny_bundle(tmp_path / "b")
    make_tiny_bundle(tmp_path / "c", threshold=7.0)
    real, calls = bundle_module.Manifest.from_json, []

    def swapped(data, source):
        calls.append(source)
        if len(calls) == 1:  # the old manifest is read; then another bundle takes its place
            target.rename(tmp_path / "old")
            (tmp_path / "c").rename(target)
        return real(data, source=source)

    monkeypatch.setattr(bundle_module.Manifest, "from_json", swapped)
    opened = open_bundle(target)
    assert opened.manifest.thresholds["fp32"].pixel.at() == 7.0
    assert len(calls) == 2


def test_a_damaged_bundle_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = make_tiny_bundle(tmp_path / "b")
    (target / "model.onnx").write_bytes(b"x")
    real, calls = bundle_module.Manifest.from_json, []
    monkeypatch.setattr(
        bundle_module.Manifest, "from_json", lambda data, source: calls.append(source) or real(data, source=source)
    )
    with pytest.raises(BundleCorruptError, match="truncated"):
        open_bundle(target)
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000 + "b", "\ud800.onnx", "loop.onnx", "pipe.onnx", "folder.onnx"])
def test_names_that_are_no_files(folder: Path, name: str) -> None:
    (folder / "loop.onnx").symlink_to(folder / "loop.onnx")
    (folder / "folder.onnx").mkdir()
    os.mkfifo(folder / "pipe.onnx")
    edit_manifest(folder, lambda data: data["files"].update({name: {"sha256": "a" * 64, "size": 0}}))
    for verify in (True, False):
        with pytest.raises(BundleError) as caught:
            open_bundle(folder, verify=verify)
        str(caught.value).encode("utf-8")


def test_a_pipe_or_a_loop_as_manifest_is_not_waited_for(folder: Path) -> None:
    manifest = folder / "manifest.json"
    manifest.unlink()
    os.mkfifo(manifest)
    with pytest.raises(BundleCorruptError, match="not a manifest") as caught:
        open_bundle(folder)
    assert "regular" in caught.value.why
    assert not is_bundle(folder)
    manifest.unlink()
    manifest.symlink_to(manifest)
    with pytest.raises(BundleError):
        open_bundle(folder)


@pytest.mark.parametrize("path", ["x" * 300, "a\0b", "\ud800", 5, None, b"x", "a/" * 3000])
def test_paths_that_lead_nowhere(tmp_path: Path, path: object) -> None:
    with pytest.raises(BundleNotFoundError):
        open_bundle(path)  # type: ignore[arg-type]


def test_a_bundle_that_is_replaced_all_the_time_opens_every_time(folder: Path) -> None:
    stop = threading.Event()

    def replace() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            size = (16 + 8 * (number % 3), 24)
            write_bundle(folder, tiny_manifest(size), {"model.onnx": tiny_graph(size)})

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        for _ in range(60):
            bundle = open_bundle(folder)
            assert bundle.manifest.category == CATEGORY
    finally:
        stop.set()
        writer.join(30)


def test_a_bundle_knows_when_another_has_taken_its_place(folder: Path) -> None:
    bundle = open_bundle(folder)
    assert bundle.is_current()
    written = write_bundle(folder, tiny_manifest(), {"model.onnx": tiny_graph()})
    assert written.is_current()
    assert not bundle.is_current()


def test_damage_is_still_damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("saae_runtime.bundle.time.sleep", slept.append)
    (folder / "model.onnx").write_bytes(b"")
    with pytest.raises(BundleCorruptError, match="truncated"):
        open_bundle(folder)
    assert slept == []  # nobody replaced it: not tried again
