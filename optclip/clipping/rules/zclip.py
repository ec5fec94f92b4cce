"""ZClip: outliers by their distance from a running mean, in running deviations.

    z = (size - μ) / (σ + eps);     an outlier where z > z_threshold
    limit of an outlier = μ + z_threshold²·σ / z     mode="reciprocal"
                        = μ                          mode="mean"
                        = μ + z_threshold·σ          mode="max"

The first `warmup_steps` sizes pass and give the first μ and σ² (Welford). Then the
clipped size x enters: μ ← decay·μ + (1 - decay)·x, σ² ← decay·σ² + (1 - decay)·(x - μ)²
with the new μ. The authors' code names the modes `zscore/adaptive_scaling`,
`zscore/mean` and `percentile`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optclip._core import checks, numerics
from optclip._core.groupings import Grouping, whole
from optclip._core.measures import Measure, l2
from optclip._core.public import public
from optclip._core.types import AxisName, Limit, Nonfinite
from optclip.clipping.actions import Action, rescale
from optclip.clipping.clip_by import clip_by
from optclip.clipping.thresholds import (
    Observation,
    Threshold,
    as_threshold,
    tightest,
)

Mode: TypeAlias = Literal["reciprocal", "mean", "max"]


class ZScoreState(NamedTuple):
    """Mean and deviation of the sizes after clipping, and how many there were.

    Attributes:
      mean: the block's shape, in the units of the size.
      deviation: standard deviation, likewise; its square would leave float32's range.
      sizes_seen: int32, the block's shape.
    """

    mean: jax.Array
    deviation: jax.Array
    sizes_seen: jax.Array


@public
def zscore(
    z_threshold: ArrayLike = 2.5,
    decay: ArrayLike = 0.97,
    warmup_steps: int = 25,
    mode: Mode = "reciprocal",
    eps: ArrayLike = 1e-6,
) -> Threshold[ZScoreState]:
    """Sizes that lie z_threshold deviations above their running mean are outliers.

        z = (size - μ) / (σ + eps);     an outlier where z > z_threshold
        limit of an outlier = μ + z_threshold²·σ / z     mode="reciprocal"
                            = μ                          mode="mean"
                            = μ + z_threshold·σ          mode="max"

    Because outliers enter clipped, "reciprocal" and "mean" hardly recover from a
    permanent rise of the norm: use `percentile` or `robust` where that happens.

    Args:
      z_threshold: in deviations, positive.
      decay: of the running averages, in [0, 1).
      warmup_steps: how many sizes pass first, at least 1 (static_args).
      mode: "reciprocal", "mean" or "max" (static_args).
      eps: beside σ in z, in the units of the size.

    Returns:
      The threshold, with `ZScoreState`.

    Edge cases: a size of zero is not learned from, so that an idle group is not clipped
    to zero when it wakes up.

    Raises:
      ValueError: if an argument is out of its range.

    Reference: [Kumar et al. 2025](https://arxiv.org/abs/2504.02507).

    >>> import optclip
    >>> ceiling = optclip.thresholds.constant(1.0)
    >>> tx = optclip.clip_by(optclip.thresholds.tightest(zscore(), ceiling))
    """
    checks.positive(z_threshold=z_threshold)
    checks.fraction(decay=decay)
    checks.at_least(1, warmup_steps=warmup_steps)
    checks.choice(get_args(Mode), mode=mode)
    checks.non_negative(eps=eps)

    def init(observation: Observation) -> ZScoreState:
        return ZScoreState(
            jnp.zeros_like(observation.size),
            jnp.zeros_like(observation.size),
            jnp.zeros_like(observation.size, dtype=jnp.int32),
        )

    def limit(state: ZScoreState, observation: Observation) -> jax.Array:
        size, deviation = observation.size, state.deviation
        bar, floor = (jnp.asarray(x, size.dtype) for x in (z_threshold, eps))
        edge = state.mean + bar * (deviation + floor)
        outlier = size > edge
        if mode == "reciprocal":
            excess = jnp.where(outlier, size - state.mean, 1)
            # At most 1 for an outlier, so that no product leaves the range.
            share = bar * numerics.quotient(deviation + floor, excess)
            clipped = state.mean + share * (bar * deviation)
        elif mode == "mean":
            clipped = state.mean
        else:
            clipped = state.mean + bar * deviation
        warm = state.sizes_seen >= warmup_steps
        return jnp.where(warm, jnp.where(outlier, clipped, edge), jnp.inf)

    def observe(
        state: ZScoreState, observation: Observation, limit: jax.Array
    ) -> ZScoreState:
        x = jnp.minimum(observation.size, limit)
        count = (state.sizes_seen + 1).astype(x.dtype)
        warming = state.sizes_seen < warmup_steps
        keep = jnp.where(warming, 1 - 1 / count, jnp.asarray(decay, x.dtype))
        take = jnp.where(warming, 1 / count, jnp.asarray(1 - decay, x.dtype))
        mean = keep * state.mean + take * x
        # While warming, Welford's increment: (x - old mean)·(x - new mean) / count.
        step = jnp.where(warming, jnp.sqrt(keep) * (x - state.mean), x - mean)
        deviation = numerics.hypot(
            jnp.sqrt(keep) * state.deviation, jnp.sqrt(take) * jnp.abs(step)
        )
        seen = optax.safe_increment(state.sizes_seen)
        learned = ZScoreState(mean, deviation, jnp.asarray(seen))
        idle = observation.size == 0
        return jax.tree.map(lambda a, b: jnp.where(idle, a, b), state, learned)

    return Threshold(limit, init, observe)


@public
def zclip(
    z_threshold: ArrayLike = 2.5,
    decay: ArrayLike = 0.97,
    warmup_steps: int = 25,
    mode: Mode = "reciprocal",
    max_norm: Limit | None = None,
    eps: ArrayLike = 1e-6,
    *,
    measure: Measure = l2,
    grouping: Grouping = whole(),
    action: Action = rescale(),
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    record: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """ZClip: bounds norms that are outliers against their running mean.

        z = (‖g‖ - μ) / (σ + eps);   where z > z_threshold, ‖g‖ ← μ + z_threshold²·σ / z

    That is `mode="reciprocal"`; "mean" clips to μ, "max" to μ + z_threshold·σ. The
    first `warmup_steps` norms pass, under `max_norm` only. The authors' code also sets
    max_norm=1. After a permanent rise of the norm, "reciprocal" and "mean" may clip for
    ever; the benchmarks page has the numbers.

    Args:
      z_threshold: in deviations, positive.
      decay: of the running averages, in [0, 1).
      warmup_steps: how many norms pass first, at least 1 (static_args).
      mode: "reciprocal", "mean" or "max" (static_args).
      max_norm: a fixed ceiling beside it, a non-negative scalar or a schedule, or None.
      eps: beside σ in z, in the units of the norm.
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

    Edge cases: a norm of zero is not learned from.

    Raises:
      ValueError: if an argument is out of its range, or a static max_norm is negative
        or NaN.

    Reference: [Kumar et al. 2025](https://arxiv.org/abs/2504.02507).

    >>> import jax.numpy as jnp
    >>> tx, state = zclip(warmup_steps=2), None
    >>> for norm in (1.0, 2.0, 100.0):
    ...     updates, state = tx.update(jnp.array([norm]), state)
    >>> print(updates)
    [1.515863]
    """
    threshold: Threshold = zscore(z_threshold, decay, warmup_steps, mode, eps)
    if max_norm is not None:
        threshold = tightest(threshold, as_threshold(max_norm=max_norm))
    return clip_by(
        threshold,
        measure=measure,
        grouping=grouping,
        action=action,
        nonfinite=nonfinite,
        axis_name=axis_name,
        record=record,
    )
