"""`saae-train`: fit, evaluate, and the data commands. Thin: parse, call one function, print."""

from __future__ import annotations

from typing import Annotated

import typer

from saae_runtime.terminal import GuardedGroup
from saae_runtime.version import saae_version

from . import cli_data, cli_fit

app = typer.Typer(
    cls=GuardedGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fit anomaly segmentation models to good pictures, evaluate them, and get or draw images.",
)
app.add_typer(cli_data.app)
app.add_typer(cli_fit.app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"saae {saae_version()}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Show the version.")
    ] = False,
) -> None:
    """Options before the command."""


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
