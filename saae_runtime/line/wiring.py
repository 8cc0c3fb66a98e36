"""What a line.toml names as camera and trigger, opened: files and folders, industrial cameras, PLCs."""

from __future__ import annotations

from pathlib import Path

from .camera import Camera
from .cameras.registry import is_camera, open_camera
from .config import LineConfig, StationConfig
from .plc.trigger import PlcConfig, open_trigger
from .service import open_file_camera

__all__ = ["SECTIONS", "open_any_camera", "open_trigger"]

SECTIONS: dict[str, type] = {"plc": PlcConfig}
"""Further tables of a line.toml, for `load_config`."""


def open_any_camera(config: LineConfig, station: StationConfig) -> Camera:
    """The camera of a station: see `cameras.registry.open_camera`; other names are files, folders and videos.

    Raises:
        ConfigError, DataError: nothing there, a missing library, an option that is none.
    """
    spec = station.camera
    if not is_camera(spec):
        return open_file_camera(config, station)
    if spec.startswith("genicam:"):
        path, mark, serial = spec.removeprefix("genicam:").partition("#")
        spec = f"genicam:{config.place(str(Path(path).expanduser()))}{mark}{serial}"
    return open_camera(spec, station.camera_options)
