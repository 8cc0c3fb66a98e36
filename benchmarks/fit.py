"""Time the fitting against plain PyTorch loops of the same model, interleaved step by step, in one process.

    python benchmarks/fit.py [--preset fast|paper] [--images 64] [--steps 30] [--weights random|packaged|auto|FILE]
                             [--normal FOLDER] [--device cpu|cuda] [--threads 2] [--out FILE]

Three ways, with the same images in the same order, the same first weights, rates and loss:

  saae             `saae_train.fitting.fit.fit` as it is, from features kept after one pass of the backbone;
  plain            float32, eager, torch.optim.Adam, from the same features, all in memory, PyTorch's defaults;
  plain, backbone  the same, but runs the frozen backbone on every batch, as a simple script would.

A step is everything from the choice of the batch to the new weights, synchronised on a GPU. `whole fit` adds what is
done once: reading the images, the backbone and the principal components, and for saae on a GPU the capture of the step;
it is for `--fit-steps` steps (default: the preset's). The plain loops get the feature space without its time. `loss` is
the running mean of all after the same steps. `precision` is the arithmetic of the products: by default PyTorch takes
TF32 for convolutions on a GPU, such as the backbone's patch projection. `peak_device_gib` is PyTorch's memory on the
GPU: of saae alone, before the plain loops start, and of the whole process with all three.
Without --normal, images are drawn at random, which changes the quality but not the speed.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from saae_runtime.errors import DataError, SaaeError

if TYPE_CHECKING:  # PyTorch comes late, for --help
    import torch

    from saae_train.data.category import Sample
    from saae_train.model.checkpoint import Checkpoint

WAYS = ("saae", "plain", "plain, backbone")
WARM_UP = 4
"""Steps that are not counted; on a GPU saae's step is captured in the last of them."""


class Plain:
    """A straightforward loop; with `pixels`, features are computed in every step."""

    def __init__(self, checkpoint: Any, features: Any, steps: int, device: Any, pixels: Any = None) -> None:
        import torch

        from saae_train.model.saae import SAAE

        old = checkpoint.detector.saae
        self.config, self.device, self.total, self.step = checkpoint.config, device, steps, 0
        self.detector, self.features, self.pixels = checkpoint.detector, features, pixels
        torch.manual_seed(self.config.seed)
        self.model = SAAE(
            old.channels,
            old.latent,
            old.positions,
            old.mlp_size,
            transformer=old.transformer,
            grid=old.grid,
            patch=old.patch,
        )
        self.model.to(device).train()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.config.learning_rate)
        self.order = self._order(len(pixels if pixels is not None else features))

    def _order(self, count: int) -> Iterator[int]:
        import torch

        epoch = 0
        while True:
            generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
            yield from torch.randperm(count, generator=generator).tolist()
            epoch += 1

    def __call__(self) -> float:
        """One step; the loss per position."""
        import torch

        config = self.config
        rate = config.learning_rate * min(1.0, (self.step + 1) / max(1, config.warmup))
        if config.cosine_decay:
            rate *= 0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * self.step / self.total))
        self.optimizer.param_groups[0]["lr"] = rate
        picked = [next(self.order) for _ in range(config.batch)]
        with torch.no_grad():
            if self.pixels is None:
                f = self.features[picked].to(self.device)
            else:
                f = self.detector.features(self.pixels[picked].to(self.device))
            projected = self.detector.space(f)
        value = plain_loss(projected, self.model(projected.g), config.loss).sum(dim=1).mean()
        self.optimizer.zero_grad()
        value.backward()
        if config.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        self.step += 1
        return value.item() / projected.g.shape[1]


def plain_loss(projected: Any, g_hat: Any, kind: str) -> Any:
    """The loss of every position as in a simple script: eq. (2), or the cosine distance."""
    import torch

    if kind == "cosine":
        return 1.0 - torch.nn.functional.cosine_similarity(projected.g, g_hat, dim=2)
    squared = (projected.g - g_hat).square().sum(dim=2)
    if projected.residual_energy is not None:
        squared = squared + projected.residual_energy
    return squared.clamp_min(1e-12).sqrt()


def interleaved_steps(
    fit: Callable[[Callable[[], None]], None], plain: dict[str, Plain], pause: Callable[[], None]
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each step and the running loss by way; between two steps of `fit` the others take one each."""
    seconds: dict[str, list[float]] = {name: [] for name in ("saae", *plain)}
    average: dict[str, float] = {}
    begin = time.perf_counter()

    def others() -> None:
        nonlocal begin
        pause()
        seconds["saae"].append(time.perf_counter() - begin)
        for name, step in plain.items():
            start = time.perf_counter()
            loss = step()
            pause()
            seconds[name].append(time.perf_counter() - start)
            average[name] = loss if name not in average else 0.9 * average[name] + 0.1 * loss
        begin = time.perf_counter()

    fit(others)
    return seconds, average


def draw(folder: Path, count: int, size: tuple[int, int]) -> Path:
    """Images of one smooth pattern with noise, as PNG."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(60, 190, (8, 8, 3), np.uint8)).resize(size[::-1], Image.Resampling.BICUBIC)
    for index in range(count):
        noisy = np.asarray(coarse, np.float32) + rng.normal(0, 12, (*size, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{index:04}.png")
    return folder


def samples_in(folder: Path, images: int) -> list[Sample]:
    """The first `images` images of a folder; DataError if it holds fewer."""
    from saae_train.data.category import Sample

    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".bmp"))
    if len(paths) < images:
        raise DataError(f"{folder} holds {len(paths)} images.", f"{images} are to be used.", "give --images")
    return [Sample(path, "good", None, False) for path in paths[:images]]


def measure(
    preset_name: str,
    folder: Path | None,
    images: int,
    steps: int,
    weights: str | None,
    device_name: str | None,
    fit_steps: int | None,
    changes: dict[str, Any],
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of the table, and what the model is."""
    import numpy as np
    import torch

    from saae_runtime.geometry import resize_frames
    from saae_train.config import preset
    from saae_train.fitting.cuda_graph import EAGER_STEPS
    from saae_train.fitting.features import extract, pick_device
    from saae_train.fitting.fit import fit
    from saae_train.fitting.loop import Reporter
    from saae_train.fitting.precision import reached
    from saae_train.model.checkpoint import discard_state
    from saae_train.model.vit import build_backbone, choose_layers

    config, device = preset(preset_name).replace(**changes), pick_device(device_name)
    whole = fit_steps or config.steps or int(config.epochs or 1) * math.ceil(images / config.batch)
    backbone = build_backbone(
        config.backbone, config.layers or choose_layers(config.backbone)[0], config.input_size, weights
    )
    on_gpu = device.type == "cuda"
    pause = partial(torch.cuda.synchronize, device) if on_gpu else lambda: None
    # First saae alone, up to the captured step, to measure what is done once, and the memory.
    alone = EAGER_STEPS + 1 if on_gpu else 1
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        samples = samples_in(folder or draw(scratch, images, config.input_size), images)
        start = time.perf_counter()
        first = fit(backbone, samples, config.replace(steps=alone), "fit", device=str(device), cache=scratch)
        spent = time.perf_counter() - start
        peak = {"saae": _peak_device_gib(device)}
        discard_state(first)
        first.detector.to(device)
        features = extract(backbone, samples, scratch, device, config.precision)
        values = torch.from_numpy(np.asarray(features.values, np.float32))
        frames = np.stack([resize_frames(sample.read(), config.input_size) for sample in samples])
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
        plain = {
            "plain": Plain(first, values.to(device), steps, device),
            "plain, backbone": Plain(first, None, steps, device, pixels.to(device)),
        }
        last: list[float] = []

        def ours(others: Callable[[], None]) -> None:
            def step(done: int, total: int, loss: float) -> None:
                others()
                last.append(loss)

            checkpoint = fit(
                build_backbone(config.backbone, backbone.layers, config.input_size, weights),
                samples,
                config.replace(steps=steps),
                "fit",
                device=str(device),
                cache=scratch,
                reporter=Reporter(steps=step),
            )
            discard_state(checkpoint)

        seconds, loss = interleaved_steps(ours, plain, pause)
    loss["saae"] = last[-1]
    peak["all"] = _peak_device_gib(device)
    # The first steps warm up; the first of saae includes what comes before it.
    timings = {name: common.Timing.of(values[min(WARM_UP, len(values) - 1) :]) for name, values in seconds.items()}
    once = {
        "saae": max(0.0, spent - alone * timings["saae"].median_ms / 1000),
        "plain": spent - (first.record.seconds_fit or 0.0),
    }
    precision = {"saae": first.record.precision, "plain": reached(device, False)}
    precision = {name: precision.get(name, reached(device, True)) for name in WAYS}
    rows = [_row(name, precision[name], timings, config.batch, whole, once, loss, peak) for name in WAYS]
    return rows, _about(first, whole, device, peak["all"])


def _about(checkpoint: Checkpoint, fit_steps: int, device: torch.device, peak: float | None) -> dict[str, Any]:
    """What the fitted model is, for the result file."""
    import torch

    config, backbone, saae = checkpoint.config, checkpoint.detector.backbone, checkpoint.detector.saae
    return {
        "backbone": config.backbone,
        "input_size": list(config.input_size),
        "layers": list(backbone.layers),
        "latent": saae.latent,
        "channels": saae.channels,
        "weights": backbone.weights.source,
        "whole_fit_steps": fit_steps,
        "batch": config.batch,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "captured": checkpoint.record.captured_steps > 0,
        "peak_device_gib": peak,
    }


def _row(
    name: str,
    precision: str | None,
    timings: Mapping[str, common.Timing],
    batch: int,
    steps: int,
    once: Mapping[str, float],
    loss: Mapping[str, float],
    peak: Mapping[str, float | None],
) -> dict[str, Any]:
    """Row of one way: its step, and a whole fit of `steps` steps."""
    step_s = timings[name].median_ms / 1000
    return {
        "way": name,
        "precision": precision,
        "images_per_second": batch / step_s,
        "ratio": timings["plain"].median_ms / timings[name].median_ms,
        "once_s": round(once[name], 2) if name in once else None,
        "whole_fit_s": round(step_s * steps + once.get(name, 0.0), 1),
        "loss": loss[name],
        "peak_device_gib": peak.get(name),
        "timing": timings[name].to_json(),
    }


def _peak_device_gib(device: Any) -> float | None:
    """PyTorch's peak memory on a GPU, including freed memory that it keeps; None on a CPU."""
    import torch

    return round(torch.cuda.max_memory_reserved(device) / 2**30, 3) if device.type == "cuda" else None


def main(
    preset: Annotated[str, typer.Option(help="fast or paper")] = "fast",
    images: Annotated[int, typer.Option(help="normal images")] = 64,
    steps: Annotated[int, typer.Option(help="steps of each way; the first four are not counted")] = 30,
    fit_steps: Annotated[int | None, typer.Option(help="steps of a whole fit; default: the preset's")] = None,
    weights: Annotated[str, typer.Option(help="of the backbone: random, auto, packaged or a file")] = "random",
    normal: Annotated[Path | None, typer.Option(help="folder of normal images; default: drawn")] = None,
    latent: Annotated[int | None, typer.Option(help="V; default: from the features")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, bf16, tf32 or fp32; default: the preset's")] = None,
    device: Annotated[str | None, typer.Option(help="torch device")] = None,
    threads: Annotated[int | None, typer.Option(help="processor cores")] = None,
    out: Annotated[Path | None, typer.Option(help="result file")] = None,
) -> None:
    """Time the fitting; print and write the table."""
    if threads:
        common.use_threads(threads)
    common.print_machine()
    changes = {"latent": latent, "precision": precision}
    chosen = None if weights == "auto" else weights
    try:
        rows, model = measure(preset, normal, images, steps, chosen, device, fit_steps, changes)
    except SaaeError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(error.exit_code) from error
    data = common.result(
        "fit-cpu" if model["device"] == "cpu" else "fit",
        rows,
        settings={"preset": preset, "images": images, "steps": steps, "threads": threads},
        inside="a step: from the choice of the batch to the new weights; whole fit: steps and what comes once",
        model=model,
    )
    common.print_table(
        f"Fitting, preset {preset}, {images} images, batches of {model['batch']}",
        ["way", "precision", "images/s", "times plain", "ms a step", "whole fit, s", "loss", "GPU, GiB"],
        [
            (
                *(row[key] for key in ("way", "precision", "images_per_second", "ratio")),
                row["timing"]["median_ms"],
                row["whole_fit_s"],
                row["loss"],
                row["peak_device_gib"],
            )
            for row in rows
        ],
        [f"Written to {common.write_result(data, out)}"],
    )


if __name__ == "__main__":
    typer.run(main)
