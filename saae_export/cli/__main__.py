"""`python -m saae_export.cli`: the command without its console script."""

from . import main

main()
