"""The graph's savings, counted on a tiny model."""

from __future__ import annotations

from tiny_models import TINY

from benchmarks import graph, random_model


def test_fusing_takes_nodes_away_and_int8_adds_pairs() -> None:
    config = random_model.random_config(TINY, "fast", (0, 1), (32, 48), latent=12, components=24)
    rows = graph.rows_of(random_model.random_checkpoint(config))
    by_name = {row["graph"]: row for row in rows}
    assert list(by_name) == ["plain", "fused", "fused, fp16", "fused, int8"]
    plain, fused = by_name["plain"], by_name["fused"]
    assert fused["nodes"] < 0.8 * plain["nodes"]
    assert fused["Transpose"] < plain["Transpose"]
    assert 0 < fused["GFLOP"] <= plain["GFLOP"]
    # the memory and the patch projection stay FP32, and are a large part of a tiny model
    assert by_name["fused, fp16"]["MB"] < 0.8 * fused["MB"]
    assert by_name["fused, fp16"]["Cast"] > fused["Cast"]
    assert by_name["fused, int8"]["MatMul"] == fused["MatMul"]
    assert by_name["fused, int8"]["nodes"] > fused["nodes"]
    assert by_name["fused, int8"]["MB"] < fused["MB"]
