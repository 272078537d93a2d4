"""Effects over seeds and held-out recordings: intervals, number of seeds, several comparisons.

Runs of two variants with the same seed read the same frames, and all are scored on the same recordings.
So a difference varies by seed and, beside it, by recording. Both are random here: the interval is
for other seeds and other recordings of the kind.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from learning.intervals import CONFIDENCE, t_quantile, two_sided
from numpy.typing import NDArray

POWER = 0.8  # probability of finding the intended effect where there is one
MOST_SEEDS = 200


@dataclass(frozen=True)
class Effect:
    """A mean over seeds, fractions from 0 to 1.

    Attributes:
        value: on all recordings.
        half: half of the interval; None with one seed or one recording.
        p: probability of so large a value, of either sign, where there is none; None likewise.
        seeds, recordings: numbers.
        between_seeds: standard deviation of the values of single seeds.
        by_recordings: standard error by the choice of recordings, which more seeds do not reduce.
        values: of each seed.
    """

    value: float
    half: float | None
    p: float | None
    seeds: int
    recordings: int
    between_seeds: float | None
    by_recordings: float
    values: tuple[float, ...]

    @property
    def excludes_zero(self) -> bool:
        return self.half is not None and abs(self.value) > self.half

    def points(self, *, signed: bool = False) -> str:
        """As points of 100: '24.1 ± 1.3', signed '+24.1 ± 1.3'."""
        value = f"{100 * self.value:+.1f}" if signed else f"{100 * self.value:.1f}"
        return value if self.half is None else f"{value} ± {100 * self.half:.1f}"


def effect(values: NDArray[np.float64], recordings: int, seed: int = 0) -> Effect | None:
    """The mean of the seeds' values, by a hierarchical bootstrap.

    A sample draws recordings, the same for all seeds, and then seeds. With few of either, resampling
    varies too little, by the factor sqrt(1 - 1/n) each, so the deviations are divided by it. The
    interval is that of Student's t around the value, with the standard deviation of the samples, and
    with Satterthwaite's degrees of freedom.

    Args:
        values: (seeds, 1 + samples): of a seed on all recordings, then on each sample of them, the
            same samples for every seed. Seeds without a value, and samples that a seed has no value
            of, are left out.

    Returns:
        None without a seed.
    """
    values = values[~np.isnan(values[:, 0])]
    n = len(values)
    if not n:
        return None
    single = tuple(float(value) for value in values[:, 0])
    value = math.fsum(single) / n
    samples = values[:, 1:]
    samples = samples[:, ~np.isnan(samples).any(0)]
    of_recordings = samples.mean(0) if samples.size else np.zeros(1)
    recordings_factor = recordings / max(recordings - 1, 1)
    variance_of_recordings = float(of_recordings.var()) * recordings_factor
    by_recordings = math.sqrt(variance_of_recordings)
    if n == 1 or recordings < 2 or not samples.size:
        return Effect(value, None, None, n, recordings, None, by_recordings, single)
    between_seeds = float(np.std(single, ddof=1))
    drawn = np.random.default_rng(seed).integers(n, size=(samples.shape[1], n))
    of_seeds = samples[drawn.T, np.arange(samples.shape[1])].mean(0) - of_recordings
    deviations = (of_recordings - of_recordings.mean()) * math.sqrt(recordings_factor)
    deviations = deviations + of_seeds * math.sqrt(n / (n - 1))
    error = float(deviations.std())
    if not error:
        return Effect(value, 0.0, float(not value), n, recordings, 0.0, 0.0, single)
    variance_of_seeds = max(error**2 - variance_of_recordings, 0.0)
    freedom = error**4 / (
        variance_of_seeds**2 / (n - 1) + variance_of_recordings**2 / (recordings - 1)
    )
    whole = max(1, math.floor(min(freedom, n + recordings - 2)))
    half = t_quantile(0.5 + CONFIDENCE / 2, whole) * error
    p = two_sided(value / error, whole)
    return Effect(value, half, p, n, recordings, between_seeds, by_recordings, single)


def paired_effect(
    ours: Mapping[int, NDArray[np.float64]],
    theirs: Mapping[int, NDArray[np.float64]],
    recordings: int,
) -> Effect | None:
    """The effect of ours - theirs over the seeds that both have; (1 + samples,) per seed."""
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        return None
    return effect(np.stack([ours[seed] - theirs[seed] for seed in common]), recordings)


def holm(probabilities: Sequence[float]) -> list[float]:
    """Holm's corrected probabilities of a family of comparisons, in their order.

    One below 0.05 is significant, so that with probability 0.95 none of the family is by chance.
    """
    order = sorted(range(len(probabilities)), key=lambda i: probabilities[i])
    corrected = [1.0] * len(probabilities)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(probabilities) - rank) * probabilities[i]))
        corrected[i] = largest
    return corrected


def seeds_needed(
    intended: float, between_seeds: float, by_recordings: float, comparisons: int
) -> int | None:
    """The smallest number of seeds that finds an effect with probability POWER.

    By the normal approximation of its power with Student's quantiles, for the strictest step of
    Holm's correction.

    Args:
        intended: the effect. between_seeds: standard deviation of paired differences.
        by_recordings: standard error by the choice of recordings.
        comparisons: of the family.

    Returns:
        None where the recordings alone are too few, or MOST_SEEDS do not do.
    """
    level = 1 - (1 - CONFIDENCE) / (2 * comparisons)
    of_many_seeds = NormalDist().inv_cdf(level) + NormalDist().inv_cdf(POWER)
    if of_many_seeds * by_recordings > intended:
        return None
    for n in range(2, MOST_SEEDS + 1):
        quantiles = t_quantile(level, n - 1) + t_quantile(POWER, n - 1)
        if quantiles * math.hypot(between_seeds / math.sqrt(n), by_recordings) <= intended:
            return n
    return None


def smallest_found(
    seeds: int, between_seeds: float, by_recordings: float, comparisons: int
) -> float:
    """The smallest effect that this number of seeds, 2 or more, finds with probability POWER."""
    level = 1 - (1 - CONFIDENCE) / (2 * comparisons)
    quantiles = t_quantile(level, seeds - 1) + t_quantile(POWER, seeds - 1)
    return quantiles * math.hypot(between_seeds / math.sqrt(seeds), by_recordings)
