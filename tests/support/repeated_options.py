"""Which options of a command line collect several values, and which of the others may wrongly be given twice."""

from __future__ import annotations

from typing import Any

import typer


def repeatable(app: typer.Typer) -> dict[str, set[str]]:
    """By command the options that are meant to be given several times; every other one is tried, and must be refused.

    Raises:
        AssertionError: an option that takes one value was accepted twice, or refused without being named.
    """
    command = typer.main.get_command(app)
    commands = getattr(command, "commands", {"": command})
    return {name: _of(item, name) for name, item in commands.items()}


def _of(command: Any, name: str) -> set[str]:
    several = set()
    for option in command.params:
        if option.param_type_name != "option" or option.is_eager:
            continue
        if option.multiple:
            several.add(option.opts[0])
            continue
        once = [option.opts[0]] if option.is_flag else [option.opts[0], "1"]
        refusal = _refusal(command, name, [*once, *once])
        assert "given more than once" in refusal, f"{name} accepts {option.opts[0]} twice: {refusal}"
        assert option.opts[0] in refusal, refusal
    return several


def _refusal(command: Any, name: str, arguments: list[str]) -> str:
    try:
        command.make_context(name, arguments)
    except Exception as error:  # typer brings its own click, so that there is no one class to name
        return error.format_message() if hasattr(error, "format_message") else repr(error)
    return ""
