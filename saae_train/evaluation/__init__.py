"""Metrics of a fitted model on labelled images."""
