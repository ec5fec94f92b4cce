"""Online quantile: a limit that moves by a fixed ratio at every step.

    C ← C · exp(-learning_rate · (1[size ≤ C] - quantile))

One number a group. It needs no warm-up and always finds a new level: it climbs by
exp(learning_rate · quantile) a step, 1.105 by default.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optclip._core import checks
from optclip._core.groupings import Grouping, whole
from optclip._core.measures import Measure, l2
from optclip._core.public import public
from optclip._core.types import AxisName, Nonfinite
from optclip.clipping.actions import Action, rescale
from optclip.clipping.clip_by import clip_by
from optclip.clipping.thresholds import Observation, Threshold


class QuantileState(NamedTuple):
    """The estimate of the quantile, the block's shape; 0 until there is a size."""

    estimate: jax.Array


@public
def online_quantile(
    quantile: ArrayLike = 0.5, learning_rate: ArrayLike = 0.2
) -> Threshold[QuantileState]:
    """An estimate of a quantile of the sizes that moves by a fixed ratio.

        C ← C · exp(-learning_rate · (1[size ≤ C] - quantile))

    Args:
      quantile: the share of sizes below the limit, in [0, 1].
      learning_rate: of the logarithm of C, positive.

    Returns:
      The threshold, with `QuantileState`.

    Edge cases: the estimate starts at the first size, which passes. A size of zero is
    not learned from.

    Raises:
      ValueError: if an argument is out of its range.

    Reference: [Andrew et al. 2019](https://arxiv.org/abs/1905.03871), the geometric
    update.

    >>> import optclip
    >>> tx = optclip.clip_by(online_quantile(0.9))
    """
    checks.between(0, 1, quantile=quantile)
    checks.positive(learning_rate=learning_rate)

    def limit(state: QuantileState, observation: Observation) -> jax.Array:
        return jnp.where(state.estimate == 0, jnp.inf, state.estimate)

    def observe(
        state: QuantileState, observation: Observation, limit: jax.Array
    ) -> QuantileState:
        size, estimate = observation.size, state.estimate
        below = (size <= estimate).astype(size.dtype)
        rate = jnp.asarray(learning_rate, size.dtype)
        moved = estimate * jnp.exp(-rate * (below - jnp.asarray(quantile, size.dtype)))
        moved = jnp.minimum(moved, jnp.finfo(size.dtype).max)  # infinity never returns
        learned = jnp.where(estimate == 0, size, moved)
        return QuantileState(jnp.where(size == 0, estimate, learned))

    return Threshold(
        limit,
        lambda observation: QuantileState(jnp.zeros_like(observation.size)),
        observe,
    )


@public
def quantile_clip(
    quantile: ArrayLike = 0.5,
    learning_rate: ArrayLike = 0.2,
    *,
    measure: Measure = l2,
    grouping: Grouping = whole(),
    action: Action = rescale(),
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    record: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Bounds the norm by an online estimate of a quantile of its history.

        ‖g‖ ← min(‖g‖, C),   C ← C · exp(-learning_rate · (1[‖g‖ ≤ C] - quantile))

    The default clips half of the steps.

    Args:
      quantile: the share of norms below the limit, in [0, 1].
      learning_rate: of log C, positive.
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

    Edge cases: the first norm passes; a norm of zero is not learned from.

    Raises:
      ValueError: if an argument is out of its range.

    Reference: [Andrew et al. 2019](https://arxiv.org/abs/1905.03871).

    >>> import jax.numpy as jnp
    >>> tx, state = quantile_clip(), None
    >>> for norm in (1.0, 100.0):
    ...     updates, state = tx.update(jnp.array([norm]), state)
    >>> print(updates)
    [1.]
    """
    return clip_by(
        online_quantile(quantile, learning_rate),
        measure=measure,
        grouping=grouping,
        action=action,
        nonfinite=nonfinite,
        axis_name=axis_name,
        record=record,
    )
