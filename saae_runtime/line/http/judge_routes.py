"""`POST /v1/judge` (judges an image) and `POST /v1/trigger` (requests a part at a station)."""

from __future__ import annotations

import asyncio
import base64
import math
import secrets
import time
from typing import Annotated, Any, Literal

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, Field
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from ... import render
from ...errors import ConfigError, ImageError, shown
from ...images import read_image_bytes
from ..handshake import LONGEST_PART_ID, Handshake, is_part_id
from ..part import BY_SCORE, Part, Verdict, now
from ..recipes import Recipe
from ..station import MOST_REGIONS
from ..view import Phase, View
from .access import Who
from .context import Context, bearer, refuse
from .judging import Judged
from .pictures import levels_png
from .yielding import give_way

__all__ = ["router"]

STATION = "http"
"""Station in the records of posted images."""

_DECODERS = 2
_BODIES = 4  # bodies in memory at once
_LOOK = 0.25  # seconds
_RECORD = 0.5  # seconds that the record of a triggered part may come after its verdict

Id = Annotated[str | None, Query(description="The part's id.", max_length=LONGEST_PART_ID)]
Name = Annotated[str | None, Query(max_length=64)]


class MapPicture(BaseModel):
    """The anomaly map."""

    kind: str
    png: str = Field(description="base64")
    score_per_level: float | None = Field(description="For kind `levels`: the score of one of 65535 levels.")


class Verdicts(BaseModel):
    """The model's result for an image."""

    part_id: str
    verdict: Literal["OK", "NG"]
    score: float
    threshold: float
    rank: float | None = Field(description="Share of the good parts' scores below this one.")
    reason: str
    recipe: str
    recipe_version: int
    bundle: str
    pixel_threshold: float
    height: int
    width: int
    regions: list[dict[str, Any]]
    judged_together: int
    milliseconds: float
    map: MapPicture | None = None


class Triggered(BaseModel):
    """The result of a trigger. NG for everything that is not known to be good."""

    part_id: str
    station: str
    verdict: Literal["OK", "NG"]
    score: float | None
    reason: str
    record: dict[str, Any] | None = Field(description="The part's record, if it is available at once.")


class TriggerBody(BaseModel):
    """A part to be judged."""

    part_id: str = Field(max_length=LONGEST_PART_ID, description="1 to 64 printable ASCII characters.")
    station: str | None = Field(None, max_length=64, description="Needed if there are several.")
    recipe: str | None = Field(None, max_length=64, description="Default: the active one.")


_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "image/*": {"schema": {"type": "string", "format": "binary"}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {"type": "object", "properties": {"image": {"type": "string", "format": "binary"}}}
            },
        },
    }
}


def router(context: Context) -> APIRouter:
    """Both routes."""
    routes = APIRouter(prefix="/v1", dependencies=[Depends(bearer)], tags=["judge"])
    decoders = CapacityLimiter(_DECODERS)
    bodies = asyncio.Semaphore(_BODIES)

    @routes.post("/judge", response_model=Verdicts, openapi_extra=_BODY, responses=_errors(413, 422, 503, 504))
    async def judge(
        request: Request,
        recipe: Name = None,
        station: Name = None,
        part_id: Id = None,
        map: Annotated[Literal["heat", "levels"] | None, Query(description="Return the map as PNG, too.")] = None,
        who: Who = Depends(context.operator),
    ) -> Verdicts:
        """Judge an image: a raw body, or the first file of a multipart form."""
        started = time.monotonic()
        name = part_id if part_id is not None else f"{now():%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"
        if not is_part_id(name):
            raise ConfigError(f"{shown(name)} is not a part id.", "", f"1 to {LONGEST_PART_ID} printable characters")
        chosen = _recipe(context, recipe, station)
        context.batcher.admit()
        limit = context.options.timeout
        try:
            async with bodies:
                data = _picture(await request.body(), request.headers.get("content-type", ""))
                frame = await to_thread.run_sync(_decoded, context, chosen, data, limiter=decoders)
                del data
            future = context.batcher.submit(frame, chosen)
            left = max(limit - (time.monotonic() - started), 0.01)
            judged = await asyncio.wait_for(asyncio.wrap_future(future), left)
        except asyncio.TimeoutError:
            raise refuse(
                504, "The image was not judged in time.", f"It had {limit:g} seconds.", "[http] timeout"
            ) from None
        if context.options.record:
            await to_thread.run_sync(_record, context, name, frame, judged, started)
        return await to_thread.run_sync(_answer, name, judged, map, started)

    @routes.post("/trigger", response_model=Triggered, responses=_errors(404, 409))
    def trigger(body: TriggerBody, who: Who = Depends(context.operator)) -> Triggered:
        """Request the verdict of a part at a station, as a PLC would; wait for it and acknowledge it."""
        return _triggered(context, body, who)

    return routes


def _errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    words = {
        404: "not found",
        409: "not possible now",
        413: "too large",
        422: "not a valid image",
        503: "too busy",
        504: "not in time",
    }
    return {code: {"description": words[code]} for code in codes}


def _recipe(context: Context, recipe: str | None, station: str | None) -> Recipe:
    book = context.line.book
    if recipe is not None:
        return book.get(recipe)
    if station is not None:
        found = context.line.stations.get(station)
        if found is None:
            raise ConfigError(f"No station is named {shown(station)}.", "", f"{', '.join(context.line.stations)}")
        return book.get(found.recipe)
    return book.get(next(iter(context.line.stations.values())).recipe)


def _picture(body: bytes, content_type: str) -> bytes:
    """The image in a body: the body itself, or the first file of a form."""
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data":
        return body
    boundary = options.get(b"boundary", b"")
    parts: list[tuple[bytearray, bytearray]] = []  # headers, content
    whole: list[bytes] = []  # complete files

    def begin() -> None:
        parts.append((bytearray(), bytearray()))

    def header(data: bytes, start: int, end: int) -> None:
        parts[-1][0].extend(data[start:end])

    def content(data: bytes, start: int, end: int) -> None:
        parts[-1][1].extend(data[start:end])

    def end() -> None:
        if b"filename" in parts[-1][0]:
            whole.append(bytes(parts[-1][1]))

    try:
        if not 1 <= len(boundary) <= 70:
            raise FormParserError("no boundary")
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": begin,
                "on_header_field": header,
                "on_header_value": header,
                "on_part_data": content,
                "on_part_end": end,
            },
        )
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise ImageError("The form cannot be read.", str(error), "send the image as the request body") from error
    if whole:
        return whole[0]
    raise ImageError(
        "The form has no complete file.",
        f"It has {len(parts)} fields.",
        "curl -F image=@part.png, or send it as the request body",
    )


def _decoded(context: Context, recipe: Recipe, data: bytes) -> Any:
    give_way()  # a thread that only decodes images
    options = context.options
    white = recipe.shared.engine.white_level
    return read_image_bytes(data, "the picture", white, formats=options.formats, pixels=options.max_pixels)


def _record(context: Context, name: str, frame: Any, judged: Judged, started: float) -> None:
    result, recipe = judged.result, judged.recipe
    part = Part(
        part_id=name,
        station=STATION,
        time=now(),
        verdict=Verdict.NG if result.is_anomalous else Verdict.OK,
        reason=BY_SCORE,
        recipe=recipe.name,
        bundle=recipe.bundle,
        score=result.score,
        threshold=recipe.threshold,
        pixel_threshold=recipe.pixel_threshold,
        regions=tuple(region.to_dict() for region in result.regions()[:MOST_REGIONS]),
        rank=result.rank,
        latency_ms=round(1000 * (time.monotonic() - started), 3),
        masks=recipe.described_masks(result.size),
        recipe_version=recipe.version,
    )
    context.line.record(part, frame, result, recipe)


def _answer(name: str, judged: Judged, kind: str | None, started: float) -> Verdicts:
    result, recipe = judged.result, judged.recipe
    height, width = result.size
    made = None
    if kind == "heat":
        made = MapPicture(kind=kind, png=_base64(render.encode_png(result.heatmap())), score_per_level=None)
    elif kind == "levels":
        data, step = levels_png(result)
        made = MapPicture(kind=kind, png=_base64(data), score_per_level=step)
    return Verdicts(
        part_id=name,
        verdict="NG" if result.is_anomalous else "OK",
        score=result.score,
        threshold=result.image_threshold,
        rank=result.rank,
        reason=result.reason,
        recipe=recipe.name,
        recipe_version=recipe.version,
        bundle=recipe.bundle,
        pixel_threshold=result.threshold,
        height=height,
        width=width,
        regions=[region.to_dict() for region in result.regions()[:MOST_REGIONS]],
        judged_together=judged.together,
        milliseconds=round(1000 * (time.monotonic() - started), 3),
        map=made,
    )


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _triggered(context: Context, body: TriggerBody, who: Who) -> Triggered:
    stations = context.line.stations
    if body.station is None and len(stations) > 1:
        raise ConfigError("There is more than one station.", "", f"name one of {', '.join(stations)}")
    name = body.station if body.station is not None else next(iter(stations))
    if name not in stations:
        raise refuse(404, f"No station is named {shown(name)}.", "", f"there is {', '.join(stations)}")
    source = stations[name].source
    if not isinstance(source, Handshake):
        raise refuse(
            409,
            f"Station {name} cannot be triggered.",
            "Each frame of its camera is a part.",
            'trigger = "http" in line.toml',
        )
    latest = context.recent.latest
    owner = object()
    version = source.view().version
    reply = source.trigger(body.part_id, body.recipe, owner, who.name, who.role)
    if not reply.accepted:
        raise refuse(
            409,
            f"Station {name} does not take the part: {reply.name.lower().replace('_', ' ')}.",
            source.view().fault,
            "one part at a time: the previous one must be judged and acknowledged",
        )
    try:
        view = _verdict(context, source, body.part_id, version)
    finally:
        source.lost(owner)  # does nothing if it was acknowledged
    score = view.score if view is not None and math.isfinite(view.score) else None
    record = _its_record(context, name, body.part_id, latest) if view is not None else None
    return Triggered(
        part_id=body.part_id,
        station=name,
        verdict="OK" if view is not None and view.ok else "NG",
        score=score,
        reason="withdrawn" if view is None else view.text,
        record=record,
    )


def _verdict(context: Context, source: Handshake, part_id: str, version: int) -> View | None:
    """Wait for the part's verdict and acknowledge it; return its view, or None if it was withdrawn."""
    while not context.stopping.is_set():
        view = source.watch(version, _LOOK)
        version = view.version
        if view.part_id != part_id or view.phase is Phase.OFFLINE:
            return None
        if view.valid:
            # Another client may have acknowledged it in between; then the part is NG here.
            return view if source.acknowledge(part_id).accepted else None
    return None


def _its_record(context: Context, station: str, part_id: str, after: int) -> dict[str, Any] | None:
    end = time.monotonic() + _RECORD
    while True:
        found = context.recent.records(50, station=station, after=after)
        for record in found:
            if record["part_id"] == part_id:
                return record
        if time.monotonic() > end or context.stopping.is_set():
            return None
        time.sleep(0.005)
