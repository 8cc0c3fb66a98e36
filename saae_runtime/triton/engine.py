"""The engine with a Triton server as backend; thresholds come from the server's model, so no bundle is needed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import Bundle
from ..call_thresholds import CallThresholds
from ..engine import Engine
from ..errors import BackendError, ConfigError, shown
from ..frames import as_frames, enough_memory, to_batch
from ..manifest import Manifest
from ..result import decision
from .backend import TritonBackend
from .connection import Connection

__all__ = ["TritonEngine", "Verdict"]


@dataclass(frozen=True)
class Verdict:
    """The verdict on one frame by its score alone.

    Attributes:
        score: anomaly score of the whole frame.
        image_threshold: image threshold.
        rank: see `saae_runtime.Result`.
    """

    score: float
    image_threshold: float
    rank: float

    @property
    def is_anomalous(self) -> bool:
        """Whether the score is above the image threshold."""
        return self.score > self.image_threshold

    @property
    def reason(self) -> str:
        """One sentence: the verdict, and which threshold decided it."""
        return decision(self.score, self.image_threshold)


class TritonEngine(Engine):
    """Scores frames by a Triton server with a model from `saae-export triton`.

    The same calls, frames, thresholds and results as `saae_runtime.Engine`, at any threshold; frames are resized and
    masks are made here. `verdict` requests only the scores, without maps. If the server's model is replaced by another
    one, calls raise BackendError instead of judging its scores by the thresholds of the first.

    Args:
        url: `grpc://host:8001` or `http://host:8000`; `grpcs://` and `https://` are encrypted.
        model: the model's name.
        version: its version; empty: the latest.
        fpr, threshold, image_fpr, image_threshold, white_level: see `Engine`.
        verify: whether to send a frame with a known score first, and after an outage, to detect a server with wrong
            results.
        timeout: seconds that an answer may take.
        wait: seconds that the server may take to be ready.
        slots: requests in flight in `stream`.
        options: passed to tritonclient's `InferenceServerClient`: certificates, for instance.

    Raises:
        BackendUnavailableError: tritonclient is not installed, or no server answers.
        ConfigError: options that cannot work, or a server without this model.
        BackendError: the known frame has another score than on the machine that wrote the model.

    Example:
        >>> with TritonEngine("grpc://inference:8001", "zipper") as engine:    # doctest: +SKIP
        ...     if engine.verdict(frame).is_anomalous:
        ...         print(engine(frame).regions())
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        version: str = "",
        fpr: float | None = None,
        threshold: float | None = None,
        image_fpr: float | None = None,
        image_threshold: float | None = None,
        white_level: int | None = None,
        verify: bool = True,
        timeout: float = 30.0,
        wait: float = 0.0,
        slots: int = 4,
        **options: Any,
    ) -> None:
        self._closed = True
        limits = {"fpr": fpr, "threshold": threshold, "image_fpr": image_fpr, "image_threshold": image_threshold}
        self._check_options(white_level, **limits)
        if isinstance(slots, bool) or not isinstance(slots, int) or not 1 <= slots <= 1024:
            raise ConfigError(f"slots={shown(slots)} is not possible.", "", "give a whole number from 1 to 1024")
        connection = Connection(url, timeout, **options)
        try:
            bundle, backend = _open(connection, model, version, wait, slots, verify)
        except BaseException:
            connection.close()
            raise
        again = partial(
            TritonEngine,
            url,
            model,
            version=version,
            white_level=white_level,
            verify=verify,
            timeout=timeout,
            wait=wait,
            slots=slots,
            **limits,
            **options,
        )
        self._begin(bundle, backend, again, white_level, None, **limits)
        self._server = backend
        try:
            backend.check_known()
        except BaseException:
            self.close()
            raise

    def verdict(self, frames: Any, *, image_fpr: float | None = None, image_threshold: float | None = None) -> Any:
        """Score one frame or a batch without its maps, which are large to send.

        Args:
            frames: as for a call of the engine.
            image_fpr, image_threshold: for this call, instead of the engine's.

        Returns:
            A Verdict for one frame, a list of Verdicts for a batch or a list.

        Raises:
            As a call of the engine.
        """
        limit = CallThresholds.choose(self._tables, self._limits, None, None, image_fpr, image_threshold).image
        checked = as_frames(frames, self._white_level)
        scores = self._metered(lambda: self._scores(checked.items))
        table = self._tables.image
        verdicts = [Verdict(score, limit, table.share_below(score)) for score in scores]
        return verdicts[0] if checked.single else verdicts

    def _scores(self, frames: tuple[NDArray[np.uint8], ...]) -> list[float]:
        scores: list[float] = []
        step = self._server.max_batch or 1
        for start in range(0, len(frames), step):
            part = frames[start : start + step]
            with enough_memory(part):
                scores.extend(map(float, self._server.scores(to_batch(part, self._server.frame_size, self._resize))))
        if not all(map(math.isfinite, scores)):
            raise BackendError(
                f"{self._server.description} gave a score that is not finite.",
                "The weights are damaged, or the precision overflows on its device.",
                "saae-export verify the bundle, and write the model again",
            )
        return scores

    def explain(self) -> str:
        """The server and the model in use: text of one line."""
        return self._server.description


def _open(
    connection: Connection, model: str, version: str, wait: float, slots: int, verify: bool
) -> tuple[Bundle, TritonBackend]:
    if not isinstance(model, str) or not model or not isinstance(version, str):
        raise ConfigError(f"model={shown(model)}, version={shown(version)} is not possible.", "", 'model="zipper"')
    connection.wait(model, version, wait)
    config, about = connection.about(model, version)
    source = f"the configuration of {model} at {connection.url}"
    manifest = Manifest.from_json(about.get("manifest"), source)
    precision = manifest.artefacts[0].precision if manifest.artefacts else ""
    max_batch = int(config.get("max_batch_size", 0))
    if precision not in manifest.thresholds or max_batch < 1:
        raise ConfigError(f"{source} is not complete.", "", "write the model again: saae-export triton")
    served = ", ".join(filter(None, (str(about.get("kind", "")), precision, f"version {version}" if version else "")))
    backend = TritonBackend(
        connection,
        model,
        version,
        precision=precision,
        frame_size=(manifest.frame.height, manifest.frame.width),
        max_batch=max_batch,
        slots=slots,
        description=f"{connection.server()} at {connection.url}, model {model} ({served})",
        about=about,
        verify=verify,
    )
    return Bundle(Path(model), manifest), backend
