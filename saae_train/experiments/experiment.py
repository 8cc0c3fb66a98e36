"""One cell of a table: one category fitted, calibrated and evaluated with one configuration, in a process of its own.

A cell becomes a row of plain JSON. `run_cell` runs here, `run_fresh` in a fresh process whose progress comes back, so
that one cell's memory, threads or crash never touch the next one.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from saae_runtime import errors
from saae_runtime.errors import SaaeError
from saae_runtime.files import canonical_json, sha256_bytes, sha256_file
from saae_runtime.version import library_versions, saae_version

from ..config import FitConfig
from ..data.category import Category, Sample, find_category, split_held_out
from .timing import PeakMemory, stopwatch

if TYPE_CHECKING:
    from ..model.vit import Features

__all__ = ["Cell", "Fitted", "Fitter", "fit_saae", "images_digest", "is_same", "run_cell", "run_fresh", "tools"]

Score = Callable[[NDArray[np.uint8]], tuple[NDArray[np.float32], float]]
Report = Callable[[str, int, int], None]
"""What is going on, and how much of how much is done."""

SAAE_METHOD = "saae"
_GRACE, _PATIENCE = 10.0, 20.0
"""Seconds that a cell has to end by itself after Ctrl-C (a fit saves its state meanwhile), and after being told to."""


@dataclass(frozen=True)
class Cell:
    """One thing to run.

    Attributes:
        data: folder of categories.
        category: which one.
        config: how the model is built and fitted; its seed also splits off the held-out images.
        method: "saae", or whatever the `Fitter` knows.
        weights: of the backbone, see `saae_train.model.weights.load_state_dict`; None: by itself.
        cache: folder of features and resumable states; None: a fresh one that goes away, so that `fit_seconds` is all.
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
        """What shapes the numbers, as plain JSON values: the key under which a finished cell is found again."""
        return {
            "category": self.category,
            "method": self.method,
            "config": self.config.to_json(),
            "weights": self.weights,
        }

    def key(self, images: str) -> str:
        """Hex sha256 of the settings, the images (see `images_digest`), this version of saae, and of what is in the
        file of weights, wherever it lies. Raises OSError when that file cannot be read."""
        shaped = {**self.settings(), "images": images, "saae": saae_version()}
        digest = _weights_digest(self.weights)
        return sha256_bytes(canonical_json(shaped if digest is None else {**shaped, "weights": digest}).encode())


class Fitted(NamedTuple):
    """A fitted method: how it scores a frame, what else is worth keeping, its configuration with everything resolved,
    and what to call when the fit is not needed any more."""

    score: Score
    facts: Mapping[str, Any]
    config: FitConfig
    discard: Callable[[], None] = lambda: None


class Fitter(Protocol):
    """How a cell's method is fitted; a function of a module, so that another process finds it by its name."""

    def __call__(
        self, cell: Cell, backbone: Features, samples: tuple[Sample, ...], cache: Path, report: Report
    ) -> Fitted: ...


def images_digest(category: Category) -> str:
    """Hex sha256 over names and sizes of a category's images and masks: another copy of the same set has the same."""
    digest = hashlib.sha256(b"saae-listing-1")
    files = [s.path for s in (*category.train, *category.test)] + [s.mask for s in category.test if s.mask is not None]
    for path in sorted(files):
        digest.update(f"\n{path.relative_to(category.root).as_posix()!r} {path.stat().st_size}".encode())
    return digest.hexdigest()


def _weights_digest(weights: str | None) -> str | None:
    """Hex sha256 of a file of weights; None where they are no file."""
    if weights is None or not Path(weights).is_file():
        return None
    about = Path(weights).stat()
    return _file_digest(weights, about.st_mtime_ns, about.st_size)


@lru_cache(maxsize=16)
def _file_digest(path: str, changed: int, size: int) -> str:
    """Of a large file that every cell of a table asks for; time and size are there to tell when it is another one."""
    return sha256_file(path)


def is_same(row: Mapping[str, Any], cell: Cell, *, unknown: bool = False) -> bool:
    """Whether a finished row is this cell: the same settings on the same images.

    Args:
        row: of an earlier run.
        cell: to be run.
        unknown: what a row that does not say which images it saw counts as.

    Raises:
        DataError: the cell's images cannot be listed.
    """
    wanted = json.loads(json.dumps(cell.settings()))
    digest = _weights_digest(cell.weights)
    if digest is not None and "weights_sha256" in row:
        del wanted["weights"]
        wanted["weights_sha256"] = digest
    if any(row.get(key) != value for key, value in wanted.items()):
        return False
    if row.get("images") is None:
        return unknown
    return bool(row["images"] == images_digest(find_category(cell.data, cell.category)))


def tools() -> dict[str, str]:
    """Versions of what measures here."""
    return {"saae": saae_version(), **library_versions(("torch", "timm", "numpy"))}


def fit_saae(cell: Cell, backbone: Features, samples: tuple[Sample, ...], cache: Path, report: Report) -> Fitted:
    """The product's own method."""
    from ..fitting.features import pick_device
    from ..fitting.fit import Reporter, fit
    from ..model.checkpoint import discard_state
    from ..model.scorer import TorchScorer

    watch = Reporter(
        features=lambda done, total: report("features", done, total),
        steps=lambda done, total, loss: report(f"step, loss {loss:.4g}", done, total),
    )
    checkpoint = fit(backbone, samples, cell.config, cell.category, device=cell.device, cache=cache, reporter=watch)
    kept = ("seconds_features", "seconds_fit", "precision", "bf16", "texture", "device")
    facts = {key: value for key, value in checkpoint.facts.items() if key in kept}
    facts["latent"] = checkpoint.detector.saae.latent
    return Fitted(
        TorchScorer(checkpoint.detector, device=pick_device(cell.device)),
        facts,
        checkpoint.config,
        lambda: discard_state(checkpoint),  # the model is not kept, and the next run is to take the whole time again
    )


def run_cell(cell: Cell, fitter: Fitter = fit_saae, report: Report = lambda what, done, total: None) -> dict[str, Any]:
    """Fits, calibrates and evaluates one cell in this process: split off the held-out normal images, fit on the others,
    calibrate T on the held-out ones, evaluate on the test set at the images' own resolution.

    Returns:
        Its row: the settings, what was measured (`overall`, `by_type`, `notes`) and what it took.

    Raises:
        SaaeError: whatever is wrong with images, weights, configuration or fit.
    """
    config = cell.config
    category = find_category(cell.data, cell.category)
    digest = images_digest(category)
    fitted_on, held_out = split_held_out(category.train, config.held_out, seed=config.seed)
    # Only now what loads PyTorch: what is wrong with the images is said at once.
    from ..calibrate import calibrate, default_fpr
    from ..evaluation.evaluate import evaluate
    from ..model.vit import build_backbone, choose_layers
    from ..model.weights import refuse_random

    with PeakMemory() as memory, tempfile.TemporaryDirectory(prefix="saae-cell-") as fresh:
        layers = config.layers or choose_layers(config.backbone)[0]
        backbone = build_backbone(config.backbone, layers, config.input_size, cell.weights)
        refuse_random(backbone.weights.source, backbone.name)
        with stopwatch() as seconds:
            fitted = fitter(cell, backbone, fitted_on, Path(cell.cache or fresh), report)
        fit_seconds = seconds()
        fpr = default_fpr(fitted.facts, category.name)
        tables = calibrate(fitted.score, held_out, fpr, progress=lambda done, total: report("calibrate", done, total))
        with stopwatch() as seconds:
            found = evaluate(
                lambda frame: fitted.score(frame)[::-1],
                category,
                threshold=tables.pixel.at(None),
                image_threshold=tables.image.at(None),
                progress=lambda done, total: report("evaluate", done, total),
            )
        fitted.discard()
    sizes = [image.size for image in found.images]
    return {
        **cell.settings(),
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
        "features_cached": cell.cache is not None,
        "evaluate_seconds": round(seconds(), 1),
        "peak_memory_gib": round(memory.gib, 2),
        "pixel_fpr": fpr,
        "facts": dict(fitted.facts),
        "tools": tools(),
        "overall": found.overall.to_json(),
        "by_type": [s.to_json() for s in found.by_type],
        "notes": list(found.notes),
    }


def run_fresh(cell: Cell, fitter: Fitter = fit_saae, report: Report = lambda what, done, total: None) -> dict[str, Any]:
    """`run_cell` in a process of its own.

    Raises:
        SaaeError: the cell's own error, of its own class; or the process ended without a word.
    """
    receiver, sender = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_child, args=(cell, fitter, sender), daemon=True)
    process.start()
    sender.close()  # the child's end is the only one now: when it ends, so does the reading
    outcome: dict[str, Any] = {}
    try:
        while True:
            message = json.loads(receiver.recv_bytes())
            if "progress" in message:
                report(*message["progress"])
            else:
                outcome = message
    except EOFError:
        process.join()
    except BaseException:
        # Ctrl-C on a terminal reaches the child as well; a signal to this process alone does not.
        process.join(_GRACE)
        process.terminate()
        process.join(_PATIENCE)
        process.kill()
        process.join()
        raise
    finally:
        receiver.close()
    if "row" in outcome:
        row: dict[str, Any] = outcome["row"]
        return row
    if "error" in outcome:
        raise _error(outcome["error"])
    raise SaaeError(
        f"The process of {cell.category} {cell.method} ended with code {process.exitcode}.",
        "A negative code is a signal; -9 usually means that memory ran out.",
        "run this category alone, with less in --set components=... or a smaller input size",
    )


def _child(cell: Cell, fitter: Fitter, sender: Connection) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as clean as Ctrl-C

    last = [0.0]

    def send(**message: Any) -> None:
        sender.send_bytes(json.dumps(message, allow_nan=False).encode())

    def report(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - last[0] > 0.1:
            last[0] = now
            send(progress=[what, done, total])

    try:
        send(row=run_cell(cell, fitter, report))
    except SaaeError as error:
        send(error={"kind": type(error).__name__, "what": error.what, "why": error.why, "cure": error.cure})
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # a full GPU, a library's own error: the other cells must go on, and this one be named
        if os.environ.get("SAAE_DEBUG", "") not in ("", "0"):
            traceback.print_exc()
        where = traceback.extract_tb(error.__traceback__)[-1]
        why = f"Raised in {Path(where.filename).name}, line {where.lineno}."
        send(
            error={
                "kind": "",
                "what": f"{type(error).__name__}: {error}",
                "why": why,
                "cure": "SAAE_DEBUG=1 shows more",
            }
        )


def _error(told: Mapping[str, str]) -> SaaeError:
    """The child's error once more, of its own class where that is one of saae's."""
    kind: Any = getattr(errors, told["kind"], SaaeError) if told["kind"] in errors.__all__ else SaaeError
    error: SaaeError = kind(told["what"], told["why"], told["cure"])
    return error
