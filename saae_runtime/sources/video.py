"""Frames of video files and cameras, through PyAV or OpenCV."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, DataError, DeviceError, SaaeError

__all__ = ["VIDEO_SUFFIXES", "camera_frames", "check_camera", "check_video", "frame_count", "video_frames"]

VIDEO_SUFFIXES = frozenset({".mp4", ".mkv", ".avi", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".ts", ".mjpeg", ".mjpg"})
"""File name endings (lower case) that are opened as video."""

Decoded = NDArray[np.uint8] | SaaeError

_CAMERA_MISSES = 30  # failed reads in a row after which a camera counts as lost (about a second)


def check_video() -> str:
    """Name of the library that will decode video files: "av" or "cv2".

    Raises:
        ConfigError: neither is installed, or the installed one cannot be loaded.
    """
    for name in ("av", "cv2"):
        if find_spec(name) is not None:
            _load(name)
            return name
    raise ConfigError(
        "Video files cannot be read here.",
        "Neither PyAV nor OpenCV is installed; the runtime alone does not need them.",
        "pip install 'saae[video]'",
    )


def check_camera() -> None:
    """Check that cameras can be used.

    Raises:
        ConfigError: OpenCV is not installed or cannot be loaded.
    """
    if find_spec("cv2") is None:
        raise ConfigError(
            "Cameras cannot be read here.",
            "They are opened through OpenCV, which is not installed.",
            "pip install opencv-python-headless",
        )
    _load("cv2")


def _load(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # usually OpenCV without libGL: installed, but not loadable
        package = {"av": "av", "cv2": "opencv-python-headless"}[name]
        raise ConfigError(
            f"The video library {name} is installed but cannot be loaded.",
            f"{type(error).__name__}: {error}",
            f"pip install --force-reinstall {package}",
        ) from error


def frame_count(path: Path) -> int | None:
    """Number of frames in a video's header; None if it has none or cannot be read."""
    try:
        if check_video() == "av":
            with _load("av").open(str(path)) as container:
                count = int(container.streams.video[0].frames)
        else:
            cv2 = _load("cv2")
            capture = cv2.VideoCapture(str(path))
            count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
            capture.release()
    except Exception:  # only an estimate for the progress bar; the real error comes with the first frame
        return None
    return count if count > 0 else None


def video_frames(path: Path) -> Iterator[Decoded]:
    """Frames of a video file in order, upright (the file's rotation is applied).

    A damaged part yields one error in place of its frames, and decoding goes on after it if the library can.

    Args:
        path: the file.

    Yields:
        uint8 arrays of shape H x W x 3, RGB; or a DataError for what could not be decoded.

    Raises:
        ConfigError: no library is installed that reads video.
    """
    decode = _av_frames if check_video() == "av" else _cv2_frames
    read = errors = 0
    for item in decode(path):
        if isinstance(item, SaaeError):
            errors += 1
        else:
            read += 1
        yield item
    if errors:
        return
    stated = frame_count(path)
    if not read:
        yield DataError(f"{path}: no frame in it.", "The video stream is empty.", "check the recording")
    elif stated is not None and read < stated - 1:
        # Libraries do not tell the end from a cut; only the header's count does. One missing frame is accepted, because
        # some recorders count the frame that they were writing when they were stopped.
        yield _unreadable(path, OSError(f"the header states {stated} frames, {read} could be decoded"))


def _av_frames(path: Path) -> Iterator[Decoded]:
    av: Any = _load("av")
    try:
        container = av.open(str(path))
    except Exception as error:
        yield _unreadable(path, error)
        return
    with container:
        if not container.streams.video:
            yield DataError(f"{path}: no video stream in it.", "The file holds other streams only.", "check the file")
            return
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except Exception as error:  # the container is cut off: nothing can follow
                yield _unreadable(path, error)
                return
            try:
                pictures = packet.decode()
            except EOFError:
                return
            except Exception as error:
                yield _unreadable(path, error)
                continue
            for picture in pictures:
                try:
                    quarter_turns = round(float(getattr(picture, "rotation", 0) or 0) / 90) % 4
                    frame = picture.to_ndarray(format="rgb24")
                except Exception as error:  # of one frame, whose pixels have a format that cannot be converted
                    yield _unreadable(path, error)
                    continue
                yield np.ascontiguousarray(np.rot90(frame, quarter_turns)) if quarter_turns else frame


def _cv2_frames(path: Path) -> Iterator[Decoded]:
    cv2: Any = _load("cv2")
    capture = cv2.VideoCapture(str(path))
    try:
        if not capture.isOpened():
            yield _unreadable(path, OSError("OpenCV found no decoder for it, or it is damaged"))
            return
        while True:
            good, picture = capture.read()
            if not good:
                return
            yield cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
    finally:
        capture.release()


def camera_frames(index: int) -> Iterator[Decoded]:
    """Endless frames of a camera; the driver drops old ones if it can.

    Args:
        index: the camera's number, 0 for the first.

    Yields:
        uint8 arrays of shape H x W x 3, RGB; or a DeviceError for a missing frame.

    Raises:
        ConfigError: OpenCV is not installed.
        DeviceError: the camera cannot be opened, or has stopped giving frames.
    """
    check_camera()
    cv2: Any = _load("cv2")
    capture = cv2.VideoCapture(index)
    try:
        if not capture.isOpened():
            raise DeviceError(
                f"camera:{index} cannot be opened.",
                "No such camera, another program holds it, or this user may not read it.",
                "ls /dev/video* shows the cameras; close other programs; add the user to the group `video`",
            )
        capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
        missed = 0
        while missed < _CAMERA_MISSES:
            good, picture = capture.read()
            if good:
                missed = 0
                yield cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
                continue
            missed += 1
            if missed == 1:
                yield DeviceError(f"camera:{index} gave no frame.", "A bad cable or bandwidth.", "check the cable")
        raise DeviceError(
            f"camera:{index} has stopped giving frames.",
            f"{_CAMERA_MISSES} reads in a row failed.",
            "check cable and power, then start again",
        )
    finally:
        capture.release()


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path}: cannot be decoded as video.",
        f"{type(error).__name__}: {error}",
        "play it in a viewer; if that fails too, record or copy it again",
    )
