"""Spheres and shells: sets that fix the norm of units, or keep it in a range.

    x ← x · radius / ‖x‖₂,   x ← x · clip(‖x‖₂, min, max) / ‖x‖₂

Zero has no direction: a unit that is zero stays zero.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optclip._core import checks
from optclip._core.groupings import Grouping, per_leaf
from optclip._core.public import error, public
from optclip._core.rounding import bound_towards
from optclip.projections.base import Set, extent_of
from optclip.projections.norms import checked_radius, margin, norm_in, scaled, units


@public
def norm_sphere(
    radius: ArrayLike = 1.0,
    *,
    grouping: Grouping = per_leaf(),  # noqa: B008 (an immutable tuple)
    axis_name: Any = None,
) -> Set:
    """Leaves, or units, of one Euclidean norm.

        {x : ‖x‖₂ = radius}

    Args:
      radius, grouping, axis_name: as in `l2_ball`.

    Edge cases: a group that is zero has no nearest point and stays zero. A norm within
    one unit in the last place of the leaf's dtype counts as the radius. NaN or infinity
    makes its whole group NaN.

    Raises:
      ValueError: as for `l2_ball`.

    >>> import jax.numpy as jnp, optclip
    >>> print(optclip.project_params(jnp.array([3.0, 4.0]), norm_sphere(10.0)))
    [6. 8.]
    """
    return _sphere(grouping, axis_name, radius=radius)


@public
def unit_norm(
    axis: int | tuple[int, ...] | None = None, *, axis_name: Any = None
) -> Set:
    """Units of norm 1: Keras' UnitNorm.

        {w : ‖w‖₂ = 1}   for each unit w

    Args:
      axis, axis_name: as in `max_norm`.

    Edge cases and errors as for `norm_sphere`; at init, if a leaf lacks an axis.

    >>> import jax.numpy as jnp, optclip
    >>> params = {"kernel": jnp.array([[3.0, 0.0], [4.0, 0.0]])}
    >>> print(optclip.project_params(params, unit_norm())["kernel"])
    [[0.6 0. ]
     [0.8 0. ]]
    """
    return _sphere(units(axis), axis_name, radius=1.0)


@public
def norm_range(
    min_value: ArrayLike = 0.0,
    max_value: ArrayLike = 1.0,
    rate: ArrayLike = 1.0,
    axis: int | tuple[int, ...] | None = None,
    *,
    axis_name: Any = None,
) -> Set:
    """Units whose norm lies in a range: Keras' MinMaxNorm.

        ‖w‖ ← rate · clip(‖w‖, min_value, max_value) + (1 - rate) · ‖w‖   for each unit

    Args:
      min_value, max_value: non-negative numbers in the units of the parameters.
      rate: from 0 (no change) to 1 (a projection); below 1 the norm only moves towards
        the range, and does not land in it.
      axis, axis_name: as in `max_norm`.

    Edge cases: what lies in the range keeps its bits; a unit that is zero stays zero.
    NaN or infinity makes its whole unit NaN.

    Raises:
      ValueError: if a bound is negative, NaN or not a number, min_value is above
        max_value, or rate lies outside [0, 1]; at init, if a leaf lacks an axis.

    >>> import jax.numpy as jnp, optclip
    >>> params = {"kernel": jnp.array([[3.0, 0.3], [4.0, 0.4]])}
    >>> halfway = norm_range(1.0, 2.0, rate=0.5)
    >>> print(optclip.project_params(params, halfway)["kernel"].astype("float16"))
    [[2.1  0.45]
     [2.8  0.6 ]]
    """
    bounds = (
        checked_radius(min_value=min_value),
        checked_radius(max_value=max_value),
    )
    checks.scalar(rate=rate)
    checks.between(0, 1, rate=rate)
    numbers = (int, float, np.generic)
    if isinstance(min_value, numbers) and isinstance(max_value, numbers):
        if min_value > max_value:
            raise error(
                f"min_value must not be above max_value, got {min_value} "
                f"and {max_value}."
            )

    def ends(dtype: Any, wide: Any) -> tuple[jax.Array, jax.Array]:
        inner = margin(dtype, wide)
        low = bound_towards(min_value, wide, np.inf) * (1 + inner)
        high = bound_towards(max_value, wide, 0.0) * (1 - inner)
        middle = low + (high - low) / 2  # where there is no room for margins
        return jnp.minimum(low, middle), jnp.maximum(high, middle)

    def project(x: jax.Array, size: jax.Array, memory: Any) -> jax.Array:
        low, high = ends(x.dtype, size.dtype)
        share = jnp.asarray(rate).astype(size.dtype)
        moved = share * jnp.clip(size, low, high) + (1 - share) * size
        stays = ((size >= low) & (size <= high)) | (share == 0)
        return scaled(x, size, jnp.where(stays, size, moved))

    def contains(x: jax.Array, size: jax.Array, memory: Any) -> jax.Array:
        slack = 4 * float(jnp.finfo(x.dtype).eps)
        low, high = (jnp.asarray(end).astype(size.dtype) for end in bounds)
        within = (size >= low * (1 - slack)) & (size <= high * (1 + slack))
        return within | (size == 0)

    extent = extent_of(units(axis), axis_name)
    return Set(extent, norm_in(bounds[1]), project, contains)


def _sphere(grouping: Grouping, axis_name: Any, **named: Any) -> Set:
    radius = checked_radius(**named)

    def off(x: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array]:
        """By how much the norm is not the radius, in units in the last place."""
        goal = jnp.asarray(radius).astype(size.dtype)
        return goal, jnp.abs(size - goal) / (float(jnp.finfo(x.dtype).eps) * goal)

    def project(x: jax.Array, size: jax.Array, memory: Any) -> jax.Array:
        goal, places = off(x, size)
        target = jnp.where(places <= 1, size, goal)
        return scaled(x, size, target, nearest=True)

    def contains(x: jax.Array, size: jax.Array, memory: Any) -> jax.Array:
        return (off(x, size)[1] <= 4) | (size == 0)

    extent = extent_of(grouping, axis_name)
    return Set(extent, norm_in(radius), project, contains)
