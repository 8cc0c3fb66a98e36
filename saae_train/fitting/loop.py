"""The training loop (paper section 4.1.2): seeded, resumable, on a GPU captured as a CUDA graph."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from saae_runtime.errors import FitError, StorageError
from saae_runtime.folders import atomic_directory
from saae_runtime.progress import Progress, silent

from ..config import FitConfig
from ..model.detector import FeatureSpace, Projected, anomaly_score
from ..model.saae import SAAE
from ..model.tensors import write_tensors
from .cuda_graph import Captured, recorder_for
from .features import FeatureSet
from .precision import arithmetic, matmul_precision
from .process import ctrl_c_after_the_step, set_for_training

__all__ = ["Loop", "Reporter"]

_SAVE_EVERY_SECONDS = 30.0


@dataclass(frozen=True)
class Reporter:
    """Callbacks for progress; each is called often and must return quickly.

    Attributes:
        features: called with (done, total).
        steps: called with (steps done, steps in all, loss).
        memory: called with (done, total, what) while the memory is built.
        say: called with a line of text.
    """

    features: Progress = silent
    steps: Callable[[int, int, float], None] = lambda done, total, loss: None
    memory: Progress = silent
    say: Callable[[str], None] = lambda text: None


class Loop:
    """The training loop with its saved state: weights, moments and step (the order of images follows from the seed)."""

    def __init__(
        self,
        saae: SAAE,
        space: FeatureSpace,
        features: FeatureSet,
        config: FitConfig,
        device: torch.device,
        state: Path,
    ) -> None:
        self.model = saae.to(device).train()
        self.space = space.to(device)
        self.features, self.config, self.device, self.state = features, config, device, state
        per_epoch = max(1, math.ceil(len(features) / config.batch))
        self.total = per_epoch * int(config.epochs or 1) if config.steps is None else config.steps
        self.recorder = recorder_for(device)
        recorded = self.recorder is not None
        # A captured step reads the rate from a tensor, which is written before each step.
        rate = torch.tensor(config.learning_rate, device=device) if recorded else config.learning_rate
        self.optimizer = torch.optim.Adam(saae.parameters(), lr=rate, fused=True, capturable=recorded)
        self.arithmetic = arithmetic(config.precision, device)
        self.step = self.captured_steps = 0
        self.whole = True  # the saved state is consistent
        self.told = False  # that the state cannot be saved
        self.seconds = 0.0
        self.history: list[tuple[int, float]] = []
        self.average = 0.0
        # Reading a number makes the CPU wait for the GPU, so it is rarely done there.
        self.read_every = 20 if device.type == "cuda" else 1
        self.unread: list[Tensor] = []
        with matmul_precision(self.arithmetic, device):
            self.resident = self._resident()
        self.picked = torch.zeros(config.batch, dtype=torch.int64, device=device)

    def _resident(self) -> Projected | None:
        """All features in the SAAE's space on the device, if they fit; None: batches are read from disk."""
        needed = len(self.features) * self.features.values.shape[1] * self.space.channels * 2
        if needed > _free_memory(self.device) // 2:
            return None
        return self._project(range(len(self.features)))

    def _project(self, indices: Iterable[int]) -> Projected:
        """Images in the SAAE's space, in half precision; one at a time, so that a batch does not change the result."""
        g, residual_energy = [], []
        for index in indices:
            with torch.no_grad():
                part = self.space(self.features.rows(index, index + 1).to(self.device))
            g.append(part.g.half())
            if part.residual_energy is not None:
                residual_energy.append(part.residual_energy)
        return Projected(torch.cat(g), torch.cat(residual_energy) if residual_energy else None)

    def _step_on_resident(self) -> Tensor:
        """A step on the images in `picked`; it reads and writes tensors in place (see `cuda_graph.Captured`)."""
        assert self.resident is not None
        g, residual_energy, _ = self.resident
        return self._train(Projected(g[self.picked], None if residual_energy is None else residual_energy[self.picked]))

    def _pick(self, indices: list[int]) -> None:
        picked = torch.tensor(indices)
        # Pinned memory is not reused before it was read, so there is no need to wait for the copy.
        self.picked.copy_(picked.pin_memory() if self.device.type == "cuda" else picked, non_blocking=True)

    def run(self, watch: Reporter) -> list[tuple[int, float]]:
        """Train to the end; return (step, mean loss per position) pairs."""
        self._resume(watch)
        if self.recorder is not None and self.resident is None:
            watch.say("the features do not fit into the GPU's memory: they are read from disk, step by step")
        step = Captured(self._step_on_resident, self.recorder, watch.say)
        started, saved, before = time.monotonic(), time.monotonic(), self.seconds
        first = self.step
        try:
            with set_for_training(), ctrl_c_after_the_step() as stopped:
                while self.step < self.total:
                    self._advance(step)
                    self.seconds = before + time.monotonic() - started
                    if len(self.unread) >= self.read_every or self.step == self.total:
                        self._read()
                    watch.steps(self.step, self.total, self.average)
                    if stopped():
                        raise KeyboardInterrupt
                    if time.monotonic() - saved > _SAVE_EVERY_SECONDS:
                        self._save_if_possible(watch)
                        saved = time.monotonic()
                if self.step > first:
                    self._save_if_possible(watch)
                if stopped():
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            if self.whole:  # half a step has changed the norms' statistics: keep the state saved before
                self._save_if_possible(watch)
            raise
        self.captured_steps = step.replayed
        return self.history

    def _advance(self, step: Captured) -> None:
        self.whole = False
        rate = self._rate()
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate
        with matmul_precision(self.arithmetic, self.device):
            if self.resident is None:
                value = self._train(self._project(self._indices()))
            else:
                self._pick(self._indices())
                value = step()
        self.unread.append(value)
        self.step += 1
        self.whole = True

    def _train(self, batch: Projected) -> Tensor:
        """One step of the optimiser; returns the loss per position."""
        value = self._gradients(batch)
        if self.config.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        return value

    def _gradients(self, batch: Projected) -> Tensor:
        """Gradients of eq. (2), the sum of A over positions, averaged over the batch; returns it per position."""
        self.optimizer.zero_grad(set_to_none=True)
        bf16 = self.arithmetic == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            g_hat = self.model(batch.g.to(torch.bfloat16 if bf16 else torch.float32))
        value = anomaly_score(batch, g_hat, self.config.loss).sum(dim=1).mean()
        value.backward()
        return value.detach() / batch.g.shape[1]

    def _read(self) -> None:
        """Record the losses of the steps since the last call. Raises FitError if one is not finite."""
        first = self.step - len(self.unread)
        numbers = torch.stack(self.unread).tolist()
        self.unread.clear()
        for step, number in enumerate(numbers, first + 1):
            if not math.isfinite(number):
                raise FitError(
                    f"The loss became {number} at step {step}.",
                    "The learning rate is too high for these features, or the features are not finite.",
                    "fit again with --learning-rate a third of it, or --fit-precision fp32",
                )
            self.average = number if not self.average else 0.9 * self.average + 0.1 * number
            if step % max(1, self.total // 100) == 0 or step == self.total:
                self.history.append((step, round(self.average, 6)))

    def _rate(self) -> float:
        config, done = self.config, self.step
        rate = config.learning_rate * min(1.0, (done + 1) / max(1, config.warmup))
        if config.cosine_decay:
            rate *= 0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * done / self.total))
        return rate

    def _indices(self) -> list[int]:
        """Images of this step: consecutive pieces of seeded permutations."""
        count, batch = len(self.features), self.config.batch
        first = self.step * batch
        picked = []
        for position in range(first, first + batch):
            epoch, place = divmod(position, count)
            picked.append(self._order(epoch)[place])
        return picked

    def _order(self, epoch: int) -> list[int]:
        if getattr(self, "_order_epoch", None) != epoch:
            generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
            self._order_list = torch.randperm(len(self.features), generator=generator).tolist()
            self._order_epoch = epoch
        return self._order_list

    # -- the saved state ------------------------------------------------------------------------------------------

    def _save_if_possible(self, watch: Reporter) -> None:
        """Save the state; where it cannot be written, say so once and go on: only a stopped fit needs it."""
        try:
            self._save()
        except StorageError as error:
            if not self.told:
                watch.say(f"a fit that is stopped cannot be resumed from here: {error.what}")
            self.told = True

    def _save(self) -> None:
        if self.unread:
            self._read()  # never save NaN or infinity
        tensors = {f"model.{key}": value for key, value in self.model.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors.update({f"adam.{index}.{key}": torch.as_tensor(value) for key, value in values.items()})
        with atomic_directory(self.state) as folder:
            write_tensors(folder / "s.safetensors", tensors)
            record = {"step": self.step, "seconds": self.seconds, "average": self.average, "history": self.history}
            (folder / "s.json").write_text(json.dumps(record))

    def _resume(self, watch: Reporter) -> None:
        with suppress(OSError, ValueError, KeyError, RuntimeError, SafetensorError):
            record = json.loads((self.state / "s.json").read_text())
            step, seconds, average = int(record["step"]), float(record["seconds"]), float(record.get("average", 0.0))
            history = [(int(at), float(loss)) for at, loss in record["history"]]
            tensors = load_file(self.state / "s.safetensors")
            self.model.load_state_dict(
                {key[len("model.") :]: value for key, value in tensors.items() if key.startswith("model.")}
            )
            moments: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith("adam."):
                    _, index, name = key.split(".", 2)
                    moments.setdefault(int(index), {})[name] = value
            state = self.optimizer.state_dict()
            self.optimizer.load_state_dict({"state": moments, "param_groups": state["param_groups"]})
            self.step, self.seconds, self.average, self.history = step, seconds, average, history
            watch.say(f"resuming at step {self.step} of {self.total}")


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return min(int(line.split()[1]) * 1024, 8 << 30)
    return 4 << 30
