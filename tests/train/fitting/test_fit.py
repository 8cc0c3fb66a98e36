"""Fitting: deterministic, resumable at any step, the same from memory and from disk, and loud when it goes wrong."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_models import noise_frames, noise_samples

from saae_runtime.errors import ConfigError, FitError
from saae_train.config import FitConfig
from saae_train.data.category import Sample
from saae_train.fitting import loop as module
from saae_train.fitting.fit import fit
from saae_train.fitting.loop import Reporter
from saae_train.model.checkpoint import Checkpoint, discard_state
from saae_train.model.detector import memory_score
from saae_train.model.saae import latent_width
from saae_train.model.vit import ViTFeatures, build_backbone

SIZE = (48, 48)
TINY = FitConfig(
    preset="test",
    input_size=SIZE,
    standardise=True,
    components=24,
    component_power=0.25,
    latent=6,
    loss="cosine",
    cosine_decay=True,
    clip=1.0,
    steps=12,
    batch=4,
    warmup=3,
    learning_rate=3e-3,
    score="cosine",
    memory=None,
    held_out=0.15,
    precision="fp32",
)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return noise_samples(tmp_path_factory.mktemp("images"), 7, SIZE)


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features are the same for every test here; states are not kept after a fit that ended."""
    return tmp_path_factory.mktemp("cache")


def backbone() -> ViTFeatures:
    return build_backbone("test_vit2", (0, 2), SIZE, "random")


def run(samples: list[Sample], cache: Path, config: FitConfig = TINY, **options: Any) -> Checkpoint:
    found = fit(backbone(), samples, config, "thing", device="cpu", cache=cache, **options)
    discard_state(found)  # as if it was saved: the next fit begins anew
    return found


def weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return checkpoint.detector.state_dict()


def same(a: Checkpoint, b: Checkpoint) -> bool:
    first, second = weights(a), weights(b)
    assert set(first) == set(second)
    return all(torch.equal(value, second[key]) for key, value in first.items())


CONFIGS = {
    "cosine, components": TINY,
    "l2, components": dataclasses.replace(TINY, loss="l2", score="l2"),
    "joint": dataclasses.replace(TINY, score="joint"),
    "paper: raw, l2, no schedule": dataclasses.replace(
        TINY,
        standardise=False,
        components=None,
        loss="l2",
        score="l2",
        steps=None,
        epochs=6,
        warmup=0,
        cosine_decay=False,
        clip=None,
    ),
    "standardised, l2": dataclasses.replace(TINY, components=None, loss="l2", score="l2"),
    "CAE": dataclasses.replace(TINY, transformer=False),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_same_seed_same_weights(samples: list[Sample], shared_cache: Path, name: str) -> None:
    config = CONFIGS[name]
    first = run(samples, shared_cache, config)
    torch.manual_seed(99)  # what the caller drew before does not matter
    assert same(first, run(samples, shared_cache, config))
    assert not same(first, run(samples, shared_cache, dataclasses.replace(config, seed=1)))
    detector = first.detector
    assert not detector.training
    with torch.inference_mode():
        found = detector(torch.from_numpy(noise_frames(2, SIZE, 5)).permute(0, 3, 1, 2))
    assert found.shape == (2, 3, 3)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("name", ["cosine, components", "paper: raw, l2, no schedule", "CAE"])
def test_loss_falls(samples: list[Sample], shared_cache: Path, name: str) -> None:
    config = dataclasses.replace(CONFIGS[name], steps=60, epochs=None)
    losses: list[float] = []
    checkpoint = run(samples, shared_cache, config, reporter=Reporter(steps=lambda done, of, loss: losses.append(loss)))
    assert len(losses) == 60
    assert losses[-1] < 0.75 * losses[0]
    history = checkpoint.record.loss
    assert [step for step, _ in history] == sorted({step for step, _ in history})
    assert history[-1][0] == 60
    assert history[-1][1] == pytest.approx(losses[-1], abs=1e-6)


def test_a_fitted_model_finds_what_it_was_not_shown(samples: list[Sample], shared_cache: Path) -> None:
    config = dataclasses.replace(TINY, steps=80, loss="l2", score="l2")
    detector = run(samples, shared_cache, config).detector
    frames = noise_frames(7, SIZE)
    spoilt = frames.copy()
    spoilt[:, 16:32, 32:48] = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3))
    with torch.inference_mode():
        normal, anomalous = (detector(torch.from_numpy(x).permute(0, 3, 1, 2)) for x in (frames, spoilt))
    assert (anomalous[:, 1, 2] > normal[:, 1, 2] * 1.2).all()


class Stop:
    """Stops the fit with Ctrl-C after a number of steps."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.said: list[str] = []
        self.steps: list[int] = []

    def reporter(self) -> Reporter:
        def step(done: int, total: int, loss: float) -> None:
            self.steps.append(done)
            if done == self.after:
                raise KeyboardInterrupt

        return Reporter(steps=step, say=self.said.append)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_stopped_fit_goes_on_to_the_same_weights(samples: list[Sample], shared_cache: Path, name: str) -> None:
    config = CONFIGS[name]
    whole = run(samples, shared_cache, config)
    for after in (1, 7):  # a second stop takes up where the first one left
        with pytest.raises(KeyboardInterrupt):
            run(samples, shared_cache, config, reporter=Stop(after).reporter())
    watch = Stop(-1)
    resumed = run(samples, shared_cache, config, reporter=watch.reporter())
    assert watch.steps[0] == 8
    assert f"resuming at step 7 of {watch.steps[-1]}" in watch.said
    assert same(whole, resumed)
    assert [step for step, _ in resumed.record.loss] == [step for step, _ in whole.record.loss]
    assert not list((shared_cache / "states").iterdir())  # nothing stays behind


@pytest.mark.parametrize("stopped", [False, True])
def test_a_disk_without_room_for_the_state_costs_no_fit(
    samples: list[Sample], shared_cache: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    resource = pytest.importorskip("resource")
    whole = run(samples, shared_cache)
    real, saves = module.Loop._save, [0]

    def save(loop: module.Loop) -> None:
        saves[0] += 1
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # the state is larger
        try:
            real(loop)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(module.Loop, "_save", save)
    monkeypatch.setattr(module, "_SAVE_EVERY_SECONDS", -1.0)
    watch = Stop(5 if stopped else -1)
    if stopped:
        with pytest.raises(KeyboardInterrupt):
            run(samples, shared_cache, reporter=watch.reporter())
    else:
        assert same(whole, run(samples, shared_cache, reporter=watch.reporter()))
    assert saves[0] == (5 if stopped else 13)
    (said,) = (text for text in watch.said if "cannot be resumed" in text)
    assert "Could not write" in said
    assert not list((shared_cache / "states").iterdir())


@pytest.mark.parametrize("where", ["forward", "backward", "optimiser"])
def test_ctrl_c_inside_a_step_saves_no_half_step(
    samples: list[Sample], shared_cache: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    whole = run(samples, shared_cache)
    calls = [0]

    def interrupting(real: Any, before: bool) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] == 6 and before:
                raise KeyboardInterrupt
            found = real(*arguments, **options)
            if calls[0] == 6:
                raise KeyboardInterrupt
            return found

        return call

    with monkeypatch.context() as patch:
        if where == "forward":
            patch.setattr(module, "anomaly_score", interrupting(module.anomaly_score, True))
        elif where == "backward":
            patch.setattr(module.nn.utils, "clip_grad_norm_", interrupting(module.nn.utils.clip_grad_norm_, True))
        else:
            patch.setattr(torch.optim.Adam, "step", interrupting(torch.optim.Adam.step, False))
        # Saved after every step, as on a slow machine, so that there is something to go on from.
        patch.setattr(module, "_SAVE_EVERY_SECONDS", -1.0)
        with pytest.raises(KeyboardInterrupt):
            run(samples, shared_cache)
    watch = Stop(-1)
    assert same(whole, run(samples, shared_cache, reporter=watch.reporter()))
    assert watch.steps[0] == 6


def test_a_real_ctrl_c_waits_for_the_step(samples: list[Sample], shared_cache: Path, monkeypatch: Any) -> None:
    whole = run(samples, shared_cache)
    real, calls, ends = module.anomaly_score, [0], []

    def press(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 5:
            os.kill(os.getpid(), signal.SIGINT)  # in the middle of step 5
        return real(*arguments)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(module, "anomaly_score", press)
        with pytest.raises(KeyboardInterrupt):
            run(samples, shared_cache, reporter=Reporter(steps=lambda done, of, loss: ends.append(done)))
    assert ends == [1, 2, 3, 4, 5]
    assert signal.getsignal(signal.SIGINT) is before
    watch = Stop(-1)
    assert same(whole, run(samples, shared_cache, reporter=watch.reporter()))
    assert watch.steps[0] == 6


def test_a_second_ctrl_c_does_not_wait(samples: list[Sample], tmp_path: Path, monkeypatch: Any) -> None:
    def press(*_: Any) -> Any:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second one was not heard")

    monkeypatch.setattr(module, "anomaly_score", press)
    with pytest.raises(KeyboardInterrupt):
        run(samples, tmp_path)


def test_fits_outside_the_main_thread(samples: list[Sample], shared_cache: Path) -> None:
    found: list[Checkpoint] = []
    thread = threading.Thread(target=lambda: found.append(run(samples, shared_cache)))
    thread.start()
    thread.join()
    assert same(found[0], run(samples, shared_cache))


@pytest.mark.parametrize("damage", ["s.json", "s.safetensors"])
def test_a_damaged_state_begins_again(samples: list[Sample], shared_cache: Path, damage: str) -> None:
    whole = run(samples, shared_cache)
    with pytest.raises(KeyboardInterrupt):
        run(samples, shared_cache, reporter=Stop(5).reporter())
    (file,) = (shared_cache / "states").rglob(damage)
    os.truncate(file, file.stat().st_size // 2)
    watch = Stop(-1)
    assert same(whole, run(samples, shared_cache, reporter=watch.reporter()))
    assert watch.steps[0] == 1


def test_a_state_belongs_to_its_configuration(samples: list[Sample], shared_cache: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(samples, shared_cache, reporter=Stop(5).reporter())
    watch = Stop(-1)
    run(samples, shared_cache, dataclasses.replace(TINY, learning_rate=1e-3), reporter=watch.reporter())
    assert watch.steps[0] == 1
    run(samples, shared_cache)  # uses up the state


@pytest.mark.parametrize("name", ["cosine, components", "l2, components", "paper: raw, l2, no schedule"])
def test_streaming_from_disk_changes_nothing(
    samples: list[Sample], shared_cache: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config = CONFIGS[name]
    resident = run(samples, shared_cache, config)
    asked = []
    real = module.FeatureSet.rows
    monkeypatch.setattr(module, "_free_memory", lambda device: 0)
    monkeypatch.setattr(
        module.FeatureSet, "rows", lambda self, start, stop: asked.append(stop - start) or real(self, start, stop)
    )
    streamed = run(samples, shared_cache, config)
    assert same(resident, streamed)
    # Images are read batch by batch, one at a time, again in every step.
    assert len(asked) >= 12 * 4
    assert set(asked) == {1}


def test_every_image_is_seen_equally_often(
    samples: list[Sample], shared_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = module.Loop._indices

    def indices(self: Any) -> list[int]:
        found = real(self)
        seen.extend(found)
        return found

    monkeypatch.setattr(module.Loop, "_indices", indices)
    run(samples, shared_cache, dataclasses.replace(TINY, steps=14))  # 14 * 4 = 8 * 7 images
    assert sorted(seen[:7]) == list(range(7))
    assert [seen.count(index) for index in range(7)] == [8] * 7
    assert seen[:7] != seen[7:14]


def test_epochs_are_passes_over_the_images(samples: list[Sample], shared_cache: Path) -> None:
    watch = Stop(-1)
    run(samples, shared_cache, CONFIGS["paper: raw, l2, no schedule"], reporter=watch.reporter())
    assert watch.steps[-1] == 6 * 2  # 7 images in batches of 4: two steps an epoch


def test_rate_warms_up_and_decays(samples: list[Sample], shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    real = module.Loop._rate

    def rate(self: Any) -> float:
        rates.append(real(self))
        return rates[-1]

    monkeypatch.setattr(module.Loop, "_rate", rate)
    run(samples, shared_cache, dataclasses.replace(TINY, steps=40, warmup=10, learning_rate=1e-3))
    assert rates[0] == pytest.approx(1e-4, rel=0.02)
    assert rates.index(max(rates)) in (9, 10)
    assert max(rates) < 1e-3
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.03 * 1e-3
    rates.clear()
    run(samples, shared_cache, dataclasses.replace(TINY, warmup=0, cosine_decay=False, learning_rate=1e-4))
    assert set(rates) == {1e-4}


def test_a_loss_that_explodes_stops_the_fit(samples: list[Sample], tmp_path: Path) -> None:
    broken = dataclasses.replace(CONFIGS["standardised, l2"], learning_rate=1e30, clip=None, warmup=0)
    with pytest.raises(FitError, match="The loss became") as caught:
        run(samples, tmp_path, broken)
    assert "--learning-rate" in caught.value.cure
    assert not list(tmp_path.rglob("s.safetensors"))


def test_losses_read_now_and_then_are_the_same(
    samples: list[Sample], shared_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where reading each would make it wait."""
    every = run(samples, shared_cache)
    real = module.Loop.__init__

    def rarely(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        self.read_every = 5

    monkeypatch.setattr(module.Loop, "__init__", rarely)
    found = run(samples, shared_cache)
    assert same(every, found)
    assert found.record.loss == every.record.loss
    broken = dataclasses.replace(CONFIGS["standardised, l2"], learning_rate=1e30, clip=None, warmup=0)
    monkeypatch.setattr(module, "_SAVE_EVERY_SECONDS", -1.0)  # it would be saved before it is read
    with pytest.raises(FitError, match="The loss became"):
        run(samples, shared_cache, broken)
    for file in (shared_cache / "states").rglob("s.safetensors"):
        assert all(torch.isfinite(value).all() for value in load_file(file).values())


@pytest.mark.parametrize("name", ["cosine, components", "CAE"])
def test_a_stopped_fit_in_bf16_goes_on_to_the_same_weights(
    samples: list[Sample], shared_cache: Path, name: str
) -> None:
    config = dataclasses.replace(CONFIGS[name], precision="bf16")
    whole = run(samples, shared_cache, config)
    assert whole.record.bf16 is True
    with pytest.raises(KeyboardInterrupt):
        run(samples, shared_cache, config, reporter=Stop(7).reporter())
    assert same(whole, run(samples, shared_cache, config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "l1"}, "no loss named 'l1'"),
        ({"loss": "joint"}, "no loss named 'joint'"),
        ({"score": "l1"}, "no score named 'l1'"),
        ({"score": "joint", "components": None}, "needs components"),
        ({"steps": 0}, "cannot be fitted in 0 steps"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_read(
    samples: list[Sample], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(samples, tmp_path, dataclasses.replace(TINY, **changes))
    assert list(tmp_path.iterdir()) == []


def test_without_an_autoencoder_the_memory_alone_scores(samples: list[Sample], shared_cache: Path) -> None:
    config = dataclasses.replace(TINY, score="memory", memory=20, held_out=0.0, steps=0)
    checkpoint = run(samples, shared_cache, config)
    detector, left_out = checkpoint.detector, checkpoint.left_out
    assert detector.memory is not None
    assert left_out is not None
    assert float(detector.memory.alpha) == 0.0
    assert checkpoint.record.loss == ()
    frames = torch.from_numpy(np.stack([sample.read() for sample in samples])).permute(0, 3, 1, 2)
    with torch.inference_mode():
        nearest = detector.memory(detector.space(detector.features(frames)).g)
        expected = memory_score(nearest, None, 0.0, detector.memory.beta)
        torch.testing.assert_close(detector(frames).flatten(1), expected)
    # an image that is in the memory is nearer to it than the same image left out
    assert float(left_out.scores.mean()) > 1.2 * float(expected.mean())
    fitted = run(samples, shared_cache, dataclasses.replace(config, steps=3))
    assert fitted.detector.memory is not None
    assert float(fitted.detector.memory.alpha) > 0.0


@pytest.mark.parametrize("steps", [0, 2])
def test_the_level_is_taken_out_of_the_left_out_scores_as_it_will_be_of_new_ones(
    samples: list[Sample], shared_cache: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    config = dataclasses.replace(TINY, score="memory", memory=20, held_out=0.0, steps=steps)
    seen: list[tuple[torch.Tensor, float]] = []
    found = []
    for beta in (0.0, 0.25):
        monkeypatch.setattr(
            "saae_train.fitting.memory.level_exponent",
            lambda scores, smoothing, beta=beta: seen.append((scores, smoothing)) or beta,
        )
        checkpoint = run(samples, shared_cache, config)
        assert checkpoint.detector.memory is not None
        assert checkpoint.left_out is not None
        assert float(checkpoint.detector.memory.beta) == beta
        found.append(checkpoint.left_out.scores)
    torch.testing.assert_close(found[1], found[0] / found[0].mean(dim=(1, 2), keepdim=True) ** 0.25)
    for scores, smoothing in seen:
        torch.testing.assert_close(scores, found[0])
        assert smoothing == config.smoothing


def test_no_images(tmp_path: Path) -> None:
    with pytest.raises(FitError, match="no images"):
        run([], tmp_path)


def test_one_image_is_enough_to_run(samples: list[Sample], tmp_path: Path) -> None:
    detector = run(samples[:1], tmp_path).detector
    with torch.inference_mode():
        assert torch.isfinite(detector(torch.zeros(1, 3, *SIZE))).all()


def test_identical_images_and_dead_channels_stay_finite(samples: list[Sample], tmp_path: Path) -> None:
    Image.fromarray(np.full((*SIZE, 3), 128, np.uint8)).save(tmp_path / "flat.png")
    flat = [Sample(tmp_path / "flat.png", "good", None, False)] * 3
    detector = run(flat, tmp_path).detector
    assert all(torch.isfinite(value).all() for value in detector.state_dict().values())
    with torch.inference_mode():
        assert torch.isfinite(detector(torch.from_numpy(noise_frames(1, SIZE)).permute(0, 3, 1, 2))).all()


# --- the space ---


def test_space_is_pca_of_the_standardised_features(samples: list[Sample], tmp_path: Path) -> None:
    checkpoint = run(samples, tmp_path, dataclasses.replace(TINY, latent=None, latent_limit=None))
    space = checkpoint.detector.space
    (file,) = (tmp_path / "features").glob("*.npy")
    features = np.load(file).astype(np.float64).reshape(-1, 128)
    np.testing.assert_allclose(space.mean, features.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(space.scale, 1 / features.std(axis=0, ddof=1), rtol=1e-3)
    standard = (features - features.mean(axis=0)) / features.std(axis=0, ddof=1)
    eigenvalues = np.linalg.eigvalsh(np.cov(standard.T))
    order = np.argsort(eigenvalues)[::-1]
    leading = eigenvalues[order][:24]
    assert space.basis.shape == (128, 24)
    np.testing.assert_allclose(space.basis.T @ space.basis, np.eye(24), atol=1e-5)
    # The same subspace, whatever the vectors' signs: it holds as much of the energy as the best one does.
    inside = ((standard @ space.basis.double().numpy()) ** 2).sum() / (len(standard) - 1)
    assert inside == pytest.approx(leading.sum(), rel=1e-4)
    np.testing.assert_allclose(space.component_scale, leading**-0.25 / (leading**-0.25).mean(), rtol=1e-2)
    assert checkpoint.config.latent == latent_width(torch.from_numpy(eigenvalues), 0.8)
    assert checkpoint.detector.saae.latent == checkpoint.config.latent


def test_raw_space_changes_nothing(samples: list[Sample], tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIGS["paper: raw, l2, no schedule"], latent=None, latent_limit=None)
    checkpoint = run(samples, tmp_path, config)
    (file,) = (tmp_path / "features").glob("*.npy")
    features = np.load(file).astype(np.float64).reshape(-1, 128)
    eigenvalues = np.linalg.eigvalsh(np.cov(features.T))  # V is that of the principal components all the same
    assert checkpoint.config.latent == latent_width(torch.from_numpy(eigenvalues), 0.8)
    space = checkpoint.detector.space
    assert space.basis is None
    assert not space.mean.any()
    assert (space.scale == 1).all()


def test_latent_limit_and_components_limit(samples: list[Sample], shared_cache: Path) -> None:
    limited = run(samples, shared_cache, dataclasses.replace(TINY, latent=None, latent_limit=10, keep=0.999))
    assert limited.config.latent == 9  # the largest multiple of the heads
    wide = run(samples, shared_cache, dataclasses.replace(TINY, components=9999))
    assert wide.detector.space.channels == 64  # half of U = 128


@pytest.mark.parametrize(("texture", "ratio"), [(True, 1), (False, 2)])
def test_mlp_size_of_textures_and_objects(samples: list[Sample], shared_cache: Path, texture: bool, ratio: int) -> None:
    checkpoint = run(samples, shared_cache, texture=texture)
    assert checkpoint.detector.saae.mlp_size == ratio * 6  # paper section 4.1.2: V, 2V
    assert checkpoint.config.mlp_ratio == ratio


def test_what_was_done_is_recorded(samples: list[Sample], shared_cache: Path) -> None:
    checkpoint = run(samples, shared_cache, held_out=samples[:1], synthetic=True)
    record = checkpoint.record
    assert (checkpoint.category, record.images, record.synthetic) == ("thing", 7, True)
    assert record.held_out == (samples[0].path.name,)
    assert (record.device, record.bf16) == ("cpu", False)
    assert record.tools["torch"] == version("torch")
    assert record.digest is not None
    assert len(record.digest) == 64
    assert checkpoint.config.layers == (0, 2)
    assert checkpoint.config.input_size == SIZE


def test_bf16(samples: list[Sample], shared_cache: Path) -> None:
    config = dataclasses.replace(TINY, precision="bf16", steps=30)
    first = run(samples, shared_cache, config)
    assert first.record.bf16 is True
    assert all(value.dtype != torch.bfloat16 for value in weights(first).values())  # weights stay float32
    assert same(first, run(samples, shared_cache, config))
    assert first.record.loss[-1][1] < first.record.loss[0][1]
