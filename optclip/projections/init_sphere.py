"""Spheres through where parameters started: each group keeps its first norm.

    x ← x · ‖x at init‖₂ / ‖x‖₂

The first norms are what `project` keeps in its state, and drift nowhere: each step is
measured against them. A group that starts at zero has no norm to keep and is free; its
radius is remembered as infinity. One whose norm is not finite, or not known because the
parameter was abstract, is remembered as NaN.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from optclip._core import meshes
from optclip._core.groupings import Grouping, per_leaf
from optclip._core.public import public
from optclip._core.types import AxisName
from optclip.projections.base import Extent, Set, Sum, extent_of
from optclip.projections.norm_arithmetic import Norm, norm_of, on_sphere, to_sphere


@public
def init_sphere(grouping: Grouping = per_leaf(), *, axis_name: AxisName = None) -> Set:
    """Leaves, matrices or units that keep the Euclidean norm that they started with.

        {x : ‖x‖₂ = ‖x at init‖₂}   for each group

    Args:
      grouping: what has a norm: `groupings.per_leaf()` (default), `per_matrix()` (each
        stacked layer and expert apart), `per_unit()` (say `axes` for heads) or
        `per_element()`.
      axis_name: inside `shard_map` and `pmap`, the mesh axes that groups extend over;
        None reads them off each leaf's type, and () says that each device holds groups
        whole.

    Returns:
      A set for `project`, `project_params` and `intersection`. In `project_params` a
      parameter's own values are the start, so nothing moves. `project` keeps one number
      a group in its state: those of whole leaves, and of leaves with one axis, in one
      vector, others in an array for each leaf, of the leaf's rank with 1 in place of
      the axes of the norm. Inside `shard_map` that array takes the leaf's own partition
      on the axes that it keeps.

    Edge cases: a group that starts at zero has no norm to keep and is left free. One
    that is zero later has no nearest point and stays zero. A norm within one unit in
    the last place of the leaf's dtype counts as the first one, so it never drifts
    further, in bfloat16 too. A leaf that is abstract at init (`jax.ShapeDtypeStruct`)
    has the radius NaN, and so do its elements at every step, until a saved state takes
    the place of that one; so has a group that is not finite at init.

    Raises:
      ValueError: if grouping joins leaves; inside `shard_map`, if units are sharded and
        axis_name does not say how.

    >>> import jax.numpy as jnp, optax, optclip
    >>> params = jnp.array([3.0, 4.0])
    >>> tx = optclip.project(init_sphere())
    >>> updates, _ = tx.update(jnp.array([3.0, 4.0]), tx.init(params), params)
    >>> print(optax.apply_updates(params, updates))
    [3. 4.]
    """

    def init(param: jax.Array, extent: Extent) -> jax.Array:
        if not meshes.bound(extent.mesh):  # outside of `pmap` a leaf is whole
            extent = Extent(extent.axes)
        size = norm_of(Sum((param,)), extent).size
        radius = jnp.where(jnp.isfinite(size), size, jnp.nan)
        radius = jnp.where(size == 0, jnp.inf, radius)
        return radius.reshape(1) if len(extent.axes) == param.ndim else radius

    def project(x: jax.Array, norm: Norm, memory: jax.Array) -> jax.Array:
        radius, free = first_norm(norm.value, memory)
        moved = jnp.where(free, x, to_sphere(x, norm, radius))
        return jnp.where(jnp.isnan(radius), jnp.nan, moved)  # zeros, too

    def contains(x: jax.Array, norm: Norm, memory: jax.Array) -> jax.Array:
        radius, free = first_norm(norm.value, memory)
        return free | on_sphere(x, norm, radius)

    return Set(extent_of(grouping, axis_name), norm_of, project, contains, init)


def first_norm(like: jax.Array, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The radii of a leaf's groups, laid out like their norms, and which are free.

    Of those the radius is 1: infinity, not chosen, would make a derivative NaN.
    """
    radius = memory.reshape(like.shape).astype(like.dtype)
    free = jnp.isinf(radius)
    return jnp.where(free, 1, radius), free
