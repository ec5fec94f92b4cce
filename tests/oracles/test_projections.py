"""Every set equals its oracle, and the oracles equal what SciPy finds."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

import optclip
from optclip import groupings, sets
from tests.oracles import projections as oracle
from tests.untyped import untyped

X = 2 * np.random.default_rng(3).standard_normal((4, 3))


def nearest(constraint, x=X):
    tree = {"kernel": jnp.asarray(x, jnp.float32)}
    return np.asarray(optclip.project_params(tree, constraint)["kernel"])


def by_unit(function, *arguments):
    return np.stack([function(column, *arguments) for column in X.T], axis=1)


UNITS = groupings.per_unit()
PAIRS = {
    "box": (sets.box(-0.3, 1.2), oracle.box(X, -0.3, 1.2)),
    "box arrays": (
        sets.box(-np.ones(3), np.arange(3.0)),
        oracle.box(X, -np.ones(3), np.arange(3.0)),
    ),
    "nonnegative": (sets.nonnegative(), oracle.box(X, 0, np.inf)),
    "linf_ball": (sets.linf_ball(0.7), oracle.box(X, -0.7, 0.7)),
    "init_box": (
        sets.init_box(0.5),
        oracle.box(X, *(np.abs(X).max() * np.array([-0.5, 0.5]))),
    ),
    "l2_ball": (sets.l2_ball(1.5), oracle.l2_ball(X, 1.5)),
    "l2_ball units": (
        sets.l2_ball(1.5, grouping=UNITS),
        by_unit(oracle.l2_ball, 1.5),
    ),
    "l2_ball elements": (
        sets.l2_ball(0.7, grouping=groupings.per_element()),
        oracle.box(X, -0.7, 0.7),
    ),
    "max_norm": (sets.max_norm(3.0), by_unit(oracle.l2_ball, 3.0)),
    "max_norm axis": (
        sets.max_norm(1.0, axis=1),
        np.stack([oracle.l2_ball(row, 1.0) for row in X]),
    ),
    "norm_sphere": (sets.norm_sphere(2.0), oracle.norm_sphere(X, 2.0)),
    "unit_norm": (sets.unit_norm(), by_unit(oracle.norm_sphere, 1.0)),
    "norm_range": (sets.norm_range(3.0, 4.0), by_unit(oracle.norm_range, 3.0, 4.0)),
    "norm_range rate": (
        sets.norm_range(3.0, 4.0, 0.3),
        by_unit(oracle.norm_range, 3.0, 4.0, 0.3),
    ),
    "l1_ball": (sets.l1_ball(3.0), oracle.l1_ball(X, 3.0)),
    "l1_ball units": (
        sets.l1_ball(2.0, grouping=UNITS),
        by_unit(oracle.l1_ball, 2.0),
    ),
    "simplex": (sets.simplex(2.0), oracle.simplex(X, 2.0)),
    "simplex units": (
        sets.simplex(1.0, grouping=UNITS),
        by_unit(oracle.simplex, 1.0),
    ),
    "spectral_ball": (sets.spectral_ball(1.5), oracle.spectral_ball(X, 1.5)),
    "spectral products": (
        sets.spectral_ball(1.5, iterations=30),
        oracle.spectral_ball(X, 1.5),
    ),
    "orthogonal": (sets.orthogonal(), oracle.orthogonal(X)),
    "orthogonal products": (sets.orthogonal(iterations=30), oracle.orthogonal(X)),
}


@pytest.mark.parametrize(("constraint", "want"), PAIRS.values(), ids=PAIRS)
def test_nearest_point(constraint, want):
    np.testing.assert_allclose(nearest(constraint), want, rtol=2e-5, atol=5e-6)


BOTH = {
    "box and ball": (sets.box(-0.4, 2.0), sets.l2_ball(2.0)),
    "ball and box": (sets.l2_ball(2.0), sets.box(-0.4, 2.0)),
}


def by_scipy(constraints, bounds):
    """The nearest point by sequential quadratic programming, from the definition."""
    found = optimize.minimize(
        lambda v: np.sum((v - X.ravel()) ** 2),
        np.full(X.size, 0.1),
        jac=lambda v: 2 * (v - X.ravel()),
        bounds=bounds,
        constraints=constraints,
        method="SLSQP",
        options={"ftol": 1e-9, "maxiter": 500},
    )
    assert found.success
    return found.x.reshape(X.shape)


@pytest.mark.parametrize(("a", "b"), BOTH.values(), ids=BOTH)
def test_intersection(a, b):
    ball = {"type": "ineq", "fun": lambda v: 4.0 - v @ v}
    want = by_scipy([ball], [(-0.4, 2.0)] * X.size)
    got = nearest(sets.intersection(a, b, iterations=64))
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_oracles_are_nearest_points():
    total = {"type": "eq", "fun": lambda v: v.sum() - 2.0}
    want = by_scipy([total], [(0, None)] * X.size)
    np.testing.assert_allclose(oracle.simplex(X, 2.0), want, atol=1e-5)
    ball = {"type": "ineq", "fun": lambda v: 2.25 - v @ v, "jac": lambda v: -2 * v}
    want = by_scipy([ball], [(None, None)] * X.size)
    np.testing.assert_allclose(oracle.l2_ball(X, 1.5), want, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_qk_clip(key_heads, seed):
    rng = np.random.default_rng(seed)
    query, key = (rng.standard_normal((3, h, 2)) for h in (4, key_heads))
    largest = 100 * np.exp(rng.standard_normal(4))
    params = {"query": {"kernel": query}, "key": {"kernel": key}}
    params = {k: {"kernel": v["kernel"].astype("f")} for k, v in params.items()}
    zeros = {k: {"kernel": 0 * v["kernel"]} for k, v in params.items()}
    tx = untyped(optclip.qk_clip(100.0))
    updates, _ = tx.update(zeros, tx.init(params), params, max_logits={"": largest})
    wanted = oracle.qk_clip(query, key, largest, 100.0)
    for name, want in zip(("query", "key"), wanted, strict=True):
        got = params[name]["kernel"] + updates[name]["kernel"]
        np.testing.assert_allclose(got, want, rtol=1e-5)
