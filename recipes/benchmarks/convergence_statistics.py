"""Means of paired differences and their intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean, and between which values it lies with 95 % confidence; None where one value says nothing about that."""

    mean: float
    low: float | None
    high: float | None


def interval(values: Sequence[float]) -> Interval | None:
    """Of the mean of normally distributed values, by Student's t; None without values."""
    if not values:
        return None
    middle = mean(values)
    if len(values) == 1:
        return Interval(middle, None, None)
    half = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Interval(middle, middle - half, middle + half)


def t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The t that Student's distribution with so many degrees of freedom exceeds in absolute value with 1 - confidence.

    By halving: `within` rises with t.
    """
    low, high = 0.0, 1.0
    while within(high, degrees) < confidence:
        high *= 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if within(middle, degrees) < confidence else (low, middle)
    return high


def within(t: float, degrees: int) -> float:
    """The probability of absolute values below t.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    term, total = math.cos(angle) ** odd, 0.0
    for power in range(odd, degrees - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * math.cos(angle) ** 2
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
