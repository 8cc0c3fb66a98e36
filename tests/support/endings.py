"""What a process still says, once a test has read some of its lines."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import AnyStr


def rest_of(process: subprocess.Popen[AnyStr], timeout: float) -> tuple[AnyStr, AnyStr]:
    """Waits for its end, and returns what is left on its two pipes.

    `readline()` reads ahead, and `communicate()` then loses what it holds: how much that is hangs on how busy the
    machine is.

    Args:
        process: with its output and its errors on pipes.
        timeout: seconds; a process that lives on is killed.

    Raises:
        subprocess.TimeoutExpired: if it was.
    """
    assert process.stdout is not None
    assert process.stderr is not None
    with ThreadPoolExecutor(2) as readers:
        out, err = readers.submit(process.stdout.read), readers.submit(process.stderr.read)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return out.result(), err.result()
