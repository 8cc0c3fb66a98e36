"""`saae-line audit verify`: whether an audit log is as it was written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...terminal import LineCommand
from ..audit import explain, verify

__all__ = ["audit_app"]

audit_app = typer.Typer(no_args_is_help=True, help="Check the log of who changed what.")


@audit_app.callback()
def about() -> None:
    """Check the log of who changed what."""


def verify_command(
    file: Annotated[Path, typer.Argument(help="The log, such as http/audit.jsonl.")],
    anchor: Annotated[
        str | None, typer.Option(help="sha256 of an entry, kept elsewhere, that has to be in the log.")
    ] = None,
) -> None:
    """Follow the chain of an audit log: a changed, removed, added or moved entry is found, and one cut off at the end.

    Whoever can write both the log and its .head file can write a new chain. The sinks of the line get a copy of each
    entry with its hash; `--anchor` compares with one of these. Exit codes: 0 whole, 2 not.
    """
    found = verify(file, anchor)
    error = explain(found)
    if error is not None:
        raise error
    for note in found.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"{found.entries} entries, chain intact; last hash {found.sha256}")


audit_app.command("verify", cls=LineCommand)(verify_command)
