"""Connection to a Triton server by tritonclient, the same for HTTP and gRPC, with errors that say what to do."""

from __future__ import annotations

import importlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from ..errors import BackendUnavailableError, BundleVersionError, ConfigError, DeviceError, SaaeError, shown
from .client_thread import ClientThread
from .known import SCHEMA

__all__ = ["Connection", "parse_url"]

_SCHEMES = {"grpc": ("grpc", False), "grpcs": ("grpc", True), "http": ("http", False), "https": ("http", True)}
_PORTS = {"grpc": 8001, "http": 8000}
_PAUSE = 0.2  # seconds between two checks of a starting server


def parse_url(url: str) -> tuple[str, str, bool]:
    """(protocol, host:port, TLS) of `grpc://host:8001`, `http://host:8000`, `grpcs://` and `https://`.

    Default scheme: gRPC; default port: the protocol's.

    Raises:
        ConfigError: another scheme, or no host.
    """
    text = url if "://" in url else f"grpc://{url}"
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
        parts = urlsplit("")
    if parts.scheme not in _SCHEMES or not host or parts.path.strip("/") or parts.query:
        raise ConfigError(
            f"{shown(url, 200)} is not the address of a Triton server.", "", "grpc://host:8001, or http://host:8000"
        )
    protocol, secure = _SCHEMES[parts.scheme]
    named = f"[{host}]" if ":" in host else host
    return protocol, f"{named}:{port or _PORTS[protocol]}", secure


class Connection:
    """One server. Thread-safe.

    gRPC has one channel for all threads. tritonclient's HTTP client belongs to one thread and takes one call at a time,
    so there are as many, each in a thread of its own, as there were calls at the same time.

    Args:
        url: see `parse_url`.
        timeout: seconds that an answer may take.
        options: passed to tritonclient's `InferenceServerClient`: certificates, for instance.

    Raises:
        ConfigError: an address or timeout that is not possible.
        BackendUnavailableError: tritonclient is not installed.
    """

    def __init__(self, url: str, timeout: float, **options: Any) -> None:
        self.protocol, self._address, secure = parse_url(url)
        if not isinstance(timeout, (int, float)) or not 0 < timeout < 1e6:
            raise ConfigError(f"timeout={shown(timeout)} is not possible.", "", "give seconds, for instance 10")
        self.url = f"{self.protocol}://{self._address}"
        self._timeout = float(timeout)
        self._options = {**options, **({"ssl": True} if secure else {})}
        try:
            self._library = importlib.import_module(f"tritonclient.{self.protocol}")
            self._failure = importlib.import_module("tritonclient.utils").InferenceServerException
        except ImportError as error:
            raise BackendUnavailableError(
                "TritonEngine needs tritonclient.", str(error), "pip install 'saae[triton]'"
            ) from error
        self._channel: Any = None
        self._idle: list[ClientThread] = []
        self._shared = threading.Lock()
        self._closed = False

    def wait(self, model: str, version: str, seconds: float) -> None:
        """Return once the model is ready, at the latest after `seconds`.

        Raises:
            BackendUnavailableError: no server answers.
            ConfigError: a server without this model; lists its models.
        """
        end = time.monotonic() + seconds
        while True:
            try:
                with self._explained(model):
                    if self._call("is_model_ready", model, version):
                        return
            except BackendUnavailableError:
                if time.monotonic() >= end:
                    raise
            else:
                if time.monotonic() >= end:
                    break
            time.sleep(_PAUSE)
        with self._explained(model):
            states = self._models()
        if model in states:
            raise BackendUnavailableError(
                f"The model {model!r} at {self.url} is not ready.",
                f"The server says: {states[model]}.",
                "look into the server's log, or wait for it: TritonEngine(..., wait=60)",
            )
        have = ", ".join(sorted(states)) or "none"
        raise ConfigError(f"{self.url} serves no model {model!r}.", f"It has: {have}.", "saae-export triton writes one")

    def _models(self) -> dict[str, str]:
        """Models of the server's repository and their states."""
        index = self._call("get_model_repository_index")
        if self.protocol == "grpc":
            index = [{"name": item.name, "state": item.state, "reason": item.reason} for item in index.models]
        return {
            item["name"]: " ".join(filter(None, (item.get("state"), item.get("reason")))) or "not loaded"
            for item in index
        }

    def config(self, model: str, version: str) -> dict[str, Any]:
        """The model's configuration: a ModelConfig message as dicts and lists."""
        with self._explained(model):
            if self.protocol == "grpc":
                found = self._call("get_model_config", model, version, as_json=True)["config"]
            else:
                found = self._call("get_model_config", model, version)
        return dict(found)

    def about(self, model: str, version: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """The model's configuration, and what `saae-export triton` has written into it for clients.

        Raises:
            ConfigError: not a model of saae.
            BundleVersionError: written by a newer saae.
        """
        config = self.config(model, version)
        try:
            found = json.loads(config["parameters"]["saae"]["string_value"])
            schema = int(found["schema"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"The model {model!r} at {self.url} was not written by saae.",
                f"Its configuration says nothing about thresholds ({type(error).__name__}: {error}).",
                "write it: saae-export triton BUNDLE --repository DIR",
            ) from error
        if schema > SCHEMA:
            raise BundleVersionError(
                f"The model {model!r} at {self.url} was written by a newer saae.",
                f"Its schema is {schema}; this saae reads up to {SCHEMA}.",
                "pip install --upgrade saae",
            )
        return config, found

    def server(self) -> str:
        """The server's name and version."""
        with self._explained(""):
            found = self._call("get_server_metadata")
        name, version = (found["name"], found["version"]) if isinstance(found, dict) else (found.name, found.version)
        return f"{name} {version}"

    def infer(self, model: str, version: str, frames: NDArray[np.uint8], wanted: Sequence[str]) -> dict[str, Any]:
        """Score a batch; return the named outputs as numpy arrays.

        Raises:
            DeviceError: the server failed, is down, or took too long.
        """
        given = self._library.InferInput("frame", list(frames.shape), "UINT8")
        given.set_data_from_numpy(frames)
        outputs = [self._library.InferRequestedOutput(name) for name in wanted]
        with self._explained(model):
            answer = self._call("infer", model, [given], model_version=version, outputs=outputs)
            found = {name: answer.as_numpy(name) for name in wanted}
        missing = [name for name, value in found.items() if value is None]
        if missing:
            raise DeviceError(f"{self.url} gave no {missing[0]} for {model}.", "", "write the model again")
        return found

    def _call(self, name: str, *values: Any, **options: Any) -> Any:
        """What a method of tritonclient's client returns, within the timeout."""
        if self.protocol == "grpc":
            with self._shared:
                if self._channel is None:
                    self._channel = self._library.InferenceServerClient(self._address, **self._options)
                client = self._channel
            return getattr(client, name)(*values, client_timeout=self._timeout, **options)
        with self._shared:
            thread = self._idle.pop() if self._idle else ClientThread(self._http_client())
        try:
            return thread.call(lambda client: getattr(client, name)(*values, **options))
        finally:
            with self._shared:
                closed = self._closed
                if not closed:
                    self._idle.append(thread)
            if closed:
                thread.close()

    def _http_client(self) -> Callable[[], Any]:
        """What makes a client; it holds no reference to the connection."""
        limits = {"connection_timeout": self._timeout, "network_timeout": self._timeout}
        return partial(self._library.InferenceServerClient, self._address, **{**limits, **self._options})

    @contextmanager
    def _explained(self, model: str) -> Iterator[None]:
        """Turn tritonclient's errors, and those of its transports, into ours."""
        try:
            yield
        except (SaaeError, MemoryError):
            raise
        except self._failure as error:
            said, status = str(error.message()), str(error.status() or "")
            if "UNAVAILABLE" in status or "DEADLINE" in status:
                raise self._unreachable(said, model) from error
            raise DeviceError(
                f"{self.url} did not score with {model!r}.",
                said,
                "look into the server's log; saae-export triton again",
            ) from error
        except Exception as error:  # the transports raise their own errors: no connection, timeout, no HTTP
            raise self._unreachable(f"{type(error).__name__}: {error}", model) from error

    def _unreachable(self, why: str, model: str) -> BackendUnavailableError:
        return BackendUnavailableError(
            f"No Triton server answers at {self.url}.",
            why,
            "start it: tritonserver --model-repository=DIR/onnx; check host, port and firewall, or give more timeout=",
        )

    def close(self) -> None:
        """Close every connection. May be called twice."""
        with self._shared:
            self._closed = True
            idle, self._idle = self._idle, []
            channel, self._channel = self._channel, None
        for thread in idle:
            thread.close()
        if channel is not None:
            with suppress(Exception):
                channel.close()
