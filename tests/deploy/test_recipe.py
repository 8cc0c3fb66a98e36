"""The container recipe: what it copies is there, nothing runs as root or writes outside."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from needs import need

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"


def stages() -> dict[str, list[tuple[str, str]]]:
    """Stage -> its instructions and their words, after those of the stage it is made from.

    Continued lines are joined, comments left out.
    """
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.split("\n") if not line.lstrip().startswith("#")]
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).split("\n"):
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            base, name = rest.split(" AS ")
            found[name] = list(found.get(base, []))
        elif word and name:
            found[name].append((word, rest.strip()))
    return found


def test_every_copied_path_is_there_and_sent_to_the_builder() -> None:
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").split()
    sent = [line[1:] for line in ignored if line.startswith("!")]
    copied = [
        path
        for instructions in stages().values()
        for word, rest in instructions
        if word == "COPY" and not rest.startswith("--from")
        for path in rest.split()[:-1]
    ]
    assert len(copied) > 5
    for path in copied:
        assert (ROOT / path).exists(), path
        assert path in sent, f"{path} is kept from the builder by Dockerfile.dockerignore"


def test_the_wheel_is_built_from_all_that_it_holds() -> None:
    """The packages that pyproject.toml names are those that are copied."""
    copied = {rest.split()[0] for word, rest in stages()["wheel"] if word == "COPY"}
    named = re.findall(r'"(saae_\w+)\*"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert named
    assert set(named) <= copied


@pytest.mark.parametrize("stage", ["cpu", "nvidia"])
def test_a_stage_runs_as_nobody_special_and_says_how_it_is(stage: str) -> None:
    found = dict(stages()[stage])
    users = [rest for word, rest in stages()[stage] if word == "USER"]
    assert users == ["10001:10001"]
    words = [word for word, _ in stages()[stage]]
    assert "RUN" not in words[words.index("USER") :]  # what the user did not install, it cannot change
    assert "--check" in found["HEALTHCHECK"]
    assert found["ENTRYPOINT"].startswith("[")  # no shell in between: signals reach the service
    extras = re.search(r"EXTRAS=(\S+)", " ".join(rest for word, rest in stages()[stage] if word == "ARG"))
    assert extras is not None
    known = set(re.findall(r"^([a-z-]+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE))
    if "line" in known:  # the service's own extra
        assert set(extras[1].split(",")) <= known


def compose() -> dict[str, Any]:
    found: dict[str, Any] = need("yaml").safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    return found


def test_compose_writes_nowhere_but_to_its_volumes() -> None:
    data = compose()
    assert set(data["services"]) == {"broker", "line"}
    for name, service in data["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert "privileged" not in service
        for volume in service["volumes"]:
            source, target, *mode = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume).split(":")
            if source in data["volumes"]:
                continue
            assert mode == ["ro"], volume
            if "bundles" not in source and "arriving" not in source:
                assert (DEPLOY / source).exists(), volume
            assert target.startswith("/")
    line = data["services"]["line"]
    other = need("yaml").safe_load((DEPLOY / "compose.nvidia.yaml").read_text(encoding="utf-8"))["services"]["line"]
    assert other["build"]["target"] in stages()
    assert (DEPLOY / line["build"]["context"]).resolve() == ROOT
    assert (ROOT / line["build"]["dockerfile"]).exists()
    assert line["build"]["target"] in stages()
    assert line["depends_on"]["broker"]["condition"] == "service_healthy"
    assert "healthcheck" in data["services"]["broker"]


def test_the_lines_configuration_is_one_and_writes_to_the_state_alone() -> None:
    need("paho")
    from saae_runtime.line import config, sinks

    found = config.load_config(DEPLOY / "line.toml", sinks.KINDS)
    assert {sink.kind for sink in found.sinks} == {"jsonl", "mqtt"}
    text = (DEPLOY / "line.toml").read_text(encoding="utf-8")
    written = re.findall(r'^(?:spool|path|folder) = "([^"]*)"', text, re.MULTILINE)
    assert len(written) == 3
    assert all(path.startswith("/state/") for path in written)
