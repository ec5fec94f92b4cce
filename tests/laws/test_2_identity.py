"""Law 2: a group within its limit comes out bit for bit as it went in.

And the ends of the scale: an infinite limit changes nothing, a limit of 0 gives zeros,
a group of size 0 stays zero under every limit.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.laws import trees
from tests.laws.trees import Case, combinations


def with_subnormals(tree):
    """The zeros that are negative become the smallest subnormal numbers instead."""
    out = {}
    for path, x in tree.items():
        negative_zero = (x.real == 0) & np.signbit(x.real)
        smallest = trees.info(x.dtype).smallest_subnormal
        out[path] = np.where(negative_zero, smallest, x).astype(x.dtype)
    return out


@pytest.mark.parametrize(("row", "dtype"), combinations("clip", "elementwise"))
@trees.at_most(15)
@given(data=st.data())
def test_within_limit(row, dtype, data):
    """Negative zeros and subnormal numbers included."""
    if row.identity is not True:
        pytest.skip(row.identity)
    tree, limit = data.draw(trees.cases(row, dtype))
    if data.draw(st.booleans(), label="subnormal"):
        tree = with_subnormals(tree)
    out, _ = trees.run(row, Case(tree, limit))
    # A size is known to a few units of its own dtype.
    known = 1 + 8 * float(np.finfo(limit.dtype).eps)
    for group, size in zip(
        trees.groups_of(row, tree), trees.sizes_of(row, tree), strict=True
    ):
        if size * known <= float(limit):
            assert trees.bits(out, group) == trees.bits(tree, group)


@pytest.mark.parametrize(("row", "dtype"), combinations("clip", "elementwise"))
@trees.at_most(15)
@given(data=st.data())
def test_infinity_and_zero(row, dtype, data):
    """Whatever the action: nothing changes, everything becomes zero."""
    tree, limit = data.draw(trees.trees(row, dtype)), trees.wide_dtype(dtype)
    unchanged, _ = trees.run(row, Case(tree, limit(np.inf)))
    zeros, _ = trees.run(row, Case(tree, limit(0.0)))
    for path, x in tree.items():
        assert unchanged[path].tobytes() == x.tobytes(), path
        # A norm of 0 gives leaves that are not in it no factor.
        if row.oracle["grouping"] != "kernels" or trees.sizes_of(row, tree)[0] > 0:
            assert np.all(zeros[path] == 0), path


@pytest.mark.parametrize(
    ("row", "dtype"),
    combinations("adaptive", "wrapper", dtypes=("float32", "bfloat16")),
)
@trees.at_most(15)
@given(data=st.data())
def test_steps_that_are_not_clipped(row, dtype, data):
    """As the counter says, whatever the limit was."""
    stream = data.draw(trees.streams(row, dtype))
    clipped = 0
    for tree, (out, state) in zip(stream, trees.walk(row, stream), strict=True):
        before = clipped
        counters = state.metrics
        clipped = int(
            counters.clipped_steps
            if row.has_metrics is True
            else counters.skipped_steps
        )
        for path, x in tree.items():
            if clipped == before:
                assert out[path].tobytes() == x.tobytes(), path
            assert np.all(np.isfinite(trees.wide(out[path])))


UNCLIPPED = combinations("clip", "elementwise")
UNCLIPPED += combinations("adaptive", "wrapper", dtypes=("float32", "complex64"))


@pytest.mark.parametrize(("row", "dtype"), UNCLIPPED)
@pytest.mark.parametrize("limit", [0.0, 1e-30, np.inf])
def test_size_zero(row, dtype, limit):
    """Zeros stay zeros, never NaN, and negative ones negative."""
    shapes = trees.BATCHED if row.batched else trees.SHAPES
    tree = {
        path: np.copysign(0.0, np.arange(np.prod(shape)).reshape(shape) % 2 - 0.5)
        for path, shape in shapes.items()
    }
    tree = {path: np.asarray(x).astype(dtype) for path, x in tree.items()}
    out, state = trees.run(row, Case(tree, trees.wide_dtype(dtype)(limit)))
    for path, x in tree.items():
        assert np.all(out[path] == 0), path
        # Zero is within a limit of zero too; for a clamp its bounds -0 and 0 are equal.
        if row.kind != "elementwise":
            assert out[path].tobytes() == x.tobytes(), path
    if row.has_metrics is True:
        assert state.metrics.clipped_steps == state.metrics.nonfinite_steps == 0


@pytest.mark.parametrize(("row", "dtype"), combinations("measuring"))
@given(data=st.data())
def test_measuring_changes_nothing(row, dtype, data):
    """Not at any magnitude, and the size it reports is the oracle's."""
    tree, limit = data.draw(trees.cases(row, dtype))
    out, state = trees.run(row, Case(tree, limit))
    for path, x in tree.items():
        assert out[path].tobytes() == x.tobytes(), path
    largest = max(trees.sizes_of(row, tree))
    eps = float(np.finfo(limit.dtype).eps)
    np.testing.assert_allclose(state.metrics.size, largest, rtol=8 * eps)
    assert state.metrics.limit is None
    assert state.metrics.clipped_fraction == 0
