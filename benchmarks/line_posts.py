"""Parts of a station while another process posts images to the same line."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.line_parts import Asker, Memory, broker, frames_of, open_line, quantiles
from saae_runtime.line.wiring import open_http
from saae_runtime.render import encode_png

__all__ = ["posts"]

_CLIENTS = 64  # connections that post in turn, so that slow answers do not lower the rate
_BEAT = 0.1  # seconds between two parts


def posts(bundle: Path, size: tuple[int, int], runs: int, rate: int, threads: int | None) -> dict[str, Any]:
    """Milliseconds from the request of a part to its verdict, without and with posts, and counts of the posts."""
    frames = frames_of(size)
    found = {}
    with tempfile.TemporaryDirectory() as name, broker(Path(name)) as (port, _):
        asker, more = Asker(), "[http]\nport = 0\n"
        with (
            open_line(Path(name), bundle, port, "asked", threads, Memory(frames, None), asker, more) as line,
            open_http(line) as service,
        ):
            assert service is not None
            line.start()
            _parts(asker, 10)
            found["alone_ms"] = _parts(asker, runs)
            picture = Path(name) / "picture.png"
            picture.write_bytes(encode_png(frames[1]))
            words = [sys.executable, "-m", "benchmarks.line_posts", str(service.port), str(rate), str(picture)]
            with subprocess.Popen(
                words, cwd=Path(__file__).parent.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            ) as client:
                time.sleep(2)
                found["posted_ms"] = _parts(asker, runs)
                said, _ = client.communicate("")
    return {"part": "posts", "rate": rate, "size": list(size), "runs": runs, **found, **json.loads(said)}


def _parts(asker: Asker, count: int) -> list[float]:
    taken = []
    for _ in range(count):
        taken.append(1000 * asker.ask())
        time.sleep(_BEAT)
    return quantiles(taken, 0.5, 0.95, 0.99)


def _client(port: int, rate: int, picture: bytes) -> dict[str, int]:
    """Post at a rate until standard input ends."""
    counts: Counter[str] = Counter(sent=0, judged=0, refused=0, failed=0)
    os.nice(19)  # in place of another machine
    lock, ended = threading.Lock(), threading.Event()
    start, turn = time.monotonic(), iter(range(10**9))

    def work() -> None:
        while not ended.is_set():
            with lock:
                due = start + next(turn) / rate
            ended.wait(max(due - time.monotonic(), 0))
            if ended.is_set():
                return
            outcome = "failed"
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                connection.request("POST", "/v1/judge", picture, {"content-type": "image/png"})
                answer = connection.getresponse()
                answer.read()
                if answer.status == 200:
                    outcome = "judged"
                elif answer.status in (429, 503) and answer.getheader("retry-after"):
                    outcome = "refused"
                connection.close()
            except OSError:
                pass
            with lock:
                counts["sent"] += 1
                counts[outcome] += 1

    workers = [threading.Thread(target=work) for _ in range(_CLIENTS)]
    for worker in workers:
        worker.start()
    sys.stdin.read()
    ended.set()
    for worker in workers:
        worker.join()
    return dict(counts)


if __name__ == "__main__":
    print(json.dumps(_client(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]).read_bytes())))
