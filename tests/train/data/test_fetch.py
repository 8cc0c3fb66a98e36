"""Fetching a collection: licence, hashes, resuming, and archives that mean harm."""

from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from range_server import serve

from saae_runtime.errors import ConfigError, DataError, FetchError, StorageError
from saae_train.data import download, fetch
from saae_train.data.fetch import LICENCE, MVTEC_AD, Archive, Counts, Source, fetch_mvtec, unpack

COUNTS = Counts(3, 2, 2)
FILES = (
    *(f"train/good/{i:03d}.png" for i in range(3)),
    *(f"test/good/{i:03d}.png" for i in range(2)),
    "test/bent/000.png",
    "test/worn/000.png",
    "ground_truth/bent/000_mask.png",
    "ground_truth/worn/000_mask.png",
)


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(value).integers(0, 255, (40, 40), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def tar(entries: list[tuple[str, bytes] | tarfile.TarInfo], mode: str = "w:xz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                archive.addfile(entry)
                continue
            info = tarfile.TarInfo(entry[0])
            info.size = len(entry[1])
            archive.addfile(info, io.BytesIO(entry[1]))
    return buffer.getvalue()


def category_entries(name: str, prefix: str = "") -> list[tuple[str, bytes] | tarfile.TarInfo]:
    files = [(f"{prefix}{name}/{file}", png(i)) for i, file in enumerate(FILES)]
    return [*files, (f"{prefix}{name}/license.txt", b"CC BY-NC-SA 4.0")]


Published = namedtuple("Published", "server source dest")


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Published]:
    """A publisher with the categories nut and bolt on the loopback."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    with serve() as server:
        for name in ("nut", "bolt"):
            server.files[f"/{name}.tar.xz"] = tar(category_entries(name))
        whole = tar(category_entries("nut") + category_entries("bolt") + [("readme.txt", b"x")])
        server.files["/all.tar.xz"] = whole
        source = Source(
            "Parts",
            "https://parts.example/downloads",
            "Be kind.",
            Archive("all.tar.xz", f"{server.url}/all.tar.xz", len(whole), hashlib.sha256(whole).hexdigest()),
            {n: Archive(f"{n}.tar.xz", f"{server.url}/{n}.tar.xz") for n in ("nut", "bolt")},
            {"nut": COUNTS, "bolt": COUNTS},
        )
        yield Published(server, source, tmp_path / "data")


def tree(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*")) if folder.exists() else []


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_one_category(published: Published) -> None:
    stages: list[str] = []
    (found,) = fetch_mvtec(
        "nut", published.dest, True, source=published.source, progress=lambda stage, done, total: stages.append(stage)
    )
    assert (len(found.train), len(found.test)) == (3, 4)
    assert found.has_masks
    assert not found.synthetic
    assert {"download", "unpack"} <= set(stages)
    assert names(published.dest) == ["nut"]
    assert (published.dest / "nut/license.txt").exists()
    # A second call finds it complete: no licence to accept, no request.
    before = len(published.server.requests)
    assert fetch_mvtec("nut", published.dest, source=published.source) == (found,)
    assert len(published.server.requests) == before


def test_all_categories_with_a_pinned_hash(published: Published) -> None:
    fetch_mvtec("nut", published.dest, True, source=published.source)
    found = fetch_mvtec("all", published.dest, True, source=published.source, keep_archive=True)
    assert [c.name for c in found] == ["bolt", "nut"]
    assert (published.dest / ".downloads/all.tar.xz").exists()


def test_licence_must_be_accepted(published: Published) -> None:
    with pytest.raises(FetchError, match="licence") as caught:
        fetch_mvtec("nut", published.dest, source=published.source)
    assert "Be kind." in caught.value.why
    assert "--accept-license" in caught.value.cure
    assert published.server.requests == []
    assert not published.dest.exists()


def test_interrupted_download_is_continued(published: Published) -> None:
    size = len(published.server.files["/nut.tar.xz"])
    published.server.drop_after = [size // 2, 0, 0, 0, 0]
    with pytest.raises(FetchError) as caught:
        fetch_mvtec("nut", published.dest, True, source=published.source)
    assert "--archive nut.tar.xz" in caught.value.cure
    assert published.source.page in caught.value.cure
    assert tree(published.dest) == [".downloads", ".downloads/nut.tar.xz.part", ".downloads/nut.tar.xz.part.json"]
    published.server.drop_after = []
    fetch_mvtec("nut", published.dest, True, source=published.source)
    assert published.server.requests[-1] == f"bytes={size // 2}-"
    assert names(published.dest) == ["nut"]


def test_wrong_hash(published: Published) -> None:
    whole = bytearray(published.server.files["/all.tar.xz"])
    whole[len(whole) // 2] ^= 1
    published.server.files["/all.tar.xz"] = bytes(whole)
    with pytest.raises(FetchError, match="not the file that its publisher offers") as caught:
        fetch_mvtec("all", published.dest, True, source=published.source)
    assert published.source.whole.sha256 in caught.value.why
    assert not list(published.dest.rglob("*.tar.xz*"))
    with pytest.raises(FetchError, match="not the file that its publisher"):
        fetch_mvtec("nut", published.dest, True, source=published.source, sha256="0" * 64)


def test_no_network_says_what_to_type(published: Published) -> None:
    with serve() as gone:
        nowhere = gone.url
    archives = {"nut": replace(published.source.archives["nut"], url=f"{nowhere}/nut.tar.xz")}
    with pytest.raises(FetchError) as caught:
        fetch_mvtec("nut", published.dest, True, source=replace(published.source, archives=archives))
    assert f"saae-train fetch nut --into {published.dest} --accept-license --archive nut.tar.xz" in caught.value.cure
    assert tree(published.dest) == []


def test_archive_by_hand_whole_or_one_category(published: Published, tmp_path: Path) -> None:
    for name, file in (("nut", "all.tar.xz"), ("bolt", "bolt.tar.xz")):
        archive = tmp_path / file
        archive.write_bytes(published.server.files[f"/{file}"])
        (found,) = fetch_mvtec(name, published.dest, True, archive=archive, source=published.source)
        assert len(found.train) == 3
        assert archive.exists()
    assert published.server.requests == []
    assert names(published.dest) == ["bolt", "nut"]
    damaged = tmp_path / "other/all.tar.xz"
    damaged.parent.mkdir()
    damaged.write_bytes(published.server.files["/all.tar.xz"][:-9])
    with pytest.raises(FetchError, match="not the file that its publisher"):
        fetch_mvtec("nut", tmp_path / "data2", True, archive=damaged, source=published.source)
    assert damaged.exists()
    with pytest.raises(FetchError, match="There is no archive"):
        fetch_mvtec("nut", tmp_path / "data2", True, archive=tmp_path / "gone", source=published.source)


def test_folder_inside_the_archive(published: Published) -> None:
    published.server.files["/nut.tar.xz"] = tar(category_entries("nut", "parts_v2/"))
    (found,) = fetch_mvtec("nut", published.dest, True, source=published.source)
    assert len(found.train) == 3


def test_incomplete_archive_leaves_nothing(published: Published) -> None:
    published.server.files["/nut.tar.xz"] = tar(category_entries("nut")[1:])
    with pytest.raises(FetchError, match="complete category 'nut'") as caught:
        fetch_mvtec("nut", published.dest, True, source=published.source)
    assert "train=2" in caught.value.why
    assert not (published.dest / "nut").exists()


def test_what_is_already_there_is_never_replaced(published: Published) -> None:
    mine = published.dest / "nut/train/good/mine.png"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(png(0))
    with pytest.raises(DataError, match="already there"):
        fetch_mvtec("nut", published.dest, True, source=published.source)
    assert tree(published.dest / "nut") == ["train", "train/good", "train/good/mine.png"]
    assert published.server.requests == []


def test_unknown_category_and_the_published_list() -> None:
    with pytest.raises(ConfigError, match="no category 'ziper'") as caught:
        fetch_mvtec("ziper", "unused")
    assert "zipper" in caught.value.cure
    assert sorted(MVTEC_AD.archives) == sorted(MVTEC_AD.counts)
    # The sums of the MVTec AD paper: 3629 for training, 1725 for testing of which 1258 are defective.
    totals = np.array([(c.train, c.test_good, c.test_bad) for c in MVTEC_AD.counts.values()]).sum(axis=0)
    assert totals.tolist() == [3629, 467, 1258]
    assert all(a.url.startswith("https://") for a in (MVTEC_AD.whole, *MVTEC_AD.archives.values()))
    assert "CC BY-NC-SA 4.0" in LICENCE


def test_full_disk_is_told_before_the_download(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    for category in ("all", "nut"):
        with pytest.raises(StorageError, match="Not enough room"):
            fetch_mvtec(category, published.dest, True, source=published.source)
        assert tree(published.dest) == []


def test_ctrl_c_while_unpacking_leaves_no_category(published: Published) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "unpack":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_mvtec("nut", published.dest, True, source=published.source, progress=interrupt)
    assert tree(published.dest) == [".downloads", ".downloads/nut.tar.xz"]
    before = len(published.server.requests)
    fetch_mvtec("nut", published.dest, True, source=published.source)
    assert len(published.server.requests) == before, "the archive was complete already"


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


EVIL: dict[str, Callable[[], Any]] = {
    "absolute": lambda: ("/saae-evil.png", b"x"),
    "parent": lambda: ("nut/../../evil.png", b"x"),
    "parent at the end": lambda: ("nut/train/..", b"x"),
    "symlink": lambda: special("nut/train/good/x.png", tarfile.SYMTYPE, "/etc/passwd"),
    "symlinked folder": lambda: special("nut/train", tarfile.SYMTYPE, "/etc"),
    "hard link": lambda: special("nut/train/good/x.png", tarfile.LNKTYPE, "../../x"),
    "fifo": lambda: special("nut/pipe", tarfile.FIFOTYPE),
    "character device": lambda: special("nut/null", tarfile.CHRTYPE),
    "block device": lambda: special("nut/disk", tarfile.BLKTYPE),
    "backslash": lambda: ("nut\\..\\..\\evil.png", b"x"),
    "drive": lambda: ("C:/evil.png", b"x"),
    "twice": lambda: ("nut/train/good/000.png", b"other"),
    "outside the wanted folder": lambda: special("else/where", tarfile.SYMTYPE, "/etc"),
}


@pytest.mark.parametrize("kind", sorted(EVIL))
@pytest.mark.parametrize("first", [True, False])
def test_archives_that_mean_harm(published: Published, tmp_path: Path, kind: str, first: bool) -> None:
    entries = category_entries("nut")
    entries.insert(0 if first else len(entries), EVIL[kind]())
    published.server.files["/nut.tar.xz"] = tar(entries)
    around = tree(tmp_path)
    with pytest.raises(FetchError) as caught:
        fetch_mvtec("nut", published.dest, True, source=published.source)
    assert "not safe to unpack" in caught.value.what
    left = [p for p in tree(tmp_path) if p not in around]
    assert left == ["data", "data/.downloads", "data/.downloads/nut.tar.xz"]
    assert not Path("/saae-evil.png").exists()


def test_bomb(tmp_path: Path) -> None:
    file = tmp_path / "bomb.tar.xz"
    file.write_bytes(tar([("nut/train/good/000.png", bytes(3_000_000))]))
    assert file.stat().st_size < 10_000
    target = tmp_path / "nut"
    target.mkdir()
    with pytest.raises(FetchError, match="not safe") as caught:
        unpack(file, {"nut": target}, most_bytes=1_000_000)
    assert "far more" in caught.value.why
    assert tree(target) == []


@pytest.mark.parametrize("content", [b"", b"no archive at all", png(0)])
def test_no_archive(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.tar.xz"
    file.write_bytes(content)
    with pytest.raises(FetchError, match="cannot be unpacked"):
        unpack(file, {"nut": tmp_path})


@settings(max_examples=40, deadline=None)
@given(cut=st.floats(0.0, 0.999), mode=st.sampled_from(("w:xz", "w:gz")))
def test_truncated_archives_are_errors(tmp_path_factory: pytest.TempPathFactory, cut: float, mode: str) -> None:
    folder = tmp_path_factory.mktemp("cut")
    data = tar(category_entries("nut"), mode)
    (folder / "x.tar").write_bytes(data[: int(cut * len(data))])
    (folder / "nut").mkdir()
    with pytest.raises(FetchError, match="cannot be unpacked"):
        unpack(folder / "x.tar", {"nut": folder / "nut"})


def test_a_flipped_byte_is_found_without_a_known_hash(tmp_path: Path) -> None:
    data = bytearray(tar(category_entries("nut")))
    for place in np.random.default_rng(0).integers(12, len(data) - 40, 25):
        spoilt = bytearray(data)
        spoilt[int(place)] ^= 0x10
        file = tmp_path / f"{place}.tar.xz"
        file.write_bytes(spoilt)
        target = tmp_path / f"{place}"
        target.mkdir(exist_ok=True)
        with pytest.raises(FetchError):
            unpack(file, {"nut": target})


@pytest.mark.parametrize("limits", [{"most_bytes": 100_000}, {}])
def test_a_bomb_of_folders(tmp_path: Path, limits: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no content, and headers that compress to nothing."""
    monkeypatch.setattr(fetch, "_MOST_FILES", 50_000 if limits else 500)
    file, target = tmp_path / "bomb.tar.xz", tmp_path / "nut"
    with tarfile.open(file, "w:xz") as archive:
        for number in range(1000):
            folder = tarfile.TarInfo(f"nut/{number}")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
    target.mkdir()
    with pytest.raises(FetchError, match="not safe") as caught:
        unpack(file, {"nut": target}, **limits)
    assert "far more" in caught.value.why
