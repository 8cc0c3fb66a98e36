"""The command `saae-export` that takes graphs which this run exported before from the folder SAAE_TEST_EXPORTED."""

from __future__ import annotations

import os
from pathlib import Path

from exported_before import once

from saae_export.cli import main
from saae_export.graph import onnx_file

if __name__ == "__main__":
    onnx_file.trace = once(onnx_file.trace, Path(os.environ["SAAE_TEST_EXPORTED"]))
    main()
