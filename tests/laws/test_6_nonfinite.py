"""Law 6: what is not finite shows in its group and touches no other.

`nonfinite="propagate"` makes all of the group NaN, `"zero"` all of it zero; neither
lets the threshold observe it, and both count it. Flat clamps have no groups.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import optclip
from optclip import groupings, measures, thresholds
from tests.laws import trees
from tests.laws.table import rows
from tests.laws.trees import Case, combinations

BAD = st.sampled_from((np.nan, np.inf, -np.inf))


@st.composite
def spoilt(draw, tree, row=None):
    """The tree with one to three elements of one leaf not finite, which is measured."""
    out = {path: np.array(x) for path, x in tree.items()}
    groups = [] if row is None else trees.groups_of(row, tree)
    among = {path for group in groups for path, _ in group} or out
    x = out[draw(st.sampled_from(sorted(among)), label="leaf")]
    at = st.integers(0, x.size - 1)
    for index in draw(st.lists(at, min_size=1, max_size=3), label="positions"):
        bad = draw(BAD)
        if np.iscomplexobj(x) and draw(st.booleans(), label="imaginary"):
            bad = complex(1.0, bad)
        x.reshape(-1)[index] = bad
    return out


def check_groups(row, case, bad, **options):
    """Spoilt groups as `nonfinite` says, others as they are without them."""
    clean_out, _ = trees.run(row, case, **options)
    out, state = trees.run(row, Case(bad, case.limit), **options)
    for group in trees.groups_of(row, bad):
        if np.all(np.isfinite(trees.values(bad, group))):
            assert trees.bits(out, group) == trees.bits(clean_out, group)
        elif options.get("nonfinite") == "zero":
            assert np.all(trees.values(out, group) == 0)
        else:
            assert np.all(np.isnan(trees.values(out, group)))
    assert state.metrics.nonfinite_steps == 1
    assert state.metrics.steps == 1


@pytest.mark.parametrize(("row", "dtype"), combinations("clip", "enlarging", "matrix"))
@trees.at_most(15)
@given(data=st.data())
def test_propagate(row, dtype, data):
    """The group is NaN throughout, its zeros too."""
    case = data.draw(trees.cases(row, dtype))
    check_groups(row, case, data.draw(spoilt(case.tree, row)))


@pytest.mark.parametrize(
    ("row", "dtype"), combinations("clip", "enlarging", "matrix", dtypes=("float32",))
)
@given(data=st.data())
def test_zero(row, dtype, data):
    """The group is zero throughout."""
    case = data.draw(trees.cases(row, dtype))
    check_groups(row, case, data.draw(spoilt(case.tree, row)), nonfinite="zero")


@pytest.mark.parametrize("row", rows("adaptive"))
@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
@trees.at_most(10)
@given(data=st.data())
def test_rules_that_learn(row, nonfinite, data):
    """The bad group as it says, others as without it; the rule goes on as if unseen."""
    tree = data.draw(trees.trees(row, "float32"))
    bad = data.draw(spoilt(tree, row))
    options = {} if nonfinite == "propagate" else {"nonfinite": nonfinite}
    (_, before), (out, after), (again, _) = trees.walk(
        row, [tree, bad, tree], **options
    )
    assert after.metrics.nonfinite_steps - before.metrics.nonfinite_steps == 1
    for group in trees.groups_of(row, bad):
        if not np.all(np.isfinite(trees.values(bad, group))):
            values = trees.values(out, group)
            assert np.all(values == 0 if nonfinite == "zero" else np.isnan(values))
        else:
            assert np.all(np.isfinite(trees.values(out, group)))
    for path, x in again.items():
        assert np.all(np.isfinite(x)), path
    if row.oracle["grouping"] == "whole":
        chex.assert_trees_all_equal(after.threshold, before.threshold)


@pytest.mark.parametrize("row", rows("wrapper"))
@given(data=st.data())
def test_wrapper(row, data):
    """All of the step is zero, whichever group it was, and the counter rises."""
    tree = data.draw(trees.trees(row, "float32"))
    _, (out, state) = trees.walk(row, [tree, data.draw(spoilt(tree, row))])
    assert all(np.all(x == 0) for x in out.values())
    assert state.metrics.consecutive_skips >= 1


@pytest.mark.parametrize("measure", ["l2", "l1", "lp3", "lp1.5", "max_abs"])
@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
def test_neighbours_of_large_leaves(measure, nonfinite):
    """Measuring again for one group gives the others what they had, to the last bit."""
    powers = {"lp3": measures.lp(3), "lp1.5": measures.lp(1.5)}
    chosen = powers.get(measure) or getattr(measures, measure)
    tx = optclip.clip_by_norm(1.0, measure=chosen, nonfinite=nonfinite)
    rng = np.random.default_rng(3)
    tree = {f"{i}": rng.normal(size=(37, 11 * i)).astype(np.float32) for i in (1, 5, 9)}
    update = jax.jit(tx.update)
    expected, _ = update(tree, None)
    bad = {**tree, "5": np.where(np.arange(55) == 7, np.inf, tree["5"])}
    bad = {path: x.astype(np.float32) for path, x in bad.items()}
    out, _ = update(bad, None)
    for path in ("1", "9"):
        np.testing.assert_array_equal(out[path], expected[path])


@pytest.mark.parametrize(("row", "dtype"), combinations("elementwise"))
@given(data=st.data())
def test_clamped(row, dtype, data):
    """Flat: infinity goes to the bound, NaN stays, every other element is as it was."""
    case = data.draw(trees.cases(row, dtype))
    bad = data.draw(spoilt(case.tree, row))
    clean_out, _ = trees.run(row, case)
    out, _ = trees.run(row, Case(bad, case.limit))
    with np.errstate(over="ignore"):  # 1e37 is infinite in float16
        bound = float(np.asarray(case.limit).astype(trees.info(dtype).dtype))
    for path, x in bad.items():
        finite, nan = np.isfinite(x), np.isnan(x)
        np.testing.assert_array_equal(out[path][finite], clean_out[path][finite])
        assert np.all(np.isnan(out[path][nan]))
        infinite = np.isinf(x) & ~nan
        after = trees.wide(out[path])[infinite]
        eps = float(trees.info(dtype).eps)
        np.testing.assert_allclose(np.abs(after), bound, rtol=4 * eps)
        if bound > 0:
            sign = np.sign(np.where(np.isinf(x.real), x.real, x.imag))[infinite]
            towards = np.where(
                np.isinf(x.real)[infinite], np.real(after), np.imag(after)
            )
            assert np.all(np.sign(towards) == trees.wide(sign))


@pytest.mark.parametrize(("row", "dtype"), combinations("measuring"))
@given(data=st.data())
def test_measuring(row, dtype, data):
    """Not even a NaN is changed; the counter rises."""
    case = data.draw(trees.cases(row, dtype))
    bad = data.draw(spoilt(case.tree, row))
    out, state = trees.run(row, Case(bad, case.limit))
    for path, x in bad.items():
        assert out[path].tobytes() == x.tobytes(), path
    assert state.metrics.nonfinite_steps == 1


@pytest.mark.parametrize("row", rows("clip", "enlarging"))
@pytest.mark.parametrize(
    ("dtype", "nonfinite"),
    [("float32", "propagate"), ("bfloat16", "propagate"), ("float32", "zero")],
)
def test_size_out_of_range(row, dtype, nonfinite):
    """A finite group whose size float32 cannot hold counts as not finite."""
    huge = trees.info(dtype).max
    shapes = trees.BATCHED if row.batched else trees.SHAPES
    tree = {path: np.full(shape, huge, dtype) for path, shape in shapes.items()}
    options = {} if nonfinite == "propagate" else {"nonfinite": nonfinite}
    out, state = trees.run(row, Case(tree, np.float32(1.0)), **options)
    representable = float(np.finfo(np.float32).max)
    sizes = trees.sizes_of(row, tree)
    for group, size in zip(trees.groups_of(row, out), sizes, strict=True):
        after = trees.values(out, group)
        if size <= representable:
            assert np.all(np.abs(after) > 0)
        elif nonfinite == "zero":
            assert np.all(after == 0)
        else:
            assert np.all(np.isnan(after))
    assert state.metrics.nonfinite_steps == int(max(sizes) > representable)


@pytest.mark.parametrize(
    ("row", "dtype"),
    combinations(
        "clip", "enlarging", "elementwise", dtypes=("float32", "float16", "complex64")
    ),
)
@trees.at_most(15)
@given(data=st.data())
def test_limit_nan(row, dtype, data):
    """A limit that is not a number gives NaN for every group that has a size."""
    tree = data.draw(trees.trees(row, dtype, zeros=False))
    limit = trees.wide_dtype(dtype)(np.nan)
    out, _ = trees.run(row, Case(tree, limit))
    for group, size in zip(
        trees.groups_of(row, tree), trees.sizes_of(row, tree), strict=True
    ):
        if size > 0:
            assert np.all(np.isnan(trees.values(out, group)))


GROUPINGS = {
    "whole": groupings.whole(),
    "per_leaf": groupings.per_leaf(),
    "per_label": groupings.per_label(lambda path: path[0]),
    "per_unit": groupings.per_unit(),
    "per_element": groupings.per_element(),
}


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize(
    ("nonfinite", "bad"), [("propagate", np.nan), ("zero", np.inf)]
)
def test_never_observed(grouping, nonfinite, bad):
    """A threshold's state is as if the spoilt group had not been there."""
    summing = thresholds.Threshold(
        limit=lambda state, seen: 1e3,
        init=lambda seen: seen.size,
        observe=lambda state, seen, limit: state + seen.size,
    )
    tx = optclip.clip_by(summing, grouping=GROUPINGS[grouping], nonfinite=nonfinite)
    tree = {p: jnp.ones(shape, jnp.float32) for p, shape in trees.SHAPES.items()}
    state = tx.init(tree)
    update = jax.jit(tx.update)
    _, once = update(tree, state)
    spoilt_tree = {**tree, "a/kernel": tree["a/kernel"].at[1, 1].set(bad)}
    _, twice = update(spoilt_tree, once)
    _, thrice = update(tree, twice)
    assert (int(thrice.metrics.nonfinite_steps), int(thrice.metrics.steps)) == (1, 3)

    # The state of every group twice: as it was, or doubled by the second observation.
    marked = {p: jnp.zeros(shape, jnp.float32) for p, shape in trees.SHAPES.items()}
    marked["a/kernel"] = marked["a/kernel"].at[1, 1].set(1.0)
    _, marks = update(marked, state)
    for first, second, third, mark in zip(
        *(jax.tree.leaves(s.threshold) for s in (once, twice, thrice, marks)),
        strict=True,
    ):
        np.testing.assert_array_equal(second, np.where(mark > 0, first, 2 * first))
        np.testing.assert_array_equal(third, second + first)
