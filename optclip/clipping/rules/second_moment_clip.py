"""SPAM's spike rule: an element may exceed the root of its own second moment by √theta.

    |g| ← min(|g|, √(theta · v)),   v ← decay·v + (1 - decay)·g² clipped

The state holds √v, whose square would leave float32's range, in one array of the
parameters' size. v is not corrected for its start at zero, as in the authors' code.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optclip._core import checks, numerics
from optclip._core.groupings import Grouping, per_element
from optclip._core.measures import Measure, l2
from optclip._core.public import public
from optclip._core.types import AxisName, Nonfinite
from optclip.clipping.actions import Action, rescale
from optclip.clipping.clip_by import clip_by
from optclip.clipping.thresholds import Observation, Threshold


class SecondMomentState(NamedTuple):
    """The root of the running mean of squares, the block's shape."""

    root_mean_square: jax.Array


@public
def second_moment(
    theta: ArrayLike = 5000.0, decay: ArrayLike = 0.999, warmup_steps: int = 20
) -> Threshold[SecondMomentState]:
    """A size may exceed the root of its own second moment by √theta.

        limit = √(theta · v),     v ← decay·v + (1 - decay)·min(size, limit)²

    With `per_element()` this is SPAM's spike rule, size² > theta·v.

    Args:
      theta: the largest ratio of squares, positive, without unit.
      decay: of the running average, in [0, 1).
      warmup_steps: how many steps pass first, at least 1 (static_args).

    Returns:
      The threshold, with `SecondMomentState`.

    Edge cases: a v of zero never clips.

    Raises:
      ValueError: if an argument is out of its range.

    Reference: [Huang et al. 2025](https://arxiv.org/abs/2501.06842).

    >>> import optclip
    >>> tx = optclip.clip_by(second_moment(), grouping=optclip.groupings.per_element())
    """
    checks.positive(theta=theta)
    checks.fraction(decay=decay)
    checks.at_least(1, warmup_steps=warmup_steps)

    def limit(state: SecondMomentState, observation: Observation) -> jax.Array:
        root = state.root_mean_square
        bar = jnp.sqrt(jnp.asarray(theta, observation.size.dtype))
        young = (observation.step < warmup_steps) | (root == 0)
        return jnp.where(young, jnp.inf, bar * root)

    def observe(
        state: SecondMomentState, observation: Observation, limit: jax.Array
    ) -> SecondMomentState:
        x = jnp.minimum(observation.size, limit)
        keep, take = (jnp.asarray(share, x.dtype) for share in (decay, 1 - decay))
        old = jnp.sqrt(keep) * state.root_mean_square
        return SecondMomentState(numerics.hypot(old, jnp.sqrt(take) * x))

    return Threshold(
        limit,
        lambda observation: SecondMomentState(jnp.zeros_like(observation.size)),
        observe,
    )


@public
def second_moment_clip(
    theta: ArrayLike = 5000.0,
    decay: ArrayLike = 0.999,
    warmup_steps: int = 20,
    *,
    measure: Measure = l2,
    grouping: Grouping = per_element(),
    action: Action = rescale(),
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    record: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SPAM's element rule: bounds each element by its own second moment.

        |g| ← min(|g|, √(theta · v)),   v ← decay·v + (1 - decay)·g² clipped

    It keeps a second moment of its own (as much state as the parameters), so that it
    goes before any optimizer.

    Args:
      theta: the largest ratio of squares, positive, without unit.
      decay: of the running average, in [0, 1).
      warmup_steps: how many steps pass first, at least 1 (static_args).
      measure: how big a group is, one of `optclip.measures`.
      grouping: what is measured together, one of `optclip.groupings`.
      action: to what size a group is scaled, one of `optclip.actions`.
      nonfinite: "propagate" makes a group with NaN or infinity NaN, "zero" makes it
        zero.
      axis_name: the mesh axes that groups span inside `shard_map` or `pmap`, see
        `clip_by`.
      record: None or 0; elements are too many to be recorded.

    Returns:
      A gradient transformation with state `ClipState`.

    Edge cases: an element that never had a gradient (v = 0) is not clipped.

    Raises:
      ValueError: if an argument is out of its range.

    Reference: [Huang et al. 2025](https://arxiv.org/abs/2501.06842).

    >>> import jax.numpy as jnp
    >>> tx, state = second_moment_clip(theta=4.0, warmup_steps=1), None
    >>> for value in (1.0, 100.0):
    ...     updates, state = tx.update(jnp.array([value]), state)
    >>> print(updates)
    [0.06324556]
    """
    return clip_by(
        second_moment(theta, decay, warmup_steps),
        measure=measure,
        grouping=grouping,
        action=action,
        nonfinite=nonfinite,
        axis_name=axis_name,
        record=record,
    )
