"""Checks the options of `saae-run` before anything is opened or written."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from ..appending import Rotation
from ..errors import ConfigError
from ..images import IMAGE_SUFFIXES
from ..sources.files import Source
from ..sources.folders import pattern_takes
from ..sources.video import VIDEO_SUFFIXES
from .exports import MAP_FORMATS
from .outputs import PICTURES

__all__ = [
    "check_exports",
    "check_outputs",
    "check_pattern_outputs",
    "check_processes",
    "kinds_of",
    "outputs_of",
    "rotation_of",
]


def outputs_of(
    out: Path | None, json_lines: str | None, csv: Path | None, parquet: Path | None, pictures: bool
) -> tuple[Path | None, str | None, Path | None, Path | None]:
    """What --out, --json, --csv and --parquet mean if --out may name a file of results instead of a folder.

    Args:
        out, json_lines, csv, parquet: as given.
        pictures: whether an option asks for pictures, which need the folder.

    Returns:
        (out, json_lines, csv, parquet); a file moves from `out` to its own option.

    Raises:
        ConfigError: the name does not say which format, pictures have no folder, or its own option is given, too.
    """
    if out is None or out.is_dir():
        return out, json_lines, csv, parquet
    suffix = out.suffix.lower()
    if suffix == ".json":
        raise ConfigError(
            f"--out {out}: JSON lines, or a COCO data set?",
            "",
            f"--out {out.with_suffix('.jsonl')} or --json {out} for a line per frame, --coco {out} for the data set",
        )
    if suffix not in (".parquet", ".csv", ".jsonl"):
        return out, json_lines, csv, parquet
    option = {".parquet": "--parquet", ".csv": "--csv", ".jsonl": "--json"}[suffix]
    if pictures:
        raise ConfigError(
            f"--out {out} is a file of results; pictures need a folder.",
            f"By its name it is what {option} writes.",
            f"{option} {out} --out DIR",
        )
    given = {"--parquet": parquet, "--csv": csv, "--json": json_lines}[option]
    if given is not None:
        raise ConfigError(
            f"--out {out} and {option} {given} are the same option.", "There is one such file.", "one of them"
        )
    if option == "--json":
        return None, str(out), csv, parquet
    return (None, json_lines, out, parquet) if option == "--csv" else (None, json_lines, csv, out)


def kinds_of(out: Path | None, asked: Sequence[bool], defects_only: bool) -> tuple[str, ...]:
    """The requested kinds of pictures; `asked` says which of `PICTURES`."""
    chosen = tuple(kind for kind, wanted in zip(PICTURES, asked, strict=True) if wanted)
    if out is None and (chosen or defects_only):
        raise ConfigError("Pictures need a folder.", "--out is missing.", "add --out DIR")
    return chosen or ("heatmap", "overlay")


def rotation_of(rotate: str | None, keep: int, json_lines: str | None, overwrite: bool) -> Rotation | None:
    """When to start a new --json file; None: never."""
    if json_lines in (None, "-"):
        for name, given in (("--rotate", rotate is not None), ("--overwrite", overwrite)):
            if given:
                raise ConfigError(f"{name} needs a file of results.", "--json names none.", "add --json FILE")
    return None if rotate is None else Rotation.parse(rotate, keep)


def check_outputs(
    out: Path | None, json_lines: str | None, sources: Sequence[str], recursive: bool, option: str = "--out"
) -> None:
    """Refuse outputs that would overwrite the input or be scored as input the next time."""
    if json_lines not in (None, "-"):
        target = Path(str(json_lines))
        if target.is_dir() or target.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
            raise ConfigError(
                f"--json {target}: JSON lines cannot be written there.",
                "It is a folder." if target.is_dir() else "By its name it is an image or a video.",
                "--json results.jsonl, or --json - for standard output",
            )
    if out is None:
        return
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{option} {out}: not a folder.", "A file has this name.", "choose another folder")
    for name in sources:
        folder = Path(name)
        if not folder.is_dir():
            continue
        place, source = out.resolve(), folder.resolve()
        if place == source or (recursive and source in place.parents):
            raise ConfigError(
                f"{option} {out} lies in the source {folder}.",
                "The next run would score the written pictures as if they were frames.",
                "choose a folder outside the source",
            )


def check_exports(
    csv: Path | None,
    parquet: Path | None,
    coco: Path | None,
    maps: Path | None,
    map_format: str,
    sources: Sequence[str],
    recursive: bool,
    endless: bool,
) -> None:
    """Refuse names of other formats, and an endless run for files that are written at its end."""
    for option, target, suffix in (
        ("--csv", csv, ".csv"),
        ("--parquet", parquet, ".parquet"),
        ("--coco", coco, ".json"),
    ):
        if target is not None and (target.is_dir() or target.suffix.lower() != suffix):
            raise ConfigError(f"{option} {target}: not the name of such a file.", "", f"{option} results{suffix}")
    for option, target in (("--coco", coco), ("--parquet", parquet)):
        if target is not None and endless:
            raise ConfigError(
                f"{option} is written when the run ends.", "--watch does not end.", "--csv, --json or --limit"
            )
    if map_format not in MAP_FORMATS:
        raise ConfigError(f"--map-format {map_format} is not known.", "", f"one of: {', '.join(MAP_FORMATS)}")
    if maps is None and map_format != "tiff":
        raise ConfigError("--map-format needs anomaly maps to write.", "--maps is missing.", "add --maps DIR")
    check_outputs(maps, None, sources, recursive, "--maps")


def check_pattern_outputs(
    out: Path | None, kinds: Sequence[str], names: Sequence[str], sources: Sequence[Source]
) -> None:
    """Refuse a folder whose pictures a source pattern would match in the next run."""
    patterns = [name for name in names if glob.has_magic(name) and not Path(name).exists()]
    if out is None or not patterns:
        return
    for source in sources:
        stem = source.stem if source.kind == "image" else source.stem / "000000"
        for kind in kinds:
            picture = out / stem.with_name(f"{stem.name}.{kind}.png")
            for pattern in patterns:
                if pattern_takes(pattern, picture):
                    raise ConfigError(
                        f"--out {out} lies within the source pattern {pattern}.",
                        f"The next run would score {picture} as if it were a frame.",
                        "choose a folder outside the pattern",
                    )


def check_processes(processes: int | None, cluster: str | None, batch: int, sources: Sequence[Source] | None) -> None:
    """Refuse --processes and --ray unless files can be distributed one by one."""
    if processes in (None, 1) and cluster is None:
        return
    option = "--processes" if cluster is None else "--ray"
    if sources is None or any(source.kind != "image" for source in sources):
        raise ConfigError(
            f"{option} is for image files.", "A watched folder, a video and a camera have only one reader.", ""
        )
    if batch > 1:
        raise ConfigError(
            f"{option} and --batch do not go together.", "Each process scores file by file.", "one of them"
        )
