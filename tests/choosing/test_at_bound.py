"""The share of weights at their bound, after a step that put them there."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip
from optclip import sets

WEIGHTS = jax.random.normal(jax.random.key(0), (64, 32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_elements(dtype: Any):
    """Of projected ones, exactly those at either end."""
    low, high = -0.5, 1.0
    kept = optclip.project_params(WEIGHTS.astype(dtype), sets.box(low, high))
    share = np.mean((np.asarray(kept) == low) | (np.asarray(kept) == high))
    assert 0.4 < share < 0.6
    assert optclip.at_bound(kept, sets.box(low, high)) == share
    assert jax.jit(lambda p: optclip.at_bound(p, sets.box(low, high)))(kept) == share
    assert optclip.at_bound(kept, sets.box(-9.0, 9.0)) == 0


def test_a_bound_of_zero():
    kept = optclip.project_params(WEIGHTS, sets.nonnegative())
    assert optclip.at_bound(kept, sets.nonnegative()) == np.mean(np.asarray(kept) == 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_units(dtype: Any):
    """All weights of a unit that was shrunk to its largest norm."""
    kernel = WEIGHTS.astype(dtype) * jnp.linspace(0.1, 2, 32, dtype=dtype)[None]
    own = sets.max_norm(8.0)
    kept = optclip.project_params({"kernel": kernel}, own)
    norms = np.linalg.norm(np.asarray(kernel, np.float64), axis=0)
    assert 0.3 < np.mean(norms > 8) < 0.7
    np.testing.assert_allclose(optclip.at_bound(kept, own), np.mean(norms > 8))


@pytest.mark.parametrize(
    ("own", "share"),
    [
        (sets.l2_ball(1.0), 1),
        (sets.l2_ball(1e3), 0),
        (sets.l1_ball(3.0), 1),
        (sets.spectral_ball(2.0), 1),
        (sets.spectral_ball(99.0), 0),
        (sets.unit_norm(), 1),
        (sets.norm_range(1.0, 2.0), 1),
    ],
    ids=repr,
)
def test_points_of_several_weights(own: Any, share: int):
    assert optclip.at_bound(optclip.project_params(WEIGHTS, own), own) == share


def test_where_and_trees():
    params = {
        "a": jnp.array([1.0, 0.0]),
        "b": jnp.array([1.0, 1.0]),
        "n": jnp.array([3]),
    }
    own = {"a": sets.linf_ball(1.0), "b": sets.linf_ball(2.0)}
    assert optclip.at_bound(params, own) == 0.25
    assert optclip.at_bound(params, sets.linf_ball(1.0), where="b") == 1
    assert optclip.at_bound({}, sets.linf_ball(1.0)) == 0


def test_a_critic_whose_weights_all_saturate():
    """What the number is for: a large rate drives every weight to ±c."""
    tx = optax.chain(optax.rmsprop(0.1), optclip.clip_weights(0.01))
    params = {"kernel": 0.001 * WEIGHTS}
    state = tx.init(params)
    assert optclip.at_bound(params, sets.linf_ball(0.01)) < 0.1
    updates, _ = tx.update({"kernel": WEIGHTS}, state, params)
    after = optax.apply_updates(params, updates)
    assert optclip.at_bound(after, sets.linf_ball(0.01)) > 0.95


@pytest.mark.parametrize(
    ("own", "where", "message"),
    [
        (1.0, None, "constraint must be a Set of optclip"),
        (sets.l2_ball(1.0), "none", "where must select a leaf"),
        (
            sets.init_box(1.0),
            None,
            "constraint must not depend on the run, got init_box",
        ),
    ],
)
def test_bad_input(own: Any, where: Any, message: str):
    with pytest.raises(ValueError, match=f"^at_bound: {message}"):
        optclip.at_bound({"w": jnp.ones(3)}, own, where)
