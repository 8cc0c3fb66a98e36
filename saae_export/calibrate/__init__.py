"""Recalibration of a finished bundle."""
