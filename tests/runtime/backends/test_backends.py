"""Choosing a backend: names, what is missing, and that nothing is replaced in silence."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
from needs import need
from tiny_bundle import gray_frame, make_tiny_bundle, tiny_graph, tiny_manifest

from saae_runtime import Engine, backends, open_bundle
from saae_runtime.backends import BACKENDS, BackendOptions
from saae_runtime.backends.cache import cache_folder
from saae_runtime.backends.onnxruntime import choose as ort_choose
from saae_runtime.backends.onnxruntime import quiet
from saae_runtime.backends.openvino import choose as openvino_choose
from saae_runtime.backends.openvino import library as openvino_library
from saae_runtime.bundle import Bundle, write_bundle
from saae_runtime.errors import BackendError, BackendUnavailableError, ConfigError
from saae_runtime.manifest import Parity


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return open_bundle(make_tiny_bundle(tmp_path / "tiny", (16, 16)))


@pytest.fixture
def no_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_library, "device_missing", lambda kind: ("it is not installed", "pip install it"))


def test_every_name_has_one_candidate(bundle: Bundle) -> None:
    found = backends.candidates(bundle)
    assert [candidate.name for candidate in found].count("onnxruntime:cpu") == 1
    assert {candidate.name for candidate in found} == set(BACKENDS)
    for candidate in found:
        assert candidate.artefact is not None or candidate.why_not


@pytest.mark.usefixtures("no_openvino")
@pytest.mark.parametrize("name", ["auto", "onnxruntime"])
def test_auto_takes_what_is_there_and_says_why(bundle: Bundle, name: str) -> None:
    if any(c.why_not is None for c in backends.candidates(bundle) if c.name == "onnxruntime:cuda"):
        pytest.skip("this machine has CUDA, which auto rightly takes")
    with Engine(bundle, backend=name) as engine:
        assert engine.backend.name == "onnxruntime:cpu"
        text = engine.explain()
    assert "* onnxruntime:cpu: in use: model.onnx" in text
    assert "openvino: not here: it is not installed -> pip install it" in text
    for other in set(BACKENDS) - {"onnxruntime:cpu"}:
        assert f"  {other}: " in text


@pytest.mark.usefixtures("no_openvino")
def test_auto_passes_over_what_fails_with_a_word(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_library, "device_missing", lambda kind: ("", ""))

    def fail(*_: object) -> None:
        raise BackendUnavailableError("OpenVINO cannot be used here.", "built for another processor")

    monkeypatch.setattr(openvino_choose, "OpenVinoBackend", fail)
    with pytest.warns(UserWarning, match="openvino is passed over.*another processor"):
        backend = backends.open_backend(bundle, "auto")
    assert backend.name == "onnxruntime:cpu"
    with pytest.raises(BackendUnavailableError, match="another processor"):  # asked for: an error
        backends.open_backend(bundle, "openvino")


@pytest.mark.parametrize(
    "name", ["onnxruntime:cuda", "onnxruntime:tensorrt", "tensorrt", "tensorrt_rtx", "tensorrt_lean"]
)
def test_asked_for_and_missing_is_an_error(bundle: Bundle, name: str) -> None:
    candidate = next(c for c in backends.candidates(bundle) if c.name == name)
    if candidate.why_not is None:
        pytest.skip(f"{name} is there on this machine")
    with pytest.raises(BackendUnavailableError) as caught:
        Engine(bundle, backend=name)
    assert caught.value.cure


def test_missing_cuda_gives_the_pip_line(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    ort = need("onnxruntime")
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendUnavailableError, match="built without CUDA") as caught:
        backends.open_backend(bundle, "onnxruntime:cuda")
    assert "pip install 'saae[cuda]'" in caught.value.cure


def test_provider_that_does_not_load_is_no_silent_cpu(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    ort = need("onnxruntime")
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has the CUDA provider")
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort_choose, "_has_nvidia_driver", lambda: True)
    # This ONNX Runtime has no CUDA provider: it warns and goes on with the CPU, as it does for a missing cuDNN.
    with pytest.raises(BackendError):
        backends.open_backend(bundle, "onnxruntime:cuda")


def test_no_driver_is_said(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    ort = need("onnxruntime")
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort_choose, "_has_nvidia_driver", lambda: False)
    with pytest.raises(BackendUnavailableError, match="no NVIDIA driver"):
        backends.open_backend(bundle, "onnxruntime:cuda")


def test_without_onnx_runtime(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendUnavailableError, match="ONNX Runtime is not installed") as caught:
        backends.open_backend(bundle, "onnxruntime:cpu")
    assert "pip install 'saae[cpu]'" in caught.value.cure
    with pytest.raises(BackendUnavailableError, match=r"saae\[cpu\]"):
        backends.open_backend(bundle, "onnxruntime")


def test_onnx_runtime_that_cannot_be_imported(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("libfoo.so.1: cannot open shared object file")

    monkeypatch.setattr(quiet.importlib, "import_module", broken)
    candidate = next(c for c in ort_choose.candidates(bundle) if c.name == "onnxruntime:cpu")
    assert "libfoo.so.1" in (candidate.why_not or "")


@pytest.mark.parametrize(
    ("name", "near"), [("onnxruntime:cud", "onnxruntime:cuda"), ("tensort", "tensorrt"), ("magic", "auto")]
)
def test_unknown_name(bundle: Bundle, name: str, near: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Engine(bundle, backend=name)
    assert near in caught.value.cure


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"precision": "fp8"}, "fp8"),
        ({"device": -1}, "device"),
        ({"device": "0"}, "device"),
        ({"threds": 2}, "threads"),
        ({"threads": 0}, "threads"),
        ({"threads": True}, "threads"),
        ({"max_batch": 1.5}, "max_batch"),
        ({"hint": "fast"}, "latency"),
        ({"device_type": "TPU"}, "NPU"),
        ({"arithmetic": "fp4"}, "bf16"),
    ],
)
def test_unknown_options(bundle: Bundle, options: dict, word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Engine(bundle, backend="onnxruntime:cpu", **options)
    assert word in str(caught.value)


def test_precision_that_the_bundle_has_not(bundle: Bundle) -> None:
    with pytest.raises(BackendUnavailableError, match="no int8 ONNX file") as caught:
        Engine(bundle, backend="onnxruntime:cpu", precision="int8")
    assert "saae-export build --int8" in caught.value.cure
    with pytest.raises(BackendUnavailableError, match="no fp16 ONNX file") as caught:
        Engine(bundle, backend="onnxruntime:cpu", precision="fp16")
    assert "saae-export build --precision fp32,fp16" in caught.value.cure


def test_precision_chooses_the_file_and_its_thresholds(tmp_path: Path) -> None:
    manifest = tiny_manifest((16, 16), 40.0, ("fp32", "fp16"))
    other = tiny_manifest((16, 16), 41.0).thresholds["fp32"]
    manifest = dataclasses.replace(manifest, thresholds={**manifest.thresholds, "fp16": other})
    files = {a.file: tiny_graph((16, 16), precision=a.precision) for a in manifest.artefacts}
    folder = write_bundle(tmp_path / "two", manifest, files).path
    frame = gray_frame((16, 16), spot=(4, 4, 6, 6))
    scores = {}
    for precision, threshold in (("fp32", 40.0), ("fp16", 41.0)):
        with Engine(folder, backend="onnxruntime:cpu", precision=precision) as engine:
            assert engine.backend.precision == precision
            assert engine.threshold == threshold
            scores[precision] = engine(frame).score
    assert scores["fp16"] == pytest.approx(scores["fp32"], rel=2e-3)
    assert scores["fp16"] != scores["fp32"]  # it really computes in half precision
    with Engine(folder, backend="onnxruntime:cpu") as engine:
        assert engine.backend.precision == "fp32"  # half precision is emulated on a CPU


def test_artefact_that_failed_parity_is_only_taken_when_asked_for(tmp_path: Path) -> None:
    failed = Parity(5, 0.5, 0.5, 3, 1e-3, 1e-3, False, "a.png", "PyTorch FP32")
    manifest = tiny_manifest((16, 16))
    artefact = dataclasses.replace(manifest.artefacts[0], parity=failed)
    manifest = dataclasses.replace(manifest, artefacts=(artefact,))
    folder = write_bundle(tmp_path / "failed", manifest, {"model.onnx": tiny_graph((16, 16))}).path
    with pytest.raises(BackendUnavailableError, match="parity"):
        Engine(folder, backend="onnxruntime:cpu")
    with Engine(folder, backend="onnxruntime:cpu", precision="fp32") as engine:
        assert engine(gray_frame((16, 16))).score == 0.0


def test_cache_folder_is_beside_the_bundle_never_inside(bundle: Bundle, tmp_path: Path) -> None:
    folder = cache_folder(bundle, None)
    assert folder is not None
    assert folder.parent == tmp_path / "tiny.cache"
    assert cache_folder(bundle, True) == folder
    assert cache_folder(bundle, False) is None
    chosen = cache_folder(bundle, tmp_path / "elsewhere")
    assert chosen is not None
    assert chosen.parent == tmp_path / "elsewhere"
    again = open_bundle(make_tiny_bundle(bundle.path, (16, 16), threshold=7.0))
    assert cache_folder(again, None) != folder  # another graph, another place


def test_cache_folder_where_the_bundle_is_read_only(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    monkeypatch.delenv("SAAE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    (tmp_path / "tiny.cache").write_text("a file in the way, since root may write anywhere")
    folder = cache_folder(bundle, None)
    assert folder is not None
    assert folder.is_relative_to(home)
    monkeypatch.setenv("SAAE_CACHE", str(tmp_path / "own"))
    folder = cache_folder(bundle, None)
    assert folder is not None
    assert folder.parent == tmp_path / "own"
    monkeypatch.setenv("SAAE_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "tiny.cache"))
    assert cache_folder(bundle, None) is None


def test_options_know_their_names() -> None:
    assert BackendOptions.from_mapping({"threads": 2, "hint": "throughput"}).threads == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        BackendOptions().threads = 3  # type: ignore[misc]


def test_a_user_without_a_home_keeps_the_cache_beside_the_bundle(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SAAE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    folder = cache_folder(bundle, None)
    assert folder is not None
    assert folder.parent == bundle.path.with_name(f"{bundle.path.name}.cache")
