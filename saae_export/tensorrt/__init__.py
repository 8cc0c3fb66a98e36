"""TensorRT engines: compilation, progress, comparison."""
