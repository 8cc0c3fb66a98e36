"""Calibrating a finished bundle again."""
