"""`python -m saae_train.cli`: the command without its console script."""

from .command import main

main()
