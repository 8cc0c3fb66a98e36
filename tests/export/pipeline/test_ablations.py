"""The paper's ablations and baselines on the whole road: options, fit, export, parity, bundle, Engine, evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_builds import options, quiet_build
from tiny_models import TINY, noise_frames
from typer.testing import CliRunner

from saae_export.parity.pytorch import TorchReference, load_reference
from saae_runtime import Engine
from saae_runtime.errors import ConfigError, WeightsError
from saae_train.cli.command import app as train_app
from saae_train.cli.options import make_config
from saae_train.model.checkpoint import load_checkpoint

QUICK = {"steps": 2, "batch": 4, "latent": 12, "precision": "fp32"}

MODELS = {
    # name: preset, model, what makes it small; and: transformer, patch, grid, U
    "dfr": (("dfr", None, {"layers": (2, 3, 5)}), (False, 1, (16, 16), 64 + 128 + 256)),
    "vgg19": (("vgg19", None, {"layers": (1, 3), "saae_patch": 4}), (True, 4, (16, 16), 64 + 128)),
    "one layer, cae": (("fast", "cae", {"backbone": TINY, "layers": (3,)}), (False, 1, (4, 4), 192)),
}


@pytest.mark.parametrize("name", MODELS)
def test_from_options_to_a_verdict(name: str, data: Path, tmp_path: Path) -> None:
    (preset, model, changes), (transformer, patch, grid, channels) = MODELS[name]
    config = make_config(preset, model, input_size=(64, 64), **QUICK, **changes)
    result, _ = quiet_build(options(data, tmp_path, config=config, precisions=("fp32",), parity_images=2))
    assert all(report.passed for report in result.parity)
    assert result.evaluation is not None
    assert 0.0 <= result.evaluation.overall.metrics["pixel_roc_auc"].value <= 1.0
    manifest = result.bundle.manifest
    assert manifest.model.grid == grid
    assert manifest.model.config["transformer"] is transformer
    assert manifest.model.config["saae_patch"] == patch
    assert manifest.model.autoencoder == (
        "CAE, no transformer" if not transformer else "SAAE" if patch == 1 else f"SAAE, patches of {patch} x {patch}"
    )

    (folder,) = (tmp_path / "runs" / "weave" / "models").iterdir()
    saae = load_checkpoint(folder).detector.saae
    assert (saae.transformer, saae.patch, saae.channels) == (
        transformer,
        patch,
        channels if config.components is None else channels // 2,
    )
    reference: TorchReference = load_reference(result.bundle, folder)
    with Engine(result.where, backend="onnxruntime:cpu", precision="fp32") as engine:
        for frame in noise_frames(2, (96, 80)):
            right = reference(frame)
            expected = right.anomaly_map
            found = engine(frame)
            np.testing.assert_allclose(found.anomaly_map, expected, rtol=1e-3, atol=1e-3 * float(expected.max()))
            assert found.score == pytest.approx(right.score, rel=1e-3)


def test_what_cannot_be_fitted_is_said_before_the_features(data: Path, tmp_path: Path) -> None:
    for changes, what in (
        ({"layers": (1, 3)}, "patches of 8 x 8"),  # the paper's patch, and a grid of 15 x 15
        ({"layers": (0, 1)}, "no layer 0"),
        ({"layers": (1,), "latent": 10}, "latent width of 10"),
    ):
        config = make_config("vgg19", input_size=(60, 60), **(QUICK | changes))
        with pytest.raises(ConfigError, match=what):
            quiet_build(options(data, tmp_path, config=config))
    assert not (tmp_path / "cache" / "features").exists()


class TestRandomWeights:
    """Right in shape and speed, worthless in quality: whatever claims quality refuses them."""

    @pytest.fixture(autouse=True)
    def _as_a_user(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("SAAE_ALLOW_RANDOM", raising=False)

    @pytest.mark.parametrize("backbone", [TINY, "vgg19"])
    def test_no_bundle_is_built_on_them(self, backbone: str, data: Path, tmp_path: Path) -> None:
        config = make_config("fast", backbone=backbone, layers=(1,), input_size=(64, 64), **QUICK)
        with pytest.raises(WeightsError, match=f"weights of {backbone} are random") as caught:
            quiet_build(options(data, tmp_path, config=config))
        assert "--weights" in caught.value.cure
        assert not (tmp_path / "bundle").exists()

    def test_neither_fitted_nor_evaluated(self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        out, run = tmp_path / "checkpoint", CliRunner()
        line = ["fit", "--category", "weave", "--data", str(data), "--out", str(out), "--backbone", TINY]
        line += ["--weights", "random", "--input-size", "64", "--layers", "1", "--steps", "2", "--latent", "12"]
        line += ["--cache", str(tmp_path / "cache")]

        def said(*arguments: str) -> str:
            done = run.invoke(train_app, arguments)
            assert done.exit_code == 2, done.output
            return " ".join(done.output.replace("│", " ").split())

        assert f"weights of {TINY} are random" in said(*line)
        assert not out.exists()
        with monkeypatch.context() as patch:
            patch.setenv("SAAE_ALLOW_RANDOM", "1")
            assert run.invoke(train_app, line).exit_code == 0
        assert "are random" in said("evaluate", str(out), "--data", str(data))
        with pytest.raises(WeightsError, match="are random"):
            quiet_build(options(data, tmp_path, checkpoint=out))
