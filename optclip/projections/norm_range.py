"""A set that keeps the Euclidean norms of units in a range: a shell.

    x ← x · clip(‖x‖₂, min, max) / ‖x‖₂

Zero has no direction: a unit that is zero stays zero.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from optclip._core import checks
from optclip._core.public import error, public
from optclip._core.rounding import bound_towards
from optclip._core.types import Axes, AxisName
from optclip.projections.base import Extent, Set, Sum, extent_of
from optclip.projections.norm_arithmetic import (
    Norm,
    checked_radius,
    norm_of,
    scaled,
    units,
)


@public
def norm_range(
    min_value: ArrayLike = 0.0,
    max_value: ArrayLike = 1.0,
    rate: ArrayLike = 1.0,
    axis: Axes | None = None,
    *,
    axis_name: AxisName = None,
) -> Set:
    """Units whose norm lies in a range: Keras' MinMaxNorm.

        ‖w‖ ← rate · clip(‖w‖, min_value, max_value) + (1 - rate) · ‖w‖   for each unit

    Args:
      min_value, max_value: non-negative numbers of any type, in the units of the
        parameters.
      rate: from 0 (no change) to 1 (a projection); below 1 the norm only moves towards
        the range, and does not land in it.
      axis: the axes over which a norm is taken, for every leaf; None takes the inputs
        of each output by the parameter's layout, as `max_norm` does.
      axis_name: inside `shard_map` and `pmap`, the mesh axes that units extend over;
        () says that each device holds them whole.

    Returns:
      A set for `project`, `project_params` and `intersection`.

    Edge cases: what lies in the range keeps its bits; what is moved into it ends within
    4 units in the last place of it; a unit that is zero stays zero. NaN or infinity
    makes its whole unit NaN.

    Raises:
      ValueError: if a bound is negative, NaN or not a number, min_value is above
        max_value, or rate lies outside [0, 1]; at init, if a leaf lacks an axis.

    Reference: Keras' `MinMaxNorm`, https://keras.io/api/layers/constraints.

    >>> import jax.numpy as jnp, optclip
    >>> params = {"kernel": jnp.array([[3.0, 0.3], [4.0, 0.4]])}
    >>> halfway = norm_range(1.0, 2.0, rate=0.5)
    >>> print(optclip.project_params(params, halfway)["kernel"].astype("float16"))
    [[2.1  0.45]
     [2.8  0.6 ]]
    """
    least = checked_radius(min_value=min_value)
    most = checked_radius(max_value=max_value)
    checks.scalar(rate=rate)
    checks.between(0, 1, rate=rate)
    static = isinstance(least, np.ndarray) and isinstance(most, np.ndarray)
    if static and least > most:
        raise error(
            f"min_value must not be above max_value, got {min_value} and {max_value}."
        )

    def ends(wide: DTypeLike) -> tuple[jax.Array, jax.Array]:
        return bound_towards(least, wide, np.inf), bound_towards(most, wide, 0.0)

    def project(x: jax.Array, norm: Norm, memory: None) -> jax.Array:
        size = norm.size
        low, high = ends(size.dtype)
        share = jnp.asarray(rate).astype(size.dtype)
        rest = (1 - share) * norm.value / norm.scale  # finite where the size is not
        goal = share * jnp.clip(size, low, high) + rest
        stays = ((size >= low) & (size <= high)) | (share == 0)
        return scaled(x, norm, goal, stays)

    def contains(x: jax.Array, norm: Norm, memory: None) -> jax.Array:
        size, slack = norm.size, 4 * float(jnp.finfo(x.dtype).eps)
        low, high = ends(size.dtype)
        within = (size >= low * (1 - slack)) & (size <= high * (1 + slack))
        return within | (size == 0)

    def measure(total: Sum, extent: Extent) -> Norm:
        return norm_of(total, extent, most)

    return Set(extent_of(units(axis), axis_name), measure, project, contains)
