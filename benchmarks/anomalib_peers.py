"""Fits anomalib's models by anomalib's engine on local backbone weights, and scores by their ONNX graphs.

Only `fit_peer` imports anomalib. Its models ask timm for pretrained weights by name; `local_weights` answers with the
weights that saae uses, so that all methods have the same backbone and nothing is downloaded.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from saae_runtime.errors import BackendUnavailableError
from saae_runtime.geometry import resize_frames, upsample_map
from saae_runtime.result import Scored

__all__ = ["NOT_RUN", "PEERS", "GraphScorer", "Peer", "anomalib_version", "fit_peer", "local_weights"]

ANOMALIB = "2.7.0"
BACKBONE = "vit_small_patch14_dinov2"
LAYERS = ("blocks.4", "blocks.5", "blocks.6", "blocks.7")
"""Backbone of the peers that take any: that of the default preset."""


@dataclass(frozen=True)
class Peer:
    """A model of anomalib.

    Attributes:
        model: name of its class.
        options: of the class.
        size: side of its square input, a multiple of the backbone's patch.
        note: how it differs from anomalib's own default.
        one_at_a_time: its graph takes one frame; its search cannot be exported with a dynamic batch.
    """

    model: str
    options: Mapping[str, Any]
    size: int
    note: str
    one_at_a_time: bool = False


_OTHER = "DINOv2 blocks 4 to 7 as backbone, input 252"
"""In place of a convolutional network, whose weights only the Internet has, at 256."""

PEERS: Mapping[str, Peer] = {
    "AnomalyDINO": Peer("AnomalyDINO", {"encoder_name": BACKBONE}, 252, "its defaults"),
    "AnomalyDINO 336": Peer("AnomalyDINO", {"encoder_name": BACKBONE}, 336, "input 336"),
    "PaDiM": Peer("Padim", {"backbone": BACKBONE, "layers": list(LAYERS), "n_features": 100}, 252, _OTHER),
    "PatchCore": Peer("Patchcore", {"backbone": BACKBONE, "layers": list(LAYERS)}, 252, _OTHER, one_at_a_time=True),
}

NOT_RUN: Mapping[str, str] = {
    "EfficientAD": "needs its own teacher's weights and Imagenette, which only the Internet has",
    "Dinomaly": "trains for 5,000 steps at 392 pixels, which is hours without a GPU",
}
"""Peers that are not run, with the reason."""


def anomalib_version() -> str:
    """The version of anomalib. Raises BackendUnavailableError if it is not installed: this script installs nothing."""
    from importlib import metadata

    try:
        return metadata.version("anomalib")
    except metadata.PackageNotFoundError as error:
        raise BackendUnavailableError(
            "anomalib is not installed here.",
            "The peers are fitted by its own code. It brings many packages, so give it an environment of its own.",
            f"python -m venv peers && peers/bin/pip install 'anomalib[cpu]=={ANOMALIB}' 'saae[demo]'",
        ) from error


@contextmanager
def local_weights(name: str, state: Mapping[str, Any]) -> Iterator[None]:
    """Within the block, timm returns these weights as the pretrained ones of a model, and no others.

    Args:
        name: timm's name of the model.
        state: its state dict.

    Raises:
        LookupError: pretrained weights of another model were asked for.
    """
    import timm

    create: Callable[..., Any] = timm.create_model

    def with_ours(model_name: str, pretrained: bool = False, **options: Any) -> Any:
        if not pretrained:
            return create(model_name, pretrained=False, **options)
        if model_name != name:
            raise LookupError(f"no weights of {model_name} here, only of {name}")
        model = create(model_name, pretrained=False, **options)
        model.load_state_dict(state)
        return model

    with mock.patch.object(timm, "create_model", with_ours):
        yield


def fit_peer(name: str, good: Path, out: Path, state: Mapping[str, Any], seed: int) -> tuple[Path, Callable[[], Path]]:
    """Fit a peer to the images of a folder by anomalib's engine; its graph, and what exports it.

    Args:
        name: key of `PEERS`.
        good: folder of normal images.
        out: an empty folder.
        state: weights of `BACKBONE`.
        seed: of the random numbers.

    Returns:
        Where the ONNX graph will be, and a function that writes it. (The fit is over when this returns.)
    """
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    import anomalib.models
    from anomalib.data import Folder
    from anomalib.engine import Engine
    from lightning import seed_everything

    peer = PEERS[name]
    seed_everything(seed, verbose=False)
    kind = getattr(anomalib.models, peer.model, None) or getattr(anomalib.models.image, peer.model)
    pre = kind.configure_pre_processor(image_size=(peer.size, peer.size))
    with local_weights(BACKBONE, state):
        # Without its post-processor, whose normalisation would clip the maps.
        model = kind(**peer.options, pre_processor=pre, post_processor=False, evaluator=False, visualizer=False)
    images = Folder(
        name="images",
        normal_dir=good,
        normal_split_ratio=0.0,
        test_split_mode="none",
        val_split_mode="none",
        train_batch_size=8,
        num_workers=0,
        seed=seed,
    )
    engine = Engine(
        default_root_dir=out,
        accelerator="cpu",
        devices=1,
        logger=False,
        limit_val_batches=0,  # validation would only set a threshold, from images with defects
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    engine.fit(model=model, datamodule=images)
    path = out / "weights" / "onnx" / "model.onnx"

    def export() -> Path:
        one: dict[str, Any] = {"dynamic_axes": {}, "dynamic_shapes": None} if peer.one_at_a_time else {}
        return Path(model.cpu().to_onnx(out, input_size=(peer.size, peer.size), opset_version=18, **one))

    return path, export


class GraphScorer:
    """A peer's ONNX graph on ONNX Runtime's CPU provider: frame in, score and map at the frame's size out.

    Args:
        path: the graph; its input is 1 x 3 x size x size in 0..1, RGB.
        threads: CPU threads.
    """

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        (entry,) = self._session.get_inputs()
        self._name, self._size = entry.name, (int(entry.shape[2]), int(entry.shape[3]))
        self._outputs = [item.name for item in self._session.get_outputs()]

    def __call__(self, frame: NDArray[np.uint8]) -> Scored:
        """Score of a frame, uint8 H x W x 3."""
        pixels = np.asarray(resize_frames(frame, self._size), np.float32).transpose(2, 0, 1)[None] / np.float32(255)
        found = dict(zip(self._outputs, self._session.run(None, {self._name: pixels}), strict=True))
        small = np.asarray(found["anomaly_map"], np.float32).reshape(self._size)
        full = upsample_map(small, (frame.shape[0], frame.shape[1]))
        return Scored(float(np.asarray(found["pred_score"]).reshape(-1)[0]), full)
