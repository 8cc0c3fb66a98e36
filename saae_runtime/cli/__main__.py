"""`python -m saae_runtime.cli`: the command without its console script."""

from . import main

main()
