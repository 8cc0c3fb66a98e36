"""Checks the certificate of the HTTP service before it listens."""

from __future__ import annotations

import ssl
from pathlib import Path

from ...errors import ConfigError
from ..config import LineConfig
from .options import HttpOptions

__all__ = ["certificate_of"]


def certificate_of(config: LineConfig, options: HttpOptions) -> tuple[Path, Path] | None:
    """Paths of a matching certificate and key; None: plain HTTP.

    Raises:
        ConfigError: a file is missing, is not such a PEM file, needs a password, or the two do not match.
    """
    if options.certificate is None or options.key is None:
        return None
    certificate, key = config.place(options.certificate), config.place(options.key)
    for path in (certificate, key):
        if not path.is_file():
            raise ConfigError(f"{path}: no such file.", "", "[http] certificate and key")

    def refuse() -> str:
        raise ConfigError(
            f"{key} is encrypted.",
            "A service cannot ask for a password.",
            f"openssl pkey -in {key.name} -out plain.key; chmod 600 plain.key",
        )

    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key, refuse)
    except (OSError, ValueError) as error:  # SSLError is an OSError
        raise ConfigError(
            f"{certificate} and {key} cannot be used for https.",
            str(error),
            "[http] certificate: a PEM file, the service's own certificate first; key: its private key",
        ) from error
    return certificate, key
