"""Steps without updates, and what they moved."""

import jax
import jax.numpy as jnp
import numpy as np
import optax


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
