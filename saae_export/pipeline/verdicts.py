"""Whether bf16 gives FP32's verdicts: a build ships it only then, unless it was asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from saae_runtime.bundle import Bundle, update_bundle
from saae_runtime.engine import Engine
from saae_runtime.errors import SimulationError
from saae_runtime.manifest import Artefact
from saae_runtime.progress import labelled
from saae_runtime.terminal import Stage, Stages
from saae_train.data.category import Category, Sample

from ..artefacts import CPU, open_artefact
from .bundle import without_artefact
from .quality import MOST_FLIPS, Quality, Verdict, compare_quality, quality

__all__ = ["Judge", "keep_verdicts"]


class Judge:
    """Measures engines on the test set, or on defects drawn onto the normal images; FP32 once in a build.

    Args:
        category: its test images.
        normal: to draw simulated defects onto if there are no real ones with masks.
    """

    def __init__(self, category: Category, normal: Sequence[Sample]) -> None:
        self._category, self._normal = category, normal
        self._reference: Quality | None = None

    def reference(self, bundle: Bundle, stage: Stage) -> Quality:
        """That of the bundle's FP32 graph.

        Raises:
            SimulationError: no test set, and nothing can be drawn onto these images.
        """
        if self._reference is None:
            with Engine(bundle, backend=CPU, precision="fp32", verify=False, cache=False) as engine:
                self._reference = self.quality(engine, stage)
        return self._reference

    def quality(self, engine: Engine, stage: Stage) -> Quality:
        """That of an engine at its own thresholds.

        Raises:
            SimulationError: as above.
        """
        return quality(engine, self._category, self._normal, labelled(stage, "judging quality"))


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
