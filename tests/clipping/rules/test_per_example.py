"""Per-example sums of what is no plain float, and of examples split over a mesh.

Values of ordinary gradients are compared with Optax and an oracle in `tests.oracles`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import optclip
from tests.untyped import untyped

FUNCTIONS = {
    "global": (
        optclip.per_example_global_norm_clip, optax.per_example_global_norm_clip,
    ),
    "layer": (
        optclip.per_example_layer_norm_clip, optax.per_example_layer_norm_clip,
    ),
    "layer, by size": (
        lambda grads, clip, **options: optclip.per_example_layer_norm_clip(
            grads, clip, False, **options
        ),
        lambda grads, clip: optax.per_example_layer_norm_clip(grads, clip, False),
    ),
}  # fmt: skip
BOTH = pytest.mark.parametrize(("clip", "peer"), FUNCTIONS.values(), ids=FUNCTIONS)


def counted(result):
    """The sums in float64, and how many were clipped in all."""
    total, clipped = result
    return (
        {name: np.asarray(x, np.float64) for name, x in total.items()},
        sum(int(n) for n in jax.tree.leaves(clipped)),
    )


def test_integers_count_in_the_norm():
    """Privacy bounds the sum of all that is released."""
    grads = {"a": jnp.array([[3.0], [0.3]]), "b": jnp.array([[4], [0]], jnp.int32)}
    total, clipped = untyped(optclip.per_example_global_norm_clip(grads, 1.0))
    assert {name: x.dtype for name, x in total.items()} == dict.fromkeys(
        "ab", jnp.float32
    )
    np.testing.assert_allclose(total["a"], [0.9], rtol=1e-6)
    np.testing.assert_allclose(total["b"], [0.8], rtol=1e-6)
    assert clipped == 1


@BOTH
@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint8, np.bool_])
def test_integers_as_in_optax(clip, peer, dtype):
    rng = np.random.default_rng(0)
    grads = {
        "a": jnp.asarray(rng.standard_normal((6, 3, 2)), jnp.float32),
        "b": jnp.asarray(rng.integers(0, 5, (6, 4)).astype(dtype)),
    }
    with jax.numpy_dtype_promotion("standard"):
        theirs, their_count = counted(peer(grads, 3.0))
    mine, count = counted(clip(grads, 3.0))
    assert 0 < count == their_count
    for name in grads:
        np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-5)
    assert clip(grads, 3.0)[0]["b"].dtype == jnp.float32


@BOTH
def test_a_tree_of_integers_alone(clip, peer):
    total, _ = clip({"b": jnp.array([[3, 4], [0, 0]])}, 1.0)
    np.testing.assert_allclose(total["b"], [0.6, 0.8], rtol=1e-6)


@BOTH
def test_float0_passes(clip, peer):
    """As `jax.grad(…, allow_int=True)` under `vmap` gives beside floats."""
    params = {"a": jnp.ones(3), "n": jnp.arange(2)}

    def loss(params, x):
        return jnp.sum(params["a"] * x)

    xs = jnp.array([[3.0, 0.0, 4.0], [0.3, 0.0, 0.4]])
    grads = jax.vmap(jax.grad(loss, allow_int=True), (None, 0))(params, xs)
    assert grads["n"].dtype == jax.dtypes.float0
    total, clipped = clip(grads, 1.0)
    np.testing.assert_allclose(total["a"], [0.9, 0.0, 1.2], rtol=1e-6)
    assert (total["n"].dtype, total["n"].shape) == (jax.dtypes.float0, (2,))
    assert sum(map(int, jax.tree.leaves(clipped))) == 1
    alone, clipped = clip({"n": grads["n"]}, 1.0)
    assert alone["n"].dtype == jax.dtypes.float0
    assert sum(map(int, jax.tree.leaves(clipped))) == 0


@BOTH
@pytest.mark.parametrize("name", ["global", "layer"])
def test_random_keys_are_refused_by_name(clip, peer, name):
    grads = {"a": {"w": jnp.ones((2, 3)), "keys": jax.random.split(jax.random.key(0))}}
    with pytest.raises(
        ValueError,
        match=r"^per_example_\w+_norm_clip: grads must be .* keys at 'a/keys'",
    ):
        clip(grads, 1.0)


@BOTH
@pytest.mark.parametrize(
    "limit", [np.uint8(2), np.int64(2), 2, jnp.int32(2), jnp.bfloat16(2), np.float64(2)]
)
def test_limits_of_any_numeric_type(clip, peer, limit):
    grads = {"a": jnp.array([[6.0, 8.0], [0.3, 0.4]])}
    total, _ = clip(grads, limit)
    np.testing.assert_allclose(total["a"], [1.5, 2.0], rtol=1e-6)
    total, _ = clip(grads, np.int64(10**12))
    np.testing.assert_allclose(total["a"], [6.3, 8.4], rtol=1e-6)


@BOTH
def test_a_schedule_is_no_limit(clip, peer):
    with pytest.raises(ValueError, match="l2_norm_clip must be a non-negative number"):
        clip({"a": jnp.ones((2, 3))}, lambda step: 1.0)


# Inside shard_map.

needs_devices = pytest.mark.skipif(jax.device_count() < 4, reason="needs a mesh")
LONG = {"a": jnp.stack([jnp.ones(8), 0.1 * jnp.ones(8)])}  # norms √8 and √0.08


def sharded(clip, spec, axis_name, summed=()):
    mesh = Mesh(np.array(jax.devices()[:4]), ("model",))

    def run(grads):
        total, clipped = clip(grads, 1.0, axis_name=axis_name)
        clipped = jnp.stack(jax.tree.leaves(clipped)).sum()
        for axis in summed:
            total, clipped = jax.lax.psum((total, clipped), axis)
        return total, clipped

    split = P() if summed else P("model")
    out = ({"a": split}, P())
    return jax.jit(
        jax.shard_map(run, mesh=mesh, in_specs=({"a": spec},), out_specs=out)
    )


@BOTH
@needs_devices
def test_an_example_split_over_devices_has_one_norm(clip, peer):
    total, count = clip(LONG, 1.0)
    mine, mine_count = sharded(clip, P(None, "model"), "model")(LONG)
    np.testing.assert_allclose(mine["a"], total["a"], rtol=1e-6)
    assert mine_count == sum(jax.tree.leaves(count)) == 1
    np.testing.assert_allclose(np.linalg.norm(mine["a"] - 0.1), 1.0, rtol=1e-6)


@BOTH
@needs_devices
def test_a_batch_split_over_devices_has_whole_examples(clip, peer):
    grads = {"a": jnp.concatenate([LONG["a"], 3 * LONG["a"]])}
    total, count = clip(grads, 1.0)
    mine, mine_count = sharded(clip, P("model"), (), ("model",))(grads)
    np.testing.assert_allclose(mine["a"], total["a"], rtol=1e-6)
    assert mine_count == sum(jax.tree.leaves(count)) == 2


@BOTH
@needs_devices
def test_a_type_does_not_say_what_is_split(clip, peer):
    with pytest.raises(ValueError, match="axis_name must say which mesh axes"):
        sharded(clip, P(None, "model"), None)(LONG)


@needs_devices
def test_no_axes_for_an_example_in_parts_clips_the_parts():
    """What () means is that devices have whole examples: each part has norm 1 here."""

    def run(x):
        return optclip.per_example_global_norm_clip(x, 1.0, axis_name=())[0]

    mesh, spec = Mesh(np.array(jax.devices()[:4]), ("model",)), P(None, "model")
    run = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=P("model"))
    total = jax.jit(run)(LONG["a"][:1])
    np.testing.assert_allclose(np.linalg.norm(total), 2.0, rtol=1e-6)


# Differential privacy on a mesh: two devices for the batch, two for the parameters.

C = 0.5
PARAMS = {
    "kernel": jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32),
    "bias": jnp.linspace(-1.0, 1.0, 4),
}
PARAM_SPECS = {"kernel": P("model"), "bias": P()}
SPLIT = {"kernel": "model", "bias": ()}


def loss(params, example, over=()):
    """The kernel's rows, and the features with them, may be split over devices."""
    hidden = example["x"] @ params["kernel"]
    hidden = jax.lax.psum(hidden, over) if over else hidden
    return example["weight"] * jnp.sum(jnp.square(hidden + params["bias"]))


def varying(tree, axis):
    """Typed as different on each device along the axis."""
    return jax.tree.map(lambda x: jax.lax.pcast(x, axis, to="varying"), tree)


def by_clip_by(grads, clip, axis_name=None):
    tx = optclip.clip_by(
        clip,
        grouping=optclip.groupings.per_example(),
        nonfinite="zero",
        axis_name=axis_name,
    )
    clipped, state = untyped(tx).update(grads, None)
    total = jax.tree.map(lambda x: x.sum(axis=0), clipped)
    return total, state.metrics.nonfinite_steps


SUMS = {
    "global": optclip.per_example_global_norm_clip,
    "layer": optclip.per_example_layer_norm_clip,
    "clip_by": by_clip_by,
}
WAYS = pytest.mark.parametrize("way", SUMS)


@functools.cache
def private_sum(way, meshed, mark=True):
    """Parameters and a batch to the sum of clipped gradients, as one vector."""

    def run(params, batch):
        if not meshed:
            grads = jax.vmap(jax.grad(loss), (None, 0))(params, batch)
            return SUMS[way](grads, C)[0]
        params = varying(params, "data") if mark else params
        own = functools.partial(loss, over=("model",))
        grads = jax.vmap(jax.grad(own), (None, 0))(params, batch)
        total, _ = SUMS[way](grads, C, axis_name=SPLIT)
        return jax.lax.psum(total, "data") if mark else total

    if meshed:
        mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
        specs = PARAM_SPECS, {"x": P("data", "model"), "weight": P("data")}
        run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=PARAM_SPECS)
    jitted = jax.jit(run)

    def flat(batch):
        total = jitted(PARAMS, jax.tree.map(jnp.asarray, batch))
        return np.concatenate([np.ravel(x).astype("d") for x in total.values()])

    return flat


def batch_of(rng):
    """Four examples, one of them small enough not to be clipped."""
    x = rng.normal(size=(4, 6)).astype("f")
    return {"x": x, "weight": np.array([1, 1e-3, 1, 1], "f")}


@WAYS
@needs_devices
def test_private_sums_on_a_mesh_are_those_of_one_device(way):
    batch = batch_of(np.random.default_rng(1))
    mine, whole = private_sum(way, True)(batch), private_sum(way, False)(batch)
    np.testing.assert_allclose(mine, whole, rtol=1e-5, atol=1e-6)


@WAYS
@needs_devices
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6, 1e15, np.nan, np.inf])
def test_one_example_moves_the_sum_by_at_most_the_bound(way, size):
    """Wherever it lies, whatever it holds: by C if it comes or goes, by 2C if changed.

    Gradients of 1e15 have norms of 1e30, whose squares overflow.
    """
    rng, total = np.random.default_rng(2), private_sum(way, True)
    moves = []
    for place in range(4):
        batch = batch_of(rng)
        without = {"x": batch["x"].copy(), "weight": batch["weight"].copy()}
        without["x"][place] = without["weight"][place] = 0  # its gradient is zero
        other = {"x": batch["x"].copy(), "weight": batch["weight"].copy()}
        other["x"][place] = -np.float32(size) * rng.normal(size=6).astype("f")
        other["weight"][place] = 1
        here, gone, changed = map(total, (batch, without, other))
        moves.append(np.linalg.norm(changed - gone))
        assert np.linalg.norm(here - gone) <= C * (1 + 1e-5)
        assert np.linalg.norm(changed - here) <= 2 * C * (1 + 1e-5)
    assert max(moves) <= C * (1 + 1e-5)
    # The bound is reached, so a smaller one would not hold; what is not finite is out.
    assert min(moves) >= (0.7 * C if 1 <= size < np.inf else 0)
    assert np.isfinite(size) or max(moves) == 0


@needs_devices
def test_gradients_that_jax_sums_over_the_batch_are_no_examples():
    """Documented: parameters have to vary over the axis of the batch.

    The first examples of both devices are clipped together, and the second ones.
    """
    batch = batch_of(np.random.default_rng(1))
    summed = private_sum("global", True, mark=False)(batch)
    grads = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(PARAMS, batch)
    pairs = jax.tree.map(lambda g: g[:2] + g[2:], grads)
    total, _ = SUMS["global"](pairs, C)
    want = np.concatenate([np.ravel(x) for x in total.values()])
    np.testing.assert_allclose(summed, want, rtol=1e-5, atol=1e-6)


@BOTH
def test_a_traced_limit_below_zero_counts_as_zero(clip, peer):
    """What a schedule ends at; a JAX array is not checked for its sign."""
    grads = {"a": jnp.array([[3.0, 4.0], [0.0, 1.0]])}
    for limit in (-1e-9, -1.0):
        total, count = counted(clip(grads, jnp.float32(limit)))
        assert count == 2 and not total["a"].any()
