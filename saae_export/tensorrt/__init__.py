"""TensorRT engines: compiled, watched and compared."""
