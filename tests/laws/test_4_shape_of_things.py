"""Law 4: dtypes, shapes, shardings and trees stay as they are.

What has no magnitude passes untouched: None, MaskedNode, integers, booleans, float0,
random keys, leaves without elements. Sizes are float32 or wider.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip
from optclip import groupings, thresholds
from tests.laws import trees
from tests.laws.table import projections, rows
from tests.laws.trees import Case, combinations
from tests.untyped import untyped

KINDS = ("clip", "enlarging", "elementwise", "matrix", "measuring")
EVERY = rows(*KINDS, "adaptive", "wrapper")


class Pair(NamedTuple):
    first: object
    second: object


def filled(row, dtype="float32"):
    """A tree of numbers between 1 and 2: everything is over a limit of a half."""
    rng = np.random.default_rng(7)
    shapes = trees.BATCHED if row.batched else trees.SHAPES
    return {
        path: rng.uniform(1, 2, shape).astype(dtype) for path, shape in shapes.items()
    }


def without_magnitude():
    """Leaves that no rule may touch."""
    return {
        "none": None,
        "masked": optax.MaskedNode(),
        "integer": jnp.arange(-3, 3, dtype=jnp.int32),
        "byte": jnp.full((2, 2), 200, jnp.uint8),
        "boolean": jnp.array([True, False]),
        "key": jax.random.key(0),
        "empty": jnp.zeros((0, 3), jnp.float32),
        "empty_half": jnp.zeros((2, 0), jnp.bfloat16),
    }


def assert_same(one, other):
    """Equal in structure, dtype, shape and value, random keys included."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(
    ("row", "dtype"),
    combinations(*KINDS)
    + combinations("adaptive", "wrapper", dtypes=("bfloat16", "float64")),
)
def test_dtypes_and_shapes(row, dtype):
    """Updates keep theirs; numbers about them are float32, or float64 for float64."""
    tree = filled(row, dtype)
    limit = trees.wide_dtype(dtype)(0.5)
    out, state = trees.run(row, Case(tree, limit))
    assert jax.tree.structure(out) == jax.tree.structure(tree)
    for path, x in tree.items():
        assert (out[path].dtype, out[path].shape) == (x.dtype, x.shape), path
    if row.has_metrics is True:
        elementwise = row.oracle["grouping"] == "element"
        assert (state.metrics.size is None) == elementwise
        assert (state.metrics.limit is None) == (elementwise or row.kind == "measuring")
        for number in (state.metrics.size, state.metrics.limit):
            assert number is None or number.dtype == trees.wide_dtype(dtype)


# Without jit every operation compiles on its own: a sample has all there is to see.
SAMPLE = [p for p in EVERY if p.id in trees.SAMPLE]
JITTED = [pytest.param(*p.values, True, id=p.id) for p in EVERY]
EAGER = [
    pytest.param(*p.values, False, id=f"{p.id}-eager")
    for p in SAMPLE
    if "per_unit" not in p.id
]


@pytest.mark.parametrize(("row", "jitted"), JITTED + EAGER)
def test_untouched(row, jitted):
    """Leaves without magnitude pass, and the others are as they are without them."""
    limit = np.inf if row.kind == "wrapper" else 0.5  # which drops a step whole
    tx, numbers, rest = row.build(limit), filled(row), without_magnitude()
    if row.integers is not True:
        for name in ("integer", "byte", "boolean"):
            del rest[name]
    if not jitted:  # float0 cannot be an argument of a jitted function
        rest["float0"] = np.zeros((2,), jax.dtypes.float0)
    tree = {**numbers, "rest": rest}
    update = jax.jit(tx.update) if jitted else tx.update
    state = tx.init(tree)
    out, after = update(tree, state, tree)
    assert_same(out["rest"], rest)
    chex.assert_trees_all_equal_structs(state, after)
    alone, _ = trees.run(row, Case(numbers, np.float32(limit)))
    for path, x in alone.items():
        np.testing.assert_allclose(out[path], x, rtol=1e-6)


@pytest.mark.parametrize("row", EVERY)
@pytest.mark.parametrize(
    "tree",
    [
        {},
        [],
        (),
        None,
        {"a": {}, "b": None},
        optax.MaskedNode(),
        {"a": np.zeros((0,), np.float32), "b": np.zeros((3, 0), np.float32)},
        {"a": np.arange(3, dtype=np.int32)},
    ],
    ids=["dict", "list", "tuple", "none", "nested", "masked", "size-zero", "integers"],
)
def test_nothing_to_measure(row, tree):
    """A tree without magnitudes comes out as it went in, and the step counts."""
    tx = row.build(1.0)
    state = tx.init(tree)
    if row.integers is not True and jax.tree.leaves(tree) and "a" in tree:
        if tree["a"].dtype == np.int32:
            with pytest.raises(ValueError, match="must be floating-point"):
                tx.update(tree, state, tree)
            return
    for steps in (1, 2):
        out, after = tx.update(tree, state, tree)
        assert_same(out, tree)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
        state = after
        if row.has_metrics is True:
            assert int(state.metrics.steps) == steps
            assert int(state.metrics.nonfinite_steps) == 0
    assert_same(tx.update(tree, None, tree)[0], tree)


@pytest.mark.parametrize("row", SAMPLE)
def test_containers(row):
    """Every kind of node, in the order that JAX gives it."""
    x = filled(row)["a/kernel"]
    tree = Pair((x, [x, {"w": 2 * x}]), [None, Pair(3 * x, ()), {}])
    tx = row.build(0.5)
    out, _ = jax.jit(tx.update)(tree, None, tree)
    assert jax.tree.structure(out) == jax.tree.structure(tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(out, tree)
    for after, before in zip(jax.tree.leaves(out), jax.tree.leaves(tree), strict=True):
        factor = np.asarray(after / before)
        assert np.all((0 < factor) & (factor <= 1)), "leaves have changed places"


@pytest.mark.parametrize("row", SAMPLE)
def test_one_array(row):
    """A bare array is a tree too, and no state is a fresh state."""
    x = filled(row)["a/kernel"]
    out, _ = trees.run(row, Case(x, np.float32(0.5)))
    alone, _ = trees.run(row, Case({"a/kernel": x}, np.float32(0.5)))
    np.testing.assert_array_equal(out, alone["a/kernel"])


@pytest.mark.parametrize(
    ("row", "jitted"),
    [p for p in JITTED if p.id in (*trees.SAMPLE, "clip_by-per_example")] + EAGER[:1],
)
@pytest.mark.skipif(jax.device_count() < 2, reason="one device has one sharding")
def test_sharding(row, jitted):
    """A leaf comes out on the devices on which it went in."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    # A batch is split in every leaf or in none.
    least = 1 if row.batched else 2
    tree = {
        path: jax.device_put(x, everywhere if x.ndim < least else split)
        for path, x in filled(row).items()
    }
    tx = row.build(0.5)
    out, _ = (jax.jit(tx.update) if jitted else tx.update)(tree, None, tree)
    for path, x in tree.items():
        assert out[path].sharding.is_equivalent_to(x.sharding, x.ndim), path


@pytest.mark.parametrize("row", projections())
def test_projections(row):
    """Half precision stays, and what has no magnitude passes."""
    rest = without_magnitude()
    params = {
        "a": {"kernel": jnp.ones((4, 3), jnp.bfloat16), "bias": jnp.ones(3)},
        "b": {"kernel": jnp.ones((2, 5), jnp.float16), "temperature": jnp.ones(())},
        "rest": rest,
    }
    tx = row.transform(0.5)
    state = tx.init(params)
    out, after = jax.jit(tx.update)(params, state, params)
    assert_same(out["rest"], rest)
    assert jax.tree.structure(out) == jax.tree.structure(params)
    for part in ("a", "b"):
        chex.assert_trees_all_equal_shapes_and_dtypes(out[part], params[part])
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    for tree in ({}, None, {"a": {}, "b": None}, optax.MaskedNode()):
        given = untyped(tree)
        empty = {} if tree is None else given
        assert_same(tx.update(given, tx.init(given), empty)[0], tree)


@pytest.mark.parametrize(
    "tree",
    [{}, {"a": np.arange(3)}, {"a": optax.MaskedNode()}],
    ids=["dict", "integers", "masked"],
)
@pytest.mark.parametrize(
    "tx",
    [
        optclip.clip_by(thresholds.relative_to_params(0.01)),
        optclip.adaptive_grad_clip(0.3, grouping=groupings.per_leaf()),
        optclip.clip_by(thresholds.per_path({"a": 1.0}), grouping=groupings.per_leaf()),
        optclip.autoclip(grouping=groupings.per_leaf()),
    ],
    ids=["whole", "per_leaf", "per_path", "learns"],
)
def test_nothing_to_measure_where_limits_need_groups(tx, tree):
    out, state = tx.update(tree, tx.init(tree), tree)
    assert_same(out, tree)
    assert int(state.metrics.steps) == 1 and int(state.metrics.clipped_steps) == 0
