"""`saae-train`: fit, evaluate, and the data commands. Thin: parse, call one function, print."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from saae_runtime.errors import ConfigError
from saae_runtime.terminal import GuardedGroup, error_panel, log
from saae_runtime.version import saae_version

_missing = ""
try:
    from . import cli_data, cli_fit
except ModuleNotFoundError as error:
    # The command is installed with the runtime alone, too: there it says what is missing.
    _missing = (error.name or "").split(".")[0]
    if _missing.startswith("saae"):
        raise

app = typer.Typer(
    cls=GuardedGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fit anomaly segmentation models to good pictures, evaluate them, and get or draw images.",
)
if not _missing:
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
    if _missing and not {"--help", "--version"} & set(sys.argv[1:]):
        missing = ConfigError(
            f"saae-train needs {_missing}.",
            "Only the runtime is installed here.",
            "pip install 'saae[train]', or 'saae[demo]' with weights that need no network",
        )
        log().print(error_panel(missing))
        raise SystemExit(missing.exit_code)
    app()


if __name__ == "__main__":
    main()
