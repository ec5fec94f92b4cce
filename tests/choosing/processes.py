"""Streams of sizes whose law is known, all seeds at once, for the simulation study."""

from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

Rng = np.random.Generator
STEPS = 4000


class Process(NamedTuple):
    """A law, the verdict that is right for it, and the limit that clips a share of it.

    Attributes:
      draw: (generator, seeds, steps) to sizes (seeds, steps).
      verdict: the right one.
      limit: the true limit for a clip rate; None for a law that changes.
    """

    draw: Callable[[Rng, int, int], np.ndarray]
    verdict: str
    limit: Callable[[float], float] | None = None


def log_normal(spread: float) -> Process:
    return Process(
        lambda rng, seeds, steps: np.exp(spread * rng.normal(size=(seeds, steps))),
        "fixed",
        lambda rate: np.exp(spread * NormalDist().inv_cdf(1 - rate)),
    )


def autocorrelated(memory: float, spread: float = 0.3) -> Process:
    """An AR(1) of logarithms."""

    def draw(rng: Rng, seeds: int, steps: int) -> np.ndarray:
        noise = spread * np.sqrt(1 - memory**2) * rng.normal(size=(steps, seeds))
        logs = spread * rng.normal(size=seeds)
        out = np.empty((steps, seeds))
        for step in range(steps):
            logs = memory * logs + noise[step]
            out[step] = logs
        return np.exp(out.T)

    return Process(draw, "fixed", log_normal(spread).limit)


def heavy_tailed(index: float = 1.5) -> Process:
    """Pareto's law: without a variance below index 2."""
    return Process(
        lambda rng, seeds, steps: 1 + rng.pareto(index, (seeds, steps)),
        "spikes",
        lambda rate: rate ** (-1 / index),
    )


BURST, OFTEN, LONG = 10.0, 0.004, 4.0  # height; starts a step; mean length


def bursts(rng: Rng, seeds: int, steps: int) -> np.ndarray:
    """A steady level, and runs of steps that are all ten times higher."""
    run, before = np.zeros(seeds, bool), 200
    inside = np.empty((before + steps, seeds), bool)
    start, stay = rng.random((2, *inside.shape))
    for step in range(before + steps):
        run = (run & (stay[step] > 1 / LONG)) | (start[step] < OFTEN)
        inside[step] = run
    noise = np.exp(0.2 * rng.normal(size=(seeds, steps)))
    return np.where(inside[before:].T, BURST * noise, noise)


def burst_limit(rate: float) -> float:
    """Where the two laws together leave the share, by bisection."""
    quiet = 1 / LONG * (1 - OFTEN)  # of a burst to end
    share = OFTEN / (OFTEN + quiet)
    low, high, normal = -3.0, 6.0, NormalDist(0, 0.2)
    for _ in range(60):
        middle = (low + high) / 2
        over = (1 - share) * (1 - normal.cdf(middle)) + share * (
            1 - normal.cdf(middle - np.log(BURST))
        )
        low, high = (middle, high) if over > rate else (low, middle)
    return float(np.exp(low))


def moving(path: Callable[[np.ndarray], np.ndarray], spread: float = 0.2) -> Callable:
    """Noise around a level that is a function of the part of the run that is over."""
    return lambda rng, seeds, steps: np.exp(
        path(np.linspace(0, 1, steps)) + spread * rng.normal(size=(seeds, steps))
    )


def to_infinity(rng: Rng, seeds: int, steps: int) -> np.ndarray:
    """Growth that leaves float32 at three fifths of the run, and NaN from there on."""
    sizes = moving(lambda part: 150 * part)(rng, seeds, steps)
    return np.where(np.arange(steps) < 0.6 * steps, sizes, np.nan)


PROCESSES = {
    "constant": Process(
        lambda rng, seeds, steps: np.full((seeds, steps), 1.3),
        "fixed",
        lambda rate: 1.3,
    ),
    "log-normal, 1 %": log_normal(0.01),
    "log-normal, 30 %": log_normal(0.3),
    "log-normal, 100 %": log_normal(1.0),
    "autocorrelated, 0.8": autocorrelated(0.8),
    "autocorrelated, 0.9": autocorrelated(0.9),
    "heavy-tailed": heavy_tailed(),
    "bursts": Process(bursts, "spikes", burst_limit),
    "drifting up 8-fold": Process(moving(lambda part: np.log(8) * part), "drifts"),
    "drifting down 8-fold": Process(moving(lambda part: -np.log(8) * part), "drifts"),
    "falling as 1/t": Process(moving(lambda part: -np.log1p(20 * part), 0.3), "drifts"),
    "a step of 4": Process(moving(lambda part: np.log(4) * (part > 0.5)), "drifts"),
    "diverging": Process(moving(lambda part: 20 * part, 0.3), "diverges"),
    "diverging to NaN": Process(to_infinity, "diverges"),
}
