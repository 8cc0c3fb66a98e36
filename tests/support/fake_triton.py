"""What a Triton server says, by its protocols, without one: to let it change its model, go down or fall silent.

Its model gives every pixel of every frame the value `score`. tests/export/triton/test_server.py asks the real server.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from needs import need
from tiny_bundle import tiny_manifest

SIZE = (16, 24)


@dataclass
class FakeTriton:
    """State of the server, which tests change while it runs.

    Attributes:
        protocol: `grpc` or `http`.
        score: of every frame.
        threshold: T of the model.
        known: the score that the model's configuration gives for the known frame.
        ready: whether the model is.
        size: (height, width) of its maps.
        down: answer as a server that stops.
        fails: names of calls that are answered so.
        answers: how many calls are answered before it falls silent.
        calls: names of the calls so far.
        connected: whether each HTTP connection so far is still open.
    """

    protocol: str = ""
    score: float = 30.0
    threshold: float = 40.0
    known: float = 30.0
    ready: bool = True
    size: tuple[int, int] = SIZE
    down: bool = False
    fails: set[str] = field(default_factory=set)
    answers: int = 1_000_000
    port: int = 0
    calls: list[str] = field(default_factory=list)
    connected: dict[int, bool] = field(default_factory=dict)
    end: threading.Event = field(default_factory=threading.Event)

    def about(self) -> dict[str, Any]:
        """The parameter `saae`."""
        manifest = {**tiny_manifest(SIZE, self.threshold).to_json(), "files": {}}
        return {"schema": 1, "kind": "onnx", "manifest": manifest, "check": {"score": self.known, "tolerance": 0.01}}

    def config(self) -> dict[str, Any]:
        """The model's configuration."""
        return {"max_batch_size": 8, "parameters": {"saae": {"string_value": json.dumps(self.about())}}}

    def outputs(self, count: int) -> dict[str, np.ndarray]:
        """The model's answer to a batch."""
        maps = np.full((count, *self.size), self.score, np.float32)
        return {"anomaly_map": maps, "score": maps[:, 0, :1]}

    def answer(self, name: str) -> bool:
        """Count a call; return whether it is answered. A silent server returns only when it ends."""
        self.calls.append(name)
        if len(self.calls) > self.answers:
            self.end.wait()
        return not self.down and name not in self.fails


@contextmanager
def fake_triton(protocol: str, **state: Any) -> Iterator[FakeTriton]:
    """A running server of one protocol, `grpc` or `http`."""
    fake = FakeTriton(protocol, **state)
    with _grpc(fake) if protocol == "grpc" else _http(fake):
        try:
            yield fake
        finally:
            fake.end.set()


@contextmanager
def _http(fake: FakeTriton) -> Iterator[None]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle(self) -> None:
            fake.connected[id(self)] = True
            try:
                super().handle()
            finally:
                fake.connected[id(self)] = False

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            name = self.path.strip("/").rpartition("/")[2]
            said = {"v2": {"name": "triton", "version": "x"}, "config": fake.config(), "ready": {}}[name]
            self.say(name, said, 200 if fake.ready or name != "ready" else 400)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path.endswith("index"):
                self.say("index", [{"name": "tiny", "state": "LOADING"}])
                return
            head = int(self.headers.get("Inference-Header-Content-Length", len(body)))
            asked = json.loads(body[:head])
            found = fake.outputs(asked["inputs"][0]["shape"][0])
            names = [item["name"] for item in asked["outputs"]]
            outputs = [
                {"name": name, "datatype": "FP32", "shape": found[name].shape, "data": found[name].ravel().tolist()}
                for name in names
            ]
            self.say("infer", {"model_name": "tiny", "model_version": "1", "outputs": outputs})

        def say(self, name: str, said: Any, status: int = 200) -> None:
            if not fake.answer(name):
                self.close_connection = True  # no answer: the client sees the connection end
                return
            body = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            pass  # a client that gave up

    with Server(("127.0.0.1", 0), Handler) as server:
        fake.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def _grpc(fake: FakeTriton) -> Iterator[None]:
    messages = need("tritonclient.grpc.service_pb2")
    import grpc  # comes with it

    model_config = need("tritonclient.grpc.model_config_pb2")

    def ready(_: Any) -> Any:
        return messages.ModelReadyResponse(ready=fake.ready)

    def config(_: Any) -> Any:
        found = model_config.ModelConfig(name="tiny", max_batch_size=8)
        found.parameters["saae"].string_value = json.dumps(fake.about())
        return messages.ModelConfigResponse(config=found)

    def metadata(_: Any) -> Any:
        return messages.ServerMetadataResponse(name="triton", version="x")

    def index(_: Any) -> Any:
        found = messages.RepositoryIndexResponse()
        found.models.add(name="tiny", state="LOADING")
        return found

    def infer(request: Any) -> Any:
        found = fake.outputs(request.inputs[0].shape[0])
        answer = messages.ModelInferResponse(model_name="tiny", model_version="1")
        for item in request.outputs:
            answer.outputs.add(name=item.name, datatype="FP32", shape=found[item.name].shape)
            answer.raw_output_contents.append(found[item.name].tobytes())
        return answer

    methods = {
        "ModelReady": ("ready", ready, messages.ModelReadyRequest),
        "ModelConfig": ("config", config, messages.ModelConfigRequest),
        "ServerMetadata": ("v2", metadata, messages.ServerMetadataRequest),
        "RepositoryIndex": ("index", index, messages.RepositoryIndexRequest),
        "ModelInfer": ("infer", infer, messages.ModelInferRequest),
    }

    class Handler(grpc.GenericRpcHandler):  # type: ignore[misc, name-defined]
        def service(self, details: Any) -> Any:
            name, method, request = methods[details.method.rpartition("/")[2]]

            def respond(asked: Any, context: Any) -> Any:
                if not fake.answer(name):
                    context.abort(grpc.StatusCode.UNAVAILABLE, "it stops")
                return method(asked)

            return grpc.unary_unary_rpc_method_handler(
                respond,
                request_deserializer=request.FromString,
                response_serializer=lambda message: message.SerializeToString(),
            )

    server = grpc.server(ThreadPoolExecutor(8))
    server.add_generic_rpc_handlers((Handler(),))
    fake.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield
    finally:
        server.stop(0).wait()
