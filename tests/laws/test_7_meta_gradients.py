"""Law 7: differentiating through a transform is finite for every finite input.

Hyperparameter search and learned optimizers differentiate through the clip, by the
updates and by the limit, in both modes, at zero gradients and at extreme magnitudes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import optclip
from tests.laws import trees
from tests.laws.table import ROWS, projections, rows
from tests.laws.trees import combinations
from tests.untyped import untyped

# A derivative is finite, or right to many digits, by its formula.


def weighted(row, tree, limit):
    """A number that depends on every output, by weights in [-1, 1]."""
    out, _ = row.build(limit).update(tree, None, tree)
    wide = limit.dtype
    total = jnp.zeros((), wide)
    for number, x in enumerate(out.values()):
        weights = jnp.sin(1.0 + number + jnp.arange(x.size, dtype=wide))
        for part in (x.real, x.imag) if jnp.iscomplexobj(x) else (x,):
            total += jnp.sum(part.astype(wide).ravel() * weights)
    return total


@functools.cache
def derivatives(name):
    """The gradient by tree and limit, and the tangent of every output."""
    (row,) = [row for row in ROWS if row.name == name]

    @jax.jit
    def both(tree, limit):
        function = functools.partial(weighted, row)
        gradient = jax.grad(function, argnums=(0, 1))(tree, limit)
        tangents = (jax.tree.map(jnp.ones_like, tree), jnp.ones_like(limit))
        _, tangent = jax.jvp(
            lambda t, c: row.build(c).update(t, None, t)[0], (tree, limit), tangents
        )
        return gradient, tangent

    return both


EVERY = ("clip", "enlarging", "elementwise", "measuring")
LEARNING = ("adaptive", "wrapper")
COMPLEX = combinations(*EVERY, dtypes=("complex64",))


@pytest.mark.parametrize(
    ("row", "dtype"),
    combinations(*EVERY, *LEARNING, dtypes=("float32",))
    + [
        p for p in COMPLEX if p.values[0].name in (*trees.SAMPLE, "clip_by-per_element")
    ],
)
@trees.at_most(10)
@given(data=st.data())
def test_finite(row, dtype, data):
    """By updates and by limit, in reverse and in forward mode."""
    case = data.draw(trees.cases(row, dtype))
    assume(max(np.max(np.abs(x)) for x in case[0].values()) <= row.differentiable_to)
    if row.kind == "enlarging" or row.oracle["grouping"] == "kernels":
        # What is not measured may be as far above the size as a limit: the derivative
        # has their ratio, which must fit.
        sizes = [size for size in trees.sizes_of(row, case.tree) if size > 0]
        limit = float(case.limit) if np.isfinite(case.limit) else 0.0
        largest = max([limit, *(float(np.abs(x).max()) for x in case.tree.values())])
        assume(largest < 1e30 * min(sizes, default=1.0))
    gradient, tangent = jax.device_get(derivatives(row.name)(*case))
    for x in jax.tree.leaves((gradient, tangent)):
        assert np.all(np.isfinite(trees.wide(x)))


@pytest.mark.parametrize("row", rows("adaptive"))
def test_finite_beside_a_leaf_whose_squares_overflow(row):
    """What the plain sums gave, infinity, is not used, and its derivative is none."""
    tree = {"large": jnp.full(3, 3e22), "small": jnp.full(3, 7e-19)}
    tx = row.build(1.0)

    def total(tree):
        out, _ = tx.update(tree, None, tree)
        return sum(jnp.sum(x) for x in out.values())

    for slope in jax.tree.leaves(jax.jit(jax.grad(total))(tree)):
        assert np.all(np.isfinite(slope))


@pytest.mark.parametrize("magnitude", [1e20, 1e-28])
def test_a_large_cotangent_beside_elements_that_are_measured_at_a_scale(magnitude):
    """What the loss gives does not meet the scale alone, and leave float32's range."""
    tree = {"kernel": jnp.array([3.0, 4.0], jnp.float32) * magnitude}
    weight, limit = 1e17, magnitude / 4

    def total(tree, build=optclip.clip_by_global_norm):
        return jnp.sum(build(limit).update(tree, None)[0]["kernel"]) * weight

    slope = jax.jit(jax.grad(total))(tree)["kernel"] / weight
    # limit / size · (1 - direction · (the sum of directions))
    want = (1 - np.array([0.6, 0.8]) * 1.4) / 20
    np.testing.assert_allclose(slope, want, rtol=1e-5)


@functools.cache
def derivative_of_stream(name):
    """By a stream of three steps, the first of which gives the parameters."""
    (row,) = [row for row in ROWS if row.name == name]
    tx = row.build(1.0)

    def total(stream):
        params = stream[0]
        state, sums = tx.init(params), []
        for tree in stream:
            out, state = tx.update(tree, state, params)
            for number, x in enumerate(out.values()):
                weights = jnp.sin(number + jnp.arange(x.size, dtype=x.dtype))
                sums.append(jnp.sum(weights * x.ravel()))
        return sum(sums)

    return jax.jit(jax.grad(total))


@pytest.mark.parametrize(("row", "dtype"), combinations(*LEARNING, dtypes=("float32",)))
@trees.at_most(6)
@given(data=st.data())
def test_finite_through_what_was_learned(row, dtype, data):
    """Through the states, to the first step from the third."""
    stream = data.draw(trees.streams(row, dtype))[:3]
    for x in jax.tree.leaves(jax.device_get(derivative_of_stream(row.name)(stream))):
        assert np.all(np.isfinite(x))


@pytest.mark.parametrize("row", rows(*EVERY, *LEARNING))
@pytest.mark.parametrize("limit", [0.0, 1e-30, 1.0, 1e37, np.inf])
def test_finite_at_zero(row, limit):
    """Where norms and roots have no derivative."""
    shapes = trees.BATCHED if row.batched else trees.SHAPES
    tree = {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
    gradient, tangent = jax.device_get(derivatives(row.name)(tree, np.float32(limit)))
    for x in jax.tree.leaves((gradient, tangent)):
        assert np.all(np.isfinite(x))


# Every measure, every action and every way back to the leaves; at the ends of the range
# only where sizes are measured in another unit.
ENDS = ("clip_by_global_norm-lp3", "clip_by_global_norm-smooth")
OTHERS = ("clip_by_norm-max_abs", "clip_by_norm-per_unit", "clip_by_block_rms", "clip")
OTHERS += ("clip_by-normalize", "clip_by-floor", "clip_by-measured")
RIGHT = [
    pytest.param(*p.values, magnitude, id=f"{p.id}-{magnitude}")
    for p in rows("clip", "enlarging", "elementwise")
    for magnitude in ((1e-120, 1.0, 1e120) if p.id in ENDS else (1.0,))
    if p.id.startswith("clip_by_global_norm") or p.id in OTHERS
]


@pytest.mark.parametrize(("row", "magnitude"), RIGHT)
def test_right(row, magnitude):
    """The derivative is the one that differences show, in float64."""
    rng = np.random.default_rng(5)
    shapes = trees.BATCHED if row.batched else trees.SHAPES
    unit = {path: rng.uniform(0.2, 1, shape) for path, shape in shapes.items()}
    along = {path: rng.uniform(-1, 1, shape) for path, shape in shapes.items()}

    @jax.jit
    def value(step):
        tree = {p: (unit[p] + step * along[p]) * magnitude for p in unit}
        limit = (0.57 + 0.3 * step) * magnitude
        return weighted(row, tree, limit) / magnitude

    with trees.in_x64(np.float64):
        step = np.float64(1e-6)
        by_difference = (value(step) - value(-step)) / (2 * step)
        by_rule = jax.grad(value)(np.float64(0.0))
        np.testing.assert_allclose(by_rule, by_difference, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("row", projections())
def test_projections(row):
    """With respect to parameters, updates and size, at zero and at equal values too."""
    orthogonal = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))[0]

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def gradient(params, updates, size):
        tx = row.transform(size)
        updates, _ = tx.update(updates, tx.init(params), params)
        return jnp.sum(jnp.sin(untyped(optax.apply_updates(params, updates))))

    zero, ones = jnp.zeros((4, 4)), jnp.ones((4, 4))
    repeated = jnp.asarray(orthogonal, jnp.float32)
    starts = [(zero, zero), (ones, zero), (repeated, repeated), (zero, 1e3 * ones)]
    for params, updates in starts:
        for size in (0.5, 30.0):
            got = gradient(params, updates, jnp.float32(size))
            assert all(np.all(np.isfinite(x)) for x in got), (size, got)


def test_the_derivative_of_a_capped_matrix():
    """Against differences, at singular values below and above the bound."""
    w = jnp.asarray(np.random.default_rng(1).standard_normal((5, 3)), jnp.float32)
    d = jnp.asarray(np.random.default_rng(2).standard_normal((5, 3)), jnp.float32)
    for constraint in (optclip.sets.spectral_ball(1.5), optclip.sets.orthogonal()):
        for m, t in ((w, d), (w.T, d.T)):
            f = functools.partial(optclip.project_params, constraint=constraint)
            _, tangent = jax.jvp(lambda x, f=f: f({"w": x})["w"], (m,), (t,))
            h = 1e-2
            ends = (
                np.asarray(f({"w": m + s * h * t})["w"], np.float64) for s in (1, -1)
            )
            np.testing.assert_allclose(tangent, np.subtract(*ends) / (2 * h), atol=2e-3)
