"""Whether bf16 gives FP32's verdicts: a build ships it only then, unless it was asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from saae_runtime.bundle import Bundle, update_bundle
from saae_runtime.engine import Engine
from saae_runtime.errors import SimulationError
from saae_runtime.manifest import Artefact
from saae_runtime.progress import Progress, labelled
from saae_runtime.terminal import Stage, Stages
from saae_train.data.category import Category, Sample
from saae_train.evaluation.evaluate import evaluate
from saae_train.evaluation.result import Evaluation

from ..artefacts import CPU, open_artefact
from .bundle import without_artefact
from .quality import MOST_FLIPS, Quality, Verdict, compare_quality, on_simulated_defects, on_test_images

__all__ = ["Judge", "keep_verdicts"]


class Judge:
    """Measures engines on the test set, or on defects drawn onto the normal images; each of a build's graphs once.

    Args:
        category: its test images.
        normal: to draw simulated defects onto if there are no real ones with masks.
    """

    def __init__(self, category: Category, normal: Sequence[Sample]) -> None:
        self._category, self._normal = category, normal
        self._evaluated: dict[tuple[object, ...], Evaluation] = {}
        self._judged: dict[tuple[object, ...], Quality] = {}

    def evaluation(self, engine: Engine, progress: Progress) -> Evaluation | None:
        """That of an engine on the test set, at its own thresholds; None without test images."""
        if not self._category.test:
            return None
        key = _identity(engine)
        if key not in self._evaluated:
            self._evaluated[key] = evaluate(
                engine,
                self._category,
                threshold=engine.threshold,
                image_threshold=engine.image_threshold,
                progress=progress,
            )
        return self._evaluated[key]

    def reference(self, bundle: Bundle, stage: Stage) -> Quality:
        """The quality of the bundle's FP32 graph.

        Raises:
            SimulationError: no test set, and nothing can be drawn onto these images.
        """
        with Engine(bundle, backend=CPU, precision="fp32", verify=False, cache=False) as engine:
            return self.quality(engine, stage)

    def quality(self, engine: Engine, stage: Stage) -> Quality:
        """That of an engine at its own thresholds.

        Raises:
            SimulationError: as above.
        """
        key, progress = _identity(engine), labelled(stage, "judging quality")
        if key not in self._judged:
            with_masks = any(sample.is_anomalous and sample.mask is not None for sample in self._category.test)
            evaluation = self.evaluation(engine, progress) if with_masks else None
            found = on_test_images(evaluation) if evaluation else None
            self._judged[key] = found or on_simulated_defects(engine, self._category, self._normal, progress)
        return self._judged[key]


def _identity(engine: Engine) -> tuple[object, ...]:
    """Equal for engines that give the same results: their files, library, precision and thresholds."""
    bundle, precision = engine.bundle, engine.backend.precision
    files = {item.file for item in bundle.artefacts(precision=precision)}
    digests = tuple(sorted(entry.sha256 for name, entry in bundle.manifest.files.items() if name in files))
    return engine.backend.name, precision, digests, engine.threshold, engine.image_threshold


def keep_verdicts(bundle: Bundle, judge: Judge, asked: Collection[str], stages: Stages) -> Bundle:
    """Compare the verdicts of the FP32 graph in bf16 with those in FP32, and leave bf16 out if too many differ.

    If it was asked for, it stays and only the difference is said. Without images to judge on, parity has decided.

    Args:
        bundle: calibrated and compared with PyTorch.
        judge: see `Judge`.
        asked: requested precisions.
        stages: progress, and remarks.
    """
    artefacts = bundle.artefacts(kind="onnx", precision="bf16")
    with stages.stage("verdicts in bf16") as stage:
        if not artefacts or not bundle.artefacts(kind="onnx", precision="fp32"):
            stage.note("not in this bundle")
            return bundle
        try:
            found = _verdict(bundle, artefacts[0], judge, stage)
        except SimulationError as error:
            stage.note(f"not compared: {error.what}")
            return bundle
        stage.note(str(found))
    if found.passed or "bf16" in asked:
        if not found.passed:
            stages.say(f"  bf16 was asked for and stays. {_limit()}", "yellow")
        return _noted(bundle, artefacts[0], found)
    words = ",".join([*asked, "bf16"])
    stages.say(f"  bf16 is left out: {_limit()} To ship it all the same: --precision {words}", "yellow")
    return without_artefact(bundle, artefacts[0])


def _limit() -> str:
    return f"more than {MOST_FLIPS:.0%} of the verdicts differ from those in FP32, or the maps are worse."


def _verdict(bundle: Bundle, artefact: Artefact, judge: Judge, stage: Stage) -> Verdict:
    reference = judge.reference(bundle, stage)
    with open_artefact(bundle, artefact) as engine:
        return compare_quality(reference, judge.quality(engine, stage))


def _noted(bundle: Bundle, artefact: Artefact, found: Verdict) -> Bundle:
    """The bundle with what was found in the manifest."""
    manifest = bundle.manifest
    noted = dataclasses.replace(artefact, options={**artefact.options, "gate": found.to_json()})
    artefacts = tuple(noted if item == artefact else item for item in manifest.artefacts)
    return update_bundle(bundle, dataclasses.replace(manifest, artefacts=artefacts), {})
