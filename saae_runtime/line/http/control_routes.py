"""Routes for recipes, thresholds, bundles, overrides, recalibration and the audit log."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, Field

from ..part import Verdict
from .access import Who
from .context import Context, bearer

__all__ = ["router"]

Name = Annotated[str, Field(max_length=64)]
Rate = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Score = Annotated[float, Field(ge=0.0, le=1e30, allow_inf_nan=False)]
Last = Annotated[int, Query(ge=1, le=100_000)]
Key = Annotated[str, Field(max_length=2000, description="`key` of the part's record.")]
Any_ = dict[str, Any]


class SwitchBody(BaseModel):
    """Active recipe of a station."""

    station: Name
    recipe: Name


class ThresholdBody(BaseModel):
    """An image threshold, by rate or by value."""

    recipe: Name
    false_alarms: Rate | None = Field(None, description="Acceptable share of good parts called NG.")
    threshold: Score | None = None
    version: int | None = Field(None, description="The version that was read; refused if it has changed.")


class BundleBody(BaseModel):
    """Version of a recipe's bundle."""

    recipe: Name
    bundle: Annotated[str, Field(max_length=255, description="A name from GET /v1/bundle.")]
    version: int | None = None


class OverrideBody(BaseModel):
    """Verdict of a person on a part."""

    key: Key
    verdict: Literal["OK", "NG"]
    note: Annotated[str, Field(max_length=500)] = ""


class UndoBody(BaseModel):
    """Override to undo."""

    key: Key


class RecalibrationBody(BaseModel):
    """Thresholds from the pool."""

    recipe: Name
    dry_run: bool = True
    archive: bool = Field(True, description="Whether to use the archive's OK images as well as the confirmed ones.")


def router(context: Context) -> APIRouter:
    """Routes that change something, and routes that show what can be changed."""
    routes = APIRouter(prefix="/v1", dependencies=[Depends(bearer)], tags=["control"])
    control = context.control
    operator, engineer = Depends(context.operator), Depends(context.engineer)

    @routes.get("/recipe")
    def recipes(who: Who = operator) -> Any_:
        """The recipes, and the active one at each station."""
        stations = {
            name: {"recipe": station.recipe, "recipes": list(station.config.recipes)}
            for name, station in context.line.stations.items()
        }
        return {"stations": stations, "recipes": context.line.book.to_dict()}

    @routes.post("/recipe")
    def switch(body: SwitchBody, who: Who = operator) -> Any_:
        """Activate a recipe at a station; parts that have begun keep theirs."""
        return control.switch(who, body.station, body.recipe)

    @routes.get("/threshold")
    def preview(
        recipe: Annotated[str, Query(max_length=64)],
        false_alarms: Annotated[float | None, Query(ge=0.0, le=1.0, allow_inf_nan=False)] = None,
        threshold: Annotated[float | None, Query(ge=0.0, le=1e30, allow_inf_nan=False)] = None,
        last: Last = 200,
        who: Who = operator,
    ) -> Any_:
        """What a threshold would have decided on the latest parts; changes nothing."""
        return control.threshold(recipe, false_alarms, threshold, last)

    @routes.post("/threshold")
    def set_threshold(body: ThresholdBody, who: Who = engineer) -> Any_:
        """Change a recipe's image threshold."""
        return control.set_threshold(who, body.recipe, body.false_alarms, body.threshold, body.version)

    @routes.get("/bundle")
    def bundles(recipe: Annotated[str, Query(max_length=64)], who: Who = operator) -> Any_:
        """The versions of a recipe's bundle."""
        return control.bundles(recipe) | {"pool": control.overrides.pool(context.line.book.get(recipe).name)}

    @routes.post("/bundle")
    def set_bundle(body: BundleBody, who: Who = engineer) -> Any_:
        """Activate another version of a recipe's bundle, without a stop."""
        return control.set_bundle(who, body.recipe, body.bundle, body.version)

    @routes.get("/overrides")
    def overrides(last: Last = 100, who: Who = operator) -> list[Any_]:
        """The latest overrides, including undone ones."""
        return control.overrides.latest(last)

    @routes.post("/overrides")
    def override(body: OverrideBody, who: Who = operator) -> Any_:
        """Override a part's verdict; its frame goes to the pool."""
        return asdict(control.override(who, body.key, Verdict(body.verdict), body.note))

    @routes.post("/overrides/undo")
    def undo(body: UndoBody, who: Who = operator) -> Any_:
        """Undo an override."""
        return asdict(control.undo(who, body.key))

    @routes.get("/recalibration")
    def recalibration(who: Who = operator) -> Any_:
        """Progress of the last recalibration."""
        return control.job

    @routes.post("/recalibration", status_code=202)
    def recalibrate(body: RecalibrationBody, who: Who = engineer) -> Any_:
        """Compute thresholds from the pool into a new version of the bundle, or only tell what would change."""
        return control.start_recalibration(who, body.recipe, body.dry_run, body.archive)

    @routes.get("/audit")
    def audit(last: Last = 100, who: Who = engineer) -> list[Any_]:
        """The latest entries of the audit log."""
        return control.audit.latest(last)

    return routes
