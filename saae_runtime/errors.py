"""Every error that saae raises on purpose: what failed, why, and what to type next."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "BackendError",
    "BackendUnavailableError",
    "BundleCorruptError",
    "BundleError",
    "BundleNotFoundError",
    "BundlePathError",
    "BundleVersionError",
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DeviceError",
    "EngineIncompatibleError",
    "FetchError",
    "FitError",
    "FrameError",
    "ImageError",
    "ParityError",
    "SaaeError",
    "SelfTestError",
    "SimulationError",
    "StorageError",
    "WeightsError",
    "shown",
]


def shown(value: object, most: int = 60) -> str:
    """A value as text for a message, at most `most` characters."""
    try:
        text = repr(value)
    except Exception:
        return f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[: most - 3]}..."


class SaaeError(Exception):
    """Base of all errors raised by saae.

    Args:
        what: what failed, one sentence naming the file, frame or option.
        why: the cause as far as it is known.
        cure: what to type or change next.
    """

    exit_code: int = 2

    def __init__(self, what: str, why: str = "", cure: str = "") -> None:
        self.what = what
        self.why = why
        self.cure = cure
        super().__init__(what, why, cure)

    def __str__(self) -> str:
        lines = [self.what]
        if self.why:
            lines.append(f"  why: {self.why}")
        if self.cure:
            lines.append(f"  try: {self.cure}")
        return "\n".join(lines)


class ConfigError(SaaeError):
    """An option or a combination of options that cannot work."""


class DataError(SaaeError):
    """A data set that cannot be used as it is; `problems` lists every finding, one line each."""

    def __init__(self, what: str, why: str = "", cure: str = "", problems: Sequence[str] = ()) -> None:
        super().__init__(what, why, cure)
        self.problems = tuple(problems)


class ImageError(DataError):
    """One image file that cannot be read."""


class SimulationError(DataError):
    """Images that no simulated defect can be drawn on: too small, or of one colour."""


class FrameError(SaaeError):
    """A frame of a dtype, shape or layout that the engine does not take."""


class WeightsError(SaaeError):
    """Backbone weights that are missing, unreachable or do not fit the model."""


class CheckpointError(SaaeError):
    """A fitted model on disk that is missing, damaged or of a different version."""


class FitError(SaaeError):
    """Fitting that cannot continue (loss not finite, too few images, not enough memory)."""


class CalibrationError(SaaeError):
    """Thresholds that cannot be computed from the images given."""


class ParityError(SaaeError):
    """An exported artefact that disagrees with the PyTorch reference beyond its bound."""

    exit_code = 3


class SelfTestError(SaaeError):
    """A model that misses large, strong defects."""

    exit_code = 3


class FetchError(SaaeError):
    """A download that did not succeed or was refused."""


class StorageError(SaaeError):
    """A write that failed (disk full, no permission); what was there before is still there."""


class BundleError(SaaeError):
    """Base of everything wrong with a bundle."""


class BundleNotFoundError(BundleError):
    """No bundle at that path."""


class BundleCorruptError(BundleError):
    """A bundle whose files differ from its manifest, or whose manifest is not one."""


class BundleVersionError(BundleError):
    """A bundle written by a newer saae."""


class BundlePathError(BundleError):
    """A path in a manifest that leaves the bundle's folder."""


class BackendError(SaaeError):
    """Base of everything wrong with an inference backend."""


class BackendUnavailableError(BackendError):
    """A backend that was asked for and is not installed or not usable here."""


class EngineIncompatibleError(BackendError):
    """A compiled engine made for another GPU, library or version."""


class DeviceError(BackendError):
    """A device that failed: no driver, out of memory, lost."""
