"""The model of Triton's Python backend: a bundle beside this file, run by saae's runtime.

Copied into a model repository. Its Python environment needs saae with one inference library and numpy 1
(`pip install "saae[cpu]" "numpy<2"`): with numpy 2, Triton's Python backend silently hands over wrong numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """`frame` uint8 N x H x W x 3 -> `anomaly_map` float32 N x H x W, `score` float32 N."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle. After an exception the server does not serve the model and logs the text."""
        if int(np.__version__.split(".")[0]) >= 2:
            raise pb_utils.TritonModelException(
                f"numpy {np.__version__} is installed in this model's Python environment, and Triton's Python backend "
                "hands over wrong numbers with it. try: pip install 'numpy<2' there"
            )
        from saae_runtime.backends import open_backend
        from saae_runtime.bundle import open_bundle

        config = json.loads(args["model_config"])
        about = json.loads(config["parameters"]["saae"]["string_value"])
        options: dict[str, Any] = dict(about["options"])
        if args.get("model_instance_kind") == "GPU":
            options["device"] = int(args["model_instance_device_id"])
        bundle = open_bundle(Path(__file__).resolve().parent / "bundle")
        self.backend = open_backend(bundle, **options)
        self.most = int(config["max_batch_size"])
        pb_utils.Logger.log_info(f"saae: {args['model_name']} runs on {self.backend.description}")

    def execute(self, requests: list[Any]) -> list[Any]:
        """Score all waiting requests as one batch."""
        frames = [pb_utils.get_input_tensor_by_name(request, "frame").as_numpy() for request in requests]
        try:
            together = frames[0] if len(frames) == 1 else np.concatenate(frames)
            anomaly_map, score = self.infer(np.ascontiguousarray(together))
        except Exception as error:  # the server goes on, and every client gets the reason
            failed = pb_utils.TritonError(f"{type(error).__name__}: {error}")
            return [pb_utils.InferenceResponse(error=failed) for _ in requests]
        responses, start = [], 0
        for request, part in zip(requests, frames, strict=True):
            stop = start + len(part)
            wanted = set(request.requested_output_names())
            tensors = [
                pb_utils.Tensor(name, np.ascontiguousarray(values[start:stop]))
                for name, values in (("anomaly_map", anomaly_map), ("score", score))
                if name in wanted
            ]
            responses.append(pb_utils.InferenceResponse(output_tensors=tensors))
            start = stop
        return responses

    def infer(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Maps and scores of a batch, split if the backend takes fewer frames at once."""
        step = self.backend.max_batch or self.most
        parts = [self.backend.infer(frames[start : start + step], 0.0) for start in range(0, len(frames), step)]
        if len(parts) == 1:
            return parts[0].anomaly_map, parts[0].score
        return np.concatenate([part.anomaly_map for part in parts]), np.concatenate([part.score for part in parts])

    def finalize(self) -> None:
        """Release the backend, if it was opened."""
        backend = getattr(self, "backend", None)
        if backend is not None:
            backend.close()
