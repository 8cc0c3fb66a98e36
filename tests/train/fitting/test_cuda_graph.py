"""A step that is recorded and played back: the same fit as without, on a recorder that runs no Python again."""

from __future__ import annotations

import dataclasses
import inspect
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_recorder import FakeRecorder
from tiny_models import noise_samples

from saae_train.config import FitConfig
from saae_train.data.category import Sample
from saae_train.fitting import loop as module
from saae_train.fitting.cuda_graph import EAGER_STEPS, Captured
from saae_train.fitting.fit import fit
from saae_train.fitting.loop import Reporter
from saae_train.model.checkpoint import Checkpoint, discard_state
from saae_train.model.vit import build_backbone

SIZE = (48, 48)
STEPS = 12
# The rate changes in every step, and three of seven images make every batch another one.
TINY = FitConfig(
    preset="test",
    input_size=SIZE,
    components=24,
    latent=6,
    loss="cosine",
    score="cosine",
    memory=None,
    held_out=0.15,
    cosine_decay=True,
    clip=0.05,
    steps=STEPS,
    batch=3,
    warmup=4,
    learning_rate=3e-3,
    precision="fp32",
)
CONFIGS = {
    "clipped, cosine": TINY,
    "l2, components": dataclasses.replace(TINY, loss="l2", score="l2"),
    "paper: raw, l2, constant rate": dataclasses.replace(
        TINY, standardise=False, components=None, loss="l2", score="l2", warmup=0, cosine_decay=False, clip=None
    ),
    "CAE": dataclasses.replace(TINY, transformer=False),
    "bf16": dataclasses.replace(TINY, precision="bf16"),
}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return noise_samples(tmp_path_factory.mktemp("images"), 7, SIZE)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


class Fits:
    """Fits with a given recorder, or with none."""

    def __init__(self, samples: list[Sample], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.samples, self.cache, self.patch = samples, cache, monkeypatch
        self.said: list[str] = []
        self.steps: list[int] = []

    def __call__(
        self, config: FitConfig, recorder: FakeRecorder | None, stop: int = -1, device: str = "cpu"
    ) -> Checkpoint:
        def step(done: int, total: int, loss: float) -> None:
            self.steps.append(done)
            if done == stop:
                raise KeyboardInterrupt

        self.said.clear()
        self.steps.clear()
        if device == "cpu":
            self.patch.setattr(module, "recorder_for", lambda device: recorder)
        backbone = build_backbone("test_vit2", (0, 2), SIZE, "random")
        watch = Reporter(steps=step, say=self.said.append)
        found = fit(backbone, self.samples, config, "thing", device=device, cache=self.cache, reporter=watch)
        discard_state(found)
        return found


@pytest.fixture
def fits(samples: list[Sample], cache: Path, monkeypatch: pytest.MonkeyPatch) -> Fits:
    return Fits(samples, cache, monkeypatch)


def assert_same(a: Checkpoint, b: Checkpoint) -> None:
    """Weights, the norms' statistics and losses, bit for bit."""
    first, second = a.detector.state_dict(), b.detector.state_dict()
    assert set(first) == set(second)
    assert any(name.endswith("running_var") for name in first)
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []
    assert a.record.loss == b.record.loss


# --- the recorder itself ---


def test_a_replay_computes_what_was_recorded_and_runs_no_python() -> None:
    calls, number = [0], [1.0]
    given, state = torch.zeros(3), torch.full((3,), 5.0)
    recorder = FakeRecorder()

    def work() -> torch.Tensor:
        calls[0] += 1
        state.mul_(2)
        return (given.view(1, 3).t() * number[0] + state.unsqueeze(1)).sum()

    result = recorder.record(work)
    assert state.tolist() == [5.0] * 3  # recording executes nothing
    for turn in (1, 2):
        given.fill_(10.0 * turn)
        number[0] = 1000.0
        recorder.replay()
        assert state.tolist() == [5.0 * 2**turn] * 3
        assert float(result) == 3 * (10.0 * turn * 1.0 + 5.0 * 2**turn)  # the number is that of the recording
    assert calls == [1]


def test_reading_a_number_back_is_refused_and_undone() -> None:
    state = torch.ones(2)

    def work() -> torch.Tensor:
        state.add_(1)
        return state * float(state.sum())

    with pytest.raises(RuntimeError, match="not permitted"):
        FakeRecorder().record(work)
    assert state.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("frozen", ["rate", "batch"])
def test_what_python_took_while_recording_would_show(fits: Fits, monkeypatch: pytest.MonkeyPatch, frozen: str) -> None:
    """The comparison below can fail: with a rate or a batch that is no tensor written anew, it does."""
    eager = fits(TINY, FakeRecorder(refuse_at=0))
    recorder = FakeRecorder()
    if frozen == "rate":
        real = torch.optim.Adam.step

        def step(self: Any, *arguments: Any) -> Any:
            rate = self.param_groups[0]["lr"]
            # A number without reading it back: the recording could not be told from one with a plain float.
            self.param_groups[0]["lr"] = loops[-1]._rate()
            found = real(self, *arguments)
            self.param_groups[0]["lr"] = rate
            return found

        loops: list[Any] = []
        began = module.Loop.__init__

        def begin(self: Any, *arguments: Any) -> None:
            began(self, *arguments)
            loops.append(self)

        monkeypatch.setattr(module.Loop, "__init__", begin)
        monkeypatch.setattr(torch.optim.Adam, "step", step)
    else:
        monkeypatch.setattr(
            module.Loop,
            "_step_on_resident",
            lambda self: self._train(
                module.Projected(*(x if x is None else x[self._indices()] for x in self.resident))
            ),
        )
    found = fits(TINY, recorder)
    assert recorder.replayed == STEPS - EAGER_STEPS
    with pytest.raises(AssertionError):
        assert_same(eager, found)


# --- fits ---


@pytest.mark.parametrize("name", CONFIGS)
def test_played_back_it_is_the_same_fit(fits: Fits, name: str) -> None:
    config, recorder, refusing = CONFIGS[name], FakeRecorder(), FakeRecorder(refuse_at=0)
    found = fits(config, recorder)
    assert (recorder.warmed_up, recorder.recorded) == (EAGER_STEPS, 1)
    assert recorder.replayed == found.record.captured_steps == STEPS - EAGER_STEPS
    assert fits.said == ["principal components of the features"]
    eager = fits(config, refusing)
    assert eager.record.captured_steps == refusing.replayed == 0
    assert_same(found, eager)
    # Without a recorder the rate is a float, not a tensor in single precision. (Biases before a norm have gradients of
    # rounding noise alone, which Adam makes as large as the others: they are not compared.)
    losses = [loss for _, loss in fits(config, None).record.loss]
    assert len(losses) == STEPS
    assert losses == pytest.approx([loss for _, loss in found.record.loss], rel=1e-4 if name != "bf16" else 1e-2)


def test_all_that_a_step_does_is_recorded(fits: Fits) -> None:
    """Gather, norms, clipping and optimiser: what is missing on the tape was done by nobody."""
    recorder = FakeRecorder()
    fits(TINY, recorder)
    assert recorder.tape is not None
    names = recorder.tape.names
    for part in ("index", "native_batch_norm", "native_batch_norm_backward", "clamp", "_fused_adam_", "_foreach_add_"):
        assert any(name.startswith(part) for name in names), part
    assert "_local_scalar_dense" not in names


def test_losses_read_now_and_then_are_not_written_over(fits: Fits, monkeypatch: pytest.MonkeyPatch) -> None:
    every = fits(TINY, FakeRecorder())
    real = module.Loop.__init__

    def rarely(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        self.read_every = 5

    monkeypatch.setattr(module.Loop, "__init__", rarely)
    assert_same(every, fits(TINY, FakeRecorder()))


@pytest.mark.parametrize("refuse_at", [0, 40, 200])
def test_a_refused_recording_leaves_no_trace(fits: Fits, refuse_at: int) -> None:
    whole, recorder = fits(TINY, FakeRecorder()), FakeRecorder(refuse_at)
    found = fits(TINY, recorder)
    assert (recorder.recorded, recorder.replayed) == (1, 0)
    (line,) = fits.said[1:]
    assert "goes on without: operation not permitted" in line
    assert_same(whole, found)


@pytest.mark.parametrize(
    ("after", "captured"), [(EAGER_STEPS - 1, True), (EAGER_STEPS, True), (9, True), (EAGER_STEPS + 1, False)]
)
def test_a_captured_fit_that_was_stopped_goes_on(fits: Fits, after: int, captured: bool) -> None:
    whole = fits(TINY, FakeRecorder())
    with pytest.raises(KeyboardInterrupt):
        fits(TINY, FakeRecorder(), stop=after)
    recorder = FakeRecorder(None if captured else 0)
    found = fits(TINY, recorder)
    assert fits.steps[0] == after + 1
    assert recorder.replayed == (max(0, STEPS - after - EAGER_STEPS) if captured else 0)
    assert_same(whole, found)


def test_a_real_ctrl_c_waits_for_the_replay(fits: Fits, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fits(TINY, FakeRecorder())
    real = FakeRecorder.replay

    def press(self: FakeRecorder) -> None:
        if self.replayed == 2:
            os.kill(os.getpid(), signal.SIGINT)
        real(self)

    with monkeypatch.context() as patch:
        patch.setattr(FakeRecorder, "replay", press)
        with pytest.raises(KeyboardInterrupt):
            fits(TINY, FakeRecorder())
    assert fits.steps[-1] == EAGER_STEPS + 3
    assert_same(whole, fits(TINY, FakeRecorder()))
    assert fits.steps[0] == EAGER_STEPS + 4


def test_features_on_disk_are_not_captured(fits: Fits, monkeypatch: pytest.MonkeyPatch) -> None:
    resident = fits(TINY, FakeRecorder())
    monkeypatch.setattr(module, "_free_memory", lambda device: 0)
    recorder = FakeRecorder()
    found = fits(TINY, recorder)
    assert (recorder.warmed_up, recorder.recorded) == (0, 0)
    assert any("read from disk" in line for line in fits.said)
    assert_same(resident, found)


def test_an_error_that_is_no_refusal_is_not_swallowed() -> None:
    def broken() -> torch.Tensor:
        if state.item():
            raise ValueError("a mistake")
        return state.clone()

    state, said = torch.zeros(()), []
    step = Captured(broken, FakeRecorder(), said.append)
    for _ in range(EAGER_STEPS + 2):
        step()
    assert len(said) == 1
    state.fill_(1)
    with pytest.raises(ValueError, match="a mistake"):
        step()


class Ending(FakeRecorder):
    """Ends as a spoilt capture does: with a complaint of its own on top of the reason."""

    def record(self, step: Any) -> Any:
        try:
            return super().record(step)
        finally:
            raise RuntimeError("capture was invalidated")


def test_the_reason_is_said_and_a_ctrl_c_is_no_refusal() -> None:
    def interrupted() -> torch.Tensor:
        if asked:
            raise asked[0]
        return state * 1

    state, said, asked = torch.zeros(()), [], []
    for error in (RuntimeError("out of memory\nand more"), KeyboardInterrupt()):
        asked.clear()
        step = Captured(interrupted, Ending(), said.append)
        for _ in range(EAGER_STEPS):
            step()
        asked.append(error)
        with pytest.raises(type(error)):  # of the recording, and of the step that is run instead
            step()
    assert len(said) == 1
    assert said[0].endswith("goes on without: out of memory")


def test_no_recorder_on_a_cpu() -> None:
    assert module.recorder_for(torch.device("cpu")) is None


def test_the_installed_pytorch_takes_what_is_asked_of_it() -> None:
    assert {"stream", "capture_error_mode"} <= set(inspect.signature(torch.cuda.graph.__init__).parameters)
    text = inspect.getsource(torch.optim.Optimizer)
    assert "capturable=True" in text  # the warning that is not passed on in the first steps


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", CONFIGS)
def test_on_a_gpu_a_graph_is_the_same_fit(fits: Fits, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    config = dataclasses.replace(CONFIGS[name], steps=40)
    captured = fits(config, None, device="cuda")
    assert captured.record.captured_steps == 40 - EAGER_STEPS
    assert len(fits.said) == 1

    def refuse(self: Any, step: Any) -> Any:
        raise RuntimeError("not today")

    with pytest.raises(KeyboardInterrupt):
        fits(config, None, stop=20, device="cuda")
    resumed = fits(config, None, device="cuda")
    assert fits.steps[0] == 21
    monkeypatch.setattr("saae_train.fitting.cuda_graph.CudaRecorder.record", refuse)
    eager = fits(config, None, device="cuda")
    assert eager.record.captured_steps == 0
    assert "not today" in fits.said[-1]
    # Attention's gradients are summed in no fixed order there, so bits may differ; a step missed or done twice, a wrong
    # rate or batch change the losses by far more.
    wanted = [loss for _, loss in eager.record.loss]
    for found in (captured, resumed):
        assert [loss for _, loss in found.record.loss] == pytest.approx(wanted, rel=1e-2)
        for key, value in eager.detector.state_dict().items():
            if key.endswith(("running_mean", "running_var", "num_batches_tracked")):
                torch.testing.assert_close(found.detector.state_dict()[key], value, rtol=5e-2, atol=5e-2)
