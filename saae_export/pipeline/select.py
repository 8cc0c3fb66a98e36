"""`--select`: fits several configurations and takes the one that tells simulated defects best from the good images."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from saae_runtime.errors import ConfigError
from saae_runtime.estimate import DEFAULT_FALSE_ALARMS
from saae_runtime.terminal import Stages
from saae_train.calibrate import Calibration, calibrate
from saae_train.config import FitConfig, few_layers, preset
from saae_train.data.category import Category
from saae_train.fitting.backbone import check_geometry
from saae_train.fitting.fit import check_scheme
from saae_train.model.vgg import PIXELS, VGGFeatures
from saae_train.model.vit import patch_size
from saae_train.selftest.choose import Choice, Tried, choose
from saae_train.selftest.run import selftest

from ..parity.pytorch import TorchReference
from .fit import fit_model
from .images import shared_size
from .options import FitRequest, parse_frame_size

__all__ = ["AUTO", "CHOICES", "HELD_OUT", "Trial", "choices_of", "possible_configs", "select_config", "try_configs"]

AUTO = "auto"
"""In place of names: all of `CHOICES` that are possible."""

HELD_OUT = 0.25
"""Share of the good images that the choice is made on; the chosen configuration is then fitted on all of them."""


def _fewer(config: FitConfig, name: str) -> FitConfig:
    """The configuration with the input size smaller by as much as a preset's is than the default's."""
    share = preset(name).input_size[0] / preset("fast").input_size[0]
    patch = patch_size(config.backbone)
    step = patch * (config.saae_patch or 1) if patch else _vgg_step(config)
    height, width = (max(step, round(share * side / step) * step) for side in config.input_size)
    return config.replace(input_size=(height, width))


def _vgg_step(config: FitConfig) -> int:
    """Pixels that are multiples of the largest stride of VGG19, and of the patches of its autoencoder."""
    return math.lcm(16, PIXELS * (config.saae_patch or VGGFeatures.saae_patch))


def _like(name: str) -> Callable[[FitConfig], FitConfig]:
    return lambda config: _fewer(config, name).replace(layers=few_layers(name, config.backbone))


CHOICES: Mapping[str, Callable[[FitConfig], FitConfig]] = {
    "as given": lambda config: config,
    "fewer pixels": lambda config: _fewer(config, "lite"),
    "lite": _like("lite"),
    "small": _like("small"),
    "joint": lambda config: config.with_values({"score": "joint"}),
}
"""Name -> how the given configuration is changed: its size, its layers, its score. ConfigError where that cannot be."""


def choices_of(text: str | None) -> tuple[str, ...]:
    """The names in `lite,joint`, after that of the given configuration; `AUTO` alone for `auto`; none for nothing.

    Raises:
        ConfigError: an unknown name.
    """
    if text is None:
        return ()
    if text.strip() == AUTO:
        return (AUTO,)
    first, *rest = CHOICES
    names = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [name for name in names if name not in CHOICES]
    if unknown or not names:
        raise ConfigError(
            f"--select {text} is not possible.",
            f"Known are: {AUTO}, {', '.join(rest)}.",
            f"--select {AUTO}, or lite,joint",
        )
    return tuple(dict.fromkeys([first, *names]))


def possible_configs(
    config: FitConfig, names: Sequence[str], frames: int
) -> tuple[dict[str, FitConfig], dict[str, str]]:
    """The configurations to choose from, checked before the first of them is fitted.

    Args:
        config: the given one.
        names: from `choices_of`.
        frames: images with a simulated defect.

    Returns:
        Name -> configuration, the given one first; and for `AUTO` name -> why it is left out.

    Raises:
        ConfigError: no frames; the given configuration, or one that was named, cannot be fitted or is the same as
            another one; nothing to choose from.
    """
    if not names:
        return {}, {}
    if frames < 1:
        raise ConfigError("--select needs at least one frame.", "It counts simulated defects.", "--selftest-frames 60")
    found: dict[str, FitConfig] = {}
    left: dict[str, str] = {}
    for name in CHOICES if tuple(names) == (AUTO,) else names:
        try:
            made = CHOICES[name](config)
            check_scheme(made)
            check_geometry(made)
        except ConfigError as error:
            if not found:  # the given one
                raise
            left[name] = f"{error.what} {error.why}".strip()
            continue
        same = next((other for other, known in found.items() if known == made), None)
        if same is None:
            found[name] = made
        else:
            left[name] = f"It is the same as `{same}` here."
    if left and (len(found) < 2 or tuple(names) != (AUTO,)):
        name, why = next(iter(left.items()))
        raise ConfigError(f"--select {name} is not possible with this configuration.", why, "leave it out")
    return found, left


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


def select_config(
    configs: Mapping[str, FitConfig], trials: Iterable[Trial], stages: Stages
) -> tuple[FitConfig, Choice]:
    """Choose among the tried configurations, and print the figures that decided.

    Args:
        configs: the ones that were tried, by name.
        trials: from `try_configs`.
        stages: where the table is printed.

    Raises:
        SaaeError: of the kind that a trial raises.
    """
    choice = choose([trial.tried for trial in trials])
    stages.console.print(_table(choice))
    stages.say(f"  taken: {choice.name}")
    return configs[choice.name], choice


def try_configs(
    request: FitRequest,
    configs: Mapping[str, FitConfig],
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
        request: of the build.
        configs: from `possible_configs`, by name.
        frame_size: of the build.
        frames: images with a simulated defect.
        category: the images.
        work: folder of fitted models.
        stages: progress; two for each name.

    Raises:
        SaaeError: of the kind that a fit or the self-test raises.
    """
    size = parse_frame_size(frame_size, shared_size(category.train))
    for name, config in configs.items():
        trial = config.with_values({"held_out": HELD_OUT})
        model = fit_model(dataclasses.replace(request, config=trial), category, work, stages)
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
