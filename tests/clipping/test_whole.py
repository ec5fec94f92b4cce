"""`groupings.whole(measured, applied)`: one norm over some leaves, applied to some."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import optclip
from optclip import groupings, thresholds
from tests.untyped import untyped

GRADS = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([12.0]), "c": jnp.array([1.0])}
FORMS = {
    "pattern": ("[ab]", "[bc]"),
    "predicate": (lambda path, leaf: path in "ab", lambda path, leaf: path in "bc"),
    "tree": (
        {"a": True, "b": True, "c": False},
        {"a": False, "b": True, "c": True},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_measured_and_applied(form):
    """The norm of a and b, 13, scales b and c; a keeps its bits."""
    measured, applied = FORMS[form]
    tx = untyped(optclip.clip_by(1.3, grouping=groupings.whole(measured, applied)))
    updates, state = jax.jit(tx.update)(GRADS, tx.init(GRADS))
    np.testing.assert_allclose(state.metrics.size, 13.0)
    np.testing.assert_array_equal(updates["a"], GRADS["a"])
    np.testing.assert_allclose(updates["b"], [1.2], rtol=1e-6)
    np.testing.assert_allclose(updates["c"], [0.1], rtol=1e-6)


def test_each_on_its_own():
    only = untyped(optclip.clip_by(1.0, grouping=groupings.whole(measured="a")))
    updates, _ = only.update(GRADS, None)
    for path, x in updates.items():
        np.testing.assert_allclose(x, GRADS[path] / 5, rtol=1e-6)
    only = untyped(optclip.clip_by(1.0, grouping=groupings.whole(applied="a")))
    updates, _ = only.update(GRADS, None)
    np.testing.assert_allclose(updates["a"], GRADS["a"] / np.sqrt(170), rtol=1e-6)
    np.testing.assert_array_equal(updates["b"], GRADS["b"])


@pytest.mark.parametrize(
    ("nonfinite", "value"), [("propagate", np.nan), ("zero", 0.0)], ids=str
)
def test_what_is_not_finite(nonfinite, value):
    """Measured, it spoils what is applied; not measured, it stays where it is."""
    grouping = groupings.whole(measured="[ab]", applied="[bc]")
    tx = untyped(optclip.clip_by(1.3, grouping=grouping, nonfinite=nonfinite))
    bad = {**GRADS, "a": jnp.array([jnp.nan, 4.0])}
    updates, state = tx.update(bad, None)
    np.testing.assert_array_equal(updates["a"], bad["a"])
    np.testing.assert_array_equal(updates["b"], [value])
    np.testing.assert_array_equal(updates["c"], [value])
    assert state.metrics.nonfinite_steps == 1
    updates, state = tx.update({**GRADS, "c": jnp.array([jnp.nan])}, None)
    np.testing.assert_allclose(updates["b"], [1.2], rtol=1e-6)
    assert np.isnan(updates["c"]) and state.metrics.nonfinite_steps == 0


def test_the_mean_square_counts_what_is_measured():
    tx = untyped(
        optclip.clip_by(
            1.0, measure=optclip.measures.rms, grouping=groupings.whole(measured="a")
        )
    )
    _, state = tx.update(GRADS, None)
    np.testing.assert_allclose(state.metrics.size, np.sqrt(12.5), rtol=1e-6)


@pytest.mark.parametrize(
    "rule",
    [
        lambda grouping: optclip.spike_clip(window=3, grouping=grouping),
        lambda grouping: optclip.clip_by_norm(1.0, grouping=grouping),
        lambda grouping: optclip.adaptive_grad_clip(grouping=grouping),
        lambda grouping: optclip.clip_by(thresholds.unlimited(), grouping=grouping),
    ],
    ids=["spike_clip", "clip_by_norm", "adaptive_grad_clip", "unlimited"],
)
def test_every_rule_with_a_grouping(rule):
    """What it learns and measures is as if the other leaves were not there."""
    some = rule(groupings.whole(measured="a", applied="a"))
    alone = rule(groupings.whole())
    state, other = some.init(GRADS), alone.init({"a": GRADS["a"]})
    for scale in (1.0, 1.1, 50.0, 1.0):
        grads = jax.tree.map(lambda x, by=scale: by * x, GRADS)
        updates, state = some.update(grads, state, GRADS)
        want, other = alone.update({"a": grads["a"]}, other, {"a": GRADS["a"]})
        np.testing.assert_array_equal(updates["a"], want["a"])
        np.testing.assert_array_equal(updates["b"], grads["b"])
    for one, two in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_recorder_keeps_what_is_measured():
    grouping = groupings.whole(measured="[bc]", applied="a")
    tx = untyped(optclip.clip_by(1.0, grouping=grouping, record=2))
    update, state = jax.jit(tx.update), tx.init(GRADS)
    for scale in (1.0, 2.0):
        grads = jax.tree.map(lambda x, by=scale: by * x, GRADS)
        _, state = update(grads, state, GRADS)
    kept = untyped(optclip.history(state))
    assert list(kept.names) == ["b", "c"]
    np.testing.assert_allclose(kept.sizes, [[12.0, 1.0], [24.0, 2.0]], rtol=1e-6)
    np.testing.assert_allclose(kept.size, np.sqrt(145) * np.array([1, 2]), rtol=1e-6)


@pytest.mark.skipif(jax.device_count() < 4, reason="fewer devices")
def test_inside_shard_map():
    """Measured leaves are summed over their own axes, whatever is applied."""
    tree = {"a": jnp.arange(8.0), "b": jnp.ones(3), "c": jnp.arange(4.0)}
    specs = {"a": P("data"), "b": P(), "c": P("data")}
    tx = untyped(optclip.clip_by(1.0, grouping=groupings.whole("a|b", "b|c")))
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("data",), axis_types=auto, devices=jax.devices()[:4])
    step = jax.shard_map(
        lambda u: tx.update(u, None)[0], mesh=mesh, in_specs=(specs,), out_specs=specs
    )
    got, want = jax.jit(step)(tree), tx.update(tree, None)[0]
    for path, x in want.items():
        np.testing.assert_allclose(got[path], x, rtol=1e-6)


@pytest.mark.parametrize("argument", ["measured", "applied"])
@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("(", " must be a regular expression, got '(' ("),
        ({"a": 3}, " must be a pattern, a predicate or a tree of booleans, got 3 at"),
        ("kernle", " must select a leaf, got none of 'a', 'b', 'c'."),
    ],
    ids=["pattern", "number", "nothing"],
)
def test_nonsense(argument, where, says):
    rule = "clip_by" if where == "kernle" else "whole"
    with pytest.raises(ValueError, match="^" + re.escape(f"{rule}: {argument}{says}")):
        grouping = untyped(groupings.whole)(**{argument: where})
        optclip.clip_by(1.0, grouping=grouping).init(GRADS)


def test_a_masked_tree_without_leaves():
    grouping = groupings.whole(measured="a")
    tx = optax.masked(
        optclip.clip_by(1.0, grouping=grouping), dict.fromkeys("abc", False)
    )
    updates, _ = untyped(tx).update(GRADS, tx.init(GRADS))
    np.testing.assert_array_equal(updates["b"], GRADS["b"])
