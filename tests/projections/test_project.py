"""The doors: which leaves, when, in which trees."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze

import optclip
from optclip import sets


def model():
    return {
        "dense": {"kernel": jnp.full((2, 3), 5.0), "bias": jnp.full(3, 5.0)},
        "norm": {"scale": jnp.full(3, 5.0), "bias": jnp.full(3, 5.0)},
    }


def after(tx, params, steps=1):
    """The parameters after some steps of no update."""
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
    return params


def moved(params):
    """The paths at which a tree of fives is no longer fives."""
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    names = ("/".join(key.key for key in keys) for keys, x in flat if np.all(x != 5))
    return set(names)


EVERY = {"dense/kernel", "dense/bias", "norm/scale", "norm/bias"}


@pytest.mark.parametrize(
    ("where", "want"),
    [
        (None, EVERY),
        (optclip.everything, EVERY),
        ("^dense/", {"dense/kernel", "dense/bias"}),
        (lambda path, leaf: leaf.ndim == 2, {"dense/kernel"}),
        ({"dense": True, "norm": False}, {"dense/kernel", "dense/bias"}),
    ],
    ids=["none", "everything", "pattern", "predicate", "tree"],
)  # fmt: skip
def test_where(where, want):
    for tx in (optclip.project(sets.linf_ball(1.0), where),):
        assert moved(after(tx, model())) == want
    assert moved(optclip.project_params(model(), sets.linf_ball(1.0), where)) == want


def test_a_tree_of_sets():
    constraint = {"dense": sets.linf_ball(1.0), "norm": {"scale": sets.box(2.0, 3.0)}}
    params = model()
    got = optclip.project_params(params, constraint, "kernel|scale")
    assert np.all(got["dense"]["kernel"] <= 1) and np.all(got["norm"]["scale"] == 3)
    assert moved(got) == {"dense/kernel", "norm/scale"}


def test_masked_none_and_frozen_leaves_do_not_move():
    params = {"a": jnp.full(2, 5.0), "b": jnp.full(2, 5.0), "none": None}
    tx = optax.masked(
        optclip.project(sets.linf_ball(1.0)), {"a": True, "b": False, "none": None}
    )
    updates, _ = tx.update(
        jax.tree.map(jnp.zeros_like, params), tx.init(params), params
    )
    assert np.all(updates["a"] == -4) and np.all(updates["b"] == 0)
    parts = {
        "free": optclip.project(sets.linf_ball(1.0)),
        "frozen": optax.set_to_zero(),
    }
    split = getattr(optax, "partition", None) or optax.multi_transform
    tx = split(parts, {"a": "free", "b": "frozen", "none": "free"})
    updates, _ = tx.update(
        jax.tree.map(jnp.zeros_like, params), tx.init(params), params
    )
    assert np.all(updates["a"] == -4) and np.all(updates["b"] == 0)


def test_every_counts_steps():
    tx = optclip.project(sets.linf_ball(1.0), every=3)
    params = model()
    assert moved(after(tx, params, 2)) == set()
    assert moved(after(tx, params, 3)) == EVERY


def test_every_counts_real_steps_under_multi_steps():
    chain = optax.chain(optax.sgd(1.0), optclip.project(sets.linf_ball(1.0), every=2))
    tx = optax.MultiSteps(chain, every_k_schedule=2)
    params = model()
    with jax.numpy_dtype_promotion("standard"):
        assert moved(after(tx, params, 3)) == set()
        assert moved(after(tx, params, 4)) == EVERY


def test_order_matters():
    """Last it lands; before the optimizer it does not."""
    params, grads = jnp.array([0.9]), jnp.array([-5.0])
    box = optclip.project(sets.linf_ball(1.0))
    for tx, lands in (
        (optax.chain(optax.sgd(1.0), box), True),
        (optax.chain(box, optax.sgd(1.0)), False),
    ):
        updates, _ = tx.update(grads, tx.init(params), params)
        assert (optax.apply_updates(params, updates) <= 1).all() == lands


# Weights by name.

SHAPES = {
    "conv": {"kernel": (3, 3, 2, 4), "bias": (4,)},
    "embed": {"embedding": (7, 3)},
    "haiku": {"w": (5,), "b": (1,)},
    "stack": {"kernel": (2, 3, 3), "bias": (2, 3), "scale": (2, 3)},
    "norm": {"scale": (4,), "offset": (4,)},
    "equinox": {"weight": (3,), "bias": (3,)},
    "linear": {"weight": (3, 2)},
    "own": {"matrix": (3, 2), "vector": (3,)},
}
WEIGHTS = {
    "conv/kernel",
    "embed/embedding",
    "haiku/w",
    "stack/kernel",
    "linear/weight",
    "own/matrix",
}


def test_clip_weights_takes_weights():
    params = jax.tree.map(
        lambda shape: jnp.full(shape, 5.0),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    assert moved(after(optclip.clip_weights(0.01), params)) == WEIGHTS
    everything = optclip.clip_weights(0.01, where=optclip.everything)
    assert len(moved(after(everything, params))) == len(jax.tree.leaves(params))


def test_clip_weights_of_a_critic_with_batch_norm():
    critic = nn.Sequential(
        [nn.Dense(3), nn.BatchNorm(use_running_average=True), nn.Dense(1)]
    )
    params = critic.init(jax.random.key(0), jnp.ones((2, 4)))["params"]
    params = jax.tree.map(lambda x: jnp.full(x.shape, 5.0), params)
    want = {"layers_0/kernel", "layers_2/kernel"}
    assert moved(after(optclip.clip_weights(0.01), params)) == want


def test_init_box_is_kept_in_the_state():
    params = {"kernel": jnp.array([[0.5, -2.0]]), "bias": jnp.zeros(2)}
    tx = optclip.project(sets.init_box(1.5))
    state = tx.init(params)
    assert state.memory.tolist() == [np.inf, 2.0]
    up = jax.tree.map(lambda x: jnp.full(x.shape, 100.0), params)
    for _ in range(2):  # from the start, not from where the parameter has gone
        updates, state = tx.update(up, state, params)
        params = optax.apply_updates(params, updates)
    assert np.all(params["kernel"] == 3.0) and np.all(params["bias"] == 200.0)
    both = optclip.project(sets.intersection(sets.init_box(1.0), sets.init_box(2.0)))
    assert both.init(params).memory.shape == (4,)


# Trees of every library.


def test_frozen_dicts_and_linen_variables():
    frozen = freeze({"params": model()})
    got = optclip.project_params(frozen, sets.linf_ball(1.0), "^dense/kernel$")
    assert type(got) is type(frozen)
    assert moved(got["params"].unfreeze()) == {"dense/kernel"}


def test_nnx_module_in_place_and_state():
    module = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    state = jax.tree.map(lambda x: x + 10, nnx.state(module, nnx.Param))
    bounded = optclip.project_params(state, sets.linf_ball(1.0), "kernel$")
    assert jax.tree.structure(bounded) == jax.tree.structure(state)
    nnx.update(module, state)
    assert optclip.project_params(module, sets.linf_ball(1.0), "kernel$") is module
    assert np.all(module.kernel[...] == 1) and np.all(module.bias[...] == 10)
    np.testing.assert_array_equal(bounded["kernel"][...], module.kernel[...])


def test_equinox_module():
    linear = eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(0))
    got = optclip.project_params(linear, sets.linf_ball(1e-3))
    assert type(got) is type(linear) and got.activation is linear.activation
    arrays = jax.tree.leaves(eqx.filter(got, eqx.is_array))
    assert all(np.all(np.abs(x) <= 1e-3) for x in arrays)


# Sets of matrices.


@pytest.mark.parametrize("iterations", [None, 40])
def test_convolutions_and_stacked_layers_are_matrices(iterations):
    rng = np.random.default_rng(0)
    params = {
        "conv": {"kernel": 5 * rng.standard_normal((3, 3, 2, 4)), "bias": np.ones(4)},
        "stack": {"kernel": 5 * rng.normal(size=(2, 3, 6)), "bias": np.ones((2, 6))},
        "small": {"kernel": 0.01 * rng.standard_normal((2, 3)), "bias": np.zeros(3)},
    }  # fmt: skip
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    got = optclip.project_params(params, sets.spectral_ball(1.0, iterations=iterations))
    matrices = (got["conv"]["kernel"].reshape(18, 4), *got["stack"]["kernel"])
    for matrix in matrices:
        np.testing.assert_allclose(np.linalg.norm(matrix, 2), 1, atol=1e-4)
    assert np.linalg.norm(got["stack"]["bias"][1]) == pytest.approx(1, abs=1e-5)
    if iterations is None:
        assert np.all(got["small"]["kernel"] == params["small"]["kernel"])
    assert np.all(got["small"]["bias"] == 0)


@pytest.mark.parametrize("steps", [8, 12, 16, 24])
@pytest.mark.parametrize("largest", [1.05, 2.0, 10.0])
def test_the_stated_error_of_newton_schulz(largest, steps):
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.standard_normal((48, 32)))
    v, _ = np.linalg.qr(rng.standard_normal((32, 32)))
    w = jnp.asarray((u * np.geomspace(0.01, largest, 32)) @ v.T, jnp.float32)
    tree = {"kernel": w}
    products = optclip.project_params(tree, sets.spectral_ball(1.0, iterations=steps))
    exact = optclip.project_params(tree, sets.spectral_ball(1.0))
    s = np.linalg.svd(np.asarray(w, np.float64), compute_uv=False)
    stated = np.sqrt(np.sum((s**2 - 1) ** 2)) * 1.875**-steps / 4
    off = np.asarray(products["kernel"] - exact["kernel"], np.float64)
    assert np.linalg.norm(off, 2) <= stated + 1e-5 * largest
