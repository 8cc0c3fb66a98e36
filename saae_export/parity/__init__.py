"""Parity: what was exported against what was fitted."""
