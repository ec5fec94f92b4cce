"""Law 1: after clipping, every group's size is at most its limit.

To within four units in the last place of the leaf's dtype, while outputs stay normal
numbers; and an output is what NumPy computes in float64, so that no finite input is
lost to an intermediate that overflows or vanishes.
"""

import jax
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
@given(data=st.data())
def test_bound(row, dtype, data):
    """No group is larger than its limit."""
    case = data.draw(trees.cases(row, dtype))
    out, _ = trees.run(row, case)
    measure = row.oracle.get("measure", "l2")
    eps = float(trees.info(dtype).eps)
    for group, size in zip(
        trees.groups_of(row, out), trees.sizes_of(row, out), strict=True
    ):
        count = trees.values(out, group).size
        slack = below_normal(dtype, measure, count)
        assert size <= float(case.limit) * (1 + 4 * eps) + slack


@pytest.mark.parametrize(("row", "dtype"), combinations("clip", "elementwise"))
@given(data=st.data())
def test_nothing_is_lost(row, dtype, data):
    """Every output is the oracle's: finite, and zero only where that is due."""
    case = data.draw(trees.cases(row, dtype))
    out, _ = trees.run(row, case)
    expected, _ = fixed.clip(case.tree, float(case.limit), **row.oracle)
    eps, tiny = float(trees.info(dtype).eps), float(trees.info(dtype).smallest_normal)
    for path, value in out.items():
        assert value.dtype == case.tree[path].dtype
        # The size costs up to four units and the rounding a half; below the normal
        # numbers, anything down to a flush to zero. A complex number by its modulus.
        off = np.abs(trees.wide(value) - expected[path])
        assert np.all(off <= 5 * eps * np.abs(expected[path]) + tiny), path


@pytest.mark.parametrize("row", rows("clip", "elementwise"))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("magnitude", [1e-25, 1.0, 1e25])
def test_bound_of_large_leaves(row, dtype, magnitude):
    """A float32 sum of 2^18 squares is as exact as a small one."""
    rng = np.random.default_rng(0)
    big = (rng.uniform(0.5, 1.0, (2048, 128)) * magnitude).astype(dtype)
    tree = {"a/kernel": big, "b/kernel": big[:, :2]}
    limit = np.float32(magnitude / 64)
    out, _ = trees.run(row, Case(tree, limit))
    eps = float(trees.info(dtype).eps)
    if row.oracle["grouping"] == "element":  # one vectorised comparison, not 2^18
        largest = max(np.abs(trees.wide(value)).max() for value in out.values())
        assert largest <= float(limit) * (1 + 4 * eps)
        return
    for size in trees.sizes_of(row, out):
        assert 0.9 * float(limit) <= size <= float(limit) * (1 + 4 * eps)


@pytest.mark.parametrize("row", rows("clip"))
@pytest.mark.parametrize("narrow", ["bfloat16", "float16"])
def test_bound_of_mixed_dtypes(row, narrow):
    """Leaves of several dtypes in one group: the coarsest says how exact it can be."""
    rng = np.random.default_rng(1)
    shapes = trees.BATCHED if row.batched else trees.SHAPES
    tree = {
        path: rng.normal(size=shape).astype(narrow if index % 2 else np.float32)
        for index, (path, shape) in enumerate(shapes.items())
    }
    limit = np.float32(0.125)
    out, state = trees.run(row, Case(tree, limit))
    assert jax.tree.map(np.result_type, out) == jax.tree.map(np.result_type, tree)
    assert state.metrics.size.dtype == np.float32
    eps = float(trees.info(narrow).eps)
    assert max(trees.sizes_of(row, out)) <= float(limit) * (1 + 4 * eps)
