"""Sets whose nearest point is found by sorting: the l1 ball and the simplex.

    l1_ball   x ← sign(x) max(|x| - τ, 0)     simplex   x ← max(x - τ, 0)

with the τ that makes the sum right. Only differences to the largest number count, and
none beyond the sum, so both are taken in units of the sum before anything is added up:
a large offset costs no digits. The sums are polished, and results are rounded so that
they hold in the leaf's dtype. Sorting keeps about five copies of the leaf in memory.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optclip._core import checks, numerics
from optclip._core.groupings import Grouping, per_leaf
from optclip._core.public import public
from optclip._core.rounding import bound_towards, rounded, rounded_towards
from optclip._core.types import Radius, Shapes
from optclip.projections.base import (
    Extent,
    ExtentOf,
    Set,
    as_it_is,
    bound_array,
    extent_of,
    is_complex,
    not_real,
    require_whole,
    trailing,
)
from optclip.projections.radii import Sized, sized


@public
def l1_ball(
    radius: Radius = 1.0,
    *,
    grouping: Grouping = per_leaf(),
) -> Set:
    """Leaves, or units, whose sum of magnitudes is bounded; many become zero.

        {x : Σ|x_i| ≤ radius}

    Args:
      radius: a non-negative number of any type, in the units of the parameters; an
        array of one for each group, of the leaf's shape without the axes of its sums
        or with 1 in their place; or a tree of these, which may be a prefix of the
        parameters.
      grouping: what has a sum: `groupings.per_leaf()` (default) or `per_unit()`.

    Returns:
      A set for `project`, `project_params` and `intersection`.

    On a mesh: units that are whole on their devices send nothing. A unit that is split
    is made whole first. With Explicit axes, devices share the units out where the size
    of the mesh axis divides their number: one all-to-all there and one back, in which
    each device receives its share of the leaf. Otherwise, and where the leaf is one
    group, every device gathers it (one all-gather for each such axis). With Auto axes
    XLA moves what it must, in general by gathering.

    Edge cases: what lies inside keeps its bits; radius 0 gives zeros. NaN or infinity
    makes its whole group NaN. Results are rounded towards zero.

    Raises:
      ValueError: if radius is negative, NaN or not a number, or grouping joins leaves;
        at init, if radius does not fit a leaf, or a leaf is complex or varies over a
        mesh axis inside `shard_map`.

    Reference: Duchi, Shalev-Shwartz, Singer, Chandra 2008,
    https://dl.acm.org/doi/10.1145/1390156.1390191.

    >>> import jax.numpy as jnp, optclip
    >>> x = jnp.array([0.1, -2.0, 3.0])
    >>> print(optclip.project_params(x, l1_ball(2.0)).round(5))
    [ 0.  -0.5  1.5]
    """

    def project(x: jax.Array, ball: Sized, memory: None) -> jax.Array:
        w, undo = _rows(x, ball.extent)
        goal, _ = trailing(ball.bound(w.dtype, x.ndim), ball.extent.axes)
        goal = goal * (1 - 4 * float(jnp.finfo(w.dtype).eps))  # for the sum's rounding
        nearest = jnp.sign(w) * _with_sum(jnp.abs(w), goal)
        inward = rounded_towards(nearest, x.dtype, nearest < 0)
        inside = jnp.sum(jnp.abs(w), axis=-1, keepdims=True) <= goal
        return undo(jnp.where(inside, w, inward)).astype(x.dtype)

    def contains(x: jax.Array, ball: Sized, memory: None) -> jax.Array:
        w = x.astype(numerics.accumulation_dtype(x.dtype))
        total = jnp.sum(jnp.abs(w), ball.extent.axes, keepdims=True)
        return total <= ball.bound(w.dtype, x.ndim)

    extent = sized(_extent(grouping), checks.non_negative, radius=radius)
    return Set(extent, as_it_is, project, contains)


@public
def simplex(
    total: ArrayLike = 1.0,
    *,
    grouping: Grouping = per_leaf(),
) -> Set:
    """Leaves, or units, that are not negative and have one sum: probabilities.

        {x : x_i ≥ 0, Σx_i = total}

    Args:
      total: a positive number of any type, in the units of the parameters.
      grouping: what has a sum: `groupings.per_leaf()` (default) or `per_unit()`.

    Returns:
      A set for `project`, `project_params` and `intersection`.

    On a mesh: units that are whole on their devices send nothing. A unit that is split
    is made whole first. With Explicit axes, devices share the units out where the size
    of the mesh axis divides their number: one all-to-all there and one back, in which
    each device receives its share of the leaf. Otherwise, and where the leaf is one
    group, every device gathers it (one all-gather for each such axis). With Auto axes
    XLA moves what it must, in general by gathering.

    Edge cases: the sum is right to 4 units in the last place of the leaf's dtype. NaN
    or infinity makes its whole group NaN. A JAX array is not checked: a total below 0
    counts as 0.

    Raises:
      ValueError: if total is not positive, NaN or not a number, or grouping joins
        leaves; at init, if a leaf is complex, or varies over a mesh axis inside
        `shard_map`.

    Reference: Duchi, Shalev-Shwartz, Singer, Chandra 2008,
    https://dl.acm.org/doi/10.1145/1390156.1390191.

    >>> import jax.numpy as jnp, optclip
    >>> x = jnp.array([0.5, -2.0, 1.0])
    >>> print(optclip.project_params(x, simplex()))
    [0.25 0.   0.75]
    """
    bound = bound_array(checks.positive, total=total)
    checks.scalar(total=total)

    def project(x: jax.Array, extent: Extent, memory: None) -> jax.Array:
        w, undo = _rows(x, extent)
        nearest = _with_sum(w, bound_towards(bound, w.dtype, 0.0))
        return undo(rounded(nearest, x.dtype)).astype(x.dtype)

    def contains(x: jax.Array, extent: Extent, memory: None) -> jax.Array:
        w = x.astype(numerics.accumulation_dtype(x.dtype))
        goal = bound_towards(bound, w.dtype, 0.0)
        off = jnp.abs(jnp.sum(w, extent.axes, keepdims=True) - goal)
        least = jnp.min(w, extent.axes, keepdims=True)
        return (least >= 0) & (off <= 4 * float(jnp.finfo(x.dtype).eps) * goal)

    return Set(_extent(grouping), as_it_is, project, contains)


def _extent(grouping: Grouping) -> ExtentOf:
    found = extent_of(grouping, ())

    def extent(path: str, leaf: jax.Array, shapes: Shapes) -> Extent:
        if is_complex(leaf):
            raise not_real(path)
        require_whole(path, leaf)
        return found(path, leaf, shapes)

    return extent


def _rows(
    x: jax.Array, extent: Extent
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """Each group as a row, in float32 or wider, and what undoes it."""
    w, undo = trailing(x, extent.axes)
    return w.astype(numerics.accumulation_dtype(x.dtype)), undo


def _with_sum(w: jax.Array, total: jax.Array) -> jax.Array:
    """The nearest rows to w that are not negative and have the sum; NaN if w is not
    finite, zeros if the sum is zero."""
    unit = jnp.where(total > 0, numerics.finite(total), 1)
    largest = jax.lax.stop_gradient(jnp.max(w, axis=-1, keepdims=True))
    # From -1 to 0: a number that is lower than the largest by the sum becomes zero. A
    # choice, because XLA may divide by multiplying, and -unit / unit be -0.99999994.
    below = jnp.maximum(w - largest, -unit)
    below = jnp.where(below > -unit, below / unit, -1)
    nearest = jnp.maximum(below - _threshold(below), 0)
    found = jnp.sum(nearest, axis=-1, keepdims=True)
    nearest = nearest * (total / jnp.where(found > 0, found, 1))
    finite = jnp.all(jnp.isfinite(w), axis=-1, keepdims=True)
    return jnp.where(finite, nearest, jnp.nan)


def _threshold(w: jax.Array) -> jax.Array:
    """The τ of each row for which Σ max(w - τ, 0) is 1."""
    fixed = jax.lax.stop_gradient(w)
    falling = -jnp.sort(-fixed, axis=-1)
    counts = jnp.arange(1, w.shape[-1] + 1, dtype=w.dtype)
    candidates = (jnp.cumsum(falling, axis=-1) - 1) / counts.reshape(
        *[1] * (w.ndim - 1), -1
    )
    # The largest candidate that fits is the threshold: they rise, then fall.
    support = fixed > jnp.max(candidates, axis=-1, keepdims=True)
    count = jnp.sum(support, axis=-1, keepdims=True, dtype=w.dtype)
    inside = jnp.sum(jnp.where(support, w, 0), axis=-1, keepdims=True)
    return (inside - 1) / jnp.maximum(count, 1)
