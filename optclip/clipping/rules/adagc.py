"""AdaGC: a multiple of each leaf's own running average.

    ‖g_i‖ ← min(‖g_i‖, relative · γ_i),   γ_i ← decay·γ_i + (1 - decay)·‖g_i‖ clipped

One number a group. Because γ learns from clipped sizes it follows a lasting rise
slowly: it grows by at most decay + (1 - decay)·relative a step, 1.001 by default, so a
tenfold rise takes 2300 steps.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optclip._core import checks, numerics
from optclip._core.groupings import Grouping, per_leaf
from optclip._core.measures import Measure, l2
from optclip._core.public import public
from optclip._core.types import AxisName, Nonfinite
from optclip.clipping.actions import Action, rescale
from optclip.clipping.clip_by import clip_by
from optclip.clipping.thresholds import Observation, Threshold


class AverageState(NamedTuple):
    """A running average of the sizes after clipping; 0 until there is one.

    Attributes:
      average: the block's shape, in the units of the size.
      sizes_seen: int32, the block's shape.
    """

    average: jax.Array
    sizes_seen: jax.Array


@public
def ema_multiple(
    multiple: ArrayLike = 1.05,
    decay: ArrayLike = 0.98,
    warmup_steps: int = 100,
    warmup_norm: ArrayLike = 1.0,
) -> Threshold[AverageState]:
    """A multiple of the running average of a group's own sizes: AdaGC's threshold.

        limit = multiple · γ,     γ ← decay·γ + (1 - decay)·min(size, limit)

    During the first `warmup_steps` all groups are scaled together, as by a clip of the
    whole norm to `warmup_norm`, and γ is the smallest size after that clip.

    Args:
      multiple: of the average, positive, without unit.
      decay: of the running average, in [0, 1).
      warmup_steps: at least 1 (static_args).
      warmup_norm: the limit of the norm of all finite groups together during the
        warm-up, in its units, positive.

    Returns:
      The threshold, with `AverageState`.

    Edge cases: a size of zero is not learned from: an idle group keeps its γ, and is
    not clipped to zero when it wakes up.

    Raises:
      ValueError: if an argument is out of its range.

    Reference: [Wang et al. 2025](https://arxiv.org/abs/2502.11034).

    >>> import optclip
    >>> tx = optclip.clip_by(ema_multiple(), grouping=optclip.groupings.per_leaf())
    """
    checks.positive(multiple=multiple)
    checks.fraction(decay=decay)
    checks.at_least(1, warmup_steps=warmup_steps)
    checks.positive(warmup_norm=warmup_norm)

    def init(observation: Observation) -> AverageState:
        return AverageState(
            jnp.zeros_like(observation.size),
            jnp.zeros_like(observation.size, dtype=jnp.int32),
        )

    def starting(state: AverageState) -> jax.Array:
        return (state.sizes_seen < warmup_steps) | (state.average == 0)

    def limit(state: AverageState, observation: Observation) -> jax.Array:
        size, combined = observation.size, observation.combined
        assert combined is not None  # the engine gives what `needs_combined` asks for
        # Infinity would make the derivative of `together` NaN where it is not chosen.
        norm = numerics.finite(jnp.asarray(warmup_norm, size.dtype))
        # In this order: norm / combined may be too small for a normal number. Only a
        # group that is not finite, which `combined` leaves out, is larger than that.
        whole = jnp.where(combined > 0, combined, 1)
        share = numerics.quotient(jnp.minimum(size, whole), whole)
        together = jnp.where(combined > norm, share * norm, size)
        relative = jnp.asarray(multiple, size.dtype) * state.average
        return jnp.where(starting(state), together, relative)

    def observe(
        state: AverageState, observation: Observation, limit: jax.Array
    ) -> AverageState:
        x = jnp.minimum(observation.size, limit)
        keep, take = (jnp.asarray(share, x.dtype) for share in (decay, 1 - decay))
        smallest = jnp.where(state.average == 0, x, jnp.minimum(state.average, x))
        running = keep * state.average + take * x
        average = jnp.where(starting(state), smallest, running)
        return AverageState(
            jnp.where(x == 0, state.average, average),
            jnp.asarray(optax.safe_increment(state.sizes_seen)),
        )

    return Threshold(limit, init, observe, needs_combined=True)


@public
def adagc(
    relative: ArrayLike = 1.05,
    absolute: ArrayLike = 1.0,
    decay: ArrayLike = 0.98,
    warmup_steps: int = 100,
    *,
    measure: Measure = l2,
    grouping: Grouping = per_leaf(),
    action: Action = rescale(),
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    record: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdaGC: bounds each leaf's norm by a multiple of its own running average.

        ‖g_i‖ ← min(‖g_i‖, relative·γ_i),   γ_i ← decay·γ_i + (1 - decay)·‖g_i‖ clipped

    For the first `warmup_steps` the whole tree is clipped to the norm `absolute`, and
    γ_i is the smallest norm after that. The default clips about four steps in ten at
    10 % noise, and follows a tenfold rise in about 2300 steps.

    Args:
      relative: the multiple of γ, positive, without unit.
      absolute: the limit of the whole norm during the warm-up, in its units, positive.
      decay: of the running average, in [0, 1).
      warmup_steps: at least 1 (static_args).
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

    Edge cases: a norm of zero is not learned from, so an idle leaf is not clipped to
    zero when it wakes up.

    Raises:
      ValueError: if an argument is out of its range.

    Reference: [Wang et al. 2025](https://arxiv.org/abs/2502.11034).

    >>> import jax.numpy as jnp
    >>> tx, state = adagc(warmup_steps=1), None
    >>> for norm in (1.0, 3.0):
    ...     updates, state = tx.update(jnp.array([norm]), state)
    >>> print(updates)
    [1.05]
    """
    checks.positive(relative=relative, absolute=absolute)
    return clip_by(
        ema_multiple(relative, decay, warmup_steps, absolute),
        measure=measure,
        grouping=grouping,
        action=action,
        nonfinite=nonfinite,
        axis_name=axis_name,
        record=record,
    )
