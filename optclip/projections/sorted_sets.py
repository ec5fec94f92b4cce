"""Sets whose nearest point is found by sorting: the l1 ball and the simplex.

    l1_ball   x ← sign(x) max(|x| - τ, 0)     simplex   x ← max(x - τ, 0)

with the τ that makes the sum right. Optax finds it, in float32 or wider; here the sums
are polished, and results are rounded so that they hold in the leaf's dtype. Sorting
keeps about five copies of the leaf in memory.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optclip._core import checks, numerics
from optclip._core.groupings import Grouping, Shape, per_leaf
from optclip._core.public import public
from optclip._core.rounding import bound_towards, rounded, rounded_towards
from optclip.projections.base import (
    Extent,
    Set,
    as_it_is,
    extent_of,
    gathered,
    require_whole,
)
from optclip.projections.boxes import bound_array


@public
def l1_ball(
    radius: ArrayLike = 1.0,
    *,
    grouping: Grouping = per_leaf(),  # noqa: B008 (an immutable tuple)
) -> Set:
    """Leaves, or units, whose sum of magnitudes is bounded; many become zero.

        {x : Σ|x_i| ≤ radius}

    Args:
      radius: a non-negative number in the units of the parameters.
      grouping: what has a sum: `groupings.per_leaf()` (default) or `per_unit()`.

    Edge cases: what lies inside keeps its bits; radius 0 gives zeros. NaN or infinity
    makes its whole group NaN. Results are rounded towards zero.

    Raises:
      ValueError: if radius is negative, NaN or not a number, or grouping joins leaves;
        at init, if a leaf is complex, or varies over a mesh axis inside `shard_map`.

    Reference: Duchi et al. 2008, ICML.

    >>> import jax.numpy as jnp, optclip
    >>> x = jnp.array([0.1, -2.0, 3.0])
    >>> print(optclip.project_params(x, l1_ball(2.0)).round(5))
    [ 0.  -0.5  1.5]
    """
    bound = _bound(radius=radius)

    def project(x: jax.Array, extent: Extent, memory: Any) -> jax.Array:
        w, back = _rows(x, extent)
        goal = bound_towards(bound, w.dtype, 0.0)
        goal = goal * (1 - 2 * float(jnp.finfo(w.dtype).eps))
        nearest = _each(optax.projections.projection_l1_ball, w, goal)
        total = jnp.sum(jnp.abs(nearest), axis=-1, keepdims=True)
        polished = nearest * jnp.minimum(1, goal / jnp.where(total > 0, total, 1))
        polished = jnp.where(goal > 0, polished, 0)
        size = jnp.sum(jnp.abs(w), axis=-1, keepdims=True)
        polished = jnp.where(jnp.isfinite(size), polished, jnp.nan)
        inward = rounded_towards(polished, x.dtype, polished < 0)
        return back(jnp.where(size <= goal, w, inward)).astype(x.dtype)

    def contains(x: jax.Array, extent: Extent, memory: Any) -> jax.Array:
        w = x.astype(numerics.wide_dtype(x.dtype))
        total = jnp.sum(jnp.abs(w), extent.axes, keepdims=True)
        return total <= bound_towards(bound, w.dtype, 0.0)

    return Set(_extent(grouping), as_it_is, project, contains)


@public
def simplex(
    total: ArrayLike = 1.0,
    *,
    grouping: Grouping = per_leaf(),  # noqa: B008 (an immutable tuple)
) -> Set:
    """Leaves, or units, that are not negative and have one sum: probabilities.

        {x : x_i ≥ 0, Σx_i = total}

    Args:
      total: a positive number in the units of the parameters.
      grouping: as in `l1_ball`.

    Edge cases: the sum is right to 4 units in the last place of the leaf's dtype. NaN
    or infinity makes its whole group NaN.

    Raises:
      ValueError: if total is not positive, or as for `l1_ball`.

    Reference: Duchi et al. 2008, ICML.

    >>> import jax.numpy as jnp, optclip
    >>> x = jnp.array([0.5, -2.0, 1.0])
    >>> print(optclip.project_params(x, simplex()))
    [0.25 0.   0.75]
    """
    checks.positive(total=total)
    bound = _bound(total=total)

    def project(x: jax.Array, extent: Extent, memory: Any) -> jax.Array:
        w, back = _rows(x, extent)
        goal = jnp.asarray(bound).astype(w.dtype)
        nearest = _each(optax.projections.projection_simplex, w, goal)
        found = jnp.sum(nearest, axis=-1, keepdims=True)
        polished = nearest * (goal / found)
        size = jnp.sum(jnp.abs(w), axis=-1, keepdims=True)
        polished = jnp.where(jnp.isfinite(size), polished, jnp.nan)
        return back(rounded(polished, x.dtype)).astype(x.dtype)

    def contains(x: jax.Array, extent: Extent, memory: Any) -> jax.Array:
        w = x.astype(numerics.wide_dtype(x.dtype))
        goal = jnp.asarray(bound).astype(w.dtype)
        off = jnp.abs(jnp.sum(w, extent.axes, keepdims=True) - goal)
        least = jnp.min(w, extent.axes, keepdims=True)
        return (least >= 0) & (off <= 4 * float(jnp.finfo(x.dtype).eps) * goal)

    return Set(_extent(grouping), as_it_is, project, contains)


def _bound(**named: Any) -> Any:
    checks.non_negative(**named)
    checks.scalar(**named)
    return bound_array(**named)


def _extent(grouping: Grouping) -> Callable[..., Extent]:
    found = extent_of(grouping, (), real=True)

    def extent(path: str, leaf: jax.Array, shapes: Mapping[str, Shape]) -> Extent:
        require_whole(path, leaf)
        return found(path, leaf, shapes)

    return extent


def _rows(x: jax.Array, extent: Extent) -> tuple[jax.Array, Any]:
    w, back = gathered(x, extent.axes)
    return w.astype(numerics.wide_dtype(x.dtype)), back


def _each(
    projection: Callable[[jax.Array, jax.Array], jax.Array],
    rows: jax.Array,
    goal: jax.Array,
) -> jax.Array:
    """Optax's projection of every row on its own."""
    for _ in range(rows.ndim - 1):
        projection = jax.vmap(projection, in_axes=(0, None))
    # Optax divides by the sum that it is given, and mixes integers and floats: where
    # those are of 64 bits, it makes float64 of float32 half-way.
    usable = jnp.where(goal > 0, goal, 1)
    wide = jax.dtypes.canonicalize_dtype(np.float64)
    with jax.numpy_dtype_promotion("standard"):
        return projection(rows.astype(wide), usable.astype(wide)).astype(rows.dtype)
