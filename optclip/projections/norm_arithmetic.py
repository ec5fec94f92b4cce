"""Norms of units, as sets of them need them: measured, bounded from inside, given.

    x ← x · goal / ‖x‖₂

A norm is summed in float32 or wider. Where it lies beyond 2^60 radii, or so low that
squares vanished, its leaf is measured once more, each group in units of its own largest
element; so norms are right wherever x is finite, and they may themselves be larger than
the dtype's largest number. On a GPU every leaf is measured twice instead, without a
conditional.

Where a bound must hold, a norm and the factor that it leads to keep what rounding took
off them, so that only the sum and the last digit of a result are rounded. The bound is
entered by a margin of 1.8 units in the last place of the dtype of the sum, which covers
both, and by half of one of a half-precision leaf; results in half precision are rounded
towards zero. So the exact norm of what comes out is not above the radius. (A sum of a
few dozen equal numbers, which all round the same way, or of more than about 10⁵ may be
off by more, as every sum in float32.)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from optclip._core import checks, meshes, numerics
from optclip._core.groupings import Grouping, in_range, per_unit
from optclip._core.rounding import bound_towards, power_of_two, rounded, rounded_towards
from optclip._core.types import Arrays, Axes
from optclip.projections.base import Extent, Sum, bound_array
from optclip.projections.radii import Sized

MARGIN = 1.8  # in units in the last place of the dtype that norms are computed in
Number = np.ndarray | jax.Array


class Norm(NamedTuple):
    """Norms times a scale, a power of two, which is 1 for ordinary norms."""

    value: jax.Array
    scale: jax.Array
    left: jax.Array  # the sum whose root the value is, less the value's square

    @property
    def size(self) -> jax.Array:
        """The norm itself, infinite where its dtype cannot hold it."""
        return self.value / self.scale


def units(axis: Axes | None) -> Grouping:
    """Units by layout, or over the given axes of every leaf."""
    checks.axes(axis=axis)
    if axis is None:
        return per_unit()
    return Grouping(
        lambda path, shape, shapes: in_range("axis", path, shape, axis),
        None,
        sums=None,
    )


def checked_radius(**named: ArrayLike) -> Number:
    """One non-negative number, as floats; raises for anything else."""
    radius = bound_array(checks.non_negative, **named)
    checks.scalar(**named)
    return radius


def margin(dtype: DTypeLike, wide: DTypeLike) -> float:
    """By how much, relatively, a norm must be within its bound to be so for certain.

    It was measured before x was rounded to half precision.
    """
    rounding = float(jnp.finfo(dtype).eps) / 2 if dtype != wide else 0.0
    return MARGIN * float(jnp.finfo(wide).eps) + rounding


def norm_of(
    total: Sum, extent: Extent, about: ArrayLike = 1.0, inside: bool = False
) -> Norm:
    """The norm of each group.

    Args:
      total: the array.
      extent: over which axes groups extend.
      about: about how large norms are.
      inside: whether a norm far below that need not be known, because nothing happens
        there: it comes out as any number below.
    """
    wide = numerics.accumulation_dtype(*(term.dtype for term in total.terms))
    norm, last = _norm(total.terms, bound_towards(about, wide, 0.0), extent, inside)
    total.terms = (*total.terms[:-1], last)
    return norm


class Goal(NamedTuple):
    """What was measured beside what it should be, or at most be."""

    norm: Norm
    radius: jax.Array


def beside_radius(inside: bool = False) -> Callable[[Sum, Sized], Goal]:
    """The measure of sets of one radius; `inside` is that of `norm_of`."""

    def measure(total: Sum, sized: Sized) -> Goal:
        norm = norm_of(total, sized.extent, sized.size, inside)
        return Goal(norm, bound_towards(sized.size, norm.value.dtype, 0.0))

    return measure


def to_sphere(x: jax.Array, norm: Norm, radius: jax.Array) -> jax.Array:
    """Gives each group the radius, except one that is at it to one unit in the last
    place."""
    stays = _spacings(x, norm, radius) <= 1
    return scaled(x, norm, radius, stays, nearest=True)


def on_sphere(x: jax.Array, norm: Norm, radius: jax.Array) -> jax.Array:
    """Which groups have the radius, or no direction."""
    return (_spacings(x, norm, radius) <= 4) | (norm.size == 0)


def _spacings(x: jax.Array, norm: Norm, radius: jax.Array) -> jax.Array:
    """How far the norm is from the radius, in units in the last place."""
    return jnp.abs(norm.size - radius) / (float(jnp.finfo(x.dtype).eps) * radius)


# Jitted, because eager code would compile the branches of `cond` at every call.
@functools.partial(jax.jit, static_argnums=(2, 3))
def _norm(
    terms: Arrays, about: jax.Array, extent: Extent, inside: bool
) -> tuple[Norm, jax.Array]:
    total = Sum(terms)
    x = _parts(total)
    wide = x[0].dtype
    one = jnp.ones((), wide)
    if not extent.axes and not extent.mesh:  # each element is a group
        size = functools.reduce(numerics.hypot, map(jnp.abs, x))
        return Norm(size, one, jnp.zeros_like(size)), terms[-1]

    squares = _sum_of_squares(extent, x)
    count = math.prod(x[0].shape[n] for n in extent.axes) * len(x)
    info, unit = jnp.finfo(wide), power_of_two(about)
    # Below `least`, squares that vanished may have counted.
    known = 8 * count * meshes.axis_size(extent.mesh) * float(info.tiny / info.eps)
    least = jnp.maximum(math.sqrt(known), unit * 2.0**-60)
    value = jnp.sqrt(jax.lax.stop_gradient(squares))
    ordinary = (value <= unit * 2.0**60) & jnp.isfinite(value)
    ordinary &= (value >= least) | (inside & (unit > 4 * least))

    def again() -> tuple[jax.Array, jax.Array]:
        largest = functools.reduce(jnp.maximum, map(jnp.abs, _parts(total)))
        largest = jnp.max(largest, extent.axes, keepdims=True)
        if extent.mesh:
            largest = meshes.largest_across(largest, extent.mesh)
        scale = 1 / power_of_two(largest)
        parts = [part * scale for part in _parts(total, scale)]
        # Groups in range keep the bits that they have when none is out of it.
        found = jnp.where(ordinary, squares, _sum_of_squares(extent, parts))
        return found, jnp.where(ordinary, one, scale)

    if numerics.backend() == "gpu":  # measured twice, no conditional
        return _root(*again()), terms[-1]
    # XLA:CPU writes what a conditional is given to memory. Behind it comes the same
    # array, or the result could not be written over it.
    hold = jax.lax.optimization_barrier
    squares, scale, last = jax.lax.cond(
        jnp.all(ordinary),
        lambda: (squares, jnp.ones_like(squares), hold(terms[-1])),
        lambda: (*again(), hold(terms[-1])),
    )
    return _root(squares, scale), last


def _root(squares: jax.Array, scale: jax.Array) -> Norm:
    value = numerics.safe_sqrt(squares)
    return Norm(value, scale, -numerics.rounding_error(value, value, squares))


def _parts(total: Sum, *after: jax.Array) -> tuple[jax.Array, ...]:
    """The array as real ones, in float32 or wider."""
    x = total.value(*after)
    x = numerics.widen(x, numerics.accumulation_dtype(x.dtype))
    return (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)


def _sum_of_squares(extent: Extent, parts: Sequence[jax.Array]) -> jax.Array:
    """Plain products: of what a sum clamps, XLA:CPU writes the bounds to memory, as
    arrays."""
    squares = functools.reduce(jnp.add, [part * part for part in parts])
    total = jnp.sum(squares, extent.axes, keepdims=True)
    return jax.lax.psum(total, extent.mesh) if extent.mesh else total


def within(norm: Norm, radius: jax.Array, margin: float) -> jax.Array:
    """Which norms are at most the radius less the margin, before that is rounded."""
    bound = radius * norm.scale  # an infinite one is far above the value
    twice = 2 * norm.value
    beyond = (norm.value - bound) * twice + norm.left
    inside = (beyond <= -margin * bound * twice) | jnp.isinf(bound)
    return inside & (norm.value <= bound)


# Jitted, so that eager code rounds products and sums as compiled code does.
@functools.partial(jax.jit, static_argnames=("margin", "nearest"))
def scaled(
    x: jax.Array,
    norm: Norm,
    goal: jax.Array,
    stays: jax.Array,
    margin: float = 0.0,
    nearest: bool = False,
) -> jax.Array:
    """Gives each group its goal less the margin, except those that stay.

    Rounds outward where a group grows, else inward; or all to nearest.
    """
    ratio, rest = _ratio(norm, goal, margin)
    a, b = numerics.split(ratio)
    w = numerics.times(numerics.widen(x, norm.value.dtype), norm.scale)
    moved = numerics.times(w, a * b * a)
    if margin and x.dtype == w.dtype:  # of half precision it is below the last digit
        moved += numerics.times(w, rest)
    moved = jnp.where(b == 0, jnp.zeros_like(moved), moved)
    moved = _fitted(moved, x.dtype, ratio * norm.scale > 1, nearest)
    return jnp.where(stays, x, moved)


def _ratio(norm: Norm, goal: jax.Array, margin: float) -> tuple[jax.Array, jax.Array]:
    """The goal less the margin over the norm's value: a `factor`, and what is to be
    added to it because it, the margin and the norm were rounded."""
    inner = goal * (1 - margin)
    wanted = jnp.where(jnp.isfinite(norm.value), inner, jnp.nan)
    ratio = numerics.factor(norm.value, wanted)
    missed = numerics.rounding_error(ratio, norm.value, wanted)
    missed -= (goal - inner) - margin * goal
    value, left = jax.lax.stop_gradient((norm.value, norm.left))
    rest = -(2 * value * missed + ratio * left) / (2 * value * value)
    rest = jax.lax.stop_gradient(rest)
    rest = jnp.where((ratio > 0) & jnp.isfinite(rest), rest, 0)
    return ratio, rest


def _fitted(
    w: jax.Array, dtype: DTypeLike, grows: jax.Array, nearest: bool
) -> jax.Array:
    if jnp.iscomplexobj(w):
        part = jnp.finfo(dtype).dtype
        real = _fitted(w.real, part, grows, nearest)
        return jax.lax.complex(real, _fitted(w.imag, part, grows, nearest))
    if nearest:
        return rounded(w, dtype).astype(dtype)
    return rounded_towards(w, dtype, (w > 0) == grows).astype(dtype)
