"""Engines shared by all stations: one per bundle and way of running it."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import MANIFEST
from ..engine import Engine
from ..errors import BundleError
from ..files import sha256_file

__all__ = ["Engines", "SharedEngine", "Way"]

_TRIES = 3


@dataclass(frozen=True)
class Way:
    """How a bundle is run: backend, GPU number, precision, threads; as for `saae_runtime.Engine`."""

    backend: str = "auto"
    device: int = 0
    precision: str | None = None
    threads: int | None = None


@dataclass(frozen=True, eq=False)
class SharedEngine:
    """An open engine, closed when it is no longer referenced, so that a part is finished with the engine it began with.

    Attributes:
        engine: may be called from several threads.
        digest: sha256 of the bundle's manifest.json, which holds the hashes of all its other files.
    """

    engine: Engine
    digest: str


@dataclass
class _Place:
    lock: threading.Lock = field(default_factory=threading.Lock)
    shared: weakref.ref[SharedEngine] | None = None


class Engines:
    """Opens each bundle once. Opening one does not delay requests for another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._places: dict[tuple[str, str, Way], _Place] = {}

    def take(self, bundle: Path, way: Way) -> SharedEngine:
        """The engine of a bundle as it is on disk now.

        Raises:
            BundleError, BackendError, ConfigError: as for `saae_runtime.Engine`.
        """
        for _ in range(_TRIES):
            digest = _digest(bundle)
            with self._lock:
                place = self._places.setdefault((str(bundle.resolve()), digest, way), _Place())
            with place.lock:
                shared = place.shared() if place.shared is not None else None
                if shared is not None:
                    return shared
                options: dict[str, Any] = {} if way.threads is None else {"threads": way.threads}
                engine = Engine(bundle, backend=way.backend, device=way.device, precision=way.precision, **options)
                _warm(engine)
                if _digest(engine.bundle.path) == digest:
                    shared = SharedEngine(engine, digest)
                    weakref.finalize(shared, _close_later, engine).atexit = False
                    place.shared = weakref.ref(shared)
                    return shared
            engine.close()  # the bundle was replaced meanwhile
        raise BundleError(f"{bundle} is being replaced repeatedly.", "", "try again when it is no longer being written")

    def close(self, timeout: float = 1.0) -> None:
        """Close all engines whose calls end in time."""
        with self._lock:
            places, self._places = list(self._places.values()), {}
        found = [place.shared() for place in places if place.shared is not None]
        threads = [_close_later(shared.engine) for shared in found if shared is not None]
        for thread in threads:
            thread.join(timeout)


def _close_later(engine: Engine) -> threading.Thread:
    """Close an engine on a separate thread, because running calls end first."""
    thread = threading.Thread(target=engine.close, name="close-engine", daemon=True)
    thread.start()
    return thread


def _warm(engine: Engine) -> None:
    """Judge a black frame, because the first call is slow."""
    try:
        engine(np.zeros((*engine.backend.frame_size, 3), np.uint8))
    except BaseException:
        engine.close()
        raise


def _digest(bundle: Path) -> str:
    try:
        return sha256_file(bundle / MANIFEST)
    except OSError:
        return ""  # opening it raises a better error
