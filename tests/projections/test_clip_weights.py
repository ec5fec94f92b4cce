"""WGAN weight clipping: weights by name, in trees of several libraries."""

import flax.linen as nn
import jax
import jax.numpy as jnp

import optclip
from tests.projections.steps import after, moved

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
