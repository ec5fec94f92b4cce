"""Per-example clipping for differentially private SGD: Optax's functions, NaN-safe.

    sum_i  g_i · min(1, C / ‖g_i‖)        over the examples i of a batch

An example that is not finite is clipped to nothing: it adds zero, and it counts as
clipped. Sizes are measured as by `clip_by(…, grouping=per_example())`.

Adding or removing an example moves the sum by at most C, and replacing one by at most
2C: what the noise of differential privacy is measured against. Inside `shard_map` this
holds if the mesh axes that split an example are named: its norm is then summed over
them. The sum over the examples of other devices is the caller's, `jax.lax.psum` over
the axis of the batch; the noise comes after it, once.

    varying = jax.lax.pcast(params, "data", to="varying")   # see below
    grads = jax.vmap(jax.grad(loss), (None, 0))(varying, batch)
    total, _ = per_example_global_norm_clip(
        grads, 1.0, axis_name={"kernel": "model", "bias": ()}
    )
    total = jax.lax.psum(total, "data")

Gradients of parameters that do not vary over the axis of the batch are summed over it
by JAX: what looks like one example is one of every device, and no type tells.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optclip._core import checks, groups, meshes, numerics, paths
from optclip._core.grouped import Groups
from optclip._core.groupings import per_example
from optclip._core.measures import l2
from optclip._core.public import error, public
from optclip._core.sizes import sizes_of
from optclip._core.types import AxisName, Tree
from optclip.clipping.actions import rescale, target_of

_TARGET = target_of(rescale(), nonfinite_value=0.0)


@public
def per_example_global_norm_clip(
    grads: optax.Updates, l2_norm_clip: ArrayLike, *, axis_name: AxisName = None
) -> tuple[optax.Updates, jax.Array]:
    """Clips each example's gradient by its norm over all leaves, and sums.

        sum_i  g_i · min(1, C / ‖g_i‖)

    Equals `optax.per_example_global_norm_clip` for finite examples.

    Args:
      grads: a tree whose leaves have a leading batch axis, as from `jax.vmap`.
      l2_norm_clip: the largest norm C of one example, a non-negative scalar.
      axis_name: inside `shard_map` and `pmap`, the mesh axes that one example is split
        over, as the parameters are: a name, a tuple of names, or a tree of these that
        may be a prefix of grads, where leaves differ (a leaf that a named axis does not
        split would count once for each device). () if every device has whole examples:
        an axis that splits the batch is not named.

    Returns:
      (sum of the clipped gradients, without the batch axis, in the leaves' dtypes;
      how many examples were clipped, an int32 scalar), of the examples on this device:
      `jax.lax.psum` both over the mesh axis that splits the batch. An example with NaN,
      infinity or an overflowing norm adds zero and counts as clipped.

    Edge cases: integers and booleans count in the norm, because the sum is what privacy
    bounds, and come out as float32. float0 does not count. C = 0 gives zeros. Inside
    `shard_map`, differentiate with respect to parameters that vary over the axis of the
    batch (`jax.lax.pcast(params, "data", to="varying")`): otherwise JAX adds up the
    gradients of all devices, and each sum would be clipped as if it were one example.

    Raises:
      ValueError: if leaves share no batch axis or hold random keys, l2_norm_clip is
        negative, NaN, a bool or not a scalar, or a leaf varies over a mesh axis inside
        `shard_map` without axis_name.

    Reference: [Abadi et al. 2016](https://arxiv.org/abs/1607.00133).

    >>> import jax.numpy as jnp
    >>> grads = jnp.array([[3.0, 4.0], [0.3, 0.4], [jnp.nan, 1.0]])
    >>> total, clipped = per_example_global_norm_clip(grads, 1.0)
    >>> print(total, clipped)
    [0.90000004 1.2       ] 2
    """
    _check_limit(l2_norm_clip=l2_norm_clip)
    return _clipped_sum(_as_floats(grads), l2_norm_clip, axis_name)


@public
def per_example_layer_norm_clip(
    grads: optax.Updates,
    global_l2_norm_clip: ArrayLike,
    uniform: bool = True,
    *,
    axis_name: AxisName = None,
) -> tuple[optax.Updates, Tree]:
    """Clips each example's gradient leaf by leaf, and sums.

    The limits of the K leaves of D_l elements share one budget C:

        C_l = C / √K   (uniform)        or       C_l = C · √(D_l / D)

    Equals `optax.per_example_layer_norm_clip` for finite examples.

    Args:
      grads: a tree whose leaves have a leading batch axis, as from `jax.vmap`.
      global_l2_norm_clip: the budget C, a non-negative scalar.
      uniform: whether all leaves get the same share.
      axis_name: inside `shard_map` and `pmap`, the mesh axes that one example is split
        over, as in `per_example_global_norm_clip`.

    Returns:
      (sum of the clipped gradients, without the batch axis; a tree like it of int32
      scalars: how many examples were clipped in each leaf), of the examples on this
      device. A leaf of an example that is not finite adds zero and counts as clipped.

    Edge cases: integers and booleans count as a leaf, and come out as float32. float0
    and empty leaves do not count. C = 0 gives zeros.

    Raises:
      ValueError: if leaves share no batch axis or hold random keys, global_l2_norm_clip
        is negative, NaN, a bool or not a scalar, or a leaf varies over a mesh axis
        inside `shard_map` without axis_name.

    Reference: [McMahan et al. 2017](https://arxiv.org/abs/1710.06963).

    >>> import jax.numpy as jnp
    >>> grads = {"a": jnp.array([[0.0, 4.0]]), "b": jnp.array([[0.1]])}
    >>> total, clipped = per_example_layer_norm_clip(grads, 2.0**0.5)
    >>> print(f"{total['a'][1]:.3f} {total['b'][0]:.3f}", clipped["a"], clipped["b"])
    1.000 0.100 1 0
    """
    _check_limit(global_l2_norm_clip=global_l2_norm_clip)
    grads = _as_floats(grads)
    known, counted = _gather(grads, axis_name)
    meshes_of: list[Any] = [m.mesh for group in known.groups for m in group.members]
    dims = [
        math.prod(leaf.shape[1:]) * meshes.axis_size(mesh)
        for leaf, mesh in zip(counted, meshes_of, strict=True)
    ]
    leaves, treedef = jax.tree_util.tree_flatten(grads)
    sums = {n: _batch_sum(x) for n, x in enumerate(leaves) if n not in known.places}
    counts = [jnp.zeros((), jnp.int32)] * len(leaves)
    budget = numerics.bound_in(global_l2_norm_clip, known.dtype)
    for place, dim, mesh in zip(known.places, dims, meshes_of, strict=True):
        share = 1 / len(dims) if uniform else dim / sum(dims)
        limit = budget * math.sqrt(share)
        sums[place], counts[place] = _clipped_sum(leaves[place], limit, mesh)
    totals = [sums[n] for n in range(len(leaves))]
    return treedef.unflatten(totals), treedef.unflatten(counts)


def _check_limit(**named: ArrayLike) -> None:
    for name, value in named.items():
        if callable(value):
            raise error(f"{name} must be a non-negative number, got {value!r}.")
    checks.limit_like(**named)


def _as_floats(grads: optax.Updates) -> optax.Updates:
    """The tree with integers as float32; float0 stays."""

    def as_float(path: str, leaf: Any) -> Any:
        dtype = getattr(leaf, "dtype", None)
        if dtype == jax.dtypes.float0:
            return leaf
        if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
            raise error(f"grads must be numbers, got random keys at {str(path)!r}.")
        x = jnp.asarray(leaf)
        return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)

    floats = [as_float(path, leaf) for path, leaf in paths.leaves(grads)]
    treedef = jax.tree_util.tree_structure(grads)
    return jax.tree_util.tree_unflatten(treedef, floats)


def _gather(
    grads: optax.Updates, axis_name: AxisName
) -> tuple[Groups, list[jax.Array]]:
    return groups.gather(grads, per_example(), meshes.axes_of(axis_name))


def _clipped_sum(
    grads: optax.Updates, clip: ArrayLike, axis_name: AxisName
) -> tuple[optax.Updates, jax.Array]:
    known, leaves = _gather(grads, axis_name)
    if not known.groups:
        return jax.tree.map(_batch_sum, grads), jnp.zeros((), jnp.int32)
    limit = jnp.maximum(numerics.bound_in(clip, known.dtype), 0)
    (size,) = sizes_of(known, leaves, l2, limit)
    clipped = groups.rescaled(known, grads, leaves, [size], [_TARGET(size, limit)])
    count = jnp.sum((size > limit) | ~jnp.isfinite(size), dtype=jnp.int32)
    return jax.tree.map(_batch_sum, clipped), count


def _batch_sum(x: Any) -> Any:
    """The sum over examples, accumulated in float32 or wider; nothing of float0."""
    if x.dtype == jax.dtypes.float0:
        return np.zeros(x.shape[1:], jax.dtypes.float0)
    wide = numerics.accumulation_dtype(x.dtype)
    return jnp.sum(numerics.widen(x, wide), axis=0).astype(x.dtype)
