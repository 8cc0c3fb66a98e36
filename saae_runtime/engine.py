"""The engine: a bundle and a backend, called with frames."""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from . import backends, geometry
from .backends.base import Backend, RawOutputs
from .backends.cuda.arrays import device_rank, is_device_array
from .bundle import Bundle, open_bundle
from .call_thresholds import CallThresholds, check_request
from .ending import native_call
from .errors import BackendError, BundleError, ConfigError, FrameError, shown
from .frames import Resize, as_frames, enough_memory, to_batch
from .images import check_white_level
from .manifest import Manifest
from .meter import Meter
from .regions import defect_mask
from .result import Result
from .stream import Pipeline

__all__ = ["Engine"]

_RESIZE_THREADS = 4
_MOST_BATCH = 1 << 16
_BATCH = 16  # frames in one call of a backend that sets no limit itself
_Size = tuple[int, int]
_Scored = TypeVar("_Scored")


class Engine:
    """Scores frames with a bundle, without PyTorch.

    One engine may be called from several threads. Passed to another process, it is opened there from the same bundle
    with the same options. Close it when done, or use it as a context manager.

    Args:
        bundle: the bundle's folder, or an opened bundle.
        backend: `auto` (the fastest here, timed once on each machine; `explain` says more), `onnxruntime`, or a name of
            `saae_runtime.backends.BACKENDS`, which is never replaced by another.
        device: GPU number.
        precision: one of `saae_runtime.manifest.PRECISIONS`; None: the backend's choice. Thresholds are those
            calibrated for it.
        fpr: acceptable false-positive rate of pixels, 0..1; None: the bundle's default.
        threshold: pixel threshold T itself, instead of `fpr`.
        image_fpr: acceptable false-positive rate of whole frames; None: the bundle's default.
        image_threshold: image threshold itself, instead of `image_fpr`.
        white_level: largest value of a 16-bit camera's pixels, such as 4095; with it, uint16 frames are accepted, too.
            None: the bundle's, if it has one.
        verify: whether the hashes of the bundle's files are compared first.
        options: threads, hint, max_batch, cache, measure and more; see `saae_runtime.backends.BackendOptions`.

    Raises:
        BundleError: no bundle there, or a damaged one.
        BackendError: the backend is missing or cannot load the file.
        ConfigError: options that cannot work, alone or together.

    Example:
        >>> with Engine("bundles/zipper") as engine:    # doctest: +SKIP
        ...     result = engine(frame)
        ...     print(result.score, result.is_anomalous)
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str] | Bundle,
        *,
        backend: str = "auto",
        device: int = 0,
        precision: str | None = None,
        fpr: float | None = None,
        threshold: float | None = None,
        image_fpr: float | None = None,
        image_threshold: float | None = None,
        white_level: int | None = None,
        verify: bool = True,
        **options: Any,
    ) -> None:
        self._closed = True  # until the backend is open; close() works on an incomplete engine
        limits = {"fpr": fpr, "threshold": threshold, "image_fpr": image_fpr, "image_threshold": image_threshold}
        self._check_options(white_level, **limits)
        self._device = device
        self._precision = precision
        self._options = options
        with native_call():
            opened, backend_in_use = _open_both(bundle, backend, device, precision, verify, options)
        again = partial(
            Engine,
            bundle if isinstance(bundle, Bundle) else str(opened.path),
            backend=backend,
            device=device,
            precision=precision,
            verify=verify,
            white_level=white_level,
            **limits,
            **options,
        )
        self._begin(opened, backend_in_use, again, white_level, options.get("threads"), **limits)

    @staticmethod
    def _check_options(white_level: int | None, **limits: float | None) -> None:
        check_request(**limits)
        check_white_level(white_level)

    def _begin(
        self,
        bundle: Bundle,
        backend: Backend,
        again: Callable[[], Engine],
        white_level: int | None,
        threads: int | None,
        **limits: float | None,
    ) -> None:
        """Take over an open backend; the engine is open from here on. `again` opens it in another process."""
        self._bundle, self._backend = bundle, backend
        self._white_level = self.manifest.frame.white_level if white_level is None else white_level
        self._again = again
        self._resize, self._resizers = _resizing(threads)
        self._tables = self.manifest.thresholds[backend.precision]
        self._idle = threading.Condition()
        self._calls = 0
        self._meter = Meter()
        self._streams: weakref.WeakSet[Pipeline[Any]] = weakref.WeakSet()
        self._closed = False
        try:
            self._limits = CallThresholds.choose(self._tables, None, **limits)
        except BaseException:
            self.close()
            raise

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self._bundle.manifest

    @property
    def bundle(self) -> Bundle:
        """The opened bundle."""
        return self._bundle

    @property
    def backend(self) -> Backend:
        """The backend in use; `backend.description` names library, device and file."""
        return self._backend

    @property
    def threshold(self) -> float:
        """Pixel threshold T of calls that give none."""
        return self._limits.pixel

    @property
    def image_threshold(self) -> float:
        """Image threshold of calls that give none."""
        return self._limits.image

    @property
    def white_level(self) -> int | None:
        """White level of 16-bit frames and files; None: not set, and uint16 frames are refused."""
        return self._white_level

    def explain(self) -> str:
        """Which backend is in use, how fast each is here, and why others are not: text of several lines."""
        ways = backends.explain(self._bundle, self._backend, self._device, self._precision, **self._options)
        return f"{self._backend.description}\n{ways}"

    def health(self) -> dict[str, Any]:
        """Statistics of the engine's calls (without streams), as JSON values.

        Returns:
            `open`; `backend`, described; `counts` of `frames` and of `failed` calls; `latency_ms` of the latest 2000
            calls, by percentile; `last_error` and its age in seconds; `idle_seconds` since the last good call.
        """
        reading = self._meter.read().to_dict()
        reading["counts"] = {"frames": 0, "failed": 0} | reading["counts"]
        return {"open": not self._closed, "backend": self._backend.description, **reading}

    @overload
    def __call__(
        self,
        frames: NDArray[Any],
        *,
        fpr: float | None = ...,
        threshold: float | None = ...,
        image_fpr: float | None = ...,
        image_threshold: float | None = ...,
    ) -> Any: ...

    @overload
    def __call__(
        self,
        frames: Sequence[Any],
        *,
        fpr: float | None = ...,
        threshold: float | None = ...,
        image_fpr: float | None = ...,
        image_threshold: float | None = ...,
    ) -> list[Result]: ...

    def __call__(
        self,
        frames: Any,
        *,
        fpr: float | None = None,
        threshold: float | None = None,
        image_fpr: float | None = None,
        image_threshold: float | None = None,
    ) -> Any:
        """Score one frame or a batch.

        Args:
            frames: uint8 H x W x 3 (RGB), H x W x 1 or H x W: one frame; N x H x W x 3 (or x 1): a batch; a list of
                frames, sizes may differ. Frames that do not have the graph's size are resized, and the map is resized
                back to theirs. With TensorRT also a GPU array (CUDA array interface or
                DLPack), H x W x 3 or N x H x W x 3 at the graph's size, which is taken without a host copy.
            fpr, threshold, image_fpr, image_threshold: for this call, instead of the engine's; see the class.

        Returns:
            A Result for one frame, a list of Results for a batch or a list.

        Raises:
            FrameError: a dtype or shape that frames do not have.
            ConfigError: `fpr` and `threshold` both given, a rate outside 0..1, or the engine is closed.
            BackendError: the inference failed, or gave values that are not finite.
        """
        limits = CallThresholds.choose(self._tables, self._limits, fpr, threshold, image_fpr, image_threshold)
        on_device = is_device_array(frames)
        if on_device:
            single = device_rank(frames) == 3
        else:
            checked = as_frames(frames, self._white_level)
            single = checked.single
        results = self._metered(
            lambda: self._score_on_device(frames, limits) if on_device else self._score(checked.items, limits)
        )
        return results[0] if single else results

    def _metered(self, score: Callable[[], list[_Scored]]) -> list[_Scored]:
        """A call that is counted, timed, and waited for by `close`."""
        self._enter()
        start = time.perf_counter()
        try:
            with native_call():
                results = score()
        except BaseException as error:
            self._meter.fail(error)
            self._meter.count("failed")
            raise
        finally:
            self._leave()
        self._meter.take(1000 * (time.perf_counter() - start))
        self._meter.count("frames", len(results))
        self._meter.beat()
        return results

    def stream(
        self,
        frames: Iterable[Any],
        *,
        batch_size: int = 1,
        fpr: float | None = None,
        threshold: float | None = None,
        image_fpr: float | None = None,
        image_threshold: float | None = None,
    ) -> Iterator[Result]:
        """Score a source of single frames, in order; reading, computing and using results overlap.

        The source is read on a separate thread, a few frames ahead. Its exceptions are raised here, after the earlier
        results. Stopping early (break, an exception, closing the engine) ends the threads.

        A result is returned as soon as it is computed, whether or not the source has a next frame.

        Args:
            frames: any iterable of single frames (see `__call__`), also one array N x H x W x 3 or N x H x W x 1.
            batch_size: frames computed together: more throughput on a GPU, more delay for each frame, since a batch
                waits until it is full or the source ends.
            fpr, threshold, image_fpr, image_threshold: for this stream, instead of the engine's; see the class.

        Returns:
            Iterator of Results.

        Raises:
            As `__call__`.
        """
        limits = CallThresholds.choose(self._tables, self._limits, fpr, threshold, image_fpr, image_threshold)
        most = self._backend.max_batch
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or not 1 <= batch_size <= _MOST_BATCH:
            raise ConfigError(f"batch_size={shown(batch_size)} is not possible.", "", "give a whole number from 1 up")
        if most is not None and batch_size > most:
            raise ConfigError(
                f"batch_size={shown(batch_size)} is above what {self._backend.name} takes here.", "", f"{most} or less"
            )
        self._check_open()
        _check_source(frames)
        pipeline = Pipeline(frames, self._prepare, self._backend, limits.pixel, batch_size)
        return self._results(pipeline, limits)

    def _results(self, pipeline: Pipeline[_Size], limits: CallThresholds) -> Iterator[Result]:
        with self._idle:  # close() ends every stream in this set
            self._check_open()
            self._streams.add(pipeline)
        for sizes, outputs in pipeline:
            finished = self._finish(sizes, outputs, limits)
            for size in sizes:
                with enough_memory([size]):
                    result = next(finished)
                yield result

    def _prepare(self, item: Any) -> tuple[_Size, NDArray[np.uint8]]:
        checked = as_frames(item, self._white_level)
        if not checked.single:
            raise FrameError(
                "An item of the stream is a batch, not one frame.",
                "A stream takes single frames; it batches them itself.",
                "engine.stream(frame for batch in batches for frame in batch)",
            )
        with enough_memory(checked.items):
            frame = to_batch(checked.items, self._backend.frame_size)[0]
            if np.may_share_memory(frame, checked.items[0]):
                # Copied, because frames are read ahead and a camera may reuse the memory.
                frame = frame.copy()
        return _size(checked.items[0]), frame

    def close(self) -> None:
        """Wait for calls in flight, end streams, release the backend. May be called twice."""
        if self._closed:
            return
        with self._idle:
            self._closed = True
            self._idle.wait_for(lambda: self._calls == 0)
            streams = list(self._streams)
        for pipeline in streams:
            pipeline.stop(_closed_error())
        if self._resizers is not None:
            self._resizers.shutdown()
        self._backend.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """What another process opens its engine from (`multiprocessing` with `spawn`)."""
        self._check_open()
        return self._again, ()

    def __enter__(self) -> Engine:
        self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else self._backend.description
        return f"Engine({self.manifest.category}: {state})"

    def _score(self, frames: Sequence[NDArray[np.uint8]], limits: CallThresholds) -> list[Result]:
        results: list[Result] = []
        step = self._backend.max_batch or _BATCH
        for start in range(0, len(frames), step):
            part = frames[start : start + step]
            with enough_memory(part):
                outputs = self._backend.infer(to_batch(part, self._backend.frame_size, self._resize), limits.pixel)
                results.extend(self._finish([_size(frame) for frame in part], outputs, limits))
        return results

    def _score_on_device(self, frames: Any, limits: CallThresholds) -> list[Result]:
        if not self._backend.takes_device_arrays:
            raise FrameError(
                f"The frames lie on a GPU; {self._backend.name} takes frames on the host.",
                "Frames are never copied between devices implicitly.",
                "copy them to the host as a numpy array, or open the engine with backend='tensorrt'",
            )
        outputs = self._backend.infer(frames, limits.pixel)
        return list(self._finish([self._backend.frame_size] * len(outputs.score), outputs, limits))

    def _finish(self, sizes: Sequence[_Size], outputs: RawOutputs, limits: CallThresholds) -> Iterator[Result]:
        for size, score, anomaly_map in zip(sizes, outputs.score, outputs.anomaly_map, strict=True):
            # NaN exceeds no threshold: without this check a damaged model would call every frame good.
            if not math.isfinite(score) or not math.isfinite(float(anomaly_map.sum())):
                raise BackendError(
                    f"{self._backend.description} gave a score or map that is not finite.",
                    "The weights are damaged, or the precision overflows on this device.",
                    "saae-export verify the bundle; or try another precision= or backend=",
                )
            if anomaly_map.shape != size:
                anomaly_map = geometry.upsample_map(anomaly_map, size)
            mask = defect_mask(anomaly_map, limits.pixel, limits.image, float(score))
            anomaly_map.setflags(write=False)
            mask.setflags(write=False)
            rank = self._tables.image.share_below(float(score))
            yield Result(float(score), anomaly_map, mask, limits.pixel, limits.image, rank)

    def _check_open(self) -> None:
        if self._closed:
            raise _closed_error()

    def _enter(self) -> None:
        with self._idle:
            self._check_open()
            self._calls += 1

    def _leave(self) -> None:
        with self._idle:
            self._calls -= 1
            self._idle.notify_all()


def _open_both(
    bundle: str | os.PathLike[str] | Bundle,
    backend: str,
    device: int,
    precision: str | None,
    verify: bool,
    options: dict[str, Any],
) -> tuple[Bundle, Backend]:
    """Open the bundle and a backend; again if another process replaces the bundle meanwhile.

    Otherwise a new graph could be judged by the thresholds of the old one.
    """
    for last in (False, True):
        opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle, verify=verify)
        again = not last and not isinstance(bundle, Bundle)
        try:
            found = backends.open_backend(opened, backend, device, precision, **options)
        except (BundleError, BackendError):
            if again and not opened.is_current():
                continue
            raise
        if not again or opened.is_current():
            return opened, found
        found.close()
    raise AssertionError("the last try returns or raises")


def _resizing(threads: int | None) -> tuple[Resize, ThreadPoolExecutor | None]:
    """The resize function for calls: large frames in parallel bands, on at most `threads` threads.

    Streams do not use it: there, resizing runs beside the inference and would slow it.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(threads or cores, _RESIZE_THREADS)
    if count < 2:
        return geometry.resize_frames, None
    pool = ThreadPoolExecutor(count, "saae-resize")  # its threads start when they are first needed
    return partial(geometry.resize_frames, bands=count, run=pool.map), pool


def _check_source(frames: Any) -> None:
    """Refuse a single frame as the source of a stream: its rows would be taken for gray frames."""
    shape = getattr(frames, "shape", None)
    if not isinstance(shape, tuple) or len(shape) == 4:
        return
    if len(shape) in (2, 3):
        what = f"A stream takes many frames; it was given one array of shape {shape}, which is one frame."
        why = "Taken as a sequence, each of its rows would be a gray frame." if len(shape) == 3 else ""
        cure = "engine(frame) for one frame, engine.stream([frame]), or N x H x W x 1 for a batch of gray frames"
    else:
        what, why = f"A stream takes frames; it was given one array of shape {shape}.", ""
        cure = "give an iterable of frames, or one array N x H x W x 3"
    raise FrameError(what, why, cure)


def _size(frame: NDArray[np.uint8]) -> _Size:
    return frame.shape[0], frame.shape[1]


def _closed_error() -> ConfigError:
    return ConfigError("This engine is closed.", "close() was called, or its `with` block has ended.", "open a new one")
