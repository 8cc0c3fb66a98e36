"""Nodes, operations and bytes of the unfused export and of the fused graph.

    python benchmarks/graph.py [--models vit_base_patch16_384,vit_small_patch14_dinov2] [--components K] [--out FILE]

Random weights, which change none of this. `plain` is the fitted Detector with its resize and upsample, exported by the
same exporter with the same rewrites; `fused` is what a bundle holds; `fused, int8` has QuantizeLinear and
DequantizeLinear nodes, which a library merges into the products. Work is counted by PyTorch for one frame of the
model's size, a multiplication and an addition being two; attention is counted written out.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from saae_runtime.errors import SaaeError

if TYPE_CHECKING:
    import onnx

    from saae_train.model.checkpoint import Checkpoint

_SHOWN = ("MatMul", "Transpose", "Add", "Mul", "LayerNormalization", "Cast")


def rows_of(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The rows of one model: plain, fused in FP32 and FP16, and INT8."""
    import onnx

    from benchmarks.random_model import random_bundle
    from benchmarks.torch_variants import Deployed, gflop
    from saae_export.graph.fused import FusedGraph
    from saae_export.graph.onnx_file import trace

    detector = checkpoint.detector
    size = detector.backbone.input_size
    plain = Deployed(detector, size)
    rows = [_row(checkpoint, "plain", trace(plain), gflop(plain))]
    with tempfile.TemporaryDirectory() as folder:
        bundle = random_bundle(checkpoint, Path(folder) / "bundle", None, ("fp32", "fp16", "int8"))
        for precision in ("fp32", "fp16", "int8"):
            (artefact,) = bundle.artefacts(kind="onnx", precision=precision)
            name = "fused" if precision == "fp32" else f"fused, {precision}"
            work = gflop(FusedGraph(detector)) if precision == "fp32" else None
            rows.append(_row(checkpoint, name, onnx.load(bundle.file(artefact.file)), work))
    return rows


def _row(checkpoint: Checkpoint, graph: str, model: onnx.ModelProto, gflop: float | None) -> dict[str, Any]:
    kinds = Counter(node.op_type for node in model.graph.node)
    space = checkpoint.detector.space
    return {
        "model": checkpoint.detector.backbone.name,
        "components": None if space.basis is None else space.channels,
        "graph": graph,
        "nodes": sum(kinds.values()),
        **{kind: kinds[kind] for kind in _SHOWN},
        "GFLOP": None if gflop is None else round(gflop, 4),
        "MB": round(model.ByteSize() / 1e6, 1),
    }


def main(
    models: Annotated[str, typer.Option(help="timm names")] = "vit_base_patch16_384,vit_small_patch14_dinov2",
    components: Annotated[int | None, typer.Option(help="k; 0 = none; default: the preset's")] = None,
    out: Annotated[Path | None, typer.Option(help="result file")] = None,
) -> None:
    """Count; print and write the table."""
    from benchmarks.random_model import random_checkpoint, random_config

    try:
        rows: list[dict[str, Any]] = []
        for name in models.split(","):
            rows += rows_of(random_checkpoint(random_config(name, components=components)))
    except SaaeError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(error.exit_code) from error
    target = common.write_result(common.result("graph", rows), out)
    common.print_table(
        "The graph before and after", list(rows[0]), [list(row.values()) for row in rows], [f"Written to {target}"]
    )


if __name__ == "__main__":
    typer.run(main)
