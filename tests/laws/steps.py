"""The stream on which law 5 compares, and what each row and set makes of it.

One small tree serves every row: two dtypes, two labels and a common leading axis of 4,
so that `per_example` and a mesh of two devices fit it too.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.laws.table import ROWS, projections, rows
from tests.untyped import untyped

EVERY = pytest.mark.parametrize(
    "row",
    rows(
        *("clip", "enlarging", "adaptive", "elementwise", "matrix", "measuring"),
        "wrapper",
        variants=False,
    ),
)
SETS = pytest.mark.parametrize("row", projections())
BY_NAME = {row.name: row for row in ROWS}
SCALES = (0.05, 1.0, 30.0, 1e4)  # from within every limit of 1 to far above it


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)

    def leaf(dtype, *shape):
        return jnp.asarray(scale * rng.standard_normal(shape), dtype)

    return {
        "alpha": {"kernel": leaf(jnp.float32, 4, 3)},
        "beta": {"kernel": leaf(jnp.bfloat16, 4, 2)},
    }


PARAMS = tree(100)
STREAM = [tree(seed, scale) for seed, scale in enumerate(SCALES)]
ALPHA = {"alpha": STREAM[2]["alpha"]}
STACKED = jax.tree.map(lambda *leaves: jnp.stack(leaves), *STREAM)


def step(tree_of_steps, index):
    return jax.tree.map(lambda leaf: leaf[index], tree_of_steps)


@functools.cache
def clipped(name):
    """(limit, updates) to the updates of a fresh transform with that limit."""
    build = BY_NAME[name].build
    return jax.jit(lambda limit, updates: build(limit).update(updates, None, PARAMS)[0])


@functools.cache
def updating(name):
    """The transform with a limit of 1, and its update, jitted."""
    tx = BY_NAME[name].build(1.0)
    return tx, jax.jit(tx.update)


def walk(name, stream, params):
    """The updates and the state after each step."""
    (tx, update), seen = updating(name), []
    state = tx.init(params)
    for updates in stream:
        out, state = update(updates, state, params)
        seen.append((out, state))
    return seen


@functools.cache
def run(name):
    """The same for the stream of this file."""
    return walk(name, STREAM, PARAMS)


def forget():
    """Compiles anew: files differ in how XLA optimizes."""
    for cached in (clipped, updating, run, projected):
        cached.cache_clear()


def assert_within_ulps(got, want, ulps=2, of_largest=False):
    """Same tree, shapes and dtypes; floats within some units in the last place.

    `of_largest`: in that of a leaf's largest number.
    """
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)

    def check(path, a, b):
        dtype = a.dtype
        a, b = np.asarray(a), np.asarray(b)
        if not jnp.issubdtype(dtype, jnp.floating):
            np.testing.assert_array_equal(a, b, jax.tree_util.keystr(path))
            return
        a, b = a.astype(np.float64), b.astype(np.float64)
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        size = np.full_like(a, abs(b).max(initial=0)) if of_largest else abs(a)
        a, b, size = a[~same], b[~same], size[~same]
        ulp = float(jnp.finfo(dtype).eps) * 2.0 ** np.floor(np.log2(size))
        far = ~(abs(a - b) <= ulps * ulp)
        assert not far.any(), f"{jax.tree_util.keystr(path)}: {a[far]} != {b[far]}"

    jax.tree_util.tree_map_with_path(check, got, want)


@functools.cache
def projected(name):
    """The set, its transform, and what it gives after the third step of the stream."""
    (row,) = (p.values[0] for p in projections(name=name))
    tx = untyped(row.transform(0.75))
    return tx, jax.jit(tx.update)(STREAM[2], tx.init(PARAMS), PARAMS)[0]
