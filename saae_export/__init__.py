"""Export: fused graph, ONNX, engines, parity, the bundle and its report."""
