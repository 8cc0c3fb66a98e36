"""A small HTTP client for tests: no library, any header, and bodies as they are."""

from __future__ import annotations

import http.client
import json
import urllib.parse
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """Requests to one port of this machine, each on a connection of its own.

    Args:
        port: of the service.
        headers: sent with each request.
    """

    def __init__(self, port: int, **headers: str) -> None:
        self.port = port
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, **query: Any
    ) -> Answer:
        if query:
            path += "?" + urllib.parse.urlencode({key: value for key, value in query.items() if value is not None})
        given = {**self.headers, **(headers or {})}
        if body is not None and not isinstance(body, (bytes, bytearray)):
            body = json.dumps(body).encode()
            given.setdefault("content-type", "application/json")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, given)
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def get(self, path: str, headers: dict[str, str] | None = None, **query: Any) -> Answer:
        return self.request("GET", path, None, headers, **query)

    def post(self, path: str, body: Any = b"", headers: dict[str, str] | None = None, **query: Any) -> Answer:
        return self.request("POST", path, body, headers, **query)


def form(name: str, data: bytes, boundary: str = "b0undary") -> tuple[bytes, dict[str, str]]:
    """A multipart form with a field and a file; its body and headers."""
    body = (
        f'--{boundary}\r\ncontent-disposition: form-data; name="note"\r\n\r\nhello\r\n'
        f'--{boundary}\r\ncontent-disposition: form-data; name="{name}"; filename="a.png"\r\n\r\n'
    ).encode() + data
    body += f"\r\n--{boundary}--\r\n".encode()
    return body, {"content-type": f"multipart/form-data; boundary={boundary}"}
