"""A machine of fake backends of known speed and answers, under a clock that they move themselves."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from tiny_bundle import tiny_manifest

from saae_runtime import Bundle, Engine
from saae_runtime.backends import BackendOptions, timing
from saae_runtime.backends.base import Backend, Candidate, RawOutputs
from saae_runtime.bundle import write_bundle
from saae_runtime.errors import BackendUnavailableError
from saae_runtime.manifest import Parity
from saae_runtime.reference import ReferenceFrame, write_reference

SIZE = (16, 24)
PRECISIONS = ("fp32", "bf16")
ANSWER = 2.0
PASSED = Parity(3, 1e-4, 1e-4, 0, 1e-2, 1e-2, True, "a.png", "PyTorch FP32")


class World:
    """A machine whose backends take a known time for a frame: (name, precision) -> seconds, or an error."""

    def __init__(self) -> None:
        self.now = 0.0
        self.speeds: dict[tuple[str, str], float | Exception] = {}
        self.opened: list[tuple[str, str | None]] = []
        self.still_open = 0
        self.slots = 1
        self.off: dict[tuple[str, str], float] = {}  # what a way adds to every map and score

    def clock(self) -> float:
        return self.now

    def frames(self) -> int:
        """How many ways were opened since the last question."""
        count, self.opened = len(self.opened), []
        return count

    def candidates(self, bundle: Bundle, device: int = 0, precision: str | None = None) -> list[Candidate]:
        found = []
        for name in dict.fromkeys(name for name, _ in self.speeds):
            able = [item for item in bundle.manifest.precisions() if (name, item) in self.speeds]
            able = [item for item in able if precision in (None, item)]
            artefact = bundle.artefacts(precision=able[0])[0] if able else None
            found.append(Candidate(name, artefact, None if artefact else "it has no file", cure="build one"))
        return found

    def open_backend(
        self, bundle: Bundle, name: str, device: int, precision: str | None, options: BackendOptions
    ) -> Backend:
        (candidate,) = [item for item in self.candidates(bundle, device, precision) if item.name == name]
        assert candidate.artefact is not None
        self.opened.append((name, precision))
        return FakeBackend(self, name, candidate.artefact.precision)


class FakeBackend(Backend):
    def __init__(self, world: World, name: str, precision: str) -> None:
        self.world, self.name, self.precision = world, name, precision
        self.description, self.frame_size, self.slots = f"fake {name}", SIZE, world.slots
        self.speed = world.speeds[name, precision]
        if isinstance(self.speed, BackendUnavailableError):
            raise self.speed
        world.still_open += 1

    def infer(self, frames: np.ndarray, threshold: float) -> RawOutputs:
        if isinstance(self.speed, Exception):
            raise self.speed
        self.world.now += self.speed * len(frames)
        shape, off = (len(frames), *SIZE), self.world.off.get((self.name, self.precision), 0.0)
        scores = np.full(len(frames), ANSWER + off, np.float32)
        return RawOutputs(np.full(shape, ANSWER + off, np.float32), scores, np.zeros(shape, np.bool_))

    def close(self) -> None:
        self.world.still_open -= 1


def bundle_at(folder: Path, model: bytes = b"graph", parity: dict[str, Parity] | None = None) -> Path:
    """A bundle of two precisions whose graph nobody reads."""
    manifest = tiny_manifest(SIZE, precisions=PRECISIONS)
    artefacts = tuple(
        dataclasses.replace(item, parity=(parity or {}).get(item.precision, PASSED)) for item in manifest.artefacts
    )
    return write_bundle(folder, dataclasses.replace(manifest, artefacts=artefacts), {"model.onnx": model}).path


def bundle_with_answers(folder: Path, size: tuple[int, int] = SIZE) -> Bundle:
    """A bundle that carries a frame and its reference map, as the fake backends compute it."""
    frame = ReferenceFrame("a.png", np.zeros((*size, 3), np.uint8), np.full(size, ANSWER, np.float32), ANSWER)
    manifest = tiny_manifest(SIZE, precisions=PRECISIONS)
    artefacts = tuple(dataclasses.replace(item, parity=PASSED) for item in manifest.artefacts)

    def fill(place: Path) -> None:
        (place / "model.onnx").write_bytes(b"graph")
        write_reference(place, [frame], "PyTorch FP32")

    return write_bundle(folder, dataclasses.replace(manifest, artefacts=artefacts), fill)


def again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next process: what this one remembered is gone."""
    monkeypatch.setattr(timing, "_known", {})


def chosen(bundle: Bundle, **options: object) -> tuple[str, str]:
    with Engine(bundle, **options) as engine:  # type: ignore[arg-type]
        return engine.backend.name, engine.backend.precision
