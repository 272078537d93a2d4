"""Means over seeds, and what they may be off by: Student's t, for a mean and for a difference that is paired by seed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """mean - half to mean + half; half is None where one value alone tells nothing of its chance."""

    mean: float
    half: float | None
    values: tuple[float, ...]

    @property
    def clear(self) -> bool:
        """Zero is outside."""
        return self.half is not None and abs(self.mean) > self.half

    def points(self, *, signed: bool = False) -> str:
        """Of shares from 0 to 1, in points of 100: 24.1 ± 1.3."""
        told = f"{100 * self.mean:{'+' if signed else ''}.1f}"
        return told if self.half is None else f"{told} ± {100 * self.half:.1f}"


def interval(values: Sequence[float]) -> Interval:
    """Of the mean of independent values, at least one, that are spread about normally."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, None, tuple(values))
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    return Interval(
        mean, t_quantile(0.5 + CONFIDENCE / 2, n - 1) * deviation / math.sqrt(n), tuple(values)
    )


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval | None:
    """Of the mean of ours - theirs, over the seeds that both have; None if there is none."""
    common = sorted(ours.keys() & theirs.keys())
    return interval([ours[seed] - theirs[seed] for seed in common]) if common else None


def t_quantile(share: float, freedom: int) -> float:
    """The t that Student's distribution stays below with probability `share` (0.5 to below 1)."""
    low, high = 0.0, 1.0
    while _t_fraction(high, freedom) < share:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_fraction(middle, freedom) < share else (low, middle)
    return (low + high) / 2


def _t_fraction(t: float, freedom: int) -> float:
    """Abramowitz & Stegun 26.7.3 and 26.7.4: a finite sum for whole degrees of freedom."""
    angle = math.atan2(t, math.sqrt(freedom))
    cosine = math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(1 + odd, freedom, 2):  # terms of cos^0 (even), or cos^1 (odd), on
        total += term
        term *= cosine**2 * k / (k + 1)
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return (1 + inside) / 2
