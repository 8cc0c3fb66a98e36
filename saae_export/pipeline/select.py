"""`--select`: fits several configurations and takes the one that tells simulated defects best from the good images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from saae_runtime.errors import ConfigError
from saae_runtime.estimate import DEFAULT_FALSE_ALARMS
from saae_runtime.terminal import Stages
from saae_train.calibrate import Calibration, calibrate
from saae_train.config import FitConfig, preset
from saae_train.data.category import Category
from saae_train.selftest.choose import Choice, Tried, choose
from saae_train.selftest.run import selftest

from ..parity.pytorch import TorchReference
from .fit import fit_model
from .images import shared_size
from .options import FitRequest, parse_frame_size

__all__ = ["CHOICES", "HELD_OUT", "Trial", "choices_of", "select_config", "try_configs"]

HELD_OUT = 0.25
"""Share of the good images that the choice is made on; the chosen configuration is then fitted on all of them."""


def _like(name: str) -> Callable[[FitConfig], FitConfig]:
    other = preset(name)
    return lambda config: config.replace(layers=other.layers, input_size=other.input_size)


CHOICES: Mapping[str, Callable[[FitConfig], FitConfig]] = {
    "as given": lambda config: config,
    "fewer pixels": lambda config: config.replace(input_size=(280, 280)),
    "lite": _like("lite"),
    "small": _like("small"),
    "joint": lambda config: config.with_values({"score": "joint"}),
}
"""Name -> how the given configuration is changed: its size, its layers, its score."""


def choices_of(text: str | None) -> tuple[str, ...]:
    """The names in `auto` or `lite,joint`; the given configuration is always the first.

    Raises:
        ConfigError: an unknown name.
    """
    if text is None:
        return ()
    first, *rest = CHOICES
    names = rest if text.strip() == "auto" else [part.strip() for part in text.split(",") if part.strip()]
    unknown = [name for name in names if name not in CHOICES]
    if unknown or not names:
        raise ConfigError(
            f"--select {text} is not possible.", f"Known are: auto, {', '.join(rest)}.", "--select auto, or lite,joint"
        )
    return tuple(dict.fromkeys([first, *names]))


@dataclass(frozen=True)
class Trial:
    """One configuration, fitted on a part of the good images and tried on the rest.

    Attributes:
        reference: scores frames.
        good: thresholds and scores of the good images that it was not fitted on.
        tried: its simulated defects, for the choice.
    """

    reference: TorchReference
    good: Calibration
    tried: Tried


def select_config(config: FitConfig, trials: Iterable[Trial], stages: Stages) -> tuple[FitConfig, Choice]:
    """Choose among the tried configurations, and print the figures that decided.

    Args:
        config: the given one, whose changes were tried.
        trials: from `try_configs`.
        stages: where the table is printed.

    Raises:
        SaaeError: of the kind that a trial raises.
    """
    choice = choose([trial.tried for trial in trials])
    stages.console.print(_table(choice))
    stages.say(f"  taken: {choice.name}")
    return CHOICES[choice.name](config), choice


def try_configs(
    request: FitRequest,
    names: tuple[str, ...],
    frame_size: str,
    frames: int,
    category: Category,
    work: Path,
    stages: Stages,
) -> Iterator[Trial]:
    """Fit each configuration on a part of the images, and draw the same simulated defects on the rest for all.

    A model with a memory holds patches of the images that it was fitted on, so it scores them lower than new ones. On
    images that no model was fitted on, scores with and without a memory can be compared.

    Args:
        request: of the build; its configuration is the one that is changed.
        names: of `CHOICES`.
        frame_size: of the build.
        frames: images with a simulated defect.
        category: the images.
        work: folder of fitted models.
        stages: progress; two for each name.

    Raises:
        SaaeError: of the kind that a fit or the self-test raises.
    """
    size = parse_frame_size(frame_size, shared_size(category.train))
    for name in names:
        config = CHOICES[name](request.config).with_values({"held_out": HELD_OUT})
        model = fit_model(dataclasses.replace(request, config=config), category, work, stages)
        reference = TorchReference(model.checkpoint.detector, size or model.checkpoint.detector.backbone.input_size)
        with stages.stage(f"simulated defects: {name}") as stage:
            unseen = model.split.held_out
            good = calibrate(reference, unseen, image_fpr=DEFAULT_FALSE_ALARMS, estimate=True)
            test = selftest(
                reference,
                unseen,
                threshold=good.pixel.at(),
                image_threshold=good.image.at(),
                frames=frames,
                synthetic=category.synthetic,
                progress=stage,
            )
        yield Trial(reference, good, Tried(name, test, good.scores))


def _table(choice: Choice) -> Table:
    table = Table("configuration", title="SIMULATED defects", title_justify="left")
    for heading in ("image ROC-AUC", "ahead, in standard errors", "found"):
        table.add_column(heading, justify="right")
    for name, value in choice.separation.items():
        mark = " (taken)" if name == choice.name else ""
        table.add_row(
            name + mark, f"{100 * value:.1f}", f"{choice.ahead[name]:+.1f}", f"{100 * choice.found[name]:.0f} %"
        )
    return table
