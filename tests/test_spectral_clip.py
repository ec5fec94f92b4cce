"""`spectral_clip`: laws 1 to 3 of singular values, their metrics, stacks and meshes.

The oracle is an SVD in NumPy float64, matrix by matrix. What the law tests ask of every
row (states, wrappers, messages, what is not finite) is asked there.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optclip
from tests.laws.collectives import collectives, mesh_of
from tests.untyped import untyped

ITERATIONS = pytest.mark.parametrize("iterations", [None, 24], ids=["svd", "products"])


def oracle(w, limit, soft=False):
    u, s, vt = np.linalg.svd(np.asarray(w, np.float64), full_matrices=False)
    s = s / np.sqrt(1 + np.square(s / limit)) if soft else np.minimum(s, limit)
    return (u * s[..., None, :]) @ vt


def sigma(w):
    return np.linalg.svd(np.asarray(w, np.float64), compute_uv=False)


def normal(*shape, seed=0, scale=1.0, dtype=jnp.float32):
    x = scale * np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(x, dtype)


@functools.cache
def jitted(**options):
    """(updates, limit) to updates and state, compiled once for all magnitudes."""
    return untyped(
        jax.jit(
            lambda t, c: untyped(optclip.spectral_clip(c, **options)).update(t, None)
        )
    )


def clipped(tree, limit, **options):
    """The updates and the metrics."""
    updates, state = jitted(**options)(tree, jnp.float32(limit))
    return updates, state.metrics


@ITERATIONS
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        *((jnp.float32, 1.0), (jnp.float32, 1e-30), (jnp.float32, 1e30)),
        *((jnp.bfloat16, 1.0), (jnp.bfloat16, 1e30), (jnp.float16, 1e-3)),
    ],
)
@pytest.mark.parametrize("shape", [(8, 8), (24, 5), (5, 24)])
def test_bound_and_oracle(shape, scale, dtype, iterations):
    """At every magnitude the dtype has: never above, and what float64 gives."""
    w, eps = normal(*shape, scale=scale, dtype=dtype), float(jnp.finfo(dtype).eps)
    wide = np.asarray(w, np.float64)
    limit = float(np.float32(0.4 * sigma(wide)[0]))
    out, metrics = clipped({"kernel": w}, limit, iterations=iterations)
    slack = 1e-4 if iterations else 0.0
    assert sigma(out["kernel"])[0] <= limit * (
        1 + 4 * eps * (dtype != jnp.float32) + slack
    )
    off = np.abs(np.asarray(out["kernel"], np.float64) - oracle(wide, limit))
    assert off.max() <= limit * max(4 * eps, 1e-5 + slack)
    assert metrics.clipped_steps == 1
    if iterations is None:
        np.testing.assert_allclose(metrics.size, sigma(wide)[0], rtol=1e-5)
        np.testing.assert_allclose(metrics.limit, limit, rtol=1e-6)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("times", "steps"), [(10, 16), (100, 24), (1000, 32)])
def test_how_many_iterations(times, steps, soft):
    """Within a thousandth of the limit, as documented."""
    w = normal(12, 8, seed=3)
    limit = sigma(w)[0] / times
    steps = steps // 2 if soft else steps
    out, _ = clipped({"kernel": w}, limit, iterations=steps, soft=soft)
    off = np.asarray(out["kernel"], np.float64) - oracle(w, limit, soft)
    assert sigma(off)[0] <= 1.5e-3 * limit


@ITERATIONS
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_soft(dtype, iterations):
    """Every direction shrinks, at every magnitude, and none is above the limit."""
    eps = float(jnp.finfo(dtype).eps)
    shapes = {"square": (8, 8), "tall": (24, 5), "wide": (5, 24)}
    run = jitted(iterations=iterations, soft=True)
    for scale in (1e-30, 1.0, 1e30):
        tree = {k: normal(*v, scale=scale, dtype=dtype) for k, v in shapes.items()}
        largest = max(sigma(w)[0] for w in tree.values())
        for share in (0.01, 0.3, 10.0):
            limit = np.float32(share * largest)
            out, state = run(tree, limit)
            metrics = state.metrics
            for name, w in tree.items():
                got, want = np.asarray(out[name], "d"), oracle(w, float(limit), True)
                size = min(float(limit), sigma(w)[0])
                assert np.abs(got - want).max() <= size * max(4 * eps, 2e-5)
                over = 1 if dtype == jnp.float32 else 1 + 4 * eps
                assert sigma(got)[0] <= limit * over
            if iterations is None:
                np.testing.assert_allclose(metrics.size, largest, rtol=1e-5)
                assert bool(metrics.clipped_steps) == (limit < largest)


@ITERATIONS
def test_soft_beside_a_spike(iterations):
    """Rounding beside a singular value of 1e7 limits is no direction."""
    w = 1e7 * jnp.outer(normal(8), normal(6, seed=1))
    out, _ = clipped({"kernel": w}, 1.0, iterations=iterations, soft=True)
    s = sigma(out["kernel"])
    assert 0.99 < s[0] <= 1 and s[1] < (0.1 if iterations else 0.01)


@ITERATIONS
def test_sizes_beyond_the_dtype(iterations):
    """σ of 3e38 in every element overflows; the clipped matrix does not."""
    w = jnp.full((8, 8), 3e38)
    out, metrics = clipped({"kernel": w}, 1.0, iterations=iterations)
    np.testing.assert_allclose(out["kernel"], np.full((8, 8), 1 / 8), rtol=1e-3)
    assert (metrics.clipped_steps, metrics.nonfinite_steps) == (1, 0)


@ITERATIONS
def test_within_the_limit(iterations):
    """Bits by decomposition, rounding by products; nothing counts as clipped."""
    w = normal(12, 6)
    limit = 1.01 * sigma(w)[0]
    out, metrics = clipped({"kernel": w}, limit, iterations=iterations)
    if iterations is None:
        np.testing.assert_array_equal(out["kernel"], w)
    np.testing.assert_allclose(out["kernel"], w, atol=1e-4)
    assert metrics.clipped_steps == 0


@ITERATIONS
def test_infinity_zero_and_matrices_of_zeros(iterations):
    w, zeros = normal(6, 4), jnp.zeros((6, 4))
    for limit in (0.0, 1.0, np.inf):
        tree = {"w": w, "zeros": zeros}
        out, metrics = clipped(tree, limit, iterations=iterations)
        np.testing.assert_array_equal(out["zeros"], zeros)
        if limit != 1:
            np.testing.assert_array_equal(out["w"], w if limit else zeros)
        assert metrics.clipped_steps == int(limit < np.inf)
        if metrics.size is not None:
            np.testing.assert_allclose(metrics.size, sigma(w)[0], rtol=1e-5)
            assert metrics.clipped_fraction == (0.5 if limit < np.inf else 0)


@ITERATIONS
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_bad_matrix_of_a_stack(bad, iterations):
    """The others are as without it, to the last bit."""
    w = normal(3, 6, 4)
    spoilt = {"kernel": w.at[1, 2, 3].set(bad)}
    clean, _ = clipped({"kernel": w}, 1.0, iterations=iterations, stacked=True)
    for nonfinite, value in (("propagate", np.nan), ("zero", 0.0)):
        out, metrics = clipped(
            spoilt, 1.0, iterations=iterations, stacked=True, nonfinite=nonfinite
        )
        np.testing.assert_array_equal(out["kernel"][1], jnp.full((6, 4), value))
        for n in (0, 2):
            np.testing.assert_array_equal(out["kernel"][n], clean["kernel"][n])
        assert metrics.nonfinite_steps == 1


def test_layers_heads_windows_and_vectors():
    """Each layer of a stack is a matrix, a window belongs to the inputs, a bias is a
    column."""
    tree = {
        "stack": {"kernel": normal(3, 6, 4), "bias": normal(3, 4)},
        "conv": {"kernel": normal(3, 3, 2, 5), "bias": normal(5)},
    }
    out, metrics = clipped(tree, 1.0)
    stack, conv = tree["stack"], tree["conv"]
    got = out["stack"]["kernel"]
    np.testing.assert_allclose(got, oracle(stack["kernel"], 1.0), atol=1e-5)
    flat = oracle(conv["kernel"].reshape(18, 5), 1.0).reshape(3, 3, 2, 5)
    np.testing.assert_allclose(out["conv"]["kernel"], flat, atol=1e-5)
    norms = np.linalg.norm(stack["bias"], axis=1, keepdims=True)
    wanted = stack["bias"] / np.maximum(norms, 1)
    np.testing.assert_allclose(out["stack"]["bias"], wanted, atol=1e-5)
    sizes = [
        sigma(stack["kernel"])[:, 0],
        norms.ravel(),
        [np.linalg.norm(conv["bias"])],
    ]
    sizes += [sigma(conv["kernel"].reshape(18, 5))[:1]]
    over = np.concatenate(sizes) > 1
    assert over.size == 8
    np.testing.assert_allclose(metrics.clipped_fraction, over.mean(), rtol=1e-6)


def test_where_schedules_and_counts():
    """Over a stream: only the kernels, by the limit of each step, counted."""
    tx = untyped(
        optclip.spectral_clip(optax.linear_schedule(4.0, 1.0, 3), where="kernel")
    )
    params = {"kernel": normal(6, 4), "bias": normal(4, scale=100.0)}
    state, update, counted = tx.init(params), jax.jit(tx.update), 0
    for step in range(30):
        grads = {**params, "kernel": normal(6, 4, seed=step)}
        limit = 4.0 - min(step, 3)
        out, state = update(grads, state)
        want = oracle(grads["kernel"], limit)
        np.testing.assert_allclose(out["kernel"], want, atol=1e-5)
        np.testing.assert_array_equal(out["bias"], grads["bias"])
        counted += sigma(grads["kernel"])[0] > limit
        assert (state.metrics.steps, state.metrics.clipped_steps) == (step + 1, counted)
    assert 0 < counted < 30


@pytest.mark.parametrize("soft", [False, True])
@ITERATIONS
def test_derivatives_are_finite(iterations, soft):
    """At zero, at repeated singular values, and far outside."""
    run = functools.partial(optclip.spectral_clip, iterations=iterations, soft=soft)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(w, limit):
        return jnp.sum(jnp.sin(untyped(run(limit)).update(w, None)[0]))

    for w in (jnp.zeros((4, 4)), jnp.eye(4), jnp.ones((4, 4)), normal(4, 4, scale=1e6)):
        for limit in (0.0, 0.5, 1.0, np.inf):
            for x in gradient(w, jnp.float32(limit)):
                assert np.all(np.isfinite(x))


def test_the_derivative_of_the_soft_rule():
    """Against differences, where singular values repeat too."""
    w = jnp.diag(jnp.array([2.0, 2.0, 0.5])) + jnp.zeros((3, 3))
    direction = normal(3, 3, seed=4)

    def softened(x):
        tx = optclip.spectral_clip(1.0, soft=True)
        return untyped(tx).update({"w": x}, None)[0]["w"]

    _, slope = jax.jvp(softened, (w,), (direction,))
    above, below = (oracle(w + h * direction, 1.0, True) for h in (1e-4, -1e-4))
    np.testing.assert_allclose(slope, (above - below) / 2e-4, atol=1e-4)


AXIS_TYPES = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
SOFT = pytest.mark.parametrize("soft", [False, True])


@SOFT
@AXIS_TYPES
@ITERATIONS
def test_sharded_matrices(iterations, axis_type, soft):
    """Split over both axes of a mesh, stacked and not: as on one device."""
    tree = {"kernel": normal(8, 16), "stack": normal(4, 8, 16)}
    specs = {"kernel": P("data", "model"), "stack": P("data", None, "model")}
    mesh = mesh_of(axis_type)
    options = {"iterations": iterations, "stacked": "stack", "soft": soft}
    want, _ = clipped(tree, 1.0, **options)
    placed = {
        p: jax.device_put(x, NamedSharding(mesh, specs[p])) for p, x in tree.items()
    }
    with jax.set_mesh(mesh):
        got, metrics = clipped(placed, 1.0, **options)
    for path, x in want.items():
        np.testing.assert_allclose(got[path], x, atol=1e-5)
        assert got[path].sharding.is_equivalent_to(placed[path].sharding, x.ndim)
    assert metrics.clipped_steps == 1


@SOFT
@AXIS_TYPES
@ITERATIONS
def test_a_stack_that_is_split_over_its_matrices_moves_nothing(
    iterations, axis_type, soft
):
    """But numbers for the metrics."""
    tx = optclip.spectral_clip(1.0, iterations=iterations, stacked=True, soft=soft)
    mesh = mesh_of(axis_type)
    place = NamedSharding(mesh, P(("data", "model")))
    grads = {"kernel": jax.ShapeDtypeStruct((8, 6, 4), jnp.float32, sharding=place)}
    with jax.set_mesh(mesh):
        update = jax.jit(untyped(tx.update)).lower(
            grads, jax.eval_shape(tx.init, grads)
        )
        found = collectives(update.compile().as_text() or "").everywhere
    assert found and {sent.kind for sent in found} == {"all-reduce"}
    assert max(sent.numbers for sent in found) <= 2


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="older XLA keeps more")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("iterations", "soft", "copies"),
    [(None, False, 3), (None, True, 3), (16, False, 9), (16, True, 7)],
)
def test_memory(iterations, soft, copies, dtype):
    """Law 11 for what factorises: so many copies of a leaf in float32."""
    tx = optclip.spectral_clip(1.0, iterations=iterations, stacked=True, soft=soft)
    grads = {"kernel": jax.ShapeDtypeStruct((4, 256, 256), dtype)}
    update = jax.jit(tx.update).lower(grads, jax.eval_shape(tx.init, grads))
    temporary = untyped(update.compile().memory_analysis()).temp_size_in_bytes
    assert temporary <= (copies + 0.1) * 4 * 4 * 256 * 256


def test_in_parts_inside_shard_map_it_says_so():
    mesh = jax.make_mesh(
        (8,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:8]
    )
    tx = untyped(optclip.spectral_clip(1.0))
    step = jax.shard_map(
        lambda u: tx.update(u, None)[0],
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
    )
    with pytest.raises(
        ValueError, match=r"^spectral_clip: .* whole on each device, got"
    ):
        step({"kernel": normal(8, 8)})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"iterations": 0}, "iterations must be an integer of at least 1, got 0."),
        ({"soft": "yes"}, "soft must be True or False, got 'yes'."),
        ({"nonfinite": "x"}, "nonfinite must be 'propagate' or 'zero', got 'x'."),
        ({"where": "kernle"}, "where must select a leaf, got none of 'w'."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_nonsense(options, says):
    with pytest.raises(ValueError, match="^" + re.escape(f"spectral_clip: {says}")):
        untyped(optclip.spectral_clip)(1.0, **options).init({"w": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match=r"^spectral_clip: .* got complex ones at 'w'"):
        optclip.spectral_clip(1.0).init({"w": jnp.ones((2, 2), jnp.complex64)})
    with pytest.raises(ValueError, match=r"^spectral_clip: state must be a ClipState"):
        optclip.spectral_clip(1.0).update({"w": jnp.ones((2, 2))}, optax.EmptyState())
