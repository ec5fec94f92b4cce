"""Law 1: after clipping, every group's size is at most its limit.

To within four units in the last place of the leaf's dtype, while outputs stay normal
numbers; and an output is what NumPy computes in float64, so that no finite input is
lost to an intermediate that overflows or vanishes.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.laws import trees
from tests.laws.table import rows
from tests.laws.trees import Case, combinations
from tests.oracles import fixed


def below_normal(dtype, measure, count):
    """What outputs below the normal numbers may add to a size: half a spacing each."""
    half = float(trees.info(dtype).smallest_subnormal) / 2
    power = {"l1": 1, "l2": 2, "rms": np.inf, "max_abs": np.inf}.get(measure, measure)
    return half * count ** (1 / power)


@pytest.mark.parametrize(("row", "dtype"), combinations("clip", "elementwise"))
@trees.at_most(15)
@given(data=st.data())
def test_bound(row, dtype, data):
    """No group is larger than its limit, and no output is lost on the way."""
    case = data.draw(trees.cases(row, dtype))
    out, _ = trees.run(row, case)
    limit, measure = float(case.limit), row.oracle.get("measure", "l2")
    eps, tiny = float(trees.info(dtype).eps), float(trees.info(dtype).smallest_normal)
    for group, size in zip(
        trees.groups_of(row, out), trees.sizes_of(row, out), strict=True
    ):
        count = trees.values(out, group).size
        slack = below_normal(dtype, measure, count)
        assert size <= limit * (1 + 4 * eps) + slack

    if 0 < limit < row.least_limit:
        return
    expected, _ = fixed.clip(case.tree, limit, **row.oracle)
    for path, value in out.items():
        # The size costs up to four units and the rounding a half; below the normal
        # numbers, anything down to a flush to zero, of both parts of a complex number.
        off = np.abs(trees.wide(value) - expected[path])
        assert np.all(off <= 5 * eps * np.abs(expected[path]) + 1.5 * tiny), path


@pytest.mark.parametrize(
    ("row", "dtype"), combinations("adaptive", dtypes=("float32", "bfloat16"))
)
@trees.at_most(15)
@given(data=st.data())
def test_bound_that_the_rule_sets(row, dtype, data):
    """The group furthest over its limit, which is the one that the metrics show."""
    if row.oracle["grouping"] == "element":
        pytest.skip("elements report counters only; the oracle has each one's limit")
    stream = data.draw(trees.streams(row, dtype))
    eps = float(trees.info(dtype).eps)
    for tree, (out, state) in zip(stream, trees.walk(row, stream), strict=True):
        before, after = trees.sizes_of(row, tree), trees.sizes_of(row, out)
        limit, shown = float(state.metrics.limit), float(state.metrics.size)
        slack = below_normal(dtype, "l2", 26)
        for size, clipped in zip(before, after, strict=True):
            assert clipped <= size * (1 + 4 * eps) + slack
        furthest = int(np.argmin(np.abs(np.subtract(before, shown))))
        assert after[furthest] <= limit * (1 + 4 * eps) + slack


@pytest.mark.parametrize("row", rows("clip"))
@pytest.mark.parametrize(
    ("dtype", "magnitude"), [("float32", 1.0), ("bfloat16", 1e25), ("float32", 1e-25)]
)
def test_bound_of_large_leaves(row, dtype, magnitude):
    """A float32 sum of 2^17 squares is as exact as a small one, in either pass."""
    if row.oracle["grouping"] == "element":
        pytest.skip("a group is one element, however large the leaf")
    rng = np.random.default_rng(0)
    big = (rng.uniform(0.5, 1.0, (2048, 64)) * magnitude).astype(dtype)
    tree = {"a/kernel": big, "b/kernel": big[:, :2]}
    limit = np.float32(magnitude / 64)
    out, _ = trees.run(row, Case(tree, limit))
    eps = float(trees.info(dtype).eps)
    for size in trees.sizes_of(row, out):
        assert size <= float(limit) * (1 + 4 * eps)
        if row.identity is True:  # others may be far below their limit
            assert size >= 0.99 * float(limit)


@pytest.mark.parametrize("row", rows("clip"))
def test_bound_of_mixed_dtypes(row):
    """Leaves of several dtypes in one group: the coarsest says how exact it can be."""
    rng = np.random.default_rng(1)
    dtypes = ("float32", "bfloat16", "float16", "float32")
    shapes = trees.BATCHED if row.batched else trees.SHAPES
    tree = {
        path: rng.normal(size=shape).astype(dtype)
        for (path, shape), dtype in zip(shapes.items(), dtypes, strict=False)
    }
    limit = np.float32(0.125)
    out, state = trees.run(row, Case(tree, limit))
    assert {p: x.dtype for p, x in out.items()} == {p: x.dtype for p, x in tree.items()}
    size = state.metrics.size
    assert size is None or size.dtype == np.float32
    eps = float(trees.info("bfloat16").eps)
    assert max(trees.sizes_of(row, out)) <= float(limit) * (1 + 4 * eps)
