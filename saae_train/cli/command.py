"""`saae-train`: fit, evaluate, the paper's tables, and the data commands."""

from __future__ import annotations

import sys

from saae_runtime.errors import ConfigError
from saae_runtime.terminal import command_group, error_panel, log, run_command

_missing = ""
try:
    from . import data as cli_data
    from . import fit as cli_fit
    from . import many as cli_many
    from . import selftest as cli_selftest
    from . import tables as cli_tables
except ModuleNotFoundError as error:
    # The runtime alone installs this command, too; then it says what is missing.
    _missing = (error.name or "").split(".")[0]
    if _missing.startswith("saae"):
        raise

__all__ = ["app", "main"]

app = command_group("Fit models to images of good parts, evaluate them, and get or check images.")
if not _missing:
    app.add_typer(cli_data.app)
    app.add_typer(cli_fit.app)
    app.add_typer(cli_many.app)
    app.add_typer(cli_selftest.app)
    app.add_typer(cli_tables.app)


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
    run_command(app, "saae-train")


if __name__ == "__main__":
    main()
