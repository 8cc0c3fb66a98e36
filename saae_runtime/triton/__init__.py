"""Frames scored by a Triton Inference Server that holds a bundle."""
