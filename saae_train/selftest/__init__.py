"""The self-test: simulated defects on images that the model has not seen."""
