"""The figures of `fps.py`: ratios between its rows, SAAE beside DFR, and the printed tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common

__all__ = ["INSIDE", "KINDS", "PAPER", "add_ratios", "saae_to_dfr", "show"]

KINDS = ("compute", "frame", "stream", "stream graph", "trigger", "device")
INSIDE = {
    "compute": "a batch at the graph's size, host to host, through backend.infer: map, score, mask",
    "frame": "camera frames in host memory to Results: host resize, inference, map at the frame's size, mask, decision",
    "stream": "Engine.stream over camera frames, per batch, pipeline full; ratio to PyTorch's frame timing",
    "stream graph": "Engine.stream over frames of the graph's size; ratio to PyTorch's compute timing",
    "trigger": "Engine.stream over a source slower than the engine: camera frames given to results out",
    "device": "a batch that lies on the GPU, outputs left there, waited for",
}
PAPER = {"saae_fps": 86, "dfr_fps": 31, "ratio": 2.77}
_BASE = {"stream": "frame", "stream graph": "compute", "trigger": "frame"}


def add_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Add to every row its ratio to PyTorch eager FP32, to DFR, and for a stream to its single call.

    Ratios are of medians in the same run: how many times as many frames a second. A share is of means: a stream is
    timed as a whole, so rare delays must count on the other side, too.
    """
    fps = {(row["backend"], row["precision"], row["kind"], row["batch"]): row["fps"] for row in rows}
    means = {(r["backend"], r["precision"], r["kind"], r["batch"]): r["timing"]["mean_ms"] for r in rows}
    for row in rows:
        base = _BASE.get(row["kind"], row["kind"])
        for name, key in (
            ("ratio", ("pytorch", "fp32", base, row["batch"])),
            ("ratio_dfr", ("dfr", "fp32", base, row["batch"])),
            ("ratio_whole", ("pytorch:whole", "fp32", base, row["batch"])),
        ):
            if key in fps:
                row[name] = round(row["fps"] / fps[key], 3)
        if row["kind"] in _BASE:
            own = means.get((row["backend"], row["precision"], base, row["batch"]))
            if own is not None:  # that kind was timed, too
                row["share"] = round(own / row["timing"]["mean_ms"], 3)


def saae_to_dfr(rows: Sequence[Mapping[str, Any]], backbone: str) -> list[dict[str, Any]]:
    """SAAE : DFR in the paper, and in PyTorch eager FP32 here; empty if DFR was not timed.

    The paper's SAAE works in all U channels. If the timed model has components, the variant without them is used.
    """
    saae = "pytorch:whole" if any(row["backend"] == "pytorch:whole" for row in rows) else "pytorch"
    here = [
        {"where": f"here, {backbone}, {row['kind']}, batch {row['batch']}", "ratio": row["ratio_dfr"]}
        for row in rows
        if (row["backend"], row["precision"]) == (saae, "fp32") and "ratio_dfr" in row
    ]
    return [{"where": "the paper, ViT-B/16 at 384", **PAPER}, *here] if here else []


def show(data: Mapping[str, Any], target: Path) -> None:
    """Print one table per kind and batch, and the missing variants."""
    for batch in data["settings"]["batches"]:
        for kind in KINDS:
            rows = [row for row in data["rows"] if (row["kind"], row["batch"]) == (kind, batch)]
            if not rows:
                continue
            columns = [
                ("median", [row["timing"]["median_ms"] for row in rows]),
                ("p95", [row["timing"]["p95_ms"] for row in rows]),
                ("p99", [row["timing"]["p99_ms"] for row in rows]),
                ("frames/s", [row["fps"] for row in rows]),
                ("ratio", [row.get("ratio") for row in rows]),
                ("to whole", [row.get("ratio_whole") for row in rows]),
                ("to DFR", [row.get("ratio_dfr") for row in rows]),
                ("share", [row.get("share") for row in rows]),
                ("J a frame", [row.get("joules") for row in rows]),
                ("runs", [row["timing"]["runs"] for row in rows]),
            ]
            columns = [(name, values) for name, values in columns if any(value is not None for value in values)]
            common.print_table(
                f"{kind}, batch {batch}: milliseconds; ratio to {data['reference']}",
                ["backend", *(name for name, _ in columns)],
                [
                    (f"{row['backend']} {row['precision']}", *(values[i] for _, values in columns))
                    for i, row in enumerate(rows)
                ],
                [data["inside"][kind]],
            )
    common.print_table(
        "Variants",
        ["backend", "memory MiB", "GPU MiB", "map error"],
        [
            (f"{v['backend']} {v['precision']}", v["memory_mib"], v["device_mib"], v["map_error"])
            for v in data["variants"]
        ],
        [
            *(f"{v['backend']} {v['precision']}: {v['description']}" for v in data["variants"]),
            *(f"Not timed: {item['backend']} {item['precision']}: {item['why']}" for item in data["not_here"]),
            f"Products of PyTorch's FP32: {data['settings']['torch_fp32_products']}.",
            f"Weights: {data['model']['weights']}. {data['model']['gflop_per_frame']} GFLOP a frame, "
            f"{data['settings']['threads']} threads, peak memory of the process {data['peak_memory_gib']} GiB.",
            *(f"SAAE : DFR, {item['where']}: {item['ratio']}" for item in data["saae_to_dfr"]),
            f"Written to {target}",
        ],
    )
