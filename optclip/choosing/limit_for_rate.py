"""The limit that clips a wanted share of the steps, and how well a log knows it.

    limit = the smallest logged size that at most a share r of the sizes exceeds
    low, high = the same for the shares p with |p - r| = z·√(p(1 - p)/m)

The two shares are Wilson's interval of a share that m independent steps know.
Neighbouring steps are alike, so m is what a bootstrap of blocks says. It draws blocks
of steps with replacement; of infinitely many draws, the variance of how many steps
exceed the limit is the number of blocks times the variance of the blocks' own counts.
In this closed form nothing is drawn, and a log always gives the same interval.

A block is at least 20 steps, and longer where sizes stay alike for longer.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

LEAST_BLOCK, LEAST_BLOCKS = 20, 10


class Interval(NamedTuple):
    """A limit, and the 95 % interval of the limit that clips the wanted share."""

    limit: float
    low: float
    high: float


def limit_for_rate(sizes: np.ndarray, rate: float) -> Interval:
    """The limit for a share of the sizes, finite ones in the order of the steps."""
    steps = len(sizes)
    falling = np.sort(sizes)[::-1]
    limit = falling[min(int(rate * steps), steps - 1)]
    over = (sizes > limit).astype(np.float64)
    memory = max(correlation_time(over), correlation_time(_ranks(sizes)))
    block = int(min(max(LEAST_BLOCK, 5 * memory), max(steps // LEAST_BLOCKS, 1)))
    count = steps // block
    counts = over[: count * block].reshape(count, block).sum(1)
    independent = steps * rate * (1 - rate) * block / max(counts.var(), 1e-30)
    # Few blocks know their variance badly, and what joins two blocks is not in it.
    wide = _student(0.975, count - 1) * math.sqrt(count / (count - 1))
    wide /= math.sqrt(1 - min(memory / block, 0.5))
    few, many = _wilson(rate, min(independent, steps), wide)
    low, high = (falling[min(int(share * steps), steps - 1)] for share in (many, few))
    return Interval(float(limit), float(low), float(high))


def correlation_time(values: np.ndarray) -> float:
    """How many steps count as one: 1 + 2·Σ autocorrelation, 1 where nothing varies.

    The sum ends at five times itself, the usual window: noise beyond adds nothing.
    """
    steps = len(values)
    centred = values - values.mean()
    power = np.abs(np.fft.rfft(centred, 2 * steps)) ** 2
    covariance = np.fft.irfft(power)[: steps // 2]
    if covariance[0] <= 1e-12 * steps * np.abs(values).max() ** 2:
        return 1.0
    times = 1 + 2 * np.cumsum(covariance[1:] / covariance[0])
    ended = np.flatnonzero(np.arange(1, len(times) + 1) >= 5 * times)
    return float(max(times[ended[0]] if len(ended) else times.max(initial=1.0), 1.0))


def _ranks(sizes: np.ndarray) -> np.ndarray:
    """The order of the sizes, which no spike stretches; equal ones share a rank."""
    rising = np.sort(sizes)
    both = np.searchsorted(rising, sizes), np.searchsorted(rising, sizes, "right")
    return (both[0] + both[1]) / 2


def _wilson(share: float, count: float, wide: float) -> tuple[float, float]:
    square = wide * wide / count
    middle = share + square / 2
    half = wide * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return (middle - half) / (1 + square), (middle + half) / (1 + square)


def _student(share: float, freedom: int) -> float:
    """Student's quantile by its expansion around the normal law's."""
    z = NormalDist().inv_cdf(share)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
