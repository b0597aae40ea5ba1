"""The GPUs that goals and floors are stated for."""

from __future__ import annotations

from typing import NamedTuple


class Card(NamedTuple):
    """What a GPU can do at most, as measured."""

    gb_s: float
    """Copy bandwidth, 1e9 bytes/s."""
    tflop_s: float
    """16-bit matrix products, 1e12 operations/s; a multiplication and an addition are two."""


CARDS = {"H200": Card(4300, 790), "H100": Card(3000, 798)}


def card(device: str) -> str | None:
    """The name in ``CARDS`` of what torch calls ``device``, such as "NVIDIA H100 80GB HBM3"; None for any other GPU."""
    return next((name for name in CARDS if device.startswith(f"NVIDIA {name}")), None)
