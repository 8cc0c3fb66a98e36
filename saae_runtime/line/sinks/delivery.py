"""A thread per sink that delivers records from the spool."""

from __future__ import annotations

import threading
import time
from typing import Any

from ...errors import SaaeError
from ...meter import one_line
from ..spool_reader import Reader
from ..spool_records import Record
from .base import Sink

__all__ = ["Delivery"]

_BACK_OFF = (0.2, 30.0)  # seconds between two attempts: first, longest
_UNSYNCED = 1000  # records after which the sink is synced
_WAIT = 0.2  # seconds of one wait for a record
_UNEXPECTED = 3  # attempts for one record that raises an unexpected error


class Delivery:
    """Delivers at least once: a record is given again until the sink has taken and synced it.

    A sink that fails is tried again after growing pauses of up to 30 seconds, without delaying stations or other sinks.
    A record that raises an unexpected error three times is skipped and counted.

    Args:
        name: of the sink.
        sink: opened and closed here.
        reader: its position in the spool.
        sync_seconds: interval of syncs.
    """

    def __init__(self, name: str, sink: Sink, reader: Reader, sync_seconds: float = 1.0) -> None:
        self.name = name
        self._sink, self._reader = sink, reader
        self._sync_seconds = sync_seconds
        self._hurry = threading.Event()
        self._deadline = float("inf")
        self._ready = False
        self._taken: Record | None = None  # the last record that the sink has and that is not committed
        self._unsynced = 0
        self._synced_at = time.monotonic()
        self._delivered = self._broken = self._failures = 0
        self._tried: tuple[int, int] = (0, 0)  # number of a record with an unexpected error, how often
        self._last_error: tuple[str, float] | None = None
        self._thread = threading.Thread(target=self._run, name=f"sink-{name}", daemon=True)
        self._thread.start()

    def state(self) -> dict[str, Any]:
        """Counts: `delivered` since the start, `backlog`, `lost`, `refused`, and the latest error or refusal."""
        error = self._last_error
        return {
            "name": self.name,
            "working": self._failures == 0,
            "delivered": self._delivered,
            "backlog": self._reader.backlog,
            "lost": self._reader.lost,
            "refused": self._sink.refused + self._broken,
            "last_error": error[0] if error else None,
            "error_age_seconds": round(time.monotonic() - error[1], 1) if error else None,
            **self._sink.state(),
        }

    def finish(self, deadline: float) -> None:
        """Deliver waiting records until `deadline` (`time.monotonic`), and end; the rest stays on disk."""
        self._deadline = deadline
        self._hurry.set()
        self._thread.join(max(deadline - time.monotonic(), 0.0) + 0.5)

    def _run(self) -> None:
        wait = _BACK_OFF[0]
        while True:
            try:
                if not self._ready:
                    self._sink.open()
                    self._ready = True
                moved = self._step()
                if moved is not False:
                    self._failures, wait = 0, _BACK_OFF[0]
                if self._hurry.is_set() and (moved is None or time.monotonic() > self._deadline):
                    break
                if moved is False:
                    self._hurry.wait(0.05)
            except Exception as error:
                self._fail(error)
                if self._hurry.is_set():
                    break
                self._hurry.wait(wait)
                wait = min(2 * wait, _BACK_OFF[1])
        try:
            self._commit()
        except Exception as error:
            self._fail(error)
        self._sink.close()

    def _step(self) -> bool | None:
        """Deliver one batch; None if there was none, False if the sink took nothing of it."""
        batch = self._reader.read(1 if self._tried[1] else self._sink.batch, 0 if self._hurry.is_set() else _WAIT)
        if not batch:
            if self._taken is not None and self._is_due():
                self._commit()
            return None
        refused = self._sink.refused
        try:
            taken = self._sink.write(batch, self._hurry)
        except SaaeError:
            self._commit()  # what was taken before is not to come again for this
            raise
        except Exception:  # an unexpected error, perhaps due to this record
            self._break(batch[0])
            raise
        if self._sink.refused != refused:
            self._last_error = (one_line(self._sink.refusal), time.monotonic())
        if taken:
            self._taken = batch[taken - 1]
            self._unsynced += taken
            self._delivered += taken
            self._tried = (0, 0)
        if taken < len(batch):
            self._commit()
            self._reader.rewind()
        elif self._is_due():
            self._commit()
        return taken > 0

    def _is_due(self) -> bool:
        return self._unsynced >= _UNSYNCED or time.monotonic() - self._synced_at >= self._sync_seconds

    def _commit(self) -> None:
        if self._taken is None:
            return
        self._sink.sync()
        self._reader.commit(self._taken.number)
        self._taken, self._unsynced = None, 0
        self._synced_at = time.monotonic()

    def _break(self, record: Record) -> None:
        """Note a record or batch with an unexpected error; skip it after some attempts."""
        self._commit()  # what was taken before is not to come again for this
        number, times = self._tried
        self._tried = (record.number, times + 1 if number == record.number else 1)
        if self._tried[1] > _UNEXPECTED:
            self._broken += 1
            self._reader.commit(record.number)
            self._tried = (0, 0)

    def _fail(self, error: Exception) -> None:
        self._failures += 1
        self._ready = False
        self._last_error = (
            one_line(error if isinstance(error, SaaeError) else f"{type(error).__name__}: {error}"),
            time.monotonic(),
        )
        # Taken records that were not synced are given again; sinks skip those they have.
        self._taken, self._unsynced = None, 0
        self._reader.rewind()
