"""Confidence intervals of means over seeds (Student's t): of values, and of paired differences."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """From mean - half to mean + half. half is None for a single value, which has no spread."""

    mean: float
    half: float | None
    values: tuple[float, ...]

    @property
    def excludes_zero(self) -> bool:
        return self.half is not None and abs(self.mean) > self.half

    def points(self, *, signed: bool = False) -> str:
        """Fractions from 0 to 1 as points of 100: '24.1 ± 1.3', signed '+24.1 ± 1.3'."""
        mean = f"{100 * self.mean:+.1f}" if signed else f"{100 * self.mean:.1f}"
        return mean if self.half is None else f"{mean} ± {100 * self.half:.1f}"


def interval(values: Sequence[float]) -> Interval:
    """The interval of the mean of independent, normally distributed values (at least one)."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, None, tuple(values))
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    quantile = t_quantile(0.5 + CONFIDENCE / 2, n - 1)
    return Interval(mean, quantile * math.sqrt(variance) / math.sqrt(n), tuple(values))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval | None:
    """The interval of the mean of ours - theirs over the seeds that both have, or None."""
    common = sorted(ours.keys() & theirs.keys())
    return interval([ours[seed] - theirs[seed] for seed in common]) if common else None


def t_quantile(probability: float, degrees_of_freedom: int) -> float:
    """The value that Student's t stays below with this probability (0.5 to below 1)."""
    low = 0.0
    high = 1.0
    while _t_distribution(high, degrees_of_freedom) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        if _t_distribution(middle, degrees_of_freedom) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _t_distribution(t: float, degrees_of_freedom: int) -> float:
    """Abramowitz & Stegun 26.7.3 and 26.7.4: a finite sum for whole degrees of freedom."""
    angle = math.atan2(t, math.sqrt(degrees_of_freedom))
    cosine = math.cos(angle)
    odd = degrees_of_freedom % 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(1 + odd, degrees_of_freedom, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    inside = math.sin(angle) * total
    if odd:
        inside = 2 / math.pi * (angle + inside)
    return (1 + inside) / 2


def two_sided(t: float, degrees_of_freedom: int) -> float:
    """The probability that |Student's t| is at least |t|."""
    return 2 * (1 - _t_distribution(abs(t), degrees_of_freedom))
