"""`python -m saae_runtime.line.cli`: the command without its console script."""

from . import main

main()
