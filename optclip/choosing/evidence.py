"""What a log of sizes says about itself: its level, whether it moves, how wild it is.

Everything is looked at in logarithms, because sizes vary by ratios, and by medians of
consecutive blocks of steps, which a spike does not move.

    level(block) = median of log size
    noise        = 1.4826 · median of |log size - local level|

| question | yes, if |
|---|---|
| does it grow from the start? | eight levels rise 30-fold, or 3-fold and then to NaN |
| is the start different? | first levels, up to a fifth of the steps, lie apart |
| does the level move? | eight levels differ 2-fold, and by 3 times the noise |
| are there spikes? | steps stand 2-fold, and 6 times the noise, above their level |
| is the tail heavy? | Hill's index of the largest twentieth is below 2 |
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from optclip.choosing.limit_for_rate import correlation_time

BLOCKS, WINDOW = 8, 48  # levels of the run; steps of a local level
# Ratios of sizes, and how many times the noise of their logarithms.
DRIFT, DRIFT_NOISE = 2.0, 3.0
SPIKE, SPIKE_NOISE = 2.0, 6.0
GROWTH, GROWTH_TO_NAN = 30.0, 3.0


class Evidence(NamedTuple):
    """What the tests found; ratios have no unit.

    Attributes:
      steps: how many there are.
      nonfinite: how many of them are not finite.
      warmup: how many at the start are left out, because their level is another.
      median: of the sizes after the warm-up.
      largest: of them.
      growth: from the first to the last of eight levels, warm-up included.
      drift: from the lowest to the highest of eight levels after the warm-up.
      noise: the spread of log sizes around their local level.
      spikes: how many steps stand far above their local level.
      tail: Hill's index of the largest sizes relative to their level; infinite without
        noise. At 2 the variance no longer exists, at 1 the mean.
      memory: how many neighbouring steps say as much as one independent step.
      diverges: whether the sizes grow from the start to the end.
      drifts: whether the level moves by more than the noise.
      spiky: whether there are at least two spikes.
    """

    steps: int
    nonfinite: int
    warmup: int
    median: float
    largest: float
    growth: float
    drift: float
    noise: float
    spikes: int
    tail: float
    memory: float
    diverges: bool
    drifts: bool
    spiky: bool


def evidence(sizes: np.ndarray) -> tuple[Evidence, np.ndarray]:
    """What a column of sizes says, and the finite ones that a limit is chosen from.

    At least ten of them are finite and not 0.
    """
    finite = np.isfinite(sizes)
    known = sizes[finite].astype(np.float64)
    positive = known[known > 0]
    logs = np.log(positive)
    levels = _eighths(logs)
    lost = not finite[-max(3, len(sizes) // 100) :].any()
    rises = bool((np.diff(levels) > 0).mean() >= 0.85 and levels.argmin() == 0)
    # What is left of a run that was soon lost need not rise at every step.
    rises = rises or (lost and bool(finite.mean() < 0.5))
    growth = levels[-1] - levels[0]
    diverges = rises and bool(growth > math.log(GROWTH_TO_NAN if lost else GROWTH))

    # A start like any other step of a drift is no warm-up.
    warmup = 0 if diverges else _warmup(logs)
    drift, noise, drifts = _drift(logs[warmup:])
    if warmup and drifts:
        warmup, (drift, noise, drifts) = 0, _drift(logs)
    start = int(np.flatnonzero(known > 0)[warmup - 1]) + 1 if warmup else 0
    logs, kept = logs[warmup:], known[start:]  # zeros have no logarithm
    above = logs - _local_levels(logs)
    spikes = int((above > max(math.log(SPIKE), SPIKE_NOISE * noise)).sum())
    found = Evidence(
        steps=len(sizes),
        nonfinite=int((~finite).sum()),
        warmup=warmup,
        median=float(np.median(kept)),
        largest=float(kept.max()),
        growth=_ratio(growth),
        drift=_ratio(drift),
        noise=noise,
        spikes=spikes,
        tail=tail_index(above)[0],
        memory=correlation_time(logs),
        diverges=diverges,
        drifts=drifts,
        spiky=spikes >= 2,
    )
    # Of a run that diverges only the start is what a limit should keep.
    return found, known[: max(10, known.size // 10)] if diverges else kept


def _ratio(log: float) -> float:
    return math.exp(min(log, 700.0))


def _levels(logs: np.ndarray, block: int) -> np.ndarray:
    """The medians of consecutive blocks; steps that fill no block are left out."""
    count = len(logs) // block
    return np.median(logs[: count * block].reshape(count, block), axis=1)


def _eighths(logs: np.ndarray) -> np.ndarray:
    return _levels(logs, len(logs) // BLOCKS)


def _drift(logs: np.ndarray) -> tuple[float, float, bool]:
    """How far levels are apart, the noise around them, and whether that is a drift."""
    drift = float(np.ptp(_eighths(logs)))
    noise = 1.4826 * float(np.median(np.abs(logs - _local_levels(logs))))
    return drift, noise, drift > max(math.log(DRIFT), DRIFT_NOISE * noise)


def _warmup(logs: np.ndarray) -> int:
    """How many steps at the start have another level than the second half."""
    block = max(5, len(logs) // 50)
    count = len(logs) // block
    if count < 10:
        return 0
    levels = _levels(logs, block)
    later = levels[count // 2 :]
    usual = np.median(later)
    spread = 1.4826 * np.median(np.abs(later - usual))
    same = np.abs(levels - usual) <= max(math.log(1.5), 4 * spread)
    first = int(np.argmax(same))
    # The block in which the level changes may have steps of both.
    return (first + 1) * block if 0 < first < count // 5 else 0


def _local_levels(logs: np.ndarray) -> np.ndarray:
    """The median of the steps around, by blocks and straight lines between them."""
    block = min(WINDOW, len(logs))
    levels = _levels(logs, block)
    centres = block * (np.arange(len(levels)) + 0.5)
    return np.interp(np.arange(len(logs)) + 0.5, centres, levels)


def tail_index(logs: np.ndarray) -> tuple[float, int]:
    """Hill's estimate, one over the mean excess of the largest, and of how many."""
    top = np.sort(logs)[-max(len(logs) // 20, 2) :]
    excess = float((top - top[0]).mean())
    return 1 / excess if excess > 1e-9 else math.inf, len(top)
