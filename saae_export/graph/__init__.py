"""The fused graph: frame in, anomaly map, score and mask out."""
