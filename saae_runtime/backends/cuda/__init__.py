"""CUDA through cuda-python: driver, arrays on the device, Jetson boards."""
