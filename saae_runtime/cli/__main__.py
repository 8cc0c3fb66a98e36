"""`python -m saae_runtime.cli`: the command without its console script."""

from .command import main

main()
