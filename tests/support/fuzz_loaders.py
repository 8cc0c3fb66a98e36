"""Damaged inputs for every loader: each gives a result or one of saae's own errors, and nothing else.

Each fuzzer is a generator of attempts. `run` makes so many and counts inputs, named errors by kind, and violations.
An attempt is decided by the fuzzer's seed and its number alone, so that a violation can be made again.
"""

from __future__ import annotations

import copy
import io
import json
import random
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tiny_bundle import gray_frame, make_tiny_bundle, tiny_graph, tiny_manifest

from saae_runtime import Engine, Result, open_bundle
from saae_runtime.bundle import write_bundle
from saae_runtime.errors import BundleError, SaaeError
from saae_runtime.images import read_image

SIZE = (16, 24)
CPU = "onnxruntime:cpu"

Attempt = Callable[[random.Random], None]
"""Makes one input from the generator and gives it to the loader; returns, or raises what the loader raised."""


@dataclass
class Count:
    """What came of one fuzzer's inputs."""

    inputs: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        named = ", ".join(f"{kind} {number}" for kind, number in self.errors.most_common()) or "none"
        found = "".join(f"\n    {text}" for text in self.violations[:20])
        errors = f"{sum(self.errors.values())} named errors ({named})"
        return f"{self.inputs} inputs, {errors}, {len(self.violations)} violations{found}"


def run(name: str, inputs: int, seed: int = 0) -> Count:
    """Gives `inputs` damaged inputs to the loader `name` of FUZZERS."""
    count = Count()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on every second damaged file
        _run(count, name, inputs, seed)
    return count


def _run(count: Count, name: str, inputs: int, seed: int) -> None:
    with FUZZERS[name]() as (attempt, expected):
        for number in range(inputs):
            count.inputs += 1
            try:
                attempt(random.Random(f"{name} {seed} {number}"))
            except expected as error:
                count.errors[type(error).__name__] += 1
                if not all(isinstance(text, str) for text in (error.what, error.why, error.cure)) or not error.what:
                    count.violations.append(f"{number}: {type(error).__name__} without words")
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                count.violations.append(f"{number}: {type(error).__name__}: {error}"[:300])


# -- image files


@contextmanager
def images() -> Iterator[tuple[Attempt, type[SaaeError]]]:
    rng = np.random.default_rng(0)
    pixels = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
    deep = Image.fromarray(rng.integers(0, 65536, (24, 32)).astype(np.uint16))
    sources = []
    for kind, picture, options in (
        ("PNG", pixels, {}),
        ("PNG", deep, {}),
        ("PNG", pixels.convert("P"), {}),
        ("JPEG", pixels, {"quality": 80}),
        ("BMP", pixels, {}),
        ("TIFF", pixels, {"compression": "tiff_lzw"}),
        ("TIFF", deep, {}),
        ("WEBP", pixels, {}),
    ):
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        sources.append(buffer.getvalue())
    suffixes = (".png", ".jpg", ".bmp", ".tif", ".webp")
    with tempfile.TemporaryDirectory() as folder:

        def attempt(random: random.Random) -> None:
            file = Path(folder) / f"part{random.choice(suffixes)}"
            file.write_bytes(damaged(random, random.choice(sources)))
            array = read_image(file)
            assert array.dtype == np.uint8, array.dtype
            assert array.ndim == 3, array.shape
            assert array.shape[2] == 3, array.shape

        yield attempt, SaaeError


# -- manifest.json


@contextmanager
def manifests() -> Iterator[tuple[Attempt, type[SaaeError]]]:
    with tempfile.TemporaryDirectory() as folder:
        bundle = make_tiny_bundle(Path(folder) / "tiny", SIZE)
        plain = json.loads((bundle / "manifest.json").read_text())

        def attempt(random: random.Random) -> None:
            data = copy.deepcopy(plain)
            for _ in range(random.choice((1, 1, 1, 2, 5))):
                change(random, data)
            text = json.dumps(data)
            for levels in re.findall(f'"{_DEEP}([0-9]+)"', text):
                text = text.replace(f'"{_DEEP}{levels}"', "[" * int(levels) + "]" * int(levels))
            content = text.encode("utf-8", "surrogatepass")
            if random.random() < 0.2:
                content = damaged(random, content)
            (bundle / "manifest.json").write_bytes(content)
            opened = open_bundle(bundle, verify=random.random() < 0.3)
            str(opened.manifest.to_json()).encode("utf-8")

        yield attempt, BundleError


# -- a whole bundle, its hashes right again


@contextmanager
def bundles() -> Iterator[tuple[Attempt, type[SaaeError]]]:
    graph, manifest = tiny_graph(SIZE), tiny_manifest(SIZE)
    with tempfile.TemporaryDirectory() as folder:

        def attempt(random: random.Random) -> None:
            target = Path(folder) / "tiny"
            write_bundle(target, manifest, {"model.onnx": damaged(random, graph)})
            with Engine(target, backend=CPU, threads=1) as engine:
                assert isinstance(engine(gray_frame(SIZE)), Result)

        yield attempt, SaaeError


# -- frames and options


class Hostile:
    """An array whose own code fails."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        raise self._error

    def __repr__(self) -> str:
        raise self._error


@contextmanager
def frames() -> Iterator[tuple[Attempt, type[SaaeError]]]:
    with tempfile.TemporaryDirectory() as folder:
        bundle = open_bundle(make_tiny_bundle(Path(folder) / "tiny", SIZE))
        with Engine(bundle, backend=CPU, threads=1) as engine:

            def attempt(random: random.Random) -> None:
                value = odd_frame(random)
                options = {}
                for name in ("fpr", "threshold", "image_fpr", "image_threshold"):
                    if random.random() < 0.15:
                        options[name] = odd_number(random)
                how = random.random()
                if how < 0.7:
                    found = engine(value, **options)
                elif how < 0.9:
                    source = value if random.random() < 0.5 else [value]
                    size = odd_number(random) if random.random() < 0.2 else 1
                    found = list(engine.stream(source, batch_size=size, **options)) if _iterable(source) else None
                else:
                    name = random.choice(
                        ("threads", "slots", "max_batch", "hint", "cache", "arithmetic", "device_type")
                    )
                    names = {name: odd_number(random)}
                    if random.random() < 0.3:
                        names = {random.choice(("backend", "precision", "device", "fpr")): odd_number(random)}
                    with Engine(bundle, **{"backend": CPU, "threads": 1, "verify": False, **names}) as other:
                        found = other(gray_frame(SIZE))
                for result in found if isinstance(found, list) else [found]:
                    assert result is None or np.isfinite(result.score)

            yield attempt, SaaeError


def _iterable(value: object) -> bool:
    try:
        iter(value)  # type: ignore[call-overload]
    except TypeError:
        return False
    return True


def odd_frame(random: random.Random) -> Any:
    """Something that may be a frame."""
    rng = np.random.default_rng(random.getrandbits(32))
    kind = random.randrange(12)
    shape = tuple(random.choice((0, 1, 2, 3, 4, 16, 24, 31)) for _ in range(random.randrange(6)))
    if kind < 3:
        return rng.integers(0, 256, shape, np.uint8)
    if kind == 3:
        dtype = random.choice(
            ("bool", "uint16", "int8", "int64", "float16", "float64", "complex64", "object", "U3", "M8[s]")
        )
        return np.zeros(shape, dtype)
    if kind == 4:
        sides: list[int] = []
        while not sides or 10**8 < prod(sides) < 10**11:  # what memory holds after all takes half a minute to resize
            sides = [random.choice((1, 3, 24, 1000, 10**6)) for _ in range(3)]
        return np.broadcast_to(np.uint8(7), sides)
    if kind == 5:
        array = rng.integers(0, 256, (*SIZE, 3), np.uint8)
        return np.ma.masked_array(array, mask=rng.random(array.shape) < random.choice((0.0, 0.1, 1.0)))
    if kind == 6:
        return Hostile(
            random.choice((KeyError("x"), OSError("x"), ZeroDivisionError(), RuntimeError(), TypeError("x")))
        )
    if kind == 7:
        return [odd_frame(random) for _ in range(random.randrange(3))]
    if kind == 8:
        return odd_number(random)
    if kind == 9:
        return np.zeros(3, [("r", "u1"), ("g", "u1")])
    if kind == 10:
        return rng.integers(0, 256, (*SIZE, 3), np.uint8)[:: random.choice((-1, 2)), ::-1, :: random.choice((-1, 1))]
    return Image.new("RGB", (3, 4))


def odd_number(random: random.Random) -> Any:
    """Something that may be a number."""
    numbers = (0, 1, 2, -1, 0.5, 1.0, 1e-300, 1e39, -0.0, float("nan"), float("inf"), 10**400, -(10**5000), 1 << 40, 1j)
    others = (np.complex64(1), np.float16("nan"), np.int8(-3), np.bool_(True), True, None)
    texts = ("0.1", b"1", "", "[/]", "\ud800", "x" * 400)
    containers = ([], (), {}, {1: 2}, [1, 2], np.zeros(2), np.zeros(()), np.array(["a"]))
    return random.choice((*numbers, *others, *texts, *containers, object(), Hostile(ValueError("x"))))


# -- damage

_DEEP = "so many lists in each other: "
_VALUES = (
    *(
        10**400,
        -(10**400),
        1 << 63,
        1 << 70,
        -1,
        0,
        1,
        3,
        2.5,
        1e308,
        1e-320,
        float("nan"),
        float("inf"),
        True,
        False,
        None,
    ),
    *(
        "",
        "x" * 300,
        "x" * 70_000,
        "\ud800",
        "\udcff.onnx",
        "[/]",
        "[red]x",
        "../x",
        "/etc/passwd",
        "a\0b",
        "a\nb",
        "C:x",
        ".",
    ),
    *("..", "a/./b", "model.onnx/", "model.onnx/x", "\u202egpj", "fp16", "int8", "engine", "sm99999", "9" * 5000),
    *([], {}, [[]], [None], {"": 1}, {"\ud800": 1}, {"[/]": "x"}, [10**400], "ab" * 32),
)


def change(random: random.Random, data: Any) -> None:
    """Changes one place of parsed JSON: another value, a place less, another name."""
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        for key in keys:
            places.append((value, key))
            walk(value[key])

    walk(data)
    if not places:
        return
    owner, key = random.choice(places)
    how = random.random()
    if how < 0.7:
        owner[key] = copy.deepcopy(random.choice(_VALUES))
    elif how < 0.8:
        del owner[key]
    elif how < 0.9:
        other, place = random.choice(places)
        owner[key] = copy.deepcopy(other[place]) if place in range(len(other)) or place in other else None
    elif how < 0.95 and isinstance(owner, dict):
        owner[str(random.choice(_VALUES[16:40]))] = owner.pop(key)
    else:
        owner[key] = f"{_DEEP}{random.choice((10, 60, 500, 900, 2000, 100_000))}"


def damaged(random: random.Random, data: bytes) -> bytes:
    """Bytes with a few of them changed, cut, doubled, exchanged or set to what lengths are made of."""
    found = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4, 16))):
        if not found:
            break
        at, how = random.randrange(len(found)), random.randrange(7)
        if how == 0:
            found[at] ^= 1 << random.randrange(8)
        elif how == 1:
            found[at] = random.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif how == 2:
            del found[at:]
        elif how == 3:
            del found[at : at + random.randrange(1, 64)]
        elif how == 4:
            found[at:at] = found[at : at + random.randrange(1, 64)]
        elif how == 5:
            found[at : at + 4] = random.randbytes(4)
        else:
            found[at : at + 4] = b"\xff\xff\xff\x7f"
    return bytes(found)


FUZZERS = {"images": images, "manifests": manifests, "bundles": bundles, "frames": frames}


if __name__ == "__main__":
    for chosen in FUZZERS:
        print(f"{chosen}: {run(chosen, int(sys.argv[1]) if len(sys.argv) > 1 else 500)}", flush=True)
