"""The self-test: simulated defects on unseen images."""
