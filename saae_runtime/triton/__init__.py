"""Client of a Triton Inference Server that serves a bundle."""
