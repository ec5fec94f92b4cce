"""QK-clip, with logits recorded by Flax's own attention."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import optclip
from tests.untyped import untyped

X = 3 * np.random.default_rng(0).standard_normal((2, 5, 8)).astype("f")
CAUSAL = np.tril(np.ones((1, 1, 5, 5), bool))
GROUPED = "num_kv_heads" in inspect.signature(nnx.MultiHeadAttention).parameters


def logits(params, mask=None):
    """The largest logit of each head, by hand; keys may have fewer heads."""
    q, k = (
        np.einsum("bsf,fhd->bshd", X, params[name]["kernel"])
        + np.asarray(params[name]["bias"])
        for name in ("query", "key")
    )
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    every = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    every = every if mask is None else np.where(mask, every, -np.inf)
    return every.max(axis=(0, 2, 3))


def clipped(params, recorded, tau):
    tx = optax.chain(optax.sgd(1.0), optclip.qk_clip(tau))
    zeros = jax.tree.map(jnp.zeros_like, params)
    update = jax.jit(tx.update)
    updates, _ = update(zeros, tx.init(params), params, max_logits=recorded)
    return untyped(optax.apply_updates(params, updates))


@pytest.mark.parametrize("mask", [None, CAUSAL], ids=["all", "causal"])
def test_linen(mask):
    attention = optclip.record_max_logits(nn.dot_product_attention)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.MultiHeadDotProductAttention(
                4, attention_fn=attention, name="mha"
            )
            return layer(x, mask=mask, sow_weights=True)

    model = untyped(Model)()
    params = model.init(jax.random.key(0), X)["params"]
    _, seen = model.apply({"params": params}, X, mutable=["intermediates"])
    plain = untyped(nn.MultiHeadDotProductAttention(4)).apply(
        {"params": params["mha"]}, X, mask=mask
    )
    np.testing.assert_allclose(model.apply({"params": params}, X), plain, rtol=1e-6)
    before = logits(params["mha"], mask)
    largest = seen["intermediates"]["mha"]["max_logits"]
    np.testing.assert_allclose(largest, before, rtol=1e-4)
    tau = float(np.sort(before)[1:3].mean())  # two heads over, two within
    for recorded in (seen["intermediates"], seen, {"mha": largest}):
        after = clipped(params, recorded, tau)
        want = np.minimum(before, tau)
        np.testing.assert_allclose(logits(after["mha"], mask), want, rtol=1e-4)
    within = before < tau
    for name in ("query", "key"):
        for leaf in ("kernel", "bias"):
            old, new = params["mha"][name][leaf], after["mha"][name][leaf]
            np.testing.assert_array_equal(old[..., within, :], new[..., within, :])
    for name in ("value", "out"):
        np.testing.assert_array_equal(
            params["mha"][name]["kernel"], after["mha"][name]["kernel"]
        )


@pytest.mark.parametrize("key_heads", [4, 2] if GROUPED else [4])
def test_nnx(key_heads):
    attention = optclip.record_max_logits(nnx.dot_product_attention)
    grouped = {"num_kv_heads": key_heads} if GROUPED else {}
    layer = nnx.MultiHeadAttention(
        4, 8, decode=False, attention_fn=attention, rngs=nnx.Rngs(0), **grouped
    )
    optimizer = nnx.Optimizer(
        layer, optax.chain(optax.sgd(0.0), optclip.qk_clip(5.0)), wrt=nnx.Param
    )

    def loss(layer):
        return layer(X, sow_weights=True).mean()

    @nnx.jit
    def step(layer, optimizer):
        if hasattr(nnx, "capture"):
            captured = untyped(nnx.capture(nnx.Intermediate)(loss))
            grads, recorded = nnx.grad(captured, has_aux=True)(layer)
        else:
            grads = nnx.grad(loss)(layer)
            recorded = nnx.pop(layer, nnx.Intermediate)
        optimizer.update(layer, grads, max_logits=recorded)
        return recorded

    def by_hand():
        return logits(nnx.to_pure_dict(nnx.state(layer, nnx.Param)))

    before = by_hand()
    assert np.sum(before > 5) >= 2
    (recorded,) = jax.tree.leaves(step(layer, optimizer))
    np.testing.assert_allclose(recorded, before, rtol=1e-4)
    np.testing.assert_allclose(by_hand(), np.minimum(before, 5), rtol=1e-4)
    layer(jnp.asarray(X))  # without sow_weights nothing is recorded
    assert not jax.tree.leaves(nnx.pop(layer, nnx.Intermediate))


def recording(heads, width):
    """Attention in Linen, and a function to gradients and the recorded logits."""
    layer = untyped(nn.MultiHeadDotProductAttention)(
        heads,
        qkv_features=width,
        out_features=8,
        attention_fn=optclip.record_max_logits(nn.dot_product_attention),
    )

    def loss(params, x):
        out, seen = layer.apply(
            {"params": params}, x, sow_weights=True, mutable=["intermediates"]
        )
        return jnp.mean(jnp.square(out)), seen["intermediates"]

    return layer, jax.grad(loss, has_aux=True)


TAU = 2.0


def whole_step(layer, gradient):
    """Parameters, all of the logits, and what one step on the whole batch makes."""
    params = layer.init(jax.random.key(0), X)["params"]
    tx = untyped(optax.chain(optax.sgd(0.1), optclip.qk_clip(TAU)))

    def step(params, x):
        grads, seen = gradient(params, x)
        updates, _ = tx.update(grads, tx.init(params), params, max_logits=seen)
        return optax.apply_updates(params, updates), seen["max_logits"]

    return params, tx, *jax.jit(step)(params, X)


def close(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
                 one, other)  # fmt: skip


@pytest.mark.parametrize("largest_first", [True, False])
def test_micro_batches(largest_first):
    """By the maximum over them, not by the last: a step on the whole batch."""
    layer, gradient = recording(4, 8)
    params, tx, want, largest = whole_step(layer, gradient)
    multi = optax.MultiSteps(tx, every_k_schedule=2)

    @jax.jit
    def step(params, state, maxima, x):
        grads, seen = gradient(params, x)
        maxima = jax.tree.map(jnp.maximum, maxima, seen)
        with jax.numpy_dtype_promotion("standard"):  # MultiSteps needs it
            updates, state = multi.update(grads, state, params, max_logits=maxima)
        stepped = multi.has_updated(state)
        maxima = jax.tree.map(lambda x: jnp.where(stepped, -jnp.inf, x), maxima)
        return optax.apply_updates(params, updates), state, maxima, seen

    order = X[1:], X[:1]  # their maxima are those of the second of the whole batch
    state, maxima = multi.init(params), {"max_logits": jnp.full(4, -jnp.inf)}
    after, recorded = params, []
    for x in order if largest_first else order[::-1]:
        assert not multi.has_updated(state)
        after, state, maxima, seen = step(after, state, maxima, x)
        recorded.append(seen["max_logits"])
    first, last = recorded
    assert np.all((first > last) == largest_first)
    assert np.any(largest > TAU)
    assert multi.has_updated(state)
    close(after, want)
    assert np.all(maxima["max_logits"] == -np.inf)


def test_shard_map():
    """The batch on one axis, whose maxima are joined; the heads on the other."""
    layer, gradient = recording(4, 8)
    params, tx, _, largest = whole_step(layer, gradient)
    _, own_gradient = recording(2, 4)  # two heads a device
    specs = {
        name: {"kernel": P(None, "model"), "bias": P("model")}
        for name in ("query", "key", "value")
    }
    specs["out"] = {"kernel": P("model"), "bias": P()}

    def step(params, x, joined):
        _, seen = own_gradient(params, x)
        if joined:
            seen = jax.lax.pmax(seen, "data")
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = tx.update(zeros, tx.init(params), params, max_logits=seen)
        return optax.apply_updates(params, updates), seen["max_logits"]

    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))

    def mapped(joined):
        return jax.jit(
            jax.shard_map(
                lambda params, x: step(params, x, joined),
                mesh=mesh,
                in_specs=(specs, P("data")),
                out_specs=(specs, P("model")),
            )
        )

    after, seen = mapped(True)(params, X)
    np.testing.assert_allclose(seen, largest, rtol=1e-5)
    close(after, clipped(params, {"": largest}, TAU))
    # Devices would shrink the same heads by different factors.
    with pytest.raises(ValueError, match=r"max_logits must be the same .* \('data',\)"):
        mapped(False)(params, X)


def plain(heads=2, key_heads=2, stack=(), dtype=jnp.float32):
    return {
        "mha": {
            name: {
                "kernel": jnp.ones((*stack, 3, count, 2), dtype),
                "bias": jnp.ones((*stack, count, 2), dtype),
            }
            for name, count in (("query", heads), ("key", key_heads))
        }
    }


def test_stacked_layers_and_half_precision():
    params = plain(stack=(2,), dtype=jnp.bfloat16)
    largest = jnp.array([[400.0, 100.0], [1.0, 1600.0]])
    after = clipped(params, {"mha": largest}, 100.0)
    want = np.array([[0.5, 1.0], [1.0, 0.25]])
    for name in ("query", "key"):
        kernel, bias = after["mha"][name]["kernel"], after["mha"][name]["bias"]
        np.testing.assert_array_equal(kernel[:, 0, :, 0].astype("f"), want)
        np.testing.assert_array_equal(bias[..., 0].astype("f"), want)


def test_logits_that_are_not_finite_change_nothing():
    params = plain()
    after = clipped(params, {"mha": jnp.array([jnp.nan, jnp.inf])}, 100.0)
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_array_below_zero_counts_as_zero():
    """Then no logit is above 0: heads above it are zero, others keep their bits."""
    params = plain()
    for tau in (0.0, -1.0):
        after = clipped(params, {"mha": jnp.array([3.0, -2.0])}, jnp.float32(tau))
        for name in ("query", "key"):
            kernel = after["mha"][name]["kernel"]
            assert not kernel[..., 0, :].any()
            np.testing.assert_array_equal(
                kernel[..., 1, :], params["mha"][name]["kernel"][..., 1, :]
            )


def test_a_sharp_attention_stays_below_tau():
    """Many steps that push logits up; clipped, they stay at tau."""
    params = {"mha": {**plain()["mha"]}}
    tx = untyped(optax.chain(optax.sgd(0.5), optclip.qk_clip(50.0)))
    state = tx.init(params)
    up = jax.tree.map(lambda x: -jnp.ones_like(x), params)
    x = np.ones((1, 1, 3), "f")

    def largest(p):
        p = jax.device_get(p)
        q, k = (np.einsum("bsf,fhd->bshd", x, p[n]["kernel"]) + p[n]["bias"] for n in p)
        return jnp.asarray(np.einsum("bqhd,bkhd->bhqk", q, k).max((0, 2, 3)) / 2**0.5)

    for _ in range(20):
        seen = {"mha": largest(params["mha"])}
        updates, state = tx.update(up, state, params, max_logits=seen)
        params = untyped(optax.apply_updates(params, updates))
    assert np.all(largest(params["mha"]) < 100)


@pytest.mark.parametrize(
    ("params", "recorded", "says"),
    [
        (plain(), {"mha": jnp.ones(3)}, "must have one number a head, got shape (3,) "),
        (plain(), {"mha": jnp.ones(())}, "must have one number a head, got shape () "),
        (
            plain(),
            {"mha": jnp.ones((3, 2))},
            "got shape (3, 2) for 2 heads of a kernel ",
        ),
        (plain(stack=(2,)), {"mha": jnp.ones((3, 2))}, "got shape (3, 2) for 2 heads"),
        (plain(), {"mha": jnp.ones((1, 1, 2))}, "got shape (1, 1, 2) for 2 heads"),
        (plain(), {"mlp": jnp.ones(2)}, "must name attention modules, got 'mlp'"),
        (
            {"mha": {**plain()["mha"], "query_ln": {"scale": jnp.ones(2)}}},
            {"mha": jnp.ones(2)},
            "queries and keys must not be normalised, got 'mha'",
        ),
    ],
)
def test_bad_logits(params, recorded, says):
    with pytest.raises(ValueError, match="qk_clip: ") as error:
        clipped(params, recorded, 1.0)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("query", "key"),
    [((8, 4, 2), (8, 2)), ((8, 6, 2), (8, 4, 2)), ((8,), (8,))],
    ids=["no heads", "do not divide", "vectors"],
)
def test_kernels_that_do_not_fit_each_other(query, key):
    params = {"query": {"kernel": jnp.ones(query)}, "key": {"kernel": jnp.ones(key)}}
    with pytest.raises(ValueError, match="numbers of heads divide"):
        untyped(optclip.qk_clip(1.0)).update(
            params, None, params, max_logits={"": jnp.ones(4)}
        )


def test_updates_of_another_shape():
    params = {name: {"kernel": jnp.ones((3, 2, 1))} for name in ("query", "key")}
    updates = {name: {"kernel": jnp.ones((1, 2, 1))} for name in ("query", "key")}
    with pytest.raises(ValueError, match="params must have the shapes of updates"):
        untyped(optclip.qk_clip(1.0)).update(
            updates, None, params, max_logits={"": jnp.array([2.0, 2.0])}
        )
