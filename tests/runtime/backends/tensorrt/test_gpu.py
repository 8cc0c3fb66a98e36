"""The TensorRT backend on a real GPU: results against numpy, device arrays, graphs, order, threads, memory."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from needs import need
from tiny_bundle import expected_map, gray_frame, make_tiny_bundle

from saae_runtime.backends.base import BackendOptions
from saae_runtime.backends.cuda.api import CudaApi
from saae_runtime.backends.tensorrt import choose as backend_module
from saae_runtime.backends.tensorrt.library import load_library
from saae_runtime.bundle import open_bundle
from saae_runtime.engine import Engine
from saae_runtime.errors import EngineIncompatibleError, FrameError, SaaeError

SIZE = (64, 96)
T = 40.0


def gpu_generation():
    """The first GPU's generation, or why there is none."""
    try:
        api = CudaApi()
        api.check_driver()
        return api.device(0).sm, ""
    except SaaeError as error:
        return "", f"{error.what} {error.why}"


SM, WHY_NOT = gpu_generation()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not SM, reason=f"needs an NVIDIA GPU: {WHY_NOT} (the fake GPU covers the same code)"),
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A bundle with an engine for this GPU, and the backend that runs it."""
    need("onnx")
    from saae_export.tensorrt import compile as engines

    path = make_tiny_bundle(
        tmp_path_factory.mktemp("gpu") / "tiny", size=SIZE, threshold=T, precisions=("fp32", "fp16")
    )
    reasons = []
    for name in ("tensorrt", "tensorrt_rtx"):
        try:
            library = load_library(name)
            known = library.buildable_sms()
            if known and SM not in known:
                reasons.append(f"{library.title} does not support {SM}")
                continue
            options = engines.EngineOptions(min_batch=1, opt_batch=2, max_batch=6)
            for precision in ("fp32", "fp16"):
                engines.build_engine(path, library=name, precision=precision, options=options)
            return path, name
        except SaaeError as error:
            reasons.append(f"{error.what} {error.why}")
    pytest.skip("no TensorRT builds for this GPU: " + "; ".join(reasons))


def frames(count, seed=0):
    made = np.random.default_rng(seed).integers(0, 256, (count, *SIZE, 3), np.uint8)
    made[0] = gray_frame(SIZE, spot=(5 + seed % 40, 10, 12, 20))
    return made


def open_it(bundle, precision="fp32", **options):
    path, name = bundle
    return backend_module.open_backend(open_bundle(path), name, 0, precision, BackendOptions(**options))


def check(outputs, given, bound=0.02):
    wanted = np.stack([expected_map(frame) for frame in given])
    assert np.abs(outputs.anomaly_map - wanted).max() <= bound * wanted.max()
    np.testing.assert_array_equal(outputs.score, outputs.anomaly_map.max((1, 2)))
    np.testing.assert_array_equal(outputs.mask, outputs.anomaly_map > np.float32(T))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_numpy_round_trip(bundle, precision, count):
    backend = open_it(bundle, precision)
    for seed in range(4):
        check(backend.infer(frames(count, seed), T), frames(count, seed))
    backend.close()


def test_graph_on_and_off_are_equal(bundle):
    on, off = open_it(bundle, cuda_graph=True), open_it(bundle, cuda_graph=False)
    for seed in range(5):
        one, other = on.infer(frames(3, seed), T), off.infer(frames(3, seed), T)
        np.testing.assert_array_equal(one.anomaly_map, other.anomaly_map)
        np.testing.assert_array_equal(one.mask, other.mask)
    assert on.cuda_graph, "capture was refused"
    on.close()
    off.close()


def test_stream_keeps_the_order(bundle):
    path, name = bundle
    given = [frames(1, seed)[0] for seed in range(40)]
    with Engine(path, backend=name, precision="fp32", threshold=T) as engine:
        for frame, result in zip(given, engine.stream(given), strict=True):
            assert np.abs(result.anomaly_map - expected_map(frame)).max() < 2


def test_four_threads(bundle):
    backend, errors = open_it(bundle), []

    def work(number):
        try:
            for turn in range(50):
                given = frames(1 + (number + turn) % 4, number * 1000 + turn)
                check(backend.infer(given, T), given)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    backend.close()
    assert errors == []


def test_torch_tensors_go_in_and_come_out_without_the_host(bundle):
    torch = need("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    backend, given = open_it(bundle), frames(3)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        busy = torch.randn(2048, 2048, device="cuda")
        for _ in range(20):
            busy = busy @ busy  # the frames are still waiting for this when they are handed over
        tensor = torch.from_numpy(given).cuda() + (busy[0, 0] * 0).nan_to_num().to(torch.uint8)
        check(backend.infer(tensor, T), given)
    torch.cuda.synchronize()
    with backend.infer_on_device(tensor, T) as outputs:
        outputs.hold(torch.cuda.current_stream().cuda_stream)  # torch does not wait by itself
        scores = torch.as_tensor(outputs.score, device="cuda")
        np.testing.assert_array_equal(scores.cpu().numpy(), backend.infer(given, T).score)
    with pytest.raises(FrameError, match="float32"):
        backend.infer(tensor.float(), T)
    with pytest.raises(FrameError, match="contiguous"):
        backend.infer(tensor.transpose(1, 2).contiguous().transpose(1, 2), T)  # same shape, columns first
    check(backend.infer(given, T), given)
    backend.close()


@pytest.mark.needs("cuda.core")
def test_dlpack_alone_is_enough(bundle):
    torch = need("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    given = frames(2)

    class OnlyDlpack:
        def __init__(self, tensor):
            self.tensor = tensor

        def __dlpack__(self, **options):
            return self.tensor.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.tensor.__dlpack_device__()

    backend = open_it(bundle)
    check(backend.infer(OnlyDlpack(torch.from_numpy(given).cuda()), T), given)
    backend.close()


@pytest.mark.needs("pycuda")
def test_pycuda_arrays(bundle):
    import pycuda.autoprimaryctx  # noqa: F401
    from pycuda import gpuarray

    given, backend = frames(2), open_it(bundle)
    check(backend.infer(gpuarray.to_gpu(given), T), given)
    backend.close()


def test_a_context_of_pycudas_own_is_left_alone_and_put_back(bundle):
    driver = need("pycuda.driver")
    driver.init()
    own, given = driver.Device(0).make_context(), frames(2)
    try:
        backend = open_it(bundle)
        check(backend.infer(given, T), given)
        block = driver.mem_alloc(1 << 20)  # in pycuda's context, which is the current one again
        driver.memset_d8(block, 7, 1 << 20)
        block.free()
        gpuarray = need("pycuda.gpuarray")
        with pytest.raises(FrameError, match="another CUDA context"):
            backend.infer(gpuarray.to_gpu(given), T)
        worker = threading.Thread(target=lambda: check(backend.infer(given, T), given))
        worker.start()
        worker.join()
        backend.close()
    finally:
        own.pop()
        own.detach()


def test_kernels_compiled_at_run_time_are_kept_for_the_next_start(bundle, tmp_path):
    _, name = bundle
    if not load_library(name).compiles_when_running:
        pytest.skip(f"{name} compiles nothing when it runs")
    for _ in range(2):
        backend = open_it(bundle, cache=str(tmp_path))
        check(backend.infer(frames(2), T), frames(2))
        backend.close()
        (kept,) = tmp_path.rglob("*.kernels")
        assert kept.stat().st_size > 0


def test_memory_is_flat(bundle):
    backend, api = open_it(bundle), CudaApi()
    for count in (6, 1, 3):
        for _ in range(4):
            backend.infer(frames(count), T)
    with api.on(0):
        before = api.memory_info()[0]
        for turn in range(300):
            backend.infer(frames((1, 3, 6)[turn % 3], turn), T)
        assert api.memory_info()[0] >= before - (1 << 20)
    backend.close()


def test_an_engine_that_is_cut_off_is_refused_and_the_process_stays_usable(bundle):
    path, name = bundle
    opened = open_bundle(path)
    (artefact,) = opened.artefacts(kind="engine", precision="fp32")
    data = opened.file(artefact.file).read_bytes()
    with pytest.raises(EngineIncompatibleError):
        load_library(name).deserialize(data[: len(data) // 2], host_code=False)
    backend = open_it(bundle)
    check(backend.infer(frames(1), T), frames(1))
    backend.close()
