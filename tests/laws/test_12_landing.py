"""Law 12: `optax.apply_updates(params, project(...))` lands in the set.

In the parameters' dtype, eager and jitted, for updates of that dtype or a wider one.
Boxes exactly, over every number that float16 and bfloat16 have; balls never outside, by
norms in float64, and near the nearest point; the others within what they state.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import optclip
from optclip import sets
from tests import compiling
from tests.laws.table import PROJECTIONS, projections
from tests.laws.trees import at_most, compiler_options
from tests.oracles import projections as oracle

HALVES = (jnp.bfloat16, jnp.float16)
PAIRS = [
    pytest.param(dtype, wide, id=f"{dtype.__name__}-{wide.__name__}")
    for dtype in (*HALVES, jnp.float32)
    for wide in {dtype: None, jnp.float32: None}
]
BOXES = ((-0.01, 0.01), (-1.0, 1.0), (0.0, np.inf), (-1000.0, 0.1), (1e-3, 2.0))
UPDATES = (0.0, 1e-6, -1e-3, 0.01, -0.1, 1.0, -2.3, 1e3, -3e4)


def stepped(tx):
    """Parameters and updates to the parameters after the step."""

    def step(params, updates, state=None):
        updates, _ = tx.update(updates, state, params)
        with jax.numpy_dtype_promotion("standard"):  # Optax adds float32 to bfloat16
            return optax.apply_updates(params, updates)

    return step


@functools.partial(jax.jit, static_argnums=(2, 3))
def naive(p, u, lower, upper):
    """P(p + u) - p, as everyone writes it."""
    with jax.numpy_dtype_promotion("standard"):
        difference = jnp.clip(p + u, lower, upper) - p
        return optax.apply_updates(p, difference.astype(u.dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("wide", ["same", "float32"])
def test_every_number_lands_in_every_box(dtype, wide, record_property):
    """All 65,536 parameters; those outside may take two steps."""
    wide = dtype if wide == "same" else jnp.float32
    with np.errstate(invalid="ignore"):
        exact = np.arange(65536, dtype=np.uint16).view(dtype).astype(np.float64)
    params = jnp.asarray(np.arange(65536, dtype=np.uint16).view(dtype))
    missed = missed_outside = missed_naively = count = 0
    for lower, upper in BOXES:
        step = stepped(optclip.project(sets.box(lower, upper)))
        jitted = jax.jit(step, compiler_options=compiling.ordinary())
        start = (exact >= lower) & (exact <= upper)

        def outside(x, lower=lower, upper=upper):
            x = np.asarray(x).astype(np.float64)
            return ~((x >= lower) & (x <= upper))

        for number in UPDATES:
            updates = jnp.full(params.shape, number, jnp.float32).astype(wide)
            once = jitted(params, updates)
            twice = jitted(once, jnp.zeros_like(updates))
            count += start.sum()
            missed += (start & outside(once)).sum()
            missed_outside += (np.isfinite(exact) & outside(twice)).sum()
            missed_naively += (
                start & outside(naive(params, updates, lower, upper))
            ).sum()
            if number == 0.01:
                eager = step(params, updates)
                ours, theirs = (np.asarray(x, np.float32) for x in (eager, once))
                np.testing.assert_array_equal(ours, theirs)
    record_property("naive", f"{missed_naively / count:.1%}")
    print(f"{missed} of {count} outside, {missed_naively / count:.1%} naively")
    assert missed == missed_outside == 0
    assert missed_naively > 0.05 * count, "what the law is for"


FRACTION = st.floats(-1, 1, allow_subnormal=False).map(lambda x: round(x, 6) + 0.0)


# One function for every draw: bounds and values are traced.
@functools.cache
def _in_a_box(dtype, wide, optimizer):
    def step(params, updates, lower, upper):
        tx = optclip.project(sets.box(lower, upper))
        if optimizer:  # a product, that may melt into the sum
            tx = optax.chain(optax.scale(-0.3), tx)
        state = tx.init(params)
        return stepped(tx)(params, updates, state)

    return jax.jit(step, compiler_options=compiling.ordinary())


@pytest.mark.parametrize("optimizer", [False, True], ids=["alone", "after a product"])
@pytest.mark.parametrize(("dtype", "wide"), PAIRS)
@given(
    seed=st.integers(0, 2**32 - 1),
    bounds=st.tuples(FRACTION, FRACTION),
    power=st.integers(-4, 3),
)
def test_boxes_in_mixed_dtypes(dtype, wide, optimizer, seed, bounds, power):
    rng = np.random.default_rng(seed)
    low, high = sorted(float(np.float32(b * 10.0**power)) for b in bounds)
    inside = rng.uniform(low, high, 64).astype(dtype)
    kept = (inside.astype(np.float64) >= low) & (inside.astype(np.float64) <= high)
    updates = (np.clip(rng.standard_cauchy(64), -9, 9) * (high - low)).astype(wide)
    after = _in_a_box(dtype, wide, optimizer)(inside, updates, jnp.float32(low),
                                              jnp.float32(high))  # fmt: skip
    after = np.asarray(after).astype(np.float64)[kept]
    assert np.all((after >= low) & (after <= high))


SHAPES = {"kernel": (24, 5), "bias": (5,)}
STARTS = ("init_box", "init_sphere", "hyperball")  # any start lies inside


@functools.cache
def _step_of(name):
    (row,) = [row for row in PROJECTIONS if row.name == name]

    def step(params, updates, size):
        tx = row.transform(size)
        return stepped(tx)(params, updates)

    def first(params, size):
        return optclip.project_params(params, row.make(size))

    options = compiler_options(name)
    if row.digits is not True:  # they depend on the order of sums, which kernels choose
        options = compiling.ordinary()
    return jax.jit(step, compiler_options=options), jax.jit(first)


def groups_of(row, tree):
    """(path, index) of every point of the set."""
    for path, leaf in tree.items():
        if row.points == "unit" and leaf.ndim == 2:
            yield from ((path, np.s_[:, unit]) for unit in range(leaf.shape[1]))
        else:
            yield path, np.s_[:]


def nearest_to(row, x, size, start):
    """The oracle's nearest point for one group that had a norm, in float64."""
    match row.name:
        case "l2_ball" | "max_norm":
            return oracle.l2_ball(x, size)
        case "l1_ball":
            return oracle.l1_ball(x, size)
        case "norm_sphere":
            return oracle.norm_sphere(x, size)
        case "unit_norm":
            return oracle.norm_sphere(x, 1.0)
        case "init_sphere" | "init_sphere-per_unit":
            return oracle.norm_sphere(x, start)
        case "norm_range":
            return oracle.norm_range(x, size / 2, size)
        case "simplex":
            return oracle.simplex(x, size)
    raise ValueError(row.name)


def drawn(seed, dtype, wide, scale):
    rng = np.random.default_rng(seed)
    params = {k: rng.standard_normal(s).astype(dtype) for k, s in SHAPES.items()}
    updates = {
        k: scale * rng.standard_normal(s) * (rng.uniform(size=s) < 0.7)
        for k, s in SHAPES.items()
    }
    updates = {k: np.clip(x, -3e4, 3e4).astype(wide) for k, x in updates.items()}
    return params, updates


@pytest.mark.parametrize(("dtype", "wide"), [*PAIRS[1:3], PAIRS[4]])
@pytest.mark.parametrize("row", projections(lands="ball") + projections(lands="near"))
@at_most(6)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.floats(0.01, 100).map(np.float32),
    power=st.integers(-6, 6),
)
def test_norms_and_sums(row, dtype, wide, seed, size, power):
    """Never outside a ball; on a sphere, and in sum, within 4 ulp of the dtype."""
    step, _ = _step_of(row.name)
    inside, updates = drawn(seed, dtype, wide, float(size) * 10.0**power)
    if row.public not in STARTS:  # two steps lead inside, as a test below says
        still = jax.tree.map(np.zeros_like, updates)
        inside = step(step(inside, still, size), still, size)
    after = jax.device_get(step(inside, updates, size))
    eps, goal = float(ml_dtypes.finfo(dtype).eps), float(size)
    # The spacing of float16's subnormal numbers; those of the others are zero.
    least = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    sums = {
        k: np.asarray(inside[k]).astype("d") + updates[k].astype("d") for k in SHAPES
    }
    sums = {k: x.astype(dtype).astype("d") for k, x in sums.items()}
    for path, index in groups_of(row, after):
        x = after[path][index].astype(np.float64)
        start = np.asarray(inside[path])[index].astype(np.float64)
        length = np.sqrt(np.sum(x**2))
        if row.name == "l1_ball":
            assert np.sum(np.abs(x)) <= goal
        elif row.lands == "ball":
            assert length <= goal
        elif row.name == "simplex":
            assert np.all(x >= 0) and abs(x.sum() - goal) <= 4 * eps * goal
        elif row.name == "norm_range":
            assert goal / 2 * (1 - 4 * eps) <= length <= goal * (1 + 4 * eps)
        else:
            given_radius = {"norm_sphere": goal, "unit_norm": 1.0}
            radius = given_radius.get(row.name, float(np.sqrt(np.sum(start**2))))
            assert length == 0 or abs(length - radius) <= 4 * eps * radius
        # Near the nearest point, as fine as the numbers at both ends of the step are;
        # what is subtracted from y is a float32 as large as y.
        y = sums[path][index]
        if row.around is not None:
            want = oracle.hyperball(
                start, updates[path][index].astype("d"), goal, row.name != "hyperball"
            )
        else:
            want = nearest_to(row, y, goal, np.sqrt(np.sum(start**2)))
        slack = 4 * np.maximum(eps * np.maximum(np.abs(start), np.abs(want)), least)
        if row.name in ("l1_ball", "simplex"):
            slack = slack + 4 * 2.0**-23 * np.max(np.abs(y)) + eps * goal
        assert np.all(np.abs(x - want) <= slack), (path, index)


@pytest.mark.parametrize("dtype", [jnp.float32, HALVES[0]], ids=lambda d: d.__name__)
@pytest.mark.parametrize("row", projections(lands="iterative"))
@at_most(6)
@given(seed=st.integers(0, 2**32 - 1), size=st.floats(0.1, 10).map(np.float32))
def test_iterative_sets(row, dtype, seed, size):
    """Within what they state, and half precision to 2 of its own ulp."""
    step, first = _step_of(row.name)
    params, updates = drawn(seed, dtype, dtype, float(size) / 5)
    after = jax.device_get(step(first(params, size), updates, size))
    slack = row.tolerance + (
        2 * float(ml_dtypes.finfo(dtype).eps) if dtype != jnp.float32 else 0
    )
    for leaf in after.values():
        x = leaf.astype(np.float64)
        s = np.linalg.svd(x.reshape(len(x), -1), compute_uv=False)
        if row.name == "orthogonal":
            assert np.all(np.abs(s - 1) <= slack)
        elif row.name == "intersection":
            assert np.all(np.abs(x) <= size / 2)
            assert np.sqrt(np.sum(x**2)) <= size * (1 + slack)
        else:
            assert np.all(s <= size * (1 + slack))


@pytest.mark.parametrize("dtype", [jnp.float32, HALVES[0]], ids=lambda d: d.__name__)
@pytest.mark.parametrize("row", projections())
def test_from_outside_two_steps_are_enough(row, dtype):
    if row.public in STARTS or row.lands == "iterative":
        pytest.skip("nothing starts outside it, or its test above starts outside")
    step, _ = _step_of(row.name)
    params, updates = drawn(3, dtype, dtype, 0.0)
    params = {k: (100 * x).astype(dtype) for k, x in params.items()}
    size = np.float32(0.5)
    for _ in range(2):
        params = step(params, updates, size)
    constraint, shapes = row.make(size), SHAPES
    for path, x in params.items():
        extent = constraint.extent(path, x, shapes)
        assert jnp.all(constraint.holds(x, extent)), path


@pytest.mark.parametrize("row", projections())
def test_inside_updates_keep_their_bits(row):
    """A projection that has nothing to do does nothing."""
    if row.points == "matrix" or row.lands == "near":
        pytest.skip(
            "a step on a sphere or of a matrix by products always does a little"
        )
    params = {k: jnp.full(s, 0.01) for k, s in SHAPES.items()}
    updates = {k: jnp.full(s, 1.2345e-4) for k, s in SHAPES.items()}
    tx = row.transform(np.float32(10.0))
    out, _ = jax.jit(tx.update)(updates, tx.init(params), params)
    for path, u in updates.items():
        np.testing.assert_array_equal(out[path], u)


def test_a_bound_that_does_not_exist_is_rounded_inward():
    """0.01 lies between two bfloat16 numbers, and 0.1 below its nearest float32."""
    ends = {jnp.bfloat16: 0.01, jnp.float16: 0.1, jnp.float32: 0.1}
    for dtype, bound in ends.items():
        x = jnp.array([-9.0, 9.0], dtype)
        low, high = optclip.project_params(x, sets.linf_ball(bound)).tolist()
        assert -bound <= low == -high and high <= bound
        above = np.nextafter(np.asarray(high, dtype), np.asarray(9.0, dtype))
        assert float(above) > bound


def test_nan_stays_and_infinity_goes_to_the_bound():
    params = jnp.zeros(3)
    updates = jnp.array([jnp.nan, jnp.inf, -jnp.inf])
    boxed = jax.jit(stepped(optclip.project(sets.linf_ball(0.5))))(params, updates)
    np.testing.assert_array_equal(boxed, [np.nan, 0.5, -0.5])
    ball = jax.jit(stepped(optclip.project(sets.l2_ball(0.5))))(params, updates)
    assert np.all(np.isnan(ball))


@pytest.mark.parametrize("power", [-30, -8, 8, 25])
def test_balls_far_from_one(power):
    """Squares of such numbers leave float32."""
    x = (10.0**power * np.random.default_rng(0).standard_normal((6, 4))).astype("f")
    for radius in (10.0 ** (power - 3), 10.0**power):
        out = optclip.project_params(jnp.asarray(x), sets.l2_ball(np.float32(radius)))
        want = oracle.l2_ball(x.astype(np.float64), float(np.float32(radius)))
        np.testing.assert_allclose(out, want, rtol=1e-6)
    far = optclip.project_params(jnp.asarray(x), sets.l2_ball(1.0))
    assert np.sqrt(np.sum(np.asarray(far, np.float64) ** 2)) <= 1
