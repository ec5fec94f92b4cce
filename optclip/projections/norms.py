"""Norms of units, as sets of them need them: measured, bounded from inside, given.

    x ← x · target / ‖x‖₂

The norm is summed in float32 or wider, in units of the radius. A bound is entered by a
margin of 2 units in the last place of that dtype, which covers the rounding of the sum
and of the scaling, and by half of one of a half-precision leaf; results are rounded
towards zero. So the exact norm of what comes out is never above the radius. (The sum of
more than about 10⁵ elements may be off by more, as every sum in float32.)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optclip._core import checks, numerics
from optclip._core.groupings import Grouping, in_range, per_unit
from optclip._core.measures import l2
from optclip._core.rounding import bound_towards, rounded, rounded_towards
from optclip.projections.base import Extent
from optclip.projections.boxes import bound_array

MARGIN = 2.0  # in units in the last place of the dtype that norms are computed in


def units(axis: int | tuple[int, ...] | None) -> Grouping:
    """Units by layout, or over the given axes of every leaf."""
    checks.axes(axis=axis)
    if axis is None:
        return per_unit()
    return Grouping(
        lambda path, shape, shapes: in_range("axis", path, shape, axis),
        None,
        sums=None,
    )


def checked_radius(**named: Any) -> Any:
    checks.non_negative(**named)
    checks.scalar(**named)
    return bound_array(**named)


def margin(dtype: Any, wide: Any) -> float:
    """By how much, relatively, a norm must be within its bound to be so for certain.

    It was measured before x was rounded to half precision.
    """
    rounding = float(jnp.finfo(dtype).eps) / 2 if dtype != wide else 0.0
    return MARGIN * float(jnp.finfo(wide).eps) + rounding


def norm_in(radius: Any, room: int = 0) -> Callable[[jax.Array, Extent], jax.Array]:
    """The norm of each group, whose squares are taken in units of 2^room radii.

    So they are in range without a look at the largest first, for every norm from 2^-60
    to 2^60 units, which is more than is of any use beside the radius. A smaller norm
    counts as 0, a larger one as infinite.
    """

    def measure(x: jax.Array, extent: Extent) -> jax.Array:
        wide = numerics.wide_dtype(x.dtype)
        unit = _power_of_two(bound_towards(radius, wide, 0.0), room)
        squares = l2.lift(numerics.times(numerics.widen(x, wide), 1 / unit))
        total = jnp.sum(squares, extent.axes, keepdims=True)
        if extent.mesh:
            total = jax.lax.psum(total, extent.mesh)
        return unit * numerics.safe_sqrt(total)

    return measure


def _power_of_two(x: jax.Array, room: int) -> jax.Array:
    """One near x, times 2^room: to divide by it rounds nothing."""
    x = jax.lax.stop_gradient(x)
    usable = (x > 0) & jnp.isfinite(x)
    _, exponent = jnp.frexp(jnp.where(usable, x, 0.5))
    end = int(jnp.finfo(x.dtype).maxexp) - 3  # its reciprocal is a normal number too
    return jnp.ldexp(jnp.ones_like(x), jnp.clip(exponent + room, -end, end))


def scaled(
    x: jax.Array, size: jax.Array, target: jax.Array, nearest: bool = False
) -> jax.Array:
    """Gives each group its target size; rounds outward where it grows, else inward."""
    wanted = jnp.where(jnp.isfinite(size), target, jnp.nan)
    a, b = numerics.split(numerics.factor(size, wanted))
    moved = numerics.times(numerics.widen(x, size.dtype), a * b * a)
    moved = jnp.where(b == 0, jnp.zeros_like(moved), moved)
    moved = _fitted(moved, x.dtype, target > size, nearest)
    return jnp.where(target == size, x, moved)


def _fitted(w: jax.Array, dtype: Any, grows: jax.Array, nearest: bool) -> jax.Array:
    if jnp.iscomplexobj(w):
        part = jnp.finfo(dtype).dtype
        real = _fitted(w.real, part, grows, nearest)
        return jax.lax.complex(real, _fitted(w.imag, part, grows, nearest))
    if nearest:
        return rounded(w, dtype).astype(dtype)
    return rounded_towards(w, dtype, (w > 0) == grows).astype(dtype)
