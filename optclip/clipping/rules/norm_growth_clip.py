"""Norm-growth limiter: a size may grow by a fixed ratio from one step to the next.

    ‖g_t‖ ← min(‖g_t‖, gamma · ‖g_{t-1}‖ after clipping)

One number a group; sizes fall freely. After a fall to a tiny size it takes
log(ratio) / log(gamma) steps to climb back.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optclip._core import checks
from optclip._core.groupings import Grouping, per_leaf
from optclip._core.measures import Measure, l2
from optclip._core.public import public
from optclip._core.types import AxisName, Nonfinite
from optclip.clipping.actions import Action, rescale
from optclip.clipping.clip_by import clip_by
from optclip.clipping.thresholds import Observation, Threshold


class GrowthState(NamedTuple):
    """The last size after clipping, the block's shape; 0 until there is one."""

    last_size: jax.Array


@public
def growth(gamma: ArrayLike = 1.01) -> Threshold[GrowthState]:
    """A size may grow by a fixed ratio a step; it falls freely.

        limit_t = gamma · min(size_{t-1}, limit_{t-1})

    Args:
      gamma: the ratio, at least 1, without unit.

    Returns:
      The threshold, with `GrowthState`.

    Edge cases: the first size passes. A size of zero is not learned from, so that one
    empty step does not hold a group at zero.

    Raises:
      ValueError: if gamma is below 1, NaN or not a number.

    Reference: [Chen et al. 2024](https://arxiv.org/abs/2410.01623) (Fira).

    >>> import optclip
    >>> tx = optclip.clip_by(growth(1.01), grouping=optclip.groupings.per_leaf())
    """
    checks.between(1, math.inf, gamma=gamma)

    def limit(state: GrowthState, observation: Observation) -> jax.Array:
        grown = jnp.asarray(gamma, observation.size.dtype) * state.last_size
        return jnp.where(state.last_size == 0, jnp.inf, grown)

    def observe(
        state: GrowthState, observation: Observation, limit: jax.Array
    ) -> GrowthState:
        size = observation.size
        clipped = jnp.minimum(size, limit)
        return GrowthState(jnp.where(size == 0, state.last_size, clipped))

    return Threshold(
        limit,
        lambda observation: GrowthState(jnp.zeros_like(observation.size)),
        observe,
    )


@public
def norm_growth_clip(
    gamma: ArrayLike = 1.01,
    *,
    measure: Measure = l2,
    grouping: Grouping = per_leaf(),
    action: Action = rescale(),
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    record: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Bounds how fast each leaf's norm may grow from one step to the next.

        ‖g_t‖ ← min(‖g_t‖, gamma · ‖g_{t-1}‖ after clipping)

    Fira's norm-growth limiter, per leaf as there. Norms fall freely.

    Args:
      gamma: the largest ratio of one step, at least 1, without unit.
      measure: how big a group is, one of `optclip.measures`.
      grouping: what is measured together, one of `optclip.groupings`.
      action: to what size a group is scaled, one of `optclip.actions`.
      nonfinite: "propagate" makes a group with NaN or infinity NaN, "zero" makes it
        zero.
      axis_name: the mesh axes that groups span inside `shard_map` or `pmap`, see
        `clip_by`.
      record: how many of the last steps are kept for `optclip.history`, see `clip_by`.

    Returns:
      A gradient transformation with state `ClipState` (`RecordedClipState` if it
      records).

    Edge cases: the first norm passes; a norm of zero is not learned from, so one empty
    step does not hold a leaf at zero.

    Raises:
      ValueError: if gamma is below 1, NaN or not a number.

    Reference: [Chen et al. 2024](https://arxiv.org/abs/2410.01623) (Fira).

    >>> import jax.numpy as jnp
    >>> tx, state = norm_growth_clip(1.5), None
    >>> for norm in (1.0, 0.0, 100.0):
    ...     updates, state = tx.update(jnp.array([norm]), state)
    >>> print(updates)
    [1.5]
    """
    return clip_by(
        growth(gamma),
        measure=measure,
        grouping=grouping,
        action=action,
        nonfinite=nonfinite,
        axis_name=axis_name,
        record=record,
    )
