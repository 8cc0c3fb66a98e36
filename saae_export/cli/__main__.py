"""`python -m saae_export.cli`: the command without its console script."""

from .command import main

main()
