"""Times contestants against each other, in turns.

A machine's speed drifts by more than what is to be seen. So contestants take turns, one
call each a round, in an order that is shuffled; ratios are taken within rounds, and
what is reported is their median with its quartiles.
"""

import random
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from benchmarks.contestants import Arrays, Compiled, Contestant

WARM_UP = 3


class Timed(NamedTuple):
    """Seconds of every round, and what the compiled program says of itself."""

    seconds: np.ndarray
    compiled: Compiled | None

    def over(self, other: np.ndarray) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of the ratio, round by round."""
        low, middle, high = np.quantile(self.seconds / other, (0.25, 0.5, 0.75))
        return float(low), float(middle), float(high)


def race(
    contestants: dict[str, Contestant],
    arrays: Arrays,
    rounds: int,
    warm_up: int = WARM_UP,
    limit: float = 0.5,
    after_round: Callable[[], object] = lambda: None,
) -> dict[str, Timed]:
    """Their seconds over some rounds, after a warm-up."""
    own = {name: contestant.own for name, contestant in contestants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    order, shuffled = list(contestants), random.Random(0)
    for number in range(warm_up + rounds):
        shuffled.shuffle(order)
        for name in order:
            limit *= 0.99
            start = time.perf_counter()
            arrays, own[name] = contestants[name].step(arrays, own[name], limit)
            took = time.perf_counter() - start
            if number >= warm_up:
                seconds[name].append(took)
        after_round()
    return {
        name: Timed(np.array(took), contestants[name].compiled)
        for name, took in seconds.items()
    }
