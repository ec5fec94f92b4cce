"""Small leaves as one vector, as a GPU gets them, on the platform that is here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optclip
from optclip import groupings
from optclip._core import numerics, small_leaves
from tests.untyped import untyped

SHAPES = [(3, 4), (5,), (), (2, 3, 300), (small_leaves.SMALL + 1,), (64, 64)] * 2


@pytest.fixture(autouse=True)
def _for_one_gpu(monkeypatch):
    monkeypatch.setattr(numerics, "backend", lambda: "gpu")
    monkeypatch.setattr(numerics, "devices", lambda: 1)


def tree_of(magnitude=1.0):
    """Leaves of two dtypes, and one that nothing touches."""
    rng = np.random.default_rng(0)
    tree = [
        jnp.asarray(rng.normal(size=shape) * magnitude, dtype)
        for shape in SHAPES
        for dtype in ("float32", "bfloat16")
    ]
    return [*tree, jnp.arange(3)]


def norm_of(tree):
    wide = [np.asarray(x, np.float64) for x in tree[:-1]]
    return np.sqrt(sum(np.sum(np.square(x)) for x in wide))


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e25])
def test_bounds_and_bits(magnitude):
    """The tree comes to its limit, and keeps its bits, shapes and dtypes within it."""
    tree = tree_of(magnitude)
    norm = norm_of(tree)
    for limit in (norm / 3, 2 * norm):
        tx = untyped(optclip.clip_by_global_norm(limit))
        out, state = jax.jit(tx.update)(tree, tx.init(tree))
        np.testing.assert_allclose(state.metrics.size, norm, rtol=2e-6)
        np.testing.assert_allclose(norm_of(out), min(limit, norm), rtol=1e-3)
        for x, y in zip(tree, out, strict=True):
            assert x.shape == y.shape and x.dtype == y.dtype
            if limit > norm:
                np.testing.assert_array_equal(x, y)


def test_groups_stay_apart():
    """Only the group over its limit changes; one that is not finite stays so."""
    tree = {name: jnp.full(3, 2.0) for name in ("a/x", "a/y", "b/x", "b/y")}
    tree["b/x"] = jnp.zeros(3).at[1].set(jnp.nan)
    by_letter = groupings.per_label(lambda path: path[0])
    tx = untyped(optclip.clip_by(1.0, grouping=by_letter))
    out, state = tx.update(tree, tx.init(tree))
    np.testing.assert_allclose(out["a/y"], 1 / np.sqrt(6), rtol=1e-6)
    assert np.all(np.isnan(out["b/x"])) and np.all(np.isnan(out["b/y"]))
    assert state.metrics.nonfinite_steps == 1 and state.metrics.clipped_steps == 1


def test_derivatives():
    """The squared norm of what was clipped to 1 does not change; at 0 all are 0."""
    tx = untyped(optclip.clip_by_global_norm(1.0))

    def squares(tree):
        out, _ = tx.update(tree, tx.init(tree))
        return sum(jnp.sum(jnp.square(x)) for x in out)

    tree = [x for x in tree_of() if x.dtype == jnp.float32]
    for x in jax.grad(squares)(tree):
        np.testing.assert_allclose(x, 0, atol=1e-5)
    for x in jax.grad(squares)(jax.tree.map(jnp.zeros_like, tree)):
        np.testing.assert_array_equal(x, 0)


@pytest.mark.parametrize(("devices", "reductions"), [(1, 10), (8, 301)])
def test_reductions(devices, reductions, monkeypatch):
    """Three for 45 small leaves and the joint one; on eight devices three for each."""
    monkeypatch.setattr(numerics, "devices", lambda: devices)
    tree = [jax.ShapeDtypeStruct((8, 8), "float32")] * 100
    tx = optclip.clip_by_global_norm(1.0)
    state = jax.eval_shape(tx.init, tree)
    jaxpr = jax.make_jaxpr(lambda *a: tx.update(*a))(tree, state)
    assert reduced(jaxpr.jaxpr) == reductions


def reduced(jaxpr) -> int:
    """How many sums a program holds, functions inside functions included."""
    found = 0
    for equation in jaxpr.eqns:
        found += equation.primitive.name == "reduce_sum"
        for inner in equation.params.values():
            inner = getattr(inner, "jaxpr", inner)
            found += reduced(inner) if hasattr(inner, "eqns") else 0
    return found
