"""Sets that look at the Euclidean norms of units: balls and spheres.

    ball    x ← x · min(‖x‖₂, radius) / ‖x‖₂
    sphere  x ← x · radius / ‖x‖₂

Zero has no direction: a unit that is zero stays zero. `norm_arithmetic` measures and
scales; here is which norm each set wants.
"""

from __future__ import annotations

import jax

from optclip._core import checks
from optclip._core.groupings import Grouping, per_leaf
from optclip._core.public import public
from optclip._core.types import Axes, AxisName, Radius
from optclip.projections.base import Set, extent_of
from optclip.projections.norm_arithmetic import (
    Goal,
    beside_radius,
    margin,
    on_sphere,
    scaled,
    to_sphere,
    units,
    within,
)
from optclip.projections.radii import sized


@public
def l2_ball(
    radius: Radius = 1.0,
    *,
    grouping: Grouping = per_leaf(),
    axis_name: AxisName = None,
) -> Set:
    """Leaves, or units, whose Euclidean norm is bounded.

        {x : ‖x‖₂ ≤ radius}

    Args:
      radius: a non-negative number of any type, in the units of the parameters; an
        array of one for each group, of the leaf's shape without the axes of its norms
        or with 1 in their place; or a tree of these, which may be a prefix of the
        parameters.
      grouping: what has a norm: `groupings.per_leaf()` (default), `per_unit()` or
        `per_element()`.
      axis_name: inside `shard_map` and `pmap`, the mesh axes that groups extend over:
        None reads them off each leaf's type; a name, a tuple of names, or a tree of
        these says so itself, as in `clip_by`.

    Returns:
      A set for `project`, `project_params` and `intersection`.

    Edge cases: what lies inside keeps its bits; radius 0 gives zeros. NaN or infinity
    makes its whole group NaN. Inside in float16 and bfloat16 too: results are rounded
    towards zero.

    Raises:
      ValueError: if radius is negative, NaN or not a number, or grouping joins leaves;
        at init, if radius does not fit a leaf; inside `shard_map`, if units are sharded
        and axis_name does not say how.

    >>> import jax.numpy as jnp, optclip
    >>> inside = optclip.project_params(jnp.array([3.0, 4.0]), l2_ball(1.0))
    >>> print(inside)  # doctest: +ELLIPSIS
    [0.59999... 0.79999...]
    """
    return _ball(grouping, axis_name, radius=radius)


@public
def max_norm(
    max_value: Radius = 2.0,
    axis: Axes | None = None,
    *,
    axis_name: AxisName = None,
) -> Set:
    """Units whose Euclidean norm is bounded: Keras' MaxNorm.

        {w : ‖w‖₂ ≤ max_value}   for each unit w

    Keras' word for a set, not the `max_norm` argument of Optax's clips. Keras also
    shrinks a unit at its bound by 1e-7; here it stays.

    Args:
      max_value: a non-negative number of any type, in the units of the parameters;
        an array of one for each unit, of the leaf's shape without the axes of the norm
        or with 1 in their place; or a tree of these, which may be a prefix of the
        parameters.
      axis: the axes over which a norm is taken, for every leaf. None takes the inputs
        of each output by the parameter's layout: Keras' `axis=0` for Dense, `[0, 1, 2]`
        for 2-D convolutions, heads and stacked layers apart; a bias or scale is one
        unit. `l2_ball(grouping=groupings.per_unit(stacked=...))` says what is stacked.
      axis_name: inside `shard_map` and `pmap`, the mesh axes that units extend over;
        () says that each device holds them whole.

    Returns:
      A set for `project`, `project_params` and `intersection`.

    Edge cases: what lies inside keeps its bits; max_value 0 gives zeros. NaN or
    infinity makes its whole unit NaN.

    Raises:
      ValueError: if max_value is negative, NaN or not a number; at init, if it does not
        fit a leaf, or a leaf lacks an axis.

    Reference: Keras' `MaxNorm`, https://keras.io/api/layers/constraints.

    >>> import jax.numpy as jnp, optclip
    >>> params = {"kernel": jnp.array([[3.0, 0.3], [4.0, 0.4]])}
    >>> print(optclip.project_params(params, max_norm(5.0))["kernel"][:, 1])
    [0.3 0.4]
    """
    return _ball(units(axis), axis_name, max_value=max_value)


@public
def norm_sphere(
    radius: Radius = 1.0,
    *,
    grouping: Grouping = per_leaf(),
    axis_name: AxisName = None,
) -> Set:
    """Leaves, or units, of one Euclidean norm.

        {x : ‖x‖₂ = radius}

    Args:
      radius: a non-negative number of any type, in the units of the parameters; an
        array of one for each group, of the leaf's shape without the axes of its norms
        or with 1 in their place; or a tree of these, which may be a prefix of the
        parameters.
      grouping: what has a norm: `groupings.per_leaf()` (default), `per_unit()` or
        `per_element()`.
      axis_name: inside `shard_map` and `pmap`, the mesh axes that groups extend over;
        None reads them off each leaf's type.

    Returns:
      A set for `project`, `project_params` and `intersection`.

    Edge cases: a group that is zero has no nearest point and stays zero. A norm within
    one unit in the last place of the leaf's dtype counts as the radius. NaN or infinity
    makes its whole group NaN.

    Raises:
      ValueError: if radius is negative, NaN or not a number, or grouping joins leaves;
        at init, if radius does not fit a leaf; inside `shard_map`, if units are sharded
        and axis_name does not say how.

    >>> import jax.numpy as jnp, optclip
    >>> print(optclip.project_params(jnp.array([3.0, 4.0]), norm_sphere(10.0)))
    [6. 8.]
    """
    return _sphere(grouping, axis_name, radius=radius)


@public
def unit_norm(axis: Axes | None = None, *, axis_name: AxisName = None) -> Set:
    """Units of norm 1: Keras' UnitNorm.

        {w : ‖w‖₂ = 1}   for each unit w

    Args:
      axis: the axes over which a norm is taken, for every leaf; None takes the inputs
        of each output by the parameter's layout, as `max_norm` does.
      axis_name: inside `shard_map` and `pmap`, the mesh axes that units extend over;
        () says that each device holds them whole.

    Returns:
      A set for `project`, `project_params` and `intersection`.

    Edge cases: a unit that is zero stays zero. NaN or infinity makes its whole unit
    NaN.

    Raises:
      ValueError: if axis is no integer or tuple of them; at init, if a leaf lacks an
        axis.

    Reference: Keras' `UnitNorm`, https://keras.io/api/layers/constraints.

    >>> import jax.numpy as jnp, optclip
    >>> params = {"kernel": jnp.array([[3.0, 0.0], [4.0, 0.0]])}
    >>> print(optclip.project_params(params, unit_norm())["kernel"])
    [[0.6 0. ]
     [0.8 0. ]]
    """
    return _sphere(units(axis), axis_name, radius=1.0)


def _ball(grouping: Grouping, axis_name: AxisName, **named: Radius) -> Set:
    def project(x: jax.Array, goal: Goal, memory: None) -> jax.Array:
        norm, radius = goal
        inner = margin(x.dtype, radius.dtype)
        return scaled(x, norm, radius, within(norm, radius, inner), inner)

    def contains(x: jax.Array, goal: Goal, memory: None) -> jax.Array:
        return goal.norm.size <= goal.radius

    extent = sized(extent_of(grouping, axis_name), checks.non_negative, **named)
    return Set(extent, beside_radius(inside=True), project, contains)


def _sphere(grouping: Grouping, axis_name: AxisName, **named: Radius) -> Set:
    def project(x: jax.Array, goal: Goal, memory: None) -> jax.Array:
        return to_sphere(x, *goal)

    def contains(x: jax.Array, goal: Goal, memory: None) -> jax.Array:
        return on_sphere(x, *goal)

    extent = sized(extent_of(grouping, axis_name), checks.non_negative, **named)
    return Set(extent, beside_radius(), project, contains)
