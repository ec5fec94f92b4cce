"""The size of all groups together, which costs no pass over the leaves."""

import jax
import numpy as np
import pytest

import optclip
from optclip import groupings, thresholds
from tests.untyped import untyped


def combined_of(state, observation):
    """As the limit of each group, so that metrics show it."""
    assert observation.combined is not None
    return observation.combined


ALL = thresholds.Threshold(combined_of, needs_combined=True)


@pytest.fixture(scope="module")
def combined():
    """The size of all leaves, each one number, compiled once."""
    tx = untyped(optclip.clip_by(ALL, grouping=groupings.per_leaf()))
    metrics = jax.jit(lambda x: tx.update(x, tx.init(x))[1].metrics)
    return lambda x: float(metrics(list(x)).limit)


@pytest.mark.parametrize("power", [-25, 0, 25, 37])
def test_combined_is_rounded_by_its_sum_alone(combined, power):
    """To bring sizes into range divides by a power of two."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        x = (rng.uniform(0.1, 1.0, 3) * 10.0**power).astype(np.float32)
        exact = np.sqrt(np.sum(np.square(x, dtype=np.float64)))
        assert abs(combined(x) - exact) <= 1.1 * np.spacing(np.float32(exact))


def test_combined_leaves_out_what_is_not_finite(combined):
    assert combined(np.array([3.0, np.inf, 4.0], np.float32)) == 5
    assert combined(np.array([np.nan, 0.0, 0.0], np.float32)) == 0
