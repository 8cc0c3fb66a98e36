"""The result of `line.py` as the lines of one table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["line_figures"]


def line_figures(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The result as lines of one table: figure, value."""
    found: list[tuple[str, str]] = []
    for row in data["rows"]:
        found += _FIGURES[row["part"]](row)
    return found


def _ms(values: list[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)


def _delay_figures(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    size = "x".join(map(str, row["size"]))
    return [
        (f"engine alone, {size}: median, 95 %, 99 %, ms", _ms(row["engine_ms"])),
        (f"from asking to the verdict, {size}, ms", _ms(row["service_ms"])),
        ("added by the service, ms", _ms(row["added_ms"])),
        ("added processor time of all threads, ms", _ms(row["added_cpu_ms"])),
    ]


def _posts_figures(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    outcome = f"{row['judged']} judged, {row['refused']} refused to come later, {row['failed']} failed"
    return [
        ("from asking to the verdict, no posts: median, 95 %, 99 %, ms", _ms(row["alone_ms"])),
        (f"the same at {row['rate']} posts a second, ms", _ms(row["posted_ms"])),
        (f"of {row['sent']} posts", outcome),
    ]


def _soak_figures(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    delivered = ", ".join(f"{name} {number:,}" for name, number in row["delivered"].items())
    return [
        ("frames, seconds", f"{row['frames']:,}, {row['seconds']:.0f}"),
        ("resident memory at 10 %, 50 %, 100 %, MiB", ", ".join(f"{value:.1f}" for value in row["rss_mib"])),
        ("of these in use in the C library's heap, MiB", ", ".join(_heap(value) for value in row["heap_mib"])),
        (
            "memory blocks that Python holds",
            ", ".join(f"{value:,}" for value in row.get("python_blocks", ())) or "-",
        ),
        ("order kept, every part in every file", f"{_yes(row['order_kept'])}, {_yes(row['all_accounted'])}"),
        ("records delivered", delivered),
    ]


def _stop_figures(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (f"stop at full speed, longest of {row['runs']}, s", f"{row['seconds']:.2f}"),
        ("every frame accounted for at the stop", _yes(row["all_accounted"])),
    ]


def _heap(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


_FIGURES = {"delay": _delay_figures, "posts": _posts_figures, "soak": _soak_figures, "stop": _stop_figures}
