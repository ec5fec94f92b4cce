"""`metrics`: the numbers that every clip keeps, read out of any optimizer state."""

from __future__ import annotations

from typing import Any

import jax

from optclip._core import paths
from optclip._core.metrics import ClipMetrics, SkipMetrics
from optclip._core.public import public


@public
def metrics(opt_state: Any, separator: str = "/") -> dict[str, jax.Array]:
    """The metrics of every clip in an optimizer state, ready for a logger.

    Args:
      opt_state: any optimizer state: of `chain`, `named_chain`, `masked`, `partition`,
        `MultiSteps`, `inject_hyperparams`, …, or an `nnx.Optimizer`'s `opt_state`.
      separator: between the names of a key.

    Returns:
      A flat dict `{path of the state}/{field}` of scalar arrays; the path is empty for
      a clip that stands alone. Works inside `jit`. Empty if there is no clip.

    >>> import jax.numpy as jnp, optax, optclip
    >>> tx = optax.chain(optclip.clip_by_global_norm(1.0), optax.sgd(0.1))
    >>> params = {"w": jnp.array([3.0, 4.0])}
    >>> _, state = tx.update(params, tx.init(params))
    >>> for name, value in metrics(state).items():
    ...     print(name, value)
    0/size 5.0
    0/limit 1.0
    0/clipped_fraction 1.0
    0/steps 1
    0/clipped_steps 1
    0/nonfinite_steps 0
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(
        opt_state, is_leaf=lambda node: isinstance(node, ClipMetrics | SkipMetrics)
    )
    found: dict[str, jax.Array] = {}
    for keys, node in flat:
        if not isinstance(node, ClipMetrics | SkipMetrics):
            continue
        prefix = paths.names(keys)[:-1]  # without the field that holds the metrics
        for field, value in zip(node._fields, node, strict=True):
            # `nnx.Optimizer` wraps every leaf in a Variable: a tree with one leaf.
            if not (leaves := jax.tree_util.tree_leaves(value)):
                continue
            (leaf,) = leaves
            found[separator.join([*prefix, field])] = leaf
    return found
