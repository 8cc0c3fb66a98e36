"""INT8: QuantizeLinear and DequantizeLinear in the graph, how they are chosen, and the quality gate."""
