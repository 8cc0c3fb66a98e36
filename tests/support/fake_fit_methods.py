"""Fit methods that fit nothing, in a module of their own, so that a fresh process can import them by name."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from saae_runtime.result import Scored
from saae_train.experiments.experiment import Experiment, FittedMethod, Report


def brightness(
    experiment: Experiment, backbone: Any, samples: tuple[Any, ...], cache: Path, report: Report
) -> FittedMethod:
    """Bright pixels are anomalous; nothing is learned."""

    def score(frame: np.ndarray) -> Scored:
        anomaly_map = frame.astype(np.float32).mean(axis=2)
        return Scored(float(anomaly_map.max()), anomaly_map)

    report("looking", len(samples), len(samples))
    return FittedMethod(score, {"process": os.getpid()}, experiment.config)


def raises(
    experiment: Experiment, backbone: Any, samples: tuple[Any, ...], cache: Path, report: Report
) -> FittedMethod:
    """What a library does that runs out of a device's memory."""
    raise RuntimeError("out of memory")


def killed(
    experiment: Experiment, backbone: Any, samples: tuple[Any, ...], cache: Path, report: Report
) -> FittedMethod:
    """What the system does to a process that takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def endless(
    experiment: Experiment, backbone: Any, samples: tuple[Any, ...], cache: Path, report: Report
) -> FittedMethod:
    """Goes on until it is stopped, and leaves a file when it is stopped as by Ctrl-C."""
    try:
        while True:
            report("waiting", os.getpid(), 0)
            time.sleep(0.05)
    except KeyboardInterrupt:
        (cache / "stopped").touch()
        raise
