"""Law 13: with a floor or a fixed target no group of some size stays below its limit.

It stands in the place of laws 1 to 3 for rules that enlarge: to within four units in
the last place of the leaf's dtype, by one factor for a group, and as NumPy computes it.
What is at its target keeps its bits; a group of size 0 has no direction and stays 0; an
infinite limit changes nothing.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import optclip
from optclip import actions, groupings, measures, thresholds
from tests.laws import trees
from tests.laws.table import rows
from tests.laws.test_1_bound import below_normal
from tests.laws.trees import Case, combinations
from tests.oracles import fixed
from tests.untyped import untyped

ENLARGING = combinations("enlarging")


def targets_of(row, sizes, limit):
    """The sizes that the groups should have; of size 0, none."""
    found = [fixed.target(size, float(limit), row.oracle["action"]) for size in sizes]
    return np.where(np.equal(sizes, 0), 0, found)


@pytest.mark.parametrize(("row", "dtype"), ENLARGING)
@given(data=st.data())
def test_lower_bound(row, dtype, data):
    """And the upper one, where there is one; no output is lost on the way."""
    case = data.draw(trees.cases(row, dtype))
    out, state = trees.run(row, case)
    eps, tiny = float(trees.info(dtype).eps), float(trees.info(dtype).smallest_normal)
    before, after = trees.sizes_of(row, case.tree), trees.sizes_of(row, out)
    targets = targets_of(row, before, case.limit)
    fits = targets <= float(trees.info(dtype).max)  # others become infinite
    limit = float(case.limit)
    known = 8 * float(np.finfo(case.limit.dtype).eps)  # of a size, in its own dtype
    groups = trees.groups_of(row, out)
    each = zip(groups, before, after, targets, fits, strict=True)
    for group, old, size, target in (found[:4] for found in each if found[4]):
        slack = below_normal(dtype, "l2", trees.values(out, group).size) + 1.5 * tiny
        assert size >= target * (1 - 4 * eps) - slack
        assert size <= target * (1 + 4 * eps) + slack
        if old == target and old > limit * (1 + known):
            assert trees.bits(out, group) == trees.bits(case.tree, group)

    expected, _ = fixed.clip(case.tree, case.limit, **row.oracle)
    for path, value in out.items():
        off = np.abs(trees.wide(value) - expected[path])
        close = off <= 5 * eps * np.abs(expected[path]) + 1.5 * tiny
        assert np.all(close) or not np.all(fits), path

    if np.any(np.abs(targets - before) < known * targets):
        return  # whether such a group counts depends on how its sum is rounded
    np.testing.assert_allclose(
        state.metrics.changed_fraction, np.mean(targets != before), rtol=1e-6
    )
    assert state.metrics.changed_steps == np.any(targets != before)
    np.testing.assert_allclose(
        state.metrics.clipped_fraction, np.mean(targets < before), rtol=1e-6
    )
    assert state.metrics.clipped_steps == np.any(targets < before)


@pytest.mark.parametrize(("row", "dtype"), ENLARGING)
@trees.at_most(15)
@given(data=st.data())
def test_direction(row, dtype, data):
    """One factor for a group; no element turns or changes its sign."""
    tree = data.draw(trees.trees(row, dtype))
    limit = trees.wide_dtype(dtype)(data.draw(st.sampled_from((0.1, 1.0, 30.0))))
    out, _ = trees.run(row, Case(tree, limit))
    eps, tiny = float(trees.info(dtype).eps), float(trees.info(dtype).smallest_normal)
    for group in trees.groups_of(row, out):
        before, after = trees.values(tree, group), trees.values(out, group)
        largest = np.argmax(np.abs(before))
        if before[largest] == 0:
            continue
        expected = after[largest] * (before / before[largest])
        assert np.all(np.abs(after - expected) <= 3 * eps * np.abs(after) + 1.5 * tiny)


@pytest.mark.parametrize(("row", "dtype"), ENLARGING)
@trees.at_most(15)
@given(data=st.data())
def test_infinity_and_zero(row, dtype, data):
    """Infinity changes nothing; at 0 a fixed target gives zeros, a floor nothing."""
    tree, limit = data.draw(trees.trees(row, dtype)), trees.wide_dtype(dtype)
    unchanged, state = trees.run(row, Case(tree, limit(np.inf)))
    at_zero, _ = trees.run(row, Case(tree, limit(0.0)))
    assert state.metrics.changed_steps == 0
    for path, x in tree.items():
        assert unchanged[path].tobytes() == x.tobytes(), path
        if row.oracle["action"] == "floor":
            assert at_zero[path].tobytes() == x.tobytes(), path
        else:
            assert np.all(at_zero[path] == 0), path


@pytest.mark.parametrize(("row", "dtype"), ENLARGING)
@pytest.mark.parametrize("limit", [0.0, 1e-30, 1.0, np.inf])
def test_size_zero(row, dtype, limit):
    """Zeros stay zeros, never NaN, and negative ones negative."""
    tree = {
        path: np.asarray(np.copysign(np.zeros(shape), -1.0)).astype(dtype)
        for path, shape in trees.SHAPES.items()
    }
    out, state = trees.run(row, Case(tree, trees.wide_dtype(dtype)(limit)))
    for path, x in tree.items():
        assert out[path].tobytes() == x.tobytes(), path
    assert state.metrics.changed_steps == state.metrics.nonfinite_steps == 0


@pytest.mark.parametrize("row", rows("enlarging"))
@pytest.mark.parametrize(
    ("dtype", "size", "limit"),
    [("float32", 2e-38, 3e38), ("bfloat16", 1e-30, 1e20), ("float64", 1e-300, 1e300)],
)
def test_factors_beyond_the_dtype(row, dtype, size, limit):
    """From nearly the smallest number to nearly the largest: 10^76 in float32."""
    tree = {path: np.zeros(shape, dtype) for path, shape in trees.SHAPES.items()}
    tree["a/kernel"][1] = [size, -size, 0]
    out, _ = trees.run(row, Case(tree, trees.wide_dtype(dtype)(limit)))
    eps = float(trees.info(dtype).eps)
    after = [size for size in trees.sizes_of(row, out) if size > 0]
    np.testing.assert_allclose(after, limit, rtol=4 * eps)


MEASURES = (measures.l1, measures.rms, measures.max_abs, measures.lp(3))
GROUPINGS = (
    groupings.whole(),
    groupings.per_label(lambda path: path[0]),
    groupings.per_example(),
    groupings.per_element(),
)


@pytest.mark.parametrize("action", [actions.normalize(), actions.floor()], ids=repr)
@pytest.mark.parametrize(
    ("measure", "grouping"),
    [(m, groupings.per_leaf()) for m in MEASURES]
    + [(measures.l2, g) for g in GROUPINGS],
    ids=repr,
)
def test_every_measure_and_grouping(action, measure, grouping):
    """What rescaling a larger copy gives: sizes of .1 come out as 1."""
    tree = {
        path: jnp.asarray(np.random.default_rng(3).uniform(0.01, 0.1, shape))
        for path, shape in trees.BATCHED.items()
    }
    tree = jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def run(act, times):
        tx = untyped(
            optclip.clip_by(1.0, measure=measure, grouping=grouping, action=act)
        )
        return tx.update(jax.tree.map(lambda x: times * x, tree), None)

    out, state = run(action, 1.0)
    expected, _ = run(actions.rescale(), 1e4)
    for path, x in out.items():
        np.testing.assert_allclose(x, expected[path], rtol=3e-6)
    assert (state.metrics.changed_steps, state.metrics.clipped_steps) == (1, 0)


@pytest.mark.parametrize("action", [actions.normalize(), actions.floor()], ids=repr)
def test_a_share_of_the_parameters(action):
    """Per row of the update: at least, or exactly, c times the norm of the weights."""
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)}
    updates = {"kernel": params["kernel"][::-1] * jnp.array([[1e-6, 0.1, 1.0, 0.0]])}
    tx = optclip.clip_by(
        thresholds.relative_to_params(0.3825),
        grouping=groupings.per_unit(),
        action=action,
    )
    out, _ = tx.update(updates, tx.init(params), params)
    before, after, weights = (
        np.linalg.norm(np.asarray(x["kernel"], np.float64), axis=0)
        for x in (updates, untyped(out), params)
    )
    wanted = 0.3825 * weights
    if action == actions.floor():
        wanted = np.maximum(before, wanted)
    np.testing.assert_allclose(after, np.where(before > 0, wanted, 0), rtol=1e-6)
