"""`spike_clip`, the robust default: median and spread of the last sizes in log space.

    limit  = median(history) · exp(z · spread)
    spread = (m · 1.4826 · MAD(log history) + prior_steps · prior_spread)
             / (m + prior_steps)

over the last `window` sizes before clipping, m of which are there yet. Why this
statistic: sizes before clipping, because an average of clipped sizes may never rise
again; the median, because a mean moves with every spike; spread over 48 sizes, because
fewer clip ordinary steps and more follow a shift too late; logarithms, because sizes
vary by ratios. The benchmarks page has the numbers.
"""

from __future__ import annotations

import math
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
from optclip.clipping.rules.history import blank_history, filled, learn
from optclip.clipping.thresholds import Observation, Threshold


class RobustState(NamedTuple):
    """The last sizes of each group, see `history`."""

    sizes: jax.Array
    sizes_seen: jax.Array


@public
def robust(
    z: ArrayLike = 3.0,
    window: int = 48,
    prior_spread: ArrayLike = 0.22,
    prior_steps: ArrayLike = 8.0,
) -> Threshold[RobustState]:
    """The median of the last sizes, times a bound on their spread in log space.

        limit  = median(history) · exp(z · spread)
        spread = (m · 1.4826 · MAD(log history) + prior_steps · prior_spread)
                 / (m + prior_steps)

    over the last `window` sizes before clipping, m of which are there yet. A median
    ignores a spike at once and follows a lasting shift after window/2 steps, at any
    level, because logarithms have no unit. The prior is all there is at the second
    size, fades as sizes come in, and is what remains when they do not vary at all: a
    limit 10 % above a constant history.

    Args:
      z: how many spreads above the median, positive, without unit.
      window: how many sizes are kept, at least 2; a Python integer (static_args).
      prior_spread: the spread of log sizes expected before any is known.
      prior_steps: how many sizes the prior counts for.

    Returns:
      The threshold, with `RobustState`: `window` floats a group.

    Edge cases: sizes of zero are left out, so that an idle group comes back to its old
    limit.

    Raises:
      ValueError: if an argument is negative, NaN or not a number, z is 0, or window is
        not an integer of at least 2.

    >>> import jax.numpy as jnp, optclip
    >>> tx = optclip.clip_by(robust())
    >>> state = tx.init(jnp.zeros(1))
    >>> for size in (1.0, 1.1, 1000.0):
    ...     updates, state = tx.update(jnp.array([size]), state)
    >>> print(f"{updates[0]:.2f}")
    1.70
    """
    checks.positive(z=z)
    checks.at_least(2, window=window)
    checks.non_negative(prior_spread=prior_spread, prior_steps=prior_steps)

    def init(observation: Observation) -> RobustState:
        return RobustState(*blank_history(window, observation))

    def limit(state: RobustState, observation: Observation) -> jax.Array:
        dtype = observation.size.dtype
        bar, prior, weight = (
            jnp.asarray(number, dtype) for number in (z, prior_spread, prior_steps)
        )
        there = filled(state)
        logs = jnp.log(jnp.where(there, state.sizes, 1))
        centre = _lower_median(logs, there)
        deviation = _lower_median(jnp.abs(logs - centre[None]), there)
        count = jnp.minimum(state.sizes_seen, window).astype(dtype)
        # 1.4826 makes the median deviation of a normal law its standard deviation.
        known = count * jnp.asarray(1.4826, dtype) * deviation
        spread = (known + weight * prior) / jnp.maximum(count + weight, 1)
        power = centre + bar * spread
        most = 0.999 * math.log(float(jnp.finfo(dtype).max))  # beyond it no limit
        limited = (count > 0) & (power < most)
        return jnp.where(limited, jnp.exp(jnp.minimum(power, most)), jnp.inf)

    return Threshold(limit, init, learn)


@jax.jit  # so that the loop is compiled once in eager use
def _lower_median(values: jax.Array, there: jax.Array) -> jax.Array:
    """The lower median over the window of the values that are there; 0 if none is.

    Ranks by counting: XLA:CPU sorts a short axis of many groups 30 times slower. For a
    few groups all pairs are compared at once, because a loop is a launch a turn on an
    accelerator; for many that would take window times their memory.
    """
    values = jnp.where(there, values, jnp.inf)
    window = values.shape[0]
    if values.size <= 64 * window:
        ranks = jnp.sum(values[:, None] <= values[None], axis=0, dtype=jnp.int32)
    else:
        ranks = jax.lax.fori_loop(
            0,
            window,
            lambda row, ranks: ranks + (values[row][None] <= values).astype(jnp.int32),
            jnp.zeros_like(values, dtype=jnp.int32),
        )
    count = jnp.sum(there, axis=0, dtype=jnp.int32)
    upper = ranks > jnp.maximum(count - 1, 0)[None] // 2
    median = jnp.min(jnp.where(upper, values, jnp.inf), axis=0)
    return jnp.where(count > 0, median, 0)


@public
def spike_clip(
    z: ArrayLike = 3.0,
    window: int = 48,
    prior_spread: ArrayLike = 0.22,
    prior_steps: ArrayLike = 8.0,
    *,
    measure: Measure = l2,
    grouping: Grouping = whole(),
    action: Action = rescale(),
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    record: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Bounds spikes of the norm and leaves ordinary steps alone: the robust default.

        limit = median(last norms) · exp(z · spread of their logarithms)

    For when the norm's scale is unknown: it has no threshold in the units of the norm.
    It protects from the second step on, clips fewer than one ordinary step in a
    hundred at up to 30 % noise, and follows a lasting change of level within 30 steps.
    `thresholds.robust` has the whole equation.

    It removes outliers only. If every step is too large, as in a recurrent network that
    diverges from the start, use a fixed limit: an LSTM with a recurrent gain of 2.5 at
    a learning rate of 0.5 becomes NaN under `spike_clip` and trains under
    `clip_by_global_norm(1.0)`.

    Args:
      z: how many spreads above the median, positive, without unit.
      window: how many norms are kept, at least 2; a Python integer (static_args).
      prior_spread: the spread of log norms expected before any is known.
      prior_steps: how many norms the prior counts for.
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
      ValueError: if an argument is negative, NaN or not a number, z is 0, or window is
        not an integer of at least 2.

    >>> import jax.numpy as jnp
    >>> tx = spike_clip()
    >>> state = tx.init(jnp.zeros(1))
    >>> for norm in (1.0, 1.1, 1000.0, 1.2):
    ...     updates, state = tx.update(jnp.array([norm]), state)
    ...     print(f"{updates[0]:.2f}")
    1.00
    1.10
    1.70
    1.20
    """
    return clip_by(
        robust(z, window, prior_spread, prior_steps),
        measure=measure,
        grouping=grouping,
        action=action,
        nonfinite=nonfinite,
        axis_name=axis_name,
        record=record,
    )
