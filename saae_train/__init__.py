"""Fitting: data, backbone, self-attention autoencoder, calibration, metrics (PyTorch)."""
