"""Norms of units over the whole range of their dtype."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip
from optclip import groupings, sets
from tests.untyped import untyped

SIZES = [1e-37, 1e-30, 1e-20, 1e-10, 1.0, 1e10, 1e20, 1e30, 3e38]
EPS = 2.0**-23


def exact(x):
    return np.sqrt(np.sum(np.abs(np.asarray(x, np.complex128)) ** 2, axis=0))


@functools.cache
def both_ways(constraint):
    """Projected as they are, and as the sum of a parameter and an update."""
    tx = untyped(optclip.project(constraint))

    @jax.jit
    def stepped(x):
        updates, _ = tx.update({"kernel": x}, None, {"kernel": jnp.zeros_like(x)})
        return updates["kernel"]

    def at_once(x):
        return optclip.project_params({"kernel": x}, constraint)["kernel"]

    return stepped, at_once


SPHERES = (sets.unit_norm(), sets.norm_sphere(1.0, grouping=groupings.per_unit()))
BALLS = (sets.max_norm(1), sets.l2_ball(1.0, grouping=groupings.per_unit()))
RANGE = sets.norm_range(0.5, 2.0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64])
def test_every_size_is_ordinary(size, dtype):
    """Beside columns of another size, of zeros, and in both ways of projecting."""
    if dtype == jnp.bfloat16 and size > 1e38:
        size = 1e38
    column = np.array([1, -1]) if dtype != jnp.complex64 else np.array([1j, -1])
    x = np.stack([size * column, [0.3, 0.4], [0, 0], [0, size]], axis=1)
    x = jnp.asarray(x, dtype)
    wanted = exact(x)
    eps = float(jnp.finfo(dtype).eps)
    for constraint in SPHERES:
        for project in both_ways(constraint):
            np.testing.assert_allclose(exact(project(x)), [1, 1, 0, 1], atol=4 * eps)
    for constraint in BALLS:
        for project in both_ways(constraint):
            got = exact(project(x))
            assert np.all(got <= 1)
            np.testing.assert_allclose(got, np.minimum(wanted, 1), rtol=4 * eps)
    for project in both_ways(RANGE):
        got, want = exact(project(x)), np.where(wanted > 0, np.clip(wanted, 0.5, 2), 0)
        np.testing.assert_allclose(got, want, rtol=4 * eps)
        inside = (wanted > 0.51) & (wanted < 1.99)
        np.testing.assert_array_equal(project(x)[:, inside], x[:, inside])


@pytest.mark.parametrize("radius", [1e-30, 1e-10, 1e10, 1e30])
@pytest.mark.parametrize("size", SIZES)
def test_every_radius_is_ordinary(size, radius):
    radius = np.float32(radius)
    x = jnp.full((2, 2), size)
    sphere, ball = sets.norm_sphere(radius), sets.l2_ball(radius)
    norm, want = float(radius), min(2 * float(np.float32(size)), float(radius))
    got = np.sqrt(np.sum(np.square(np.asarray(optclip.project_params(x, sphere), "d"))))
    np.testing.assert_allclose(got, norm, rtol=4 * EPS)
    got = np.sqrt(np.sum(np.square(np.asarray(optclip.project_params(x, ball), "d"))))
    assert got <= norm
    np.testing.assert_allclose(got, want, rtol=4 * EPS)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e20, 1e30])
@pytest.mark.parametrize("constraint", [*SPHERES, *BALLS, RANGE], ids=repr)
def test_derivatives_are_finite_at_every_size(constraint, size):
    x = jnp.full((2, 3), size).at[:, 1].set(0.0).at[:, 2].set(1.0)

    def loss(x):
        (_, at_once) = both_ways(constraint)
        return jnp.sum(at_once(x) * jnp.array([[1.0], [2.0]]))

    slope = jax.grad(loss)(x)
    assert np.all(np.isfinite(slope))
    # Of a direction: along x it is 0 on a sphere, across it 1 / size.
    if constraint in SPHERES:
        np.testing.assert_allclose(slope[1, 0] * size, 0.5 / 2**0.5, rtol=1e-5)
        np.testing.assert_allclose(slope[0, 0], -slope[1, 0], rtol=1e-5)


def test_what_is_not_finite_is_nan_beside_what_is():
    x = jnp.array([[jnp.inf, jnp.nan, 3e38, 3.0], [1.0, 1.0, 3e38, 4.0]])
    for constraint in (*SPHERES, *BALLS, RANGE):
        for project in both_ways(constraint):
            found = project(x)
            assert np.all(np.isnan(found[:, :2])) and np.all(np.isfinite(found[:, 2:]))


def test_elements_are_groups_of_one():
    x = jnp.array([1e30, -1e-30, 0.0, 1e20 + 1e20j], jnp.complex64)
    ball = sets.l2_ball(1.0, grouping=groupings.per_element())
    got = np.abs(np.asarray(optclip.project_params(x, ball), np.complex128))
    np.testing.assert_allclose(got, [1, 1e-30, 0, 1], rtol=4 * EPS)


def test_a_step_from_huge_parameters():
    params = jnp.full((4, 4), 1e25)
    tx = optclip.project(sets.l2_ball(1.0))
    for _ in range(2):
        updates, _ = tx.update(jnp.full((4, 4), 1e24), tx.init(params), params)
        params = optax.apply_updates(params, updates)
    assert 0 < np.sqrt(np.sum(np.square(np.asarray(params, np.float64)))) <= 1


def test_a_range_without_width_is_hit_and_not_passed():
    """There is no room for margins within it: the norm comes as near as float32 can."""
    kernel = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    onto = optclip.project_params({"kernel": kernel}, sets.norm_range(1.0, 1.0))
    norms = np.linalg.norm(np.asarray(onto["kernel"], np.float64), axis=0)
    assert np.max(np.abs(norms - 1)) <= 1.5 * 2.0**-23


@pytest.mark.parametrize(
    "make",
    [
        sets.l2_ball,
        sets.max_norm,
        sets.norm_sphere,
        sets.linf_ball,
        sets.l1_ball,
        sets.simplex,
        sets.spectral_ball,
        lambda most: sets.norm_range(0.0, most),
    ],
    ids="l2_ball max_norm norm_sphere linf_ball l1_ball simplex spectral_ball "
    "norm_range".split(),
)
def test_an_array_below_zero_counts_as_zero(make):
    """A JAX array is not checked for its sign, and a schedule may end below zero."""
    x = jnp.array([[3.0, 4.0], [-1.0, 2.0]])
    for radius in (-1e-9, -1.0):
        assert not optclip.project_params(x, make(jnp.float32(radius))).any()
