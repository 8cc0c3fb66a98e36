"""Checks an input size against what a backbone's patches or strides divide."""

from __future__ import annotations

from saae_runtime.errors import ConfigError

__all__ = ["check_size"]


def check_size(name: str, input_size: tuple[int, int], step: int, why: str) -> None:
    """Check that both sides are multiples of `step` pixels.

    Args:
        name: of the backbone.
        input_size: (H, W), pixels.
        step: its patch size, or the stride of its highest layer.
        why: the reason, for the message.

    Raises:
        ConfigError: they are not; it names the nearest size that is possible.
    """
    if input_size[0] % step or input_size[1] % step:
        near = tuple(max(step, round(side / step) * step) for side in input_size)
        raise ConfigError(
            f"{name} cannot take {input_size[0]} x {input_size[1]} pixels.",
            why,
            f"use --input-size {near[0]}x{near[1]}",
        )
