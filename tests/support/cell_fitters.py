"""Ways of fitting a cell that need no fitting: in a file of their own, so that a fresh process finds them by name."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from saae_train.experiments.experiment import Cell, Fitted, Report


def brightness(cell: Cell, backbone: Any, samples: tuple[Any, ...], cache: Path, report: Report) -> Fitted:
    """Bright pixels are anomalous; nothing is learned."""

    def score(frame: np.ndarray) -> tuple[np.ndarray, float]:
        anomaly_map = frame.astype(np.float32).mean(axis=2)
        return anomaly_map, float(anomaly_map.max())

    report("looking", len(samples), len(samples))
    return Fitted(score, {"process": os.getpid()}, cell.config)


def raises(cell: Cell, backbone: Any, samples: tuple[Any, ...], cache: Path, report: Report) -> Fitted:
    """What a library does that runs out of a device's memory."""
    raise RuntimeError("out of memory")


def killed(cell: Cell, backbone: Any, samples: tuple[Any, ...], cache: Path, report: Report) -> Fitted:
    """What the system does to a process that takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def endless(cell: Cell, backbone: Any, samples: tuple[Any, ...], cache: Path, report: Report) -> Fitted:
    """Goes on until it is stopped, and leaves a file when it is stopped as by Ctrl-C."""
    try:
        while True:
            report("waiting", os.getpid(), 0)
            time.sleep(0.05)
    except KeyboardInterrupt:
        (cache / "stopped").touch()
        raise
