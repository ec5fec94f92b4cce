"""Small leaves as one vector, as a GPU gets them, on the platform that is here."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optclip
from optclip import actions, groupings
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


RULES = {
    "leaves": optclip.clip_by_block_rms(0.5),
    "units": optclip.adaptive_grad_clip(0.5),
    "elements": optclip.second_moment_clip(1.0, warmup_steps=1),
    "learning": optclip.zclip(grouping=groupings.per_leaf(), warmup_steps=1),
    "raising": optclip.clip_by(
        1.0, grouping=groupings.per_unit(), action=actions.normalize()
    ),
}


@pytest.mark.parametrize("only_vectors", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_many_blocks(rule, only_vectors, monkeypatch):
    """Updates, metrics and what is learned are those of blocks that stay apart."""
    tx = untyped(RULES[rule])
    tree = [x for x in tree_of() if x.dtype == jnp.float32]
    tree = [x for x in tree if x.ndim == 1] if only_vectors else tree
    steps = [[x * scale for x in tree] for scale in (1, 3, 0, 1e25)]
    steps.append([*tree[:1], tree[1] * 1e25, *tree[2:]])
    steps.append([*tree[:1], tree[1] * jnp.nan, *tree[2:]])

    def run(backend):
        monkeypatch.setattr(numerics, "backend", lambda: backend)
        update, state, found = jax.jit(lambda *a: tx.update(*a)), tx.init(tree), []
        for updates in steps:
            out, state = update(updates, state, tree)
            found.append((out, state))
        return found

    for x, y in zip(*map(jax.tree.leaves, (run("gpu"), run("cpu"))), strict=True):
        np.testing.assert_allclose(x, y, rtol=3e-6)


@pytest.mark.parametrize(("devices", "reductions"), [(1, 11), (8, 302)])
def test_reductions(devices, reductions, monkeypatch):
    """Three for 45 small leaves, three on eight devices for each leaf, the joint one
    and that of the metrics."""
    monkeypatch.setattr(numerics, "devices", lambda: devices)
    assert reductions_of(optclip.clip_by_global_norm(1.0)) == reductions


@pytest.mark.parametrize(
    ("rule", "reductions"),
    [("leaves", 302), ("units", 7), ("elements", 1), ("learning", 302)],
)
def test_reductions_of_many_groups(rule, reductions):
    """What a leaf needs, and for all groups one each of metrics and doubts of a tree.

    Leaves are summed at three scales, whose rows meet in one more. Units are summed in
    two stacks of leaves, those of the gradients and those of the parameters.
    """
    assert reductions_of(RULES[rule]) == reductions


def test_stacks_keep_what_is_not_scaled():
    """Leaves that are measured only, beside leaves alike that are scaled."""
    units = dataclasses.replace(
        groupings.per_unit(), applied=lambda path, leaf: path != "b"
    )
    tx = untyped(optclip.clip_by(1.0, grouping=units))
    tree = {name: jnp.full((2, 3), 2.0) for name in "abc"}
    out, _ = tx.update(tree, tx.init(tree))
    np.testing.assert_array_equal(out["b"], tree["b"])
    for name in "ac":
        np.testing.assert_allclose(out[name], np.sqrt(0.5), rtol=1e-6)


def reductions_of(tx) -> int:
    """Those of a step of 100 small leaves."""
    tree = [jax.ShapeDtypeStruct((8, 8), "float32")] * 100
    state = jax.eval_shape(tx.init, tree)
    return reduced(jax.make_jaxpr(lambda *a: tx.update(*a))(tree, state, tree).jaxpr)


def reduced(jaxpr) -> int:
    """How many reductions a program holds, in functions but not in branches."""
    found = 0
    for equation in jaxpr.eqns:
        found += equation.primitive.name.startswith("reduce")
        found -= equation.primitive.name == "reduce_precision"
        if equation.primitive.name == "cond":
            continue
        for inner in equation.params.values():
            inner = getattr(inner, "jaxpr", inner)
            found += reduced(inner) if hasattr(inner, "eqns") else 0
    return found
