"""What something usually takes: an exponential moving average of what it took."""

from __future__ import annotations

LEARNT = 0.2  # how much of what was seen last enters into what is usual


def moved(average: float, seen: float) -> float:
    """The average after one more value, in the unit of both."""
    return average + LEARNT * (seen - average)
