"""Per-example clipping for differentially private SGD: Optax's functions, NaN-safe.

    sum_i  g_i · min(1, C / ‖g_i‖)        over the examples i of a batch

An example that is not finite is clipped to nothing: it adds zero and it counts.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optclip._core import checks, groups, meshes, numerics
from optclip._core.groupings import per_example
from optclip._core.measures import l2
from optclip._core.public import public
from optclip._core.sizes import sizes_of
from optclip.clipping.actions import rescale


@public
def per_example_global_norm_clip(
    grads: Any, l2_norm_clip: ArrayLike
) -> tuple[Any, jax.Array]:
    """Clips each example's gradient by its norm over all leaves, and sums.

    Equals `optax.per_example_global_norm_clip` for finite examples.

    Args:
      grads: a tree whose leaves have a leading batch axis, as from `jax.vmap`.
      l2_norm_clip: the largest norm C of one example, a non-negative scalar.

    Returns:
      (sum of the clipped gradients, without the batch axis, in the leaves' dtypes;
      how many examples were clipped, an int32 scalar). An example with NaN, infinity or
      an overflowing norm adds zero and counts as clipped.

    Raises:
      ValueError: if leaves share no batch axis, or l2_norm_clip is negative, NaN, a
        bool or not a scalar.

    Reference: Abadi et al. 2016, arXiv 1607.00133.

    >>> import jax.numpy as jnp
    >>> grads = jnp.array([[3.0, 4.0], [0.3, 0.4], [jnp.nan, 1.0]])
    >>> total, clipped = per_example_global_norm_clip(grads, 1.0)
    >>> print(total, clipped)
    [0.90000004 1.2       ] 2
    """
    checks.limit_like(l2_norm_clip=l2_norm_clip)
    return _clipped_sum(grads, l2_norm_clip)


@public
def per_example_layer_norm_clip(
    grads: Any, global_l2_norm_clip: ArrayLike, uniform: bool = True
) -> tuple[Any, Any]:
    """Clips each example's gradient leaf by leaf, and sums.

    The limits of the K leaves of D_l elements share one budget C:

        C_l = C / √K   (uniform)        or       C_l = C · √(D_l / D)

    Equals `optax.per_example_layer_norm_clip` for finite examples.

    Args:
      grads: a tree whose leaves have a leading batch axis, as from `jax.vmap`.
      global_l2_norm_clip: the budget C, a non-negative scalar.
      uniform: whether all leaves get the same share.

    Returns:
      (sum of the clipped gradients, without the batch axis; a tree like it of int32
      scalars: how many examples were clipped in each leaf). A leaf of an example that
      is not finite adds zero and counts as clipped.

    Raises:
      ValueError: as `per_example_global_norm_clip`.

    Reference: McMahan et al. 2017, arXiv 1710.06963.

    >>> import jax.numpy as jnp
    >>> grads = {"a": jnp.array([[0.0, 4.0]]), "b": jnp.array([[0.1]])}
    >>> total, clipped = per_example_layer_norm_clip(grads, 2.0**0.5)
    >>> print(f"{total['a'][1]:.3f} {total['b'][0]:.3f}", clipped["a"], clipped["b"])
    1.000 0.100 1 0
    """
    checks.limit_like(global_l2_norm_clip=global_l2_norm_clip)
    leaves, treedef = jax.tree_util.tree_flatten(grads)
    gathered, values = groups.gather(grads, per_example(), meshes.axes_of(None))
    dims = {
        gathered.places[index]: math.prod(leaf.shape[1:])
        for index, leaf in enumerate(values)
    }
    everything = sum(dims.values())
    sums, counts = list(leaves), [jnp.zeros((), jnp.int32)] * len(leaves)
    for index, dim in dims.items():
        share = 1 / len(dims) if uniform else dim / everything
        limit = jnp.asarray(global_l2_norm_clip) * math.sqrt(share)
        sums[index], counts[index] = _clipped_sum(leaves[index], limit)
    for index, leaf in enumerate(leaves):
        if index not in dims:
            sums[index] = _batch_sum(leaf)
    return (
        jax.tree_util.tree_unflatten(treedef, sums),
        jax.tree_util.tree_unflatten(treedef, counts),
    )


def _clipped_sum(grads: Any, clip: ArrayLike) -> tuple[Any, jax.Array]:
    gathered, leaves = groups.gather(grads, per_example(), meshes.axes_of(None))
    if not gathered.groups:
        return jax.tree.map(_batch_sum, grads), jnp.zeros((), jnp.int32)
    limit = jnp.asarray(clip, gathered.dtype)
    (size,) = sizes_of(gathered, leaves, l2, limit)
    finite = jnp.isfinite(size)
    target = jnp.where(finite, rescale().target(size, limit), 0)
    clipped = groups.rescaled(gathered, grads, leaves, [size], [target])
    count = jnp.sum((size > limit) | ~finite, dtype=jnp.int32)
    return jax.tree.map(_batch_sum, clipped), count


def _batch_sum(x: Any) -> jax.Array:
    """The sum over examples, accumulated in float32 or wider."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.sum(x, axis=0, dtype=x.dtype)
    wide = numerics.wide_dtype(x.dtype)
    return jnp.sum(numerics.widen(x, wide), axis=0).astype(x.dtype)
