"""Fitting the autoencoder to normal images."""
