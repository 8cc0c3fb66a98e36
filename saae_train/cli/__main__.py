"""`python -m saae_train.cli`: the command without its console script."""

from . import main

main()
