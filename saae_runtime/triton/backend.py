"""The backend that sends frames to a Triton server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Backend, RawOutputs, Ticket
from ..errors import BackendError, BackendUnavailableError, DeviceError
from .connection import Connection
from .known import known_frame
from .watch import Watch

__all__ = ["TritonBackend"]


class TritonBackend(Backend):
    """Runs one model of a server; see `saae_runtime.backends.base.Backend`.

    The mask is made here, because a Triton that forms batches takes no threshold. No answer is returned after an outage
    until the server has said that its model is still the same; without one it is asked every few seconds.

    Args:
        connection: to the server; closed with the backend.
        model: the model's name.
        version: its version; empty: the server's choice, the latest.
        precision: of the thresholds.
        frame_size: (height, width) of the model's input.
        max_batch: frames of the largest batch.
        slots: requests in flight in a stream.
        description: text for users.
        about: the parameter `saae` of the model's configuration.
        verify: whether the known frame is sent after an outage, too.
    """

    def __init__(
        self,
        connection: Connection,
        model: str,
        version: str,
        *,
        precision: str,
        frame_size: tuple[int, int],
        max_batch: int,
        slots: int,
        description: str,
        about: Mapping[str, Any],
        verify: bool,
    ) -> None:
        self.name = f"triton:{connection.protocol}"
        self.description = description
        self.precision = precision
        self.frame_size = frame_size
        self.max_batch = max_batch
        self.slots = slots
        self._connection = connection
        self._model, self._version = model, version
        self._known = about.get("check") if verify else None
        self._watch = Watch(about, lambda: connection.about(model, version)[1], self.check_known, description)
        self._pool = ThreadPoolExecutor(slots, "saae-triton")  # its threads start when they are first needed

    def infer(self, frames: NDArray[np.uint8], threshold: float) -> RawOutputs:
        """See `Backend.infer`.

        Raises:
            BackendUnavailableError: the server does not answer, or not in time.
            DeviceError: it failed.
            BackendError: it serves another model now.
        """
        found = self._infer(frames, ("anomaly_map", "score"))
        anomaly_map = np.array(found[0])  # the answer's memory is read-only, and shared with other outputs
        return RawOutputs(anomaly_map, found[1], anomaly_map > np.float32(threshold))

    def scores(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Scores of a batch, float32 N, without the maps: a frame of 512 x 512 pixels sends 1 MB less.

        Raises:
            As `infer`.
        """
        return self._infer(frames, ("score",))[0]

    def check_known(self) -> None:
        """Compare the known frame's score with that of the machine that wrote the model.

        Raises:
            BackendError: it is another.
        """
        if self._known is None:
            return
        expected, tolerance = float(self._known["score"]), float(self._known["tolerance"])
        found = float(self._ask(known_frame(self.frame_size)[None], ("score",))[0][0])
        if not abs(found - expected) <= tolerance * abs(expected):
            raise BackendError(
                f"{self.description} gives wrong scores: {found:.6g} for a frame whose score is {expected:.6g}.",
                "Triton's Python backend does so with numpy 2 in the model's environment; else it is another model.",
                "pip install 'numpy<2' in the server's environment, or write the model again: saae-export triton",
            )

    def _infer(self, frames: NDArray[np.uint8], wanted: Sequence[str]) -> list[NDArray[np.float32]]:
        try:
            found = self._ask(frames, wanted)
        except BackendUnavailableError:
            self._watch.doubt()
            raise
        except DeviceError:  # another model may take other frames
            self._watch.doubt()
            self._watch.check()
            raise
        self._watch.check()
        return found

    def _ask(self, frames: NDArray[np.uint8], wanted: Sequence[str]) -> list[NDArray[np.float32]]:
        found = self._connection.infer(self._model, self._version, frames, wanted)
        count, (height, width) = len(frames), self.frame_size
        shapes = {"anomaly_map": (count, height, width), "score": (count,)}
        values = []
        for name in wanted:
            value = np.asarray(found[name])
            if name == "score":
                value = value.reshape(-1)  # Triton has a dimension more
            if value.shape != shapes[name] or value.dtype != np.float32:
                raise DeviceError(
                    f"The server gave {name} as {value.dtype} {value.shape}, not float32 {shapes[name]}.",
                    "Its model is not the one that its configuration describes.",
                    "write it again: saae-export triton",
                )
            values.append(value)
        return values

    def submit(self, frames: NDArray[np.uint8], threshold: float) -> Ticket:
        """Send a batch; several are in flight at once, and the server may join them."""
        return Ticket(self._pool.submit(self.infer, frames, threshold))

    def collect(self, ticket: Ticket) -> RawOutputs:
        """Wait for an answer."""
        future: Future[RawOutputs] = ticket.payload
        return future.result()

    def close(self) -> None:
        """End the threads and the connection."""
        self._pool.shutdown()
        self._connection.close()
