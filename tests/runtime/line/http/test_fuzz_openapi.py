"""Requests made from the service's own OpenAPI, right and wrong ones: no fault, and no verdict changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from line_parts import bad
from needs import need

from saae_runtime.render import encode_png

ENDLESS = "/v1/events"  # a stream
CHANGES = {"/v1/threshold", "/v1/bundle", "/v1/recipe"}
NAMES = {"recipe": ["first", "other"], "station": ["one", "asked"]}


def with_names(schema: Any) -> Any:
    """The schema, whose recipes and stations are often those that are there: else little behind them is reached."""
    if isinstance(schema, list):
        return [with_names(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: with_names(value) for key, value in schema.items()}
    for name, known in NAMES.items():
        if isinstance(made.get("properties"), dict) and name in made["properties"]:
            made["properties"][name] = {"anyOf": [{"enum": known}, made["properties"][name]]}
        if made.get("name") == name and "schema" in made:
            made["schema"] = {"anyOf": [{"enum": known}, made["schema"]]}
    return made


def in_force(line: Any) -> tuple[dict[str, Any], dict[str, str]]:
    return {name: line.book.get(name) for name in line.book.names}, {
        name: station.recipe for name, station in line.stations.items()
    }


def drive(cases: Any, check: Callable[[Any], None], examples: int) -> None:
    """Checks so many cases, the same ones each time."""

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def run(case: Any) -> None:
        check(case)

    run()


@pytest.mark.parametrize("examples", [6, pytest.param(400, marks=pytest.mark.fuzz)])
@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_requests_by_openapi(served: ExitStack, examples: int, mode: str, request: pytest.FixtureRequest) -> None:
    if examples > 6 and "fuzz" not in request.config.option.markexpr:
        pytest.skip("for minutes; only where asked for by -m fuzz")
    need("schemathesis")
    import schemathesis

    client, line = served.client, served.line  # type: ignore[attr-defined]
    expected = client.post("/v1/judge", encode_png(bad()), recipe="first").json
    schema = schemathesis.openapi.from_dict(with_names(client.get("/openapi.json").json))
    address = f"http://127.0.0.1:{served.http.port}"  # type: ignore[attr-defined]
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 20
    asked = 0

    def check(case: Any, operation: Any) -> None:
        nonlocal asked
        before = in_force(line)
        answer = case.call(base_url=address, timeout=30)
        asked += 1
        documented = {str(code) for code in operation.definition.raw.get("responses", {})}
        assert answer.status_code < 500 or str(answer.status_code) in documented, (case, answer.text)
        assert answer.status_code != 500, (case, answer.text)
        if answer.status_code >= 400:
            assert set(answer.json()) >= {"what", "why", "cure"}, (case, answer.text)
        recipes, stations = in_force(line)
        if (recipes, stations) != before:
            assert operation.path in CHANGES, case
            assert (operation.method.upper(), answer.status_code) == ("POST", 200), case
            for name, recipe in before[0].items():
                if recipes[name] is not recipe:
                    line.book.change(name, threshold=recipe.threshold)
            for name, recipe in before[1].items():
                line.stations[name].switch(recipe)

    for operation in operations:
        if operation.path == ENDLESS:
            continue
        cases = operation.as_strategy(generation_mode=schemathesis.GenerationMode[mode])
        try:
            drive(cases, lambda case, operation=operation: check(case, operation), examples)
        except Unsatisfiable:
            assert mode == "NEGATIVE", operation.label  # without parameters and body nothing can be wrong
    assert asked > 4 * examples
    found = client.post("/v1/judge", encode_png(bad()), recipe="first").json
    assert (found["score"], found["verdict"]) == (expected["score"], expected["verdict"])
    assert expected["verdict"] == "NG"
    verdict = client.post("/v1/trigger", {"station": "asked", "part_id": "after", "recipe": "first"}).json
    assert verdict["verdict"] == ("NG" if verdict["score"] > line.book.get("first").threshold else "OK")
    assert client.get("/livez").status == 200
    assert line.stations["one"].reading().counts["NG"] == 1  # of its own camera, and no other
    assert json.loads(json.dumps(line.health()))["ready"]
