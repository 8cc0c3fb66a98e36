"""Parity of exported artefacts with the fitted model."""
