"""https: the service's own certificate, checked by a client that trusts it; one that cannot be used is said at once."""

from __future__ import annotations

import http.client
import shutil
import ssl
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from line_parts import bad

from saae_runtime.errors import ConfigError
from saae_runtime.line.config import load_config
from saae_runtime.line.sinks import KINDS
from saae_runtime.line.wiring import SECTIONS, check_http
from saae_runtime.render import encode_png

OPTIONS = 'certificate = "line.pem"\nkey = "line.key"'
USER = '\n[[http.user]]\nname = "olga"\nrole = "operator"\ntoken_env = "TEST_OLGA"'
TOKEN = "an operator's token".replace(" ", "-")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a self-signed certificate and its key, and a key of somebody else, and an encrypted one."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command: apt-get install openssl")
    folder = tmp_path_factory.mktemp("pair")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    curve = ("-pkeyopt", "ec_paramgen_curve:prime256v1")
    names = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
    files = ("-keyout", "line.key", "-out", "line.pem", "-days", "2")
    openssl("req", "-x509", "-newkey", "ec", *curve, "-nodes", *files, *names)
    openssl("genpkey", "-algorithm", "EC", *curve, "-out", "other.key")
    openssl("pkey", "-in", "line.key", "-aes256", "-passout", "pass:secret", "-out", "locked.key")
    return folder


def test_a_picture_is_judged_over_https(
    serving: Callable[..., ExitStack], pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_OLGA", TOKEN)
    shutil.copytree(pair, tmp_path, dirs_exist_ok=True)
    with serving(tmp_path, OPTIONS + USER) as stack:
        port = stack.http.port  # type: ignore[attr-defined]
        assert stack.http.url == f"https://127.0.0.1:{port}/"  # type: ignore[attr-defined]
        trusting = ssl.create_default_context(cafile=str(pair / "line.pem"))

        def ask(method: str, path: str, body: bytes | None = None, **headers: str) -> http.client.HTTPResponse:
            connection = http.client.HTTPSConnection("127.0.0.1", port, context=trusting, timeout=30)
            stack.callback(connection.close)
            connection.request(method, path, body, headers)
            return connection.getresponse()

        assert ask("GET", "/livez").status == 200
        assert ask("POST", "/v1/judge", encode_png(bad())).status == 401
        answer = ask("POST", "/v1/judge", encode_png(bad()), authorization=f"Bearer {TOKEN}")
        assert answer.status == 200
        assert b'"verdict":"NG"' in answer.read()
        login = ask("POST", "/v1/login", f'{{"token": "{TOKEN}"}}'.encode(), **{"content-type": "application/json"})
        assert login.status == 200
        assert "Secure" in (login.getheader("set-cookie") or "")  # never sent in the clear

        with pytest.raises(ssl.SSLCertVerificationError):  # whoever does not trust it, does not talk to it
            http.client.HTTPSConnection("127.0.0.1", port, timeout=30).request("GET", "/livez")
        plain = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        plain.request("GET", "/livez")
        with pytest.raises((http.client.HTTPException, OSError)):
            plain.getresponse()
        plain.close()
        assert ask("GET", "/livez").status == 200


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ('certificate = "line.pem"\nkey = "other.key"', "cannot be used"),
        ('certificate = "line.pem"\nkey = "locked.key"', "encrypted"),
        ('certificate = "line.key"\nkey = "line.key"', "cannot be used"),
        ('certificate = "gone.pem"\nkey = "line.key"', "no such file"),
    ],
)
def test_a_pair_that_cannot_be_used_is_said(
    serving: Callable[..., ExitStack], pair: Path, tmp_path: Path, options: str, said: str
) -> None:
    shutil.copytree(pair, tmp_path, dirs_exist_ok=True)
    with pytest.raises(ConfigError, match=said):
        serving(tmp_path, options)
    with pytest.raises(ConfigError, match=said):
        check_http(load_config(tmp_path / "line.toml", KINDS, SECTIONS))
