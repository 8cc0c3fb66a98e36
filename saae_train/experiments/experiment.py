"""One experiment: one category fitted, calibrated and evaluated with one configuration, in a process of its own.

Its result is a row of JSON. `run_experiment` runs in this process; `run_fresh` starts a fresh one and reports its
progress, so that memory, threads or a crash of one experiment cannot affect the next (`saae_train.experiments.jobs`).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from saae_runtime.errors import SaaeError
from saae_runtime.estimate import DEFAULT_FALSE_ALARMS
from saae_runtime.files import canonical_json, sha256_bytes, sha256_file
from saae_runtime.progress import Progress
from saae_runtime.result import Scorer
from saae_runtime.version import library_versions, saae_version

from ..config import HELD_OUT, FitConfig
from ..data.category import Category, Sample, find_category
from ..data.shape import typical_shape
from ..data.split import content_digest, split_held_out
from .jobs import Job, Jobs, Processes, Report
from .timing import PeakMemory, stopwatch

if TYPE_CHECKING:
    from ..calibrate import Calibration
    from ..model.left_out import LeftOut
    from ..model.vit import Features

__all__ = [
    "Experiment",
    "FittedMethod",
    "FitMethod",
    "fit_saae",
    "images_digest",
    "is_same",
    "run_experiment",
    "run_fresh",
    "tools",
]

SAAE_METHOD = "saae"


@dataclass(frozen=True)
class Experiment:
    """What to fit, on which images, with which configuration.

    Attributes:
        data: folder of categories.
        category: name of the category.
        config: how the model is built and fitted; its seed also chooses the held-out images.
        method: "saae", or another name that the `FitMethod` knows.
        weights: of the backbone, see `saae_train.model.weights.load_state_dict`; None: chosen automatically.
        cache: folder of features and resumable states; None: a temporary one, so that `fit_seconds` covers everything.
        device: torch device; None: the first GPU, or the CPU.
    """

    data: str
    category: str
    config: FitConfig
    method: str = SAAE_METHOD
    weights: str | None = None
    cache: str | None = None
    device: str | None = None

    def settings(self) -> dict[str, Any]:
        """Everything that the result depends on, as JSON values; finished experiments are found by them."""
        return {
            "category": self.category,
            "method": self.method,
            "config": self.config.to_json(),
            "weights": self.weights,
        }

    def key(self, images: str) -> str:
        """Hex sha256 of the settings, the images (see `images_digest`), this version of saae, and the content of the
        weights file, wherever it is. Raises OSError if that file cannot be read."""
        shaped = {**self.settings(), "images": images, "saae": saae_version()}
        digest = _weights_digest(self.weights)
        return sha256_bytes(canonical_json(shaped if digest is None else {**shaped, "weights": digest}).encode())


class FittedMethod(NamedTuple):
    """A fitted method.

    Attributes:
        score: scores a frame.
        facts: other results to record.
        config: the configuration with all defaults resolved.
        discard: deletes the resumable state of the fit.
        left_out: scores the fitted images as if they were new; None if the method cannot.
    """

    score: Scorer
    facts: Mapping[str, Any]
    config: FitConfig
    discard: Callable[[], None] = lambda: None
    left_out: Callable[[], LeftOut | None] = lambda: None


class FitMethod(Protocol):
    """Fits an experiment's method; a module-level function, so that another process can import it by name."""

    def __call__(
        self, experiment: Experiment, backbone: Features, samples: tuple[Sample, ...], cache: Path, report: Report
    ) -> FittedMethod: ...


def images_digest(category: Category) -> str:
    """Hex sha256 over names and content of a category's images and masks; a copy of the set has the same digest.

    The white level is a setting of the experiment and does not count. Raises DataError if a file cannot be read.
    """
    samples = [replace(s, white_level=None) for s in sorted((*category.train, *category.test), key=lambda s: s.path)]
    names = [path.relative_to(category.root).as_posix() for s in samples for path in (s.path, *s.masks)]
    return sha256_bytes(canonical_json({"names": names, "content": content_digest(samples)}).encode())


def _weights_digest(weights: str | None) -> str | None:
    """Hex sha256 of a weights file; None if `weights` is not a file."""
    if weights is None or not Path(weights).is_file():
        return None
    about = Path(weights).stat()
    return _file_digest(weights, about.st_mtime_ns, about.st_size)


@lru_cache(maxsize=16)
def _file_digest(path: str, changed: int, size: int) -> str:
    """Hex sha256 of a large file that every experiment reads; a new time or size makes it a new cache entry."""
    return sha256_file(path)


def is_same(row: Mapping[str, Any], experiment: Experiment, *, unknown: bool = False) -> bool:
    """Whether a finished row is this experiment: the same settings on the same images.

    Args:
        row: result of an earlier run.
        experiment: the experiment to run.
        unknown: the answer for a row that does not record its images.

    Raises:
        DataError: the experiment's images cannot be listed.
    """
    wanted = json.loads(json.dumps(experiment.settings()))
    digest = _weights_digest(experiment.weights)
    if digest is not None and "weights_sha256" in row:
        del wanted["weights"]
        wanted["weights_sha256"] = digest
    if any(row.get(key) != value for key, value in wanted.items()):
        return False
    if row.get("images") is None:
        return unknown
    return bool(row["images"] == images_digest(find_category(experiment.data, experiment.category)))


def tools() -> dict[str, str]:
    """Versions of saae, torch, timm and numpy."""
    return {"saae": saae_version(), **library_versions(("torch", "timm", "numpy"))}


def fit_saae(
    experiment: Experiment, backbone: Features, samples: tuple[Sample, ...], cache: Path, report: Report
) -> FittedMethod:
    """Fit SAAE."""
    from ..fitting.features import pick_device
    from ..fitting.fit import fit
    from ..fitting.loop import Reporter
    from ..model.checkpoint import discard_state
    from ..model.scorer import TorchScorer

    watch = Reporter(
        features=_under("features", report),
        steps=lambda done, total, loss: report(f"step, loss {loss:.4g}", done, total),
    )
    checkpoint = fit(
        backbone, samples, experiment.config, experiment.category, device=experiment.device, cache=cache, reporter=watch
    )
    kept = ("seconds_features", "seconds_fit", "precision", "bf16", "texture", "device")
    facts = {key: getattr(checkpoint.record, key) for key in kept}
    facts["latent"] = checkpoint.detector.saae.latent
    return FittedMethod(
        TorchScorer(checkpoint.detector, device=pick_device(experiment.device)),
        facts,
        checkpoint.config,
        lambda: discard_state(checkpoint),  # the model is not kept, and another run must time the whole fit again
        lambda: checkpoint.left_out,
    )


def _under(what: str, report: Report) -> Progress:
    return lambda done, total, text="": report(what, done, total)


def run_experiment(
    experiment: Experiment, fit_method: FitMethod = fit_saae, report: Report = lambda what, done, total: None
) -> dict[str, Any]:
    """Run one experiment in this process: fit, calibrate the thresholds, and evaluate on the test set at the images'
    own resolution. Thresholds come from the fitted images, each scored as if it were new, if the configuration has a
    memory; else from normal images that are held out from the fit.

    Returns:
        The row: the settings, the metrics (`overall`, `by_type`, `notes`), times and memory.

    Raises:
        SaaeError: images, weights, configuration or fit are invalid.
    """
    config = experiment.config
    category = find_category(experiment.data, experiment.category).with_white_level(config.white_level)
    digest = images_digest(category)
    # With a memory every method is fitted on all images; without one SAAE's own share holds for all of them.
    share = config.held_out or (0.0 if experiment.method == SAAE_METHOD or config.memory is not None else HELD_OUT)
    fitted_on, held_out = split_held_out(category.train, share, seed=config.seed)
    # Imported late, because they load PyTorch: errors about the images appear at once.
    from ..evaluation.decisions import decisions
    from ..evaluation.evaluate import evaluate
    from ..fitting.backbone import backbone_for

    with PeakMemory() as memory, tempfile.TemporaryDirectory(prefix="saae-experiment-") as fresh:
        backbone = backbone_for(config, fitted_on, experiment.weights)
        with stopwatch() as seconds:
            fitted = fit_method(experiment, backbone, fitted_on, Path(experiment.cache or fresh), report)
        fit_seconds = seconds()
        tables, fpr = _tables(fitted, category, fitted_on, held_out, _under("calibrate", report))
        with stopwatch() as seconds:
            found = evaluate(
                fitted.score,
                category,
                threshold=tables.pixel.at(None),
                image_threshold=tables.image.at(None),
                progress=_under("evaluate", report),
            )
        fitted.discard()
    sizes = [image.size for image in found.images]
    return {
        **experiment.settings(),
        "fitted_config": fitted.config.to_json(),
        "weights_source": backbone.weights.source,
        "weights_sha256": backbone.weights.sha256,
        "images": digest,
        "synthetic": category.synthetic,
        "image_sizes": [list(min(sizes)), list(max(sizes))],
        "fit_images": len(fitted_on),
        "held_out_images": len(held_out),
        "test_images": found.overall.images,
        "fit_seconds": round(fit_seconds, 1),
        "features_cached": experiment.cache is not None,
        "evaluate_seconds": round(seconds(), 1),
        "peak_memory_gib": round(memory.gib, 2),
        "pixel_fpr": fpr,
        "facts": dict(fitted.facts),
        "tools": tools(),
        "decisions": [
            item.to_json()
            for item in decisions(
                [image.score for image in found.images], [image.is_anomalous for image in found.images], tables.image
            )
        ],
        "overall": found.overall.to_json(),
        "by_type": [s.to_json() for s in found.by_type],
        "notes": list(found.notes),
    }


def _tables(
    fitted: FittedMethod, category: Category, samples: Sequence[Sample], held_out: Sequence[Sample], progress: Progress
) -> tuple[Calibration, float]:
    """Threshold tables and the default pixel FPR, by the preset's rule for every method."""
    from ..calibrate import OBJECT_FPR, calibrate, calibrate_left_out, default_fpr

    config = fitted.config
    if config.memory is None:
        fpr = default_fpr(fitted.facts.get("texture"), category.name)
        return calibrate(fitted.score, held_out, fpr, progress=progress), fpr
    left_out = fitted.left_out()
    if left_out is None:
        rate = DEFAULT_FALSE_ALARMS
        return calibrate(fitted.score, held_out, OBJECT_FPR, rate, progress, estimate=True), OBJECT_FPR
    size = config.input_size
    shape = typical_shape(category.train)
    frame_size = size if shape is None else shape.size
    return calibrate_left_out(left_out, config.smoothing, frame_size, size, content_digest(samples)), OBJECT_FPR


def run_fresh(
    experiment: Experiment, fit_method: FitMethod = fit_saae, report: Report = lambda what, done, total: None
) -> dict[str, Any]:
    """`run_experiment` in a process of its own.

    Raises:
        SaaeError: the experiment's error, with its own class, or the process ended without reporting one.
    """
    job = Job(f"{experiment.category} {experiment.method}", partial(_run_with, fit_method), experiment)
    with Jobs(Processes(), tries=1) as jobs:
        jobs.begin(None, job, report)
        _, found = jobs.next()
    if isinstance(found, SaaeError):
        raise found
    return dict(found)


def _run_with(fit_method: FitMethod, experiment: Experiment, report: Report) -> dict[str, Any]:
    return run_experiment(experiment, fit_method, report)
