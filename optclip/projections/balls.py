"""Balls: sets that bound the norm of units.

    x ← x · min(‖x‖₂, radius) / ‖x‖₂

What comes out is never outside, as the leaf's dtype holds it: see `norms`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optclip._core.groupings import Grouping, per_leaf
from optclip._core.public import public
from optclip._core.rounding import bound_towards
from optclip.projections.base import Set, extent_of
from optclip.projections.norms import checked_radius, margin, norm_in, scaled, units


@public
def l2_ball(
    radius: ArrayLike = 1.0,
    *,
    grouping: Grouping = per_leaf(),  # noqa: B008 (an immutable tuple)
    axis_name: Any = None,
) -> Set:
    """Leaves, or units, whose Euclidean norm is bounded.

        {x : ‖x‖₂ ≤ radius}

    Args:
      radius: a non-negative number in the units of the parameters.
      grouping: what has a norm: `groupings.per_leaf()` (default), `per_unit()` or
        `per_element()`.
      axis_name: inside `shard_map` and `pmap`, the mesh axes that groups extend over,
        as in `clip_by`.

    Edge cases: what lies inside keeps its bits; radius 0 gives zeros. NaN or infinity
    makes its whole group NaN. Inside in float16 and bfloat16 too: results are rounded
    towards zero.

    Raises:
      ValueError: if radius is negative, NaN or not a number, or grouping joins leaves;
        inside `shard_map`, if units are sharded and axis_name does not say how.

    >>> import jax.numpy as jnp, optclip
    >>> print(optclip.project_params(jnp.array([3.0, 4.0]), l2_ball(1.0)))
    [0.5999999  0.79999983]
    """
    return _ball(grouping, axis_name, radius=radius)


@public
def max_norm(
    max_value: ArrayLike = 2.0,
    axis: int | tuple[int, ...] | None = None,
    *,
    axis_name: Any = None,
) -> Set:
    """Units whose Euclidean norm is bounded: Keras' MaxNorm.

        {w : ‖w‖₂ ≤ max_value}   for each unit w

    Keras' word for a set, not the `max_norm` argument of Optax's clips. Keras also
    shrinks a unit at its bound by 1e-7; here it stays.

    Args:
      max_value: a non-negative number in the units of the parameters.
      axis: the axes over which a norm is taken, for every leaf. None takes the inputs
        of each output by the parameter's layout: Keras' `axis=0` for Dense, `[0, 1, 2]`
        for 2-D convolutions, heads and stacked layers apart; a bias or scale is one
        unit. `l2_ball(grouping=groupings.per_unit(stacked=...))` says what is stacked.
      axis_name: inside `shard_map` and `pmap`, the mesh axes that units extend over.

    Edge cases and errors as for `l2_ball`; at init, if a leaf lacks an axis.

    >>> import jax.numpy as jnp, optclip
    >>> params = {"kernel": jnp.array([[3.0, 0.3], [4.0, 0.4]])}
    >>> print(optclip.project_params(params, max_norm(5.0))["kernel"][:, 1])
    [0.3 0.4]
    """
    grouping = units(axis)
    return _ball(grouping, axis_name, max_value=max_value)


def _ball(grouping: Grouping, axis_name: Any, **named: Any) -> Set:
    radius = checked_radius(**named)

    def project(x: jax.Array, size: jax.Array, memory: Any) -> jax.Array:
        limit = bound_towards(radius, size.dtype, 0.0)
        target = limit * (1 - margin(x.dtype, size.dtype))
        return scaled(x, size, jnp.where(size <= target, size, target))

    def contains(x: jax.Array, size: jax.Array, memory: Any) -> jax.Array:
        return size <= bound_towards(radius, size.dtype, 0.0)

    extent = extent_of(grouping, axis_name)
    # Below 2^-30 of the radius a norm need not be known: it lies inside.
    return Set(extent, norm_in(radius, 30), project, contains)
