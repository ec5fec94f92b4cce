"""The sums of programs for GPUs, on the platform that is here.

They are right at every magnitude, the same as those of other platforms to 4 units in
the last place, and their programs choose nothing.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optclip
from optclip import groupings, measures
from optclip._core import numerics
from tests.laws.table import rows
from tests.laws.trees import in_x64
from tests.untyped import untyped

MEASURES = {
    "l2": measures.l2,
    "rms": measures.rms,
    "p = 1.5": measures.lp(1.5),
    "p = 3": measures.lp(3),
}
EXPONENTS = np.arange(-36, 37, 4)


@pytest.fixture(autouse=True, scope="module")
def _for_a_gpu():
    before = numerics.backend, numerics.devices
    jax.clear_caches()
    numerics.backend, numerics.devices = (lambda: "gpu"), (lambda: 1)
    yield
    numerics.backend, numerics.devices = before
    jax.clear_caches()


def expected(x: np.ndarray, measure: str) -> float:
    """The size in float64."""
    size = np.abs(x.astype(np.complex128 if np.iscomplexobj(x) else np.float64))
    largest = size.max() or 1.0
    p = float(measure[4:]) if measure.startswith("p") else 2.0
    total = np.sum((size / largest) ** p) / (x.size if measure == "rms" else 1)
    return float(largest * total ** (1 / p))


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "complex64"])
def test_sizes_at_every_magnitude(dtype, measure):
    """Of one magnitude, and of elements that lie six powers of ten apart."""
    rng = np.random.default_rng(0)
    with in_x64(dtype):
        wide = "float64" if dtype == "float64" else "float32"
        norm = jax.jit(lambda x: optclip.global_norm([x], measure=MEASURES[measure]))
        for exponent in EXPONENTS * (8 if dtype == "float64" else 1):
            for spread in (0.0, 3.0):
                x = rng.normal(size=40) * 10.0 ** rng.uniform(-spread, spread, 40)
                largest = float(jnp.finfo(dtype).max) / 8
                x = np.clip(x * 10.0**exponent, -largest, largest)
                x = jnp.asarray(x, dtype)
                # What the dtype cannot hold as a normal number may count as zero.
                tiny = float(jnp.finfo(dtype).smallest_normal)
                x = jnp.where(jnp.abs(x) < tiny, 0, x)
                right = expected(np.asarray(x), measure)
                if right < float(jnp.finfo(wide).max):
                    tolerance = 4 * float(jnp.finfo(wide).eps)
                    np.testing.assert_allclose(norm(x), right, rtol=tolerance)


@pytest.mark.parametrize("magnitude", [1e-38, 1e-30, 1e-19, 1.0, 1e19, 1e30, 1e37])
@pytest.mark.parametrize("measure", ["l2", "rms"])
def test_derivatives_at_every_magnitude(measure, magnitude):
    x = jnp.asarray(np.random.default_rng(1).normal(size=8) * magnitude, jnp.float32)
    x = jnp.where(jnp.abs(x) < 1.2e-38, 0, x)
    slope = jax.grad(lambda x: optclip.global_norm([x], measure=MEASURES[measure]))(x)
    wide = np.asarray(x, np.float64)
    size = expected(wide, measure) * (8 if measure == "rms" else 1)
    np.testing.assert_allclose(slope, wide / size, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1.0, 1e30])
def test_what_is_not_finite_stays_so(bad, magnitude):
    for shape in ((), (3,)):
        x = jnp.full(shape, magnitude).at[(0,) * len(shape)].set(bad)
        assert not np.isfinite(optclip.global_norm([x]))
        tx = untyped(optclip.clip_by_global_norm(1.0))
        out, state = tx.update({"x": x}, tx.init({"x": x}))
        assert np.all(np.isnan(out["x"])) and state.metrics.nonfinite_steps == 1


@pytest.mark.parametrize("grouping", [groupings.whole(), groupings.per_leaf()])
def test_bounds_and_bits(grouping):
    """Over its limit a group comes to it; otherwise, and at zero, it keeps its bits."""
    for magnitude in (1e-30, 1e-10, 1.0, 1e10, 1e30):
        x = {"x": jnp.asarray(np.arange(1, 7) * magnitude, jnp.float32)}
        size = optclip.global_norm(x)
        for limit, clips in ((size, False), (2 * size, False), (size / 3, True)):
            tx = untyped(optclip.clip_by(limit, grouping=grouping))
            out, _ = tx.update(x, tx.init(x))
            if clips:
                np.testing.assert_allclose(optclip.global_norm(out), limit, rtol=5e-7)
            else:
                np.testing.assert_array_equal(out["x"], x["x"])
    zero = {"x": jnp.zeros(3)}
    out, _ = tx.update(zero, tx.init(zero))
    np.testing.assert_array_equal(out["x"], zero["x"])


def test_one_collective_on_a_mesh():
    """The three sums of all leaves travel together, and give the unsharded norm."""
    cpus = jax.devices("cpu")
    mesh = jax.make_mesh((4, 2), ("data", "model"), devices=cpus[:8])
    rng = np.random.default_rng(2)
    for magnitude in (1e-30, 1.0, 1e30):
        tree = {
            name: jnp.asarray(rng.normal(size=(8, 4)) * magnitude, jnp.float32)
            for name in "abc"
        }
        spec = dict.fromkeys("abc", P("data", "model"))
        norm = jax.jit(
            jax.shard_map(
                optclip.global_norm, mesh=mesh, in_specs=(spec,), out_specs=P()
            )
        )
        placed = jax.device_put(tree, NamedSharding(mesh, P("data", "model")))
        right = expected(np.stack([np.asarray(x) for x in tree.values()]), "l2")
        np.testing.assert_allclose(norm(placed), right, rtol=5e-7)
    text = norm.lower(placed).compile().as_text() or ""
    assert len(re.findall(r" all-reduce[\w-]*\(", text)) == 1


LEAVES = {f"layer_{number}/kernel": (8, 4) for number in range(4)}


@pytest.mark.parametrize(
    "row", rows("clip", "enlarging", "adaptive", "elementwise", "measuring")
)
def test_programs_for_a_gpu_choose_nothing(row):
    """No conditional and no loop, so that the host never has to know a predicate.

    Units choose, for XLA:GPU writes squares to memory where it sums columns at three
    scales: once, or once for each tree where the rule reads parameters.
    """
    tree = {
        name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in LEAVES.items()
    }
    tx = row.build(1.0)
    state = jax.eval_shape(tx.init, tree)
    jaxpr = jax.make_jaxpr(tx.update)(tree, state, tree).jaxpr
    found = counted(jaxpr)
    units = row.oracle["grouping"] in ("unit", "example")
    assert found["cond"] == (1 + row.needs_params if units else 0), found
    assert found["while"] == found["scan"] == 0, found


def counted(jaxpr) -> dict[str, int]:
    """How often a program branches or loops, functions inside functions included."""
    found: dict[str, int] = {"cond": 0, "while": 0, "scan": 0}
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in found:
            found[name] += 1
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                for key, count in counted(inner).items():
                    found[key] += count
    return found
