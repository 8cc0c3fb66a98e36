"""Opens what a line.toml names: files and folders, industrial cameras, PLCs, the HTTP service."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from .camera import Camera
from .cameras.registry import has_white_level, is_camera, open_camera
from .config import LineConfig, StationConfig
from .http.certificate import certificate_of
from .http.options import HttpOptions, users_of
from .plc.trigger import PlcConfig, open_trigger
from .recipes import white_level_of
from .service import Line, open_file_camera

if TYPE_CHECKING:
    from .http.service import HttpService

__all__ = ["SECTIONS", "check_http", "open_any_camera", "open_http", "open_trigger"]

SECTIONS: dict[str, type] = {"plc": PlcConfig, "http": HttpOptions}
"""Further tables of a line.toml, for `load_config`."""


def open_any_camera(config: LineConfig, station: StationConfig, looking: bool = False) -> Camera:
    """Open a station's camera, see `cameras.registry.open_camera`; other names are files, folders and videos.

    `looking`: see `service.open_file_camera`.

    Raises:
        ConfigError, DataError: nothing found, a missing library, an invalid option, or different white levels.
    """
    spec = station.camera
    if not is_camera(spec):
        return open_file_camera(config, station, looking)
    if spec.startswith("genicam:"):
        path, mark, serial = spec.removeprefix("genicam:").partition("#")
        spec = f"genicam:{config.place(str(Path(path).expanduser()))}{mark}{serial}"
    options = dict(station.camera_options)
    if has_white_level(spec):
        options["white_level"] = white_level_of(config, station)
    return open_camera(spec, options, station.trigger != "free")


def open_http(line: Line) -> AbstractContextManager[HttpService | None]:
    """Open the HTTP service of a line; None without `[http]`.

    Raises:
        As for `http.service.HttpService`; ConfigError: a missing library.
    """
    options = line.config.extra.get("http")
    if options is None:
        return nullcontext()
    assert isinstance(options, HttpOptions)
    try:
        from .http.service import HttpService
    except ImportError as error:
        raise ConfigError("[http] cannot be served.", str(error), "pip install 'saae[serve]'") from error
    return HttpService(line, options)


def check_http(config: LineConfig) -> str:
    """Check what the HTTP service needs, without serving; return a description.

    Raises:
        ConfigError: a missing library, token, certificate or key, or an address that cannot be used.
    """
    options = config.extra["http"]
    assert isinstance(options, HttpOptions)
    https = certificate_of(config, options) is not None
    users = users_of(options)
    try:
        from .http.service import listener
    except ImportError as error:
        raise ConfigError("[http] cannot be served.", str(error), "pip install 'saae[serve]'") from error
    listener(options.host, options.port).close()
    who = ", ".join(user.name for user in users) or "everybody on this machine"
    return f"{'https' if https else 'http'}://{options.host}:{options.port}, for {who}"
