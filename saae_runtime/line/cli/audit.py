"""`saae-line audit verify`: checks whether an audit log was changed."""

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
        str | None, typer.Option(help="sha256 of an entry, kept elsewhere, that must be in the log.")
    ] = None,
) -> None:
    """Check the hash chain of an audit log: find changed, removed, added or moved entries, also at the end.

    Anyone who can write both the log and its .head file can write a new chain. The sinks of the line get a copy of each
    entry with its hash; `--anchor` compares with one of these. Exit codes: 0 intact, 2 not.
    """
    found = verify(file, anchor)
    error = explain(found)
    if error is not None:
        raise error
    for note in found.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"{found.entries} entries, chain intact; last hash {found.sha256}")


audit_app.command("verify", cls=LineCommand)(verify_command)
