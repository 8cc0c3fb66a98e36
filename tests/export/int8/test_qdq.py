"""INT8 insertion: what is quantised, what smoothing keeps, and that ranges and weights are what they should be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from tiny_models import noise_frames, tiny_detector

from saae_export.graph.fused import FusedGraph
from saae_export.graph.half_weights import halve_weights
from saae_export.graph.onnx_file import export_onnx
from saae_export.int8.choose import MIN_FRAMES, Quantiser
from saae_export.int8.qdq import Observed, insert_qdq, observe, run_frames, smooth, weighted_products
from saae_runtime.errors import CalibrationError, ConfigError

SIZE = (80, 100)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    detector = tiny_detector(components=48, smoothing=0.5, score="cosine")
    return export_onnx(FusedGraph(detector, SIZE), tmp_path_factory.mktemp("int8") / "model.onnx", 1.0)


@pytest.fixture(scope="module")
def model(graph: Path) -> onnx.ModelProto:
    return onnx.load(graph)


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    return list(noise_frames(MIN_FRAMES, SIZE))


@pytest.fixture(scope="module")
def observed(model: onnx.ModelProto, frames: list[np.ndarray]) -> dict[str, Observed]:
    return observe(model, frames[:4])


def maps(model: onnx.ModelProto, frames: list[np.ndarray]) -> np.ndarray:
    return np.stack([outputs["anomaly_map"][0] for outputs in run_frames(model, frames)])


def test_products_with_large_weights_and_no_others(model: onnx.ModelProto) -> None:
    names = list(weighted_products(model))
    assert "block_1/mlp/fc1/MatMul" in names
    assert "space/basis/MatMul" in names
    assert not [
        name
        for name in names
        if name.startswith(("anomaly_map", "pixels", "patch_embed")) or name.endswith("attn/MatMul")
    ]


def test_ranges_are_those_of_the_tensors(model: onnx.ModelProto, frames: list[np.ndarray]) -> None:
    found = observe(model, frames[:3])
    name = weighted_products(model)["block_1/attn/qkv/MatMul"][0]
    seen = np.stack([outputs[name] for outputs in run_frames(model, frames[:3], [name])])
    np.testing.assert_allclose(found[name].channels, np.abs(seen).max(axis=(0, 1, 2)), rtol=1e-6)
    assert found[name].largest == pytest.approx(float(np.abs(seen).max()))


def test_smoothing_changes_the_weights_and_not_the_function(
    model: onnx.ModelProto, observed: dict[str, Observed], frames: list[np.ndarray]
) -> None:
    smoothed = smooth(model, observed)
    weight = weighted_products(model)["block_1/attn/qkv/MatMul"][1]

    def of(graph: onnx.ModelProto) -> np.ndarray:
        return numpy_helper.to_array(next(item for item in graph.graph.initializer if item.name == weight))

    assert np.abs(of(smoothed) / of(model) - 1).max() > 0.05
    np.testing.assert_allclose(maps(smoothed, frames[:2]), maps(model, frames[:2]), rtol=2e-4, atol=1e-5)


def test_int8_products_are_near_and_not_the_same(
    model: onnx.ModelProto, observed: dict[str, Observed], frames: list[np.ndarray]
) -> None:
    products = weighted_products(model)
    chosen = [name for name in products if name.startswith("block_")]
    quantised = insert_qdq(model, {name: observed[products[name][0]].largest for name in chosen})
    onnx.checker.check_model(quantised, full_check=True)
    kinds = [node.op_type for node in quantised.graph.node]
    inputs = {products[name][0] for name in chosen}
    assert kinds.count("QuantizeLinear") == len(inputs)
    assert kinds.count("DequantizeLinear") == len(inputs) + len(chosen)
    stored = [item for item in quantised.graph.initializer if item.name.endswith("/int8.q")]
    assert {item.data_type for item in stored} == {onnx.TensorProto.INT8}
    assert "threshold" in {item.name for item in quantised.graph.initializer}
    before, after = maps(model, frames[:2]), maps(quantised, frames[:2])
    assert 0 < np.abs(after - before).max() < 0.1 * before.max()
    assert quantised.ByteSize() < 0.6 * model.ByteSize()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.0, 0.01), st.floats(1.0, 200.0))
def test_the_least_squares_range_is_never_worse(seed: int, share: float, loud: float) -> None:
    rng = np.random.default_rng(seed)
    values = np.abs(rng.normal(size=5000)).astype(np.float32)
    values[rng.random(5000) < share] *= np.float32(loud)
    found = Observed(np.array([values.max()], np.float32), values)

    def error(limit: float) -> float:
        step = limit / 127
        return float(np.square(np.minimum(np.rint(values / step), 127) * step - values).mean())

    assert found.least_squares() <= found.largest
    assert error(found.least_squares()) <= error(found.largest)


def test_the_product_that_int8_hurts_is_left_out(graph: Path, frames: list[np.ndarray], tmp_path: Path) -> None:
    """One weight column gets a value that no 8-bit range can hold beside the others' inputs."""
    model = onnx.load(graph)
    name = "block_2/mlp/fc2/MatMul"
    tensors = {item.name: item for item in model.graph.initializer}
    weight = tensors[weighted_products(model)[name][1]]
    hurt = numpy_helper.to_array(weight).copy()
    bias = next(item for item in model.graph.initializer if item.name == "block_2/mlp/fc1.bias")
    loud = numpy_helper.to_array(bias).copy()
    loud[0], hurt[0] = 3000.0, 1e-4  # one huge activation that hardly counts
    weight.CopyFrom(numpy_helper.from_array(hurt, weight.name))
    bias.CopyFrom(numpy_helper.from_array(loud, bias.name))
    onnx.save(model, tmp_path / "hurt.onnx")
    told: list[str] = []
    quantiser = Quantiser(tmp_path / "hurt.onnx", frames, SIZE, lambda done, total, what: told.append(what))
    errors = {product.name: product.error for product in quantiser.products}
    assert max(errors, key=lambda key: errors[key]) == name
    limit = 0.5 * errors[name]
    chosen = quantiser.chosen(limit)
    assert name not in {product.name for product in chosen}
    assert chosen
    assert sum(product.share for product in quantiser.products) == pytest.approx(1.0)
    written = onnx.load(quantiser.write(tmp_path / "model.int8.onnx", chosen))
    assert {item.key: item.value for item in written.metadata_props}["saae.precision"] == "int8"
    assert {"ranges", "products measured"} <= set(told)


def test_half_stored_weights_are_quantised_too(graph: Path, frames: list[np.ndarray], tmp_path: Path) -> None:
    model = onnx.load(graph)
    names = set(weighted_products(model))
    assert halve_weights(model) > 0
    onnx.save(model, tmp_path / "half.onnx")
    assert {product.name for product in Quantiser(tmp_path / "half.onnx", frames, SIZE).products} == names


def test_too_few_frames_and_nothing_to_quantise(graph: Path, frames: list[np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=f"INT8 needs {MIN_FRAMES}") as caught:
        Quantiser(graph, frames[: MIN_FRAMES - 1], SIZE)
    assert "add normal images" in caught.value.cure
    model = onnx.load(graph)
    del model.graph.initializer[:]
    onnx.save(model, tmp_path / "empty.onnx")
    with pytest.raises(ConfigError, match="no product"):
        Quantiser(tmp_path / "empty.onnx", frames, SIZE)


def test_a_weight_that_two_products_share_is_left_alone(model: onnx.ModelProto) -> None:
    """Smoothing would scale it twice, and its INT8 form would be there twice under one name."""
    shared = onnx.ModelProto()
    shared.CopyFrom(model)
    name, (activation, weight) = next(iter(weighted_products(model).items()))
    shared.graph.node.append(onnx.helper.make_node("MatMul", [activation, weight], ["twin"], f"{name}_twin"))
    found = weighted_products(shared)
    assert weight not in {used for _, used in found.values()}
    assert set(found) == set(weighted_products(model)) - {name}
