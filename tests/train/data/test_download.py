"""Downloads against a server on the loopback that drops connections, forgets ranges and changes files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from range_server import RangeServer, serve

from saae_runtime.errors import ConfigError, FetchError, StorageError
from saae_train.data import download as module
from saae_train.data.download import download

CONTENT = bytes(range(256)) * 4096  # 1 MiB


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve() as running:
        running.files["/a.bin"] = CONTENT
        yield running


def get(server: RangeServer, target: Path, **options: Any) -> None:
    download(f"{server.url}/a.bin", target, cure="fetch by hand", pause_s=0.0, **options)


def only(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_plain_download(server: RangeServer, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    get(server, tmp_path / "a.bin", progress=lambda *step: seen.append(step))
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert only(tmp_path) == ["a.bin"]
    assert seen[-1] == ("download", len(CONTENT), len(CONTENT))
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


@pytest.mark.parametrize("validators", [True, False])
def test_dropped_connections_are_continued(server: RangeServer, tmp_path: Path, validators: bool) -> None:
    server.validators = validators
    server.drop_after = [300_000, 1, 400_000, 0, 0]
    get(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    starts = [0 if r is None else int(r.removeprefix("bytes=").rstrip("-")) for r in server.requests]
    assert starts == [0, 300_000, 300_001, 700_001, 700_001, 700_001]


def test_a_later_call_continues(server: RangeServer, tmp_path: Path) -> None:
    server.drop_after = [500_000, 0, 0, 0, 0]
    with pytest.raises(FetchError, match=r"Could not download a\.bin") as caught:
        get(server, tmp_path / "a.bin")
    assert "0.5 MB are kept" in caught.value.why
    assert caught.value.cure == "fetch by hand"
    assert only(tmp_path) == ["a.bin.part", "a.bin.part.json"]
    server.drop_after = []
    get(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert server.requests[-1] == "bytes=500000-"
    assert only(tmp_path) == ["a.bin"]


def test_ctrl_c_keeps_the_part(server: RangeServer, tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if done > 400_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(server, tmp_path / "a.bin", progress=interrupt)
    assert not (tmp_path / "a.bin").exists()
    kept = (tmp_path / "a.bin.part").stat().st_size
    assert kept > 0
    get(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert server.requests[-1] == f"bytes={kept}-"


@pytest.mark.parametrize("validators", [True, False])
def test_parts_of_two_versions_are_never_joined(server: RangeServer, tmp_path: Path, validators: bool) -> None:
    server.validators = validators
    server.drop_after = [500_000, 0, 0, 0, 0]
    with pytest.raises(FetchError):
        get(server, tmp_path / "a.bin")
    newer = CONTENT[::-1] + b"longer"
    server.files["/a.bin"], server.drop_after = newer, []
    get(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == newer


def test_a_file_that_became_shorter_starts_anew(server: RangeServer, tmp_path: Path) -> None:
    server.validators = False
    server.drop_after = [500_000, 0, 0, 0, 0]
    with pytest.raises(FetchError):
        get(server, tmp_path / "a.bin")
    server.files["/a.bin"], server.drop_after = CONTENT[:1000], []
    get(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT[:1000]


def test_a_server_without_ranges_starts_anew(server: RangeServer, tmp_path: Path) -> None:
    server.ranges = False
    server.drop_after = [500_000]
    get(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_complete_part_needs_no_connection(server: RangeServer, tmp_path: Path) -> None:
    (tmp_path / "a.bin.part").write_bytes(CONTENT)
    (tmp_path / "a.bin.part.json").write_text(f'{{"version": "x", "total": {len(CONTENT)}}}')
    get(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert server.requests == []


def test_a_part_without_notes_is_not_trusted(server: RangeServer, tmp_path: Path) -> None:
    (tmp_path / "a.bin.part").write_bytes(b"x" * 1000)
    (tmp_path / "a.bin.part.json").write_text("not json")
    get(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert server.requests == [None]


@pytest.mark.parametrize(("status", "tries"), [(404, 1), (403, 1), (503, module.FRUITLESS_TRIES)])
def test_refusals(server: RangeServer, tmp_path: Path, status: int, tries: int) -> None:
    server.status = status
    with pytest.raises(FetchError) as caught:
        get(server, tmp_path / "a.bin")
    assert caught.value.cure == "fetch by hand"
    assert str(status) in str(caught.value) or "Service Unavailable" in str(caught.value)
    assert len(server.requests) == tries
    assert only(tmp_path) == []


def test_nobody_listens(server: RangeServer, tmp_path: Path) -> None:
    with serve() as gone:
        address = gone.url
    with pytest.raises(FetchError, match=r"127\.0\.0\.1") as caught:
        download(f"{address}/a.bin", tmp_path / "a.bin", cure="fetch by hand", pause_s=0.0)
    assert "refused" in caught.value.why.lower()


def test_only_http(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    with pytest.raises(ConfigError, match="Only http"):
        download(secret.as_uri(), tmp_path / "a.bin", cure="")
    assert not (tmp_path / "a.bin").exists()


def test_a_full_disk_is_told_before_the_first_byte(server: RangeServer, tmp_path: Path) -> None:
    asked: list[int] = []

    def room(needed: int) -> None:
        asked.append(needed)
        raise StorageError("full")

    with pytest.raises(StorageError):
        get(server, tmp_path / "a.bin", room=room)
    assert asked == [len(CONTENT)]
    assert only(tmp_path) == []


def test_a_disk_that_fills_up_meanwhile(server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if self.name == "a.bin.part" and "b" in mode and "r" not in mode:
            return real(Path("/dev/full"), "wb", buffering=0)
        return real(self, mode, *args, **kwargs)

    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(StorageError, match="the disk is full"):
        get(server, tmp_path / "a.bin")
    assert not (tmp_path / "a.bin").exists()
