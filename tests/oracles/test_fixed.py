"""Rules with a fixed or scheduled limit equal their oracle, and Optax's namesakes.

Each row of the table runs over a stream of 300 steps, its state carried from step to
step; the oracle is flat NumPy in float64.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import optclip
from tests.laws import trees
from tests.laws.table import rows
from tests.oracles import fixed
from tests.untyped import untyped

STEPS = 300
BAD = (41, 42, 200)  # steps with a NaN, an infinity, a NaN
LIMIT = 1.5


# Falls from 3 to a little below zero, as polynomial schedules do. A table, because a
# formula rounds differently inside a compiled loop.
LIMITS = np.linspace(3.0, -1e-9, STEPS).astype(np.float32)


def schedule(step):
    """The limit at a step."""
    return jnp.asarray(LIMITS)[step]


def stream(row):
    """300 trees, stacked: heavy-tailed sizes, some zeros, a few spoilt."""
    rng = np.random.default_rng(11)
    out = {}
    for path, shape in (trees.BATCHED if row.batched else trees.SHAPES).items():
        x = rng.normal(size=(STEPS, *shape))
        scale = np.exp(rng.normal(size=(STEPS,) + (1,) * len(shape)))
        out[path] = (x * scale * (rng.uniform(size=x.shape) > 0.1)).astype(np.float32)
    first = min(out)
    for step, bad in zip(BAD, (np.nan, np.inf, np.nan), strict=True):
        out[first][step].reshape(-1)[0] = bad
    return out


EVERY = rows("clip", "enlarging", "elementwise", "measuring")
STREAMS = [pytest.param(*p.values, schedule, id=p.id) for p in EVERY]
STREAMS += [
    pytest.param(*p.values, LIMIT, id=f"{p.id}-constant")
    for p in EVERY
    if p.id in trees.SAMPLE
]


@pytest.mark.parametrize(("row", "limit"), STREAMS)
def test_stream(row, limit):
    """Updates, sizes and counters, step by step."""
    tx, updates = row.build(limit), stream(row)
    start = tx.init({path: x[0] for path, x in updates.items()})

    @jax.jit
    def run(updates):
        def step(state, tree):
            out, state = tx.update(tree, state)
            return state, (out, state)

        return jax.lax.scan(step, start, updates)[1]

    out, states = jax.device_get(run(updates))
    limits = LIMITS if callable(limit) else np.full(STEPS, limit)
    limits = np.maximum(limits, 0).astype(float)
    clipped_steps = nonfinite_steps = changed_steps = 0
    for t, bound in enumerate(limits):
        tree = {path: x[t] for path, x in updates.items()}
        expected, sizes = fixed.clip(tree, bound, **row.oracle)
        if row.kind == "measuring":
            expected = tree
        if row.kind == "elementwise":  # flat: infinity goes to the bound
            expected = {path: np.clip(x, -bound, bound) for path, x in tree.items()}
        # An interval is taken as it is where the schedule ends at (1e-9, -1e-9).
        slack = 2e-9 if row.kind == "elementwise" else 1e-30
        for path in tree:
            np.testing.assert_allclose(
                out[path][t], expected[path], rtol=2e-6, atol=slack, err_msg=f"{t}"
            )
        if row.has_metrics is not True:
            continue
        sizes, now = np.array(sizes), jax.tree.map(lambda x, t=t: x[t], states.metrics)
        finite = np.isfinite(sizes)
        over = finite & (sizes > (np.inf if row.kind == "measuring" else bound))
        if row.kind == "enlarging":
            targets = [fixed.target(x, bound, row.oracle["action"]) for x in sizes]
            targets = np.where(sizes == 0, 0, targets)
            over, changed = finite & (targets < sizes), finite & (targets != sizes)
            changed_steps += changed.any()
            assert now.changed_steps == changed_steps
            np.testing.assert_allclose(now.changed_fraction, changed.mean(), rtol=1e-6)
        elementwise = row.oracle["grouping"] == "element"
        clipped_steps += over.any()
        nonfinite_steps += not finite.all()
        assert now.steps == t + 1
        assert now.nonfinite_steps == nonfinite_steps
        assert now.clipped_steps == clipped_steps
        if not elementwise:
            np.testing.assert_allclose(now.clipped_fraction, over.mean(), rtol=1e-6)
        if finite.all() and not elementwise:
            np.testing.assert_allclose(now.size, sizes.max(), rtol=2e-6)


def optax_clips(limit):
    """Transformations of one name in both libraries."""
    return [
        (optclip.clip(limit), optax.clip(limit)),
        (optclip.clip_by_value(limit), optax.clip(limit)),
        (optclip.clip_by_global_norm(limit), optax.clip_by_global_norm(limit)),
        (optclip.clip_by_block_rms(limit), optax.clip_by_block_rms(limit)),
    ]


SEEDS = st.integers(0, 2**32 - 1)
# Where Optax's float32 squares neither overflow nor vanish.
POWERS = st.integers(-12, 12)


def drawn(shapes, seed, power):
    rng = np.random.default_rng(seed)
    return {
        path: (rng.normal(size=shape) * 10.0**power).astype(np.float32)
        for path, shape in shapes.items()
    }


@given(SEEDS, POWERS, st.floats(-2.0, 2.0))
def test_optax_transformations(seed, power, relative):
    """Equal for finite input in ordinary range."""
    tree = drawn(trees.SHAPES, seed, power)
    limit = np.float32(10.0 ** (power + relative))
    ours, theirs = _both(tree, limit)
    for mine, yours in zip(ours, theirs, strict=True):
        for path in tree:
            np.testing.assert_allclose(mine[path], yours[path], rtol=1e-6, atol=0)


@jax.jit
def _both(tree, limit):
    pairs = optax_clips(limit)
    ours = [untyped(mine).update(tree, None)[0] for mine, _ in pairs]
    theirs = [other.update(tree, optax.EmptyState())[0] for _, other in pairs]
    return ours, theirs


@given(SEEDS, POWERS, st.floats(-2.0, 2.0), st.booleans())
def test_optax_per_example(seed, power, relative, uniform):
    """The sums of clipped examples, and how many were clipped."""
    tree = drawn(trees.BATCHED, seed, power)
    limit = np.float32(10.0 ** (power + relative))
    for (mine, clipped), (yours, theirs) in _per_example(uniform)(tree, limit):
        jax.tree.map(np.testing.assert_array_equal, clipped, theirs)
        for path, x in tree.items():
            # A sum of four can cancel: its error counts against the summands.
            largest = np.abs(x).max() + 0.0
            slack = 1e-6 * min(largest, float(limit))
            np.testing.assert_allclose(mine[path], yours[path], rtol=1e-6, atol=slack)


_COMPILED = {}


def _per_example(uniform):
    @jax.jit
    def both(tree, limit):
        return [
            (
                optclip.per_example_global_norm_clip(tree, limit),
                optax.per_example_global_norm_clip(tree, limit),
            ),
            (
                optclip.per_example_layer_norm_clip(tree, limit, uniform),
                optax.per_example_layer_norm_clip(tree, limit, uniform),
            ),
        ]

    return _COMPILED.setdefault(uniform, both)


@pytest.mark.parametrize("uniform", [True, False])
def test_per_example_against_oracle(uniform):
    """Optax's functions lose an example that is not finite; here it adds zero."""
    tree = drawn(trees.BATCHED, 0, 0)
    tree["a/bias"][2, 0] = np.inf
    limit = 0.8
    total, clipped = untyped(optclip.per_example_global_norm_clip(tree, limit))
    expected, sizes = untyped(
        fixed.clip(tree, limit, grouping="example", nonfinite="zero")
    )
    for path in tree:  # a sum of four can cancel
        np.testing.assert_allclose(
            total[path], expected[path].sum(axis=0), rtol=2e-6, atol=1e-6 * limit
        )
    assert int(clipped) == sum(not size <= limit for size in sizes)

    total, clipped = untyped(optclip.per_example_layer_norm_clip(tree, limit, uniform))
    dims = {path: x[0].size for path, x in tree.items()}
    for path, x in tree.items():
        share = 1 / 3 if uniform else dims[path] / sum(dims.values())
        own = limit * share**0.5
        alone, sizes = untyped(
            fixed.clip({path: x}, own, grouping="example", nonfinite="zero")
        )
        np.testing.assert_allclose(
            total[path], alone[path].sum(axis=0), rtol=2e-6, atol=1e-6 * limit
        )
        assert int(clipped[path]) == sum(not size <= own for size in sizes)


def test_the_oracle_by_hand():
    """The oracle itself, on numbers that need no computer."""
    tree = {"a": np.array([3.0, 0.0]), "b": np.array([4.0])}
    out, sizes = fixed.clip(tree, 1.0)
    assert sizes == [5.0]
    np.testing.assert_allclose(out["a"], [0.6, 0.0])
    np.testing.assert_allclose(out["b"], [0.8])
    out, sizes = fixed.clip(tree, 3.5, grouping="leaf", measure="l1")
    assert sizes == [3.0, 4.0]
    np.testing.assert_allclose(out["b"], [3.5])
    assert fixed.size(np.array([1.0, 7.0]), "rms") == pytest.approx(5.0)
    assert fixed.size(np.array([1.0, 2.0]), 3) == pytest.approx(9 ** (1 / 3))
    assert fixed.target(2.0, 2.0, "smooth") == 1.0
    np.testing.assert_allclose(fixed.target(2.0, 1.0, "torch"), 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"steps": np.ones((0, 3), np.int32)},
        {"w": np.ones((0, 2), np.float32)},
        {"w": np.ones((2, 0), np.float32)},
    ],
    ids=["empty", "no examples of integers", "no examples", "no elements"],
)
def test_a_tree_without_a_norm_is_only_summed(tree):
    for function in (
        optclip.per_example_global_norm_clip,
        optclip.per_example_layer_norm_clip,
    ):
        total, clipped = function(tree, 1.0)
        chex.assert_trees_all_equal(total, {k: x.sum(0) for k, x in tree.items()})
        assert not any(map(np.any, jax.tree.leaves(clipped)))
