"""`saae-train`: fit, evaluate, and the data commands."""

from __future__ import annotations

from saae_runtime.terminal import command_group, run_command

from . import cli_data, cli_fit

app = command_group("Fit anomaly segmentation models to good pictures, evaluate them, and get or draw images.")
app.add_typer(cli_data.app)
app.add_typer(cli_fit.app)


def main() -> None:
    """The console script."""
    run_command(app, "saae-train")


if __name__ == "__main__":
    main()
