"""The l1 ball and the simplex, of numbers that are large beside their sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optclip
from optclip import sets
from tests.oracles import projections as oracle


@pytest.mark.parametrize("total", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4, 1e6])
def test_an_offset_costs_no_digits(offset, total):
    """Of 1000 numbers, against float64, as far as float32 holds the numbers."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(1000)
    x = np.asarray(offset + noise, np.float32)
    sign = np.where(np.arange(1000) % 3, 1, -1).astype(np.float32)
    simplex = optclip.project_params(jnp.asarray(x), sets.simplex(total))
    want = oracle.simplex(x.astype(np.float64), float(np.float32(total)))
    assert np.sum(np.abs(np.asarray(simplex, np.float64) - want)) < 2e-6 * total
    if offset:
        ball = optclip.project_params(jnp.asarray(sign * x), sets.l1_ball(total))
        want = sign * want
        assert np.sum(np.abs(np.asarray(ball, np.float64) - want)) < 2e-6 * total


def test_two_numbers_far_from_zero():
    x = jnp.array([1e6, 1e6 - 0.5, 1e6 - 1] + [1e6 - 5] * 997)
    found = optclip.project_params(x, sets.simplex())
    np.testing.assert_array_equal(found[:3], [0.75, 0.25, 0])
    assert not np.any(found[3:])


def test_numbers_that_are_lower_by_more_than_the_radius_become_zero():
    """Exactly, whatever a compiler makes of a quotient."""

    @jax.jit
    def found(radius):
        x = jnp.array([-4.0, 2.9, 2.3, -2.3]) * radius
        return optclip.project_params(x, sets.l1_ball(radius))

    for radius in range(1, 100):
        first, *others = found(jnp.float32(radius)).tolist()
        assert others == [0, 0, 0]
        assert first == pytest.approx(-radius, rel=1e-6)


def test_equal_numbers_do_not_exceed_their_sum():
    """Though their roundings, and those of the step, all go the same way."""
    sign = np.where(np.arange(94) % 2, 1, -1).astype(np.float32)

    @jax.jit
    def found(p, radius):
        tx = optclip.project(sets.l1_ball(radius))
        updates, _ = tx.update(jnp.asarray(sign * 3e4), tx.init(p), p)
        return p + updates

    for number in range(200):
        rng = np.random.default_rng(number)
        p = jnp.asarray(rng.normal(size=94) / 200, jnp.float32)
        radius = np.float32(rng.uniform(0.5, 2.0))
        total = np.sum(np.abs(np.asarray(found(p, radius), np.float64)))
        assert radius * (1 - 1e-6) <= total <= radius


@pytest.mark.parametrize("size", [1e-30, 1e20, 3e38])
def test_the_top_of_the_range(size):
    x = jnp.array([size, size])
    np.testing.assert_allclose(
        optclip.project_params(x, sets.l1_ball()), np.minimum(x, 0.5), rtol=1e-6
    )
    np.testing.assert_array_equal(optclip.project_params(x, sets.simplex()), [0.5, 0.5])
    apart = optclip.project_params(jnp.array([size, -size]), sets.simplex())
    np.testing.assert_array_equal(apart, [1, 0] if size > 1 else [0.5, 0.5])


def test_the_derivative_is_that_of_the_nearest_point():
    """Between the numbers that stay, what one gains the others lose."""
    x = jnp.array([1e4, 1e4 - 0.25, 1e4 - 9.0])
    slope = jax.jacobian(lambda x: optclip.project_params(x, sets.simplex()))(x)
    want = np.array([[0.5, -0.5, 0], [-0.5, 0.5, 0], [0, 0, 0]])
    np.testing.assert_allclose(slope, want, atol=1e-6)
