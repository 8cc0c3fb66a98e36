"""The runtime's tests: a file that imports a library which is not installed is skipped with the reason."""

from __future__ import annotations

from needs import skips_without

pytest_pycollect_makemodule = skips_without("onnx", "onnxruntime", "pycocotools", "supervision", "tifffile")
