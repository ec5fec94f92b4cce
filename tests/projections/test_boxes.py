"""Boxes: bounds of every numeric type, in every dtype."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import optclip
from optclip import sets
from tests.untyped import untyped

X = np.array([-3.0, 0.25, 3.0], np.float32)
TWOS = [
    2,
    2.0,
    np.uint8(2),
    np.int8(2),
    np.uint64(2),
    np.int64(2),
    np.float16(2),
    np.float64(2),
    ml_dtypes.bfloat16(2),
    ml_dtypes.float8_e4m3fn(2),
    np.array(2, np.uint16),
    jnp.uint8(2),
    jnp.int32(2),
    jnp.bfloat16(2),
    jnp.float8_e4m3fn(2),
]
HUGE = [
    10**12,
    np.int64(10**12),
    np.uint64(2**64 - 1),
    2**64,
    10**40,
    np.float64(1e300),
]


def named(values):
    return [pytest.param(x, id=f"{type(x).__name__}-{i}") for i, x in enumerate(values)]


@pytest.mark.parametrize("two", named(TWOS))
def test_a_bound_of_any_type_is_that_number(two):
    for constraint in (sets.linf_ball(two), sets.box(-2, two)):
        np.testing.assert_array_equal(
            optclip.project_params(X, constraint), [-2, 0.25, 2]
        )
    ball = untyped(optclip.project_params(X, sets.l2_ball(two)))
    np.testing.assert_array_equal(ball, optclip.project_params(X, sets.l2_ball(2.0)))
    grown = untyped(optclip.project(sets.init_box(two))).init(X)
    assert grown.memory == 3
    clipped = untyped(optclip.clip_weights(two, where=optclip.everything))
    updates, _ = clipped.update(np.zeros_like(X), clipped.init(X), X)
    np.testing.assert_array_equal(X + updates, [-2, 0.25, 2])


@pytest.mark.parametrize("huge", named(HUGE))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn"])
def test_a_bound_beyond_a_dtype_bounds_nothing(huge, dtype):
    x = jnp.asarray([-96, 0.25, 96], dtype)
    every = (
        sets.linf_ball(huge),
        sets.box(-float(huge), huge),
        sets.l2_ball(huge),
        sets.max_norm(huge),
        sets.l1_ball(huge),
        sets.spectral_ball(huge),
        sets.norm_range(0, huge),
    )
    for constraint in every:
        got = optclip.project_params({"kernel": x[:, None]}, constraint)["kernel"]
        np.testing.assert_array_equal(got[:, 0], x, err_msg=repr(constraint))


def test_a_negative_bound_of_a_wide_integer():
    free = sets.box(np.int64(-3 * 10**9), 5)
    np.testing.assert_array_equal(optclip.project_params(X, free), X)
    with pytest.raises(ValueError, match=r"^box: lower and upper must have a float16"):
        optclip.project_params(X.astype(np.float16), sets.box(10**6, 10**7))


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
@pytest.mark.parametrize("bound", [1000.0, jnp.float32(1000.0), np.inf])
def test_types_of_eight_bits(dtype, bound):
    """The largest of float8_e4m3fn is 448, and it has no infinity."""
    x = jnp.array([3, -4, 96, -448], dtype)
    np.testing.assert_array_equal(optclip.project_params(x, sets.linf_ball(bound)), x)
    assert optclip.project_params(x, sets.linf_ball(4.9)).tolist() == (
        [3, -4, 4.5, -4.5] if dtype == jnp.float8_e4m3fn else [3, -4, 4, -4]
    )
    tx = optclip.project(sets.linf_ball(bound))
    updates, _ = tx.update(jnp.zeros_like(x), tx.init(x), x)
    np.testing.assert_array_equal(updates, jnp.zeros_like(x))


@pytest.mark.parametrize(
    "make",
    [
        sets.linf_ball,
        sets.l2_ball,
        sets.max_norm,
        sets.init_box,
        sets.spectral_ball,
        sets.simplex,
        lambda size: sets.box(0, size),
        lambda size: sets.norm_range(0, size),
        optclip.qk_clip,
        optclip.clip_weights,
    ],
)
@pytest.mark.parametrize("digits", [400, 5000])
def test_an_integer_that_no_float_holds(make, digits):
    says = r"must be a number that a float can hold, got an integer of \d+ bits\.$"
    with pytest.raises(ValueError, match=says):
        make(10**digits)


def test_init_box_of_abstract_leaves():
    """What is not known is NaN, never 0, until a saved state is restored."""
    tree = {"w": jnp.array([0.5, -2.0]), "b": jnp.zeros(2)}
    abstract = jax.eval_shape(lambda: tree)
    both = sets.intersection(sets.init_box(2.0), sets.init_box(3.0))
    for constraint in (sets.init_box(2.0), both):
        tx = untyped(optclip.project(constraint))
        state, known = tx.init(abstract), tx.init(tree)
        assert state.memory.shape == known.memory.shape
        assert np.all(np.isnan(state.memory)) and not np.any(np.isnan(known.memory))
        updates, _ = tx.update(tree, state, tree)
        assert all(np.all(np.isnan(x)) for x in jax.tree.leaves(updates))


def test_init_box_keeps_every_digit_of_a_wide_leaf():
    """With kappa = 1 the start lies inside, also beyond the range of float32."""
    with jax.enable_x64(True):
        for start in (0.7, 1e300):
            x = jnp.array([start, -start / 3])
            out = optclip.project_params(x, sets.init_box(), strict=True)
            np.testing.assert_array_equal(out, x)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_init_box_of_a_start_that_is_not_finite(bad):
    """It is visible at once, and does not leave the leaf free for ever."""
    params = {"bad": jnp.array([bad, 1.0]), "good": jnp.array([2.0, 1.0])}
    tx = optclip.project(sets.init_box())
    updates, _ = untyped(tx.update)(params, tx.init(params), params)
    assert np.isnan(updates["bad"]).all() and not np.isnan(updates["good"]).any()
