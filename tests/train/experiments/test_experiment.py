"""One experiment: what its row holds, that a fresh process is one, and what is reported if it fails."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import fake_fit_methods
import numpy as np
import pytest
from tiny_models import noise_frames, tiny_detector
from tiny_sets import TINY_CHANGES, write_square_set

from saae_runtime.errors import DataError, SaaeError
from saae_runtime.files import sha256_file
from saae_runtime.geometry import upsample_map
from saae_train.cli.options import make_config
from saae_train.data.category import find_category
from saae_train.experiments.experiment import Experiment, images_digest, is_same, run_experiment, run_fresh
from saae_train.model.scorer import TorchScorer


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_square_set(tmp_path_factory.mktemp("data"))


def experiment(tree: Path, category: str = "part", **more: object) -> Experiment:
    return Experiment(
        str(tree), category, make_config("fast", **{**TINY_CHANGES, **more}), weights="random", device="cpu"
    )


@pytest.mark.parametrize(("score", "held_out"), [("memory", 0), ("cosine", 4)])
def test_a_row_holds_what_was_measured_and_with_what(tree: Path, score: str, held_out: int) -> None:
    seen: list[str] = []
    row = run_experiment(
        experiment(tree, score=score), report=lambda what, done, total: seen.append(what.split(",")[0])
    )
    row = json.loads(json.dumps(row, allow_nan=False))
    assert {"features", "step", "evaluate"} <= set(seen)
    assert ("calibrate" in seen) == (held_out > 0)  # a memory has scored its images in the fit
    assert 0 <= row["overall"]["metrics"]["pixel_roc_auc"]["value"] <= 1
    assert row["overall"]["metrics"]["pixel_fpr"]["value"] is not None
    assert (row["fit_images"], row["held_out_images"]) == (10 - held_out, held_out)
    assert (row["test_images"], row["image_sizes"]) == (6, [[70, 64], [70, 64]])
    assert row["fitted_config"]["latent"] == 6
    assert row["fitted_config"]["mlp_ratio"] == 2
    assert row["config"]["mlp_ratio"] is None
    assert row["weights_source"].startswith("random")
    assert row["pixel_fpr"] == 0.001
    assert is_same(row, experiment(tree, score=score))
    for other in (
        experiment(tree, score=score, seed=1),
        replace(experiment(tree, score=score), weights="hub"),
        replace(experiment(tree, score=score), method="pca"),
    ):
        assert not is_same(row, other)


def test_a_texture_has_the_papers_mlp_and_without_a_memory_its_rate(tmp_path: Path) -> None:
    write_square_set(tmp_path, "tile")
    for score, rate in (("cosine", 0.0), ("memory", 0.001)):
        row = run_experiment(experiment(tmp_path, "tile", score=score))
        assert (row["fitted_config"]["mlp_ratio"], row["pixel_fpr"]) == (1, rate)


def test_a_fresh_process_is_one_and_says_how_far_it_is(tree: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    row = run_fresh(experiment(tree, held_out=0.3), fake_fit_methods.brightness, lambda *told: seen.append(told))
    assert row["facts"]["process"] != os.getpid()
    assert row["overall"]["metrics"]["pixel_roc_auc"]["value"] == 1.0
    assert ("looking", row["fit_images"], row["fit_images"]) in seen
    assert ("evaluate", 6, 6) in seen


def test_an_experiment_that_fails_keeps_its_words(tree: Path) -> None:
    with pytest.raises(DataError, match="nothere") as found:
        run_fresh(experiment(tree, "nothere"), fake_fit_methods.brightness)
    assert found.value.cure
    with pytest.raises(SaaeError, match="ended with code -9"):
        run_fresh(experiment(tree), fake_fit_methods.Killed())


def test_the_images_digest_follows_the_files_and_not_the_place(tree: Path, tmp_path: Path) -> None:
    first = images_digest(find_category(tree, "part"))
    write_square_set(tmp_path)
    assert images_digest(find_category(tmp_path, "part")) == first
    category = find_category(tmp_path, "part")
    assert images_digest(category.with_white_level(4095)) == first  # it is one of the settings
    for path in (category.train[0].path, category.test[0].path, category.test[-1].masks[0]):
        kept = path.read_bytes()
        path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))  # of the same size
        assert images_digest(find_category(tmp_path, "part")) != first
        path.write_bytes(kept)
    assert images_digest(find_category(tmp_path, "part")) == first
    (tmp_path / "part/test/good/0.png").unlink()
    assert images_digest(find_category(tmp_path, "part")) != first
    assert experiment(tree).key(first) != experiment(tree).key("other")


def test_a_row_of_other_images_is_another_one(tree: Path, tmp_path: Path) -> None:
    write_square_set(tmp_path)
    row = {**json.loads(json.dumps(experiment(tree).settings())), "images": images_digest(find_category(tree, "part"))}
    assert is_same(row, experiment(tree))
    assert is_same(row, experiment(tmp_path))  # a copy
    (tmp_path / "part/test/good/0.png").unlink()
    assert not is_same(row, experiment(tmp_path))
    old = {key: value for key, value in row.items() if key != "images"}
    assert not is_same(old, experiment(tree))
    assert is_same(old, experiment(tree), unknown=True)
    assert not is_same(old, experiment(tree, seed=1), unknown=True)


def test_a_key_holds_the_version_and_what_is_in_the_weights(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / name for name in ("a.pth", "b.pth", "c.pth")]
    for path, content in zip(files, (b"one", b"one", b"another"), strict=True):
        path.write_bytes(content)
    first, copy, other = (replace(experiment(tree), weights=str(path)) for path in files)
    assert first.key("images") == copy.key("images") != other.key("images")
    row = {**json.loads(json.dumps(first.settings())), "images": images_digest(find_category(tree, "part"))}
    row["weights_sha256"] = sha256_file(files[0])
    assert is_same(row, copy)
    assert not is_same(row, other)
    before = first.key("images")
    files[0].write_bytes(b"changed")
    assert first.key("images") != before
    before = experiment(tree).key("images")
    monkeypatch.setattr("saae_train.experiments.experiment.saae_version", lambda: "99.0")
    assert experiment(tree).key("images") != before


@pytest.mark.parametrize("smoothing", [0.0, 0.7])
def test_the_scorer_gives_each_frame_a_map_of_its_own_size(smoothing: float) -> None:
    detector = tiny_detector(smoothing=smoothing)
    scorer = TorchScorer(detector)
    for size in ((64, 64), (90, 71), (40, 100)):
        frame = noise_frames(1, size)[0]
        found = scorer(frame)
        anomaly_map, score = found.anomaly_map, found.score
        assert anomaly_map.shape == size
        assert score == anomaly_map.max()
        fixed = TorchScorer(detector, size)(frame).anomaly_map
        assert np.array_equal(anomaly_map, fixed)
    coarse = TorchScorer(detector, (64, 64))(frame).anomaly_map  # resized twice, brought back twice
    assert coarse.shape == size
    assert not np.array_equal(coarse, anomaly_map)
    small = TorchScorer(detector)(frame).anomaly_map
    assert np.allclose(upsample_map(small, (80, 200)).mean(), small.mean(), rtol=0.05)
