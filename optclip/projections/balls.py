"""Sets that bound or fix the norm of units: balls, spheres and shells.

    x ← x · target / ‖x‖₂     ball: target = min(‖x‖, radius); sphere: target = radius

The norm is summed in float32 or wider, in units of the radius. A ball is entered by a
margin of 2 units in the last place of that dtype, which covers the rounding of the sum
and of the scaling, and by half of one of a half-precision leaf; results are rounded
towards zero. So the exact norm of what comes out is never above the radius. (The sum of
more than about 10⁵ elements may be off by more, as every sum in float32.)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optclip import _checks, _numerics
from optclip.clipping.groupings import Grouping, in_range, per_leaf, per_unit
from optclip.clipping.measures import l2
from optclip.projections.base import Extent, Set, extent_of
from optclip.projections.boxes import bound_array

MARGIN = 2.0  # in units in the last place of the dtype that norms are computed in


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
    return _ball("l2_ball", grouping, axis_name, radius=radius)


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
    grouping = _units("max_norm", axis)
    return _ball("max_norm", grouping, axis_name, max_value=max_value)


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
    return _sphere("norm_sphere", grouping, axis_name, radius=radius)


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
    return _sphere("unit_norm", _units("unit_norm", axis), axis_name, radius=1.0)


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
        _radius("norm_range", min_value=min_value),
        _radius("norm_range", max_value=max_value),
    )
    _checks.scalar("norm_range", rate=rate)
    _checks.between("norm_range", 0, 1, rate=rate)
    numbers = (int, float, np.generic)
    if isinstance(min_value, numbers) and isinstance(max_value, numbers):
        if min_value > max_value:
            raise ValueError(
                f"norm_range: min_value must not be above max_value, got {min_value} "
                f"and {max_value}."
            )

    def ends(dtype: Any, wide: Any) -> tuple[jax.Array, jax.Array]:
        margin = _margin(dtype, wide)
        low = _numerics.bound_towards(min_value, wide, np.inf) * (1 + margin)
        high = _numerics.bound_towards(max_value, wide, 0.0) * (1 - margin)
        middle = low + (high - low) / 2  # where there is no room for margins
        return jnp.minimum(low, middle), jnp.maximum(high, middle)

    def project(x: jax.Array, size: jax.Array, memory: Any) -> jax.Array:
        low, high = ends(x.dtype, size.dtype)
        share = jnp.asarray(rate).astype(size.dtype)
        moved = share * jnp.clip(size, low, high) + (1 - share) * size
        stays = ((size >= low) & (size <= high)) | (share == 0)
        return _scaled(x, size, jnp.where(stays, size, moved))

    def contains(x: jax.Array, size: jax.Array, memory: Any) -> jax.Array:
        slack = 4 * float(jnp.finfo(x.dtype).eps)
        low, high = (jnp.asarray(end).astype(size.dtype) for end in bounds)
        within = (size >= low * (1 - slack)) & (size <= high * (1 + slack))
        return within | (size == 0)

    extent = extent_of("norm_range", _units("norm_range", axis), axis_name)
    return Set(extent, _norm_in(bounds[1]), project, contains)


def _units(rule: str, axis: int | tuple[int, ...] | None) -> Grouping:
    """Units by layout, or over the given axes of every leaf."""
    if axis is None:
        return per_unit()
    return Grouping(
        lambda path, shape, shapes: in_range(rule, "axis", path, shape, axis),
        None,
        sums=None,
    )


def _ball(rule: str, grouping: Grouping, axis_name: Any, **named: Any) -> Set:
    radius = _radius(rule, **named)

    def project(x: jax.Array, size: jax.Array, memory: Any) -> jax.Array:
        limit = _numerics.bound_towards(radius, size.dtype, 0.0)
        target = limit * (1 - _margin(x.dtype, size.dtype))
        return _scaled(x, size, jnp.where(size <= target, size, target))

    def contains(x: jax.Array, size: jax.Array, memory: Any) -> jax.Array:
        return size <= _numerics.bound_towards(radius, size.dtype, 0.0)

    extent = extent_of(rule, grouping, axis_name)
    # Below 2^-30 of the radius a norm need not be known: it lies inside.
    return Set(extent, _norm_in(radius, 30), project, contains)


def _sphere(rule: str, grouping: Grouping, axis_name: Any, **named: Any) -> Set:
    radius = _radius(rule, **named)

    def off(x: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array]:
        """By how much the norm is not the radius, in units in the last place."""
        goal = jnp.asarray(radius).astype(size.dtype)
        return goal, jnp.abs(size - goal) / (float(jnp.finfo(x.dtype).eps) * goal)

    def project(x: jax.Array, size: jax.Array, memory: Any) -> jax.Array:
        goal, places = off(x, size)
        target = jnp.where(places <= 1, size, goal)
        return _scaled(x, size, target, nearest=True)

    def contains(x: jax.Array, size: jax.Array, memory: Any) -> jax.Array:
        return (off(x, size)[1] <= 4) | (size == 0)

    extent = extent_of(rule, grouping, axis_name)
    return Set(extent, _norm_in(radius), project, contains)


def _margin(dtype: Any, wide: Any) -> float:
    """By how much, relatively, a norm must be within its bound to be so for certain.

    It was measured before x was rounded to half precision.
    """
    rounding = float(jnp.finfo(dtype).eps) / 2 if dtype != wide else 0.0
    return MARGIN * float(jnp.finfo(wide).eps) + rounding


def _radius(rule: str, **named: Any) -> Any:
    _checks.non_negative(rule, **named)
    _checks.scalar(rule, **named)
    return bound_array(rule, **named)


def _norm_in(radius: Any, room: int = 0) -> Callable[[jax.Array, Extent], jax.Array]:
    """The norm of each group, whose squares are taken in units of 2^room radii.

    So they are in range without a look at the largest first, for every norm from 2^-60
    to 2^60 units, which is more than is of any use beside the radius. A smaller norm
    counts as 0, a larger one as infinite.
    """

    def measure(x: jax.Array, extent: Extent) -> jax.Array:
        wide = _numerics.wide_dtype(x.dtype)
        unit = _power_of_two(_numerics.bound_towards(radius, wide, 0.0), room)
        squares = l2.lift(_numerics.times(_numerics.widen(x, wide), 1 / unit))
        total = jnp.sum(squares, extent.axes, keepdims=True)
        if extent.mesh:
            total = jax.lax.psum(total, extent.mesh)
        return unit * _numerics.safe_sqrt(total)

    return measure


def _power_of_two(x: jax.Array, room: int) -> jax.Array:
    """One near x, times 2^room: to divide by it rounds nothing."""
    x = jax.lax.stop_gradient(x)
    usable = (x > 0) & jnp.isfinite(x)
    _, exponent = jnp.frexp(jnp.where(usable, x, 0.5))
    end = int(jnp.finfo(x.dtype).maxexp) - 3  # its reciprocal is a normal number too
    return jnp.ldexp(jnp.ones_like(x), jnp.clip(exponent + room, -end, end))


def _scaled(
    x: jax.Array, size: jax.Array, target: jax.Array, nearest: bool = False
) -> jax.Array:
    """Gives each group its target size; rounds outward where it grows, else inward."""
    wanted = jnp.where(jnp.isfinite(size), target, jnp.nan)
    a, b = _numerics.split(_numerics.factor(size, wanted))
    moved = _numerics.times(_numerics.widen(x, size.dtype), a * b * a)
    moved = jnp.where(b == 0, jnp.zeros_like(moved), moved)
    moved = _fitted(moved, x.dtype, target > size, nearest)
    return jnp.where(target == size, x, moved)


def _fitted(w: jax.Array, dtype: Any, grows: jax.Array, nearest: bool) -> jax.Array:
    if jnp.iscomplexobj(w):
        part = jnp.finfo(dtype).dtype
        real = _fitted(w.real, part, grows, nearest)
        return jax.lax.complex(real, _fitted(w.imag, part, grows, nearest))
    if nearest:
        return _numerics.rounded(w, dtype).astype(dtype)
    return _numerics.rounded_towards(w, dtype, (w > 0) == grows).astype(dtype)
