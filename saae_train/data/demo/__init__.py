"""The built-in demo data: products drawn procedurally, always labelled synthetic."""

from .write import DEMO_CATEGORIES, defect_types, render, write_demo

__all__ = ["DEMO_CATEGORIES", "defect_types", "render", "write_demo"]
