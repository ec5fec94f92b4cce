"""Law 3: within a group, output = factor · input with one factor in [0, 1]."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.laws import trees
from tests.laws.trees import combinations


@pytest.mark.parametrize(("row", "dtype"), combinations("clip", "elementwise"))
@trees.at_most(10)
@given(data=st.data())
def test_direction(row, dtype, data):
    """One factor for a group; no element grows, turns or changes its sign."""
    case = data.draw(trees.cases(row, dtype))
    out, _ = trees.run(row, case)
    check_direction(row, dtype, case.tree, out)


@pytest.mark.parametrize(
    ("row", "dtype"),
    combinations("adaptive", "wrapper", dtypes=("float32", "bfloat16")),
)
@trees.at_most(10)
@given(data=st.data())
def test_direction_along_a_stream(row, dtype, data):
    """The same at every step, however the rule came by its limit."""
    stream = data.draw(trees.streams(row, dtype))
    for tree, (out, _) in zip(stream, trees.walk(row, stream), strict=True):
        check_direction(row, dtype, tree, out)


def check_direction(row, dtype, tree, out):
    eps, tiny = float(trees.info(dtype).eps), float(trees.info(dtype).smallest_normal)
    for group in trees.groups_of(row, out):
        before, after = trees.values(tree, group), trees.values(out, group)
        largest = np.argmax(np.abs(before))
        if before[largest] == 0:
            continue
        # The largest element's factor for all; the quotient itself could be subnormal.
        expected = after[largest] * (before / before[largest])
        # Each element was rounded on its own, the reference too.
        slack = 3 * eps * np.abs(after) + 1.5 * tiny
        assert np.all(np.abs(after - expected) <= slack)
        for part in (np.real, np.imag):
            assert np.all(np.abs(part(after)) <= np.abs(part(before)))
            turned = np.sign(part(after)) * np.sign(part(before)) < 0
            assert not np.any(turned)
