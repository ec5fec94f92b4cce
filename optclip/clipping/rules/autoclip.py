"""AutoClip: a percentile of the last sizes.

    limit = multiple · percentile(size_{t-window+1}, ..., size_t)

The authors keep the whole history; here it is a window.
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
from optclip.clipping.rules.history import blank_history, filled, learn, remember
from optclip.clipping.thresholds import Observation, Threshold


class PercentileState(NamedTuple):
    """The last sizes of each group, see `history`."""

    sizes: jax.Array
    sizes_seen: jax.Array


@public
def percentile(
    percentile: ArrayLike = 10.0, window: int = 1000, multiple: ArrayLike = 1.0
) -> Threshold[PercentileState]:
    """A percentile of the last sizes, the current one included.

        limit = multiple · percentile(size_{t-window+1}, ..., size_t)

    `percentile=50, multiple=2` is the rule of ScaledAdam. A constant history never
    clips. State: window × groups floats, so 1000 floats a unit under `per_unit()`.

    Args:
      percentile: in [0, 100]; 0 gives the running minimum, 100 with multiple 1 never
        clips.
      window: how many sizes are kept, at least 2; a Python integer (static_args).
      multiple: of the percentile, without unit.

    Returns:
      The threshold, with `PercentileState`. It fits only updates of the same window.

    Edge cases: sizes of zero are left out.

    Raises:
      ValueError: if percentile is outside [0, 100], window is not an integer of at
        least 2, or multiple is negative, NaN or not a number.

    Reference: [Seetharaman et al. 2020](https://arxiv.org/abs/2007.14469).

    >>> import optclip
    >>> tx = optclip.clip_by(percentile(50.0, window=100, multiple=2.0))
    """
    checks.between(0, 100, percentile=percentile)
    checks.at_least(2, window=window)
    checks.non_negative(multiple=multiple)
    chosen = percentile

    def init(observation: Observation) -> PercentileState:
        return PercentileState(*blank_history(window, observation))

    def limit(state: PercentileState, observation: Observation) -> jax.Array:
        with_current = remember(state, observation.size)
        times = jnp.asarray(multiple, observation.size.dtype)
        return times * _quantile(with_current, chosen)

    return Threshold(limit, init, learn)


def _quantile(state: PercentileState, percentile: ArrayLike) -> jax.Array:
    """The percentile of each group's sizes, interpolated linearly.

    Written as lo + f·(hi - lo), so that a constant history gives exactly its constant.
    """
    count = jnp.minimum(state.sizes_seen, state.sizes.shape[0])
    ordered = jnp.sort(jnp.where(filled(state), state.sizes, jnp.inf), axis=0)
    last = jnp.maximum(count - 1, 0)
    place = last.astype(ordered.dtype) * (jnp.asarray(percentile, ordered.dtype) / 100)
    below = jnp.clip(jnp.floor(place).astype(jnp.int32), 0, last)
    above = jnp.minimum(below + 1, last)
    low = jnp.take_along_axis(ordered, below[None], axis=0)[0]
    high = jnp.take_along_axis(ordered, above[None], axis=0)[0]
    return low + (place - below.astype(ordered.dtype)) * (high - low)


_threshold = percentile  # which the argument of `autoclip` hides


@public
def autoclip(
    percentile: ArrayLike = 10.0,
    window: int = 1000,
    multiple: ArrayLike = 1.0,
    *,
    measure: Measure = l2,
    grouping: Grouping = whole(),
    action: Action = rescale(),
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    record: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AutoClip: bounds the norm by a percentile of its own history.

        limit = multiple · percentile(‖g_{t-window+1}‖, ..., ‖g_t‖)

    The default clips nine steps in ten, by design. `percentile=50, multiple=2` is the
    rule of ScaledAdam (with window=100).

    Args:
      percentile: in [0, 100].
      window: how many norms are kept, at least 2; a Python integer (static_args).
      multiple: of the percentile, without unit.
      measure: how big a group is, one of `optclip.measures`.
      grouping: what is measured together, one of `optclip.groupings`.
      action: to what size a group is scaled, one of `optclip.actions`.
      nonfinite: "propagate" makes a group with NaN or infinity NaN, "zero" makes it
        zero.
      axis_name: the mesh axes that groups span inside `shard_map` or `pmap`, see
        `clip_by`.
      record: how many of the last steps are kept for `optclip.history`, see `clip_by`.

    Returns:
      A gradient transformation with state `ClipState`, which holds window × groups
      floats. A state of another window is refused.

    Edge cases: norms of zero are left out of the history.

    Raises:
      ValueError: if percentile is outside [0, 100], window is not an integer of at
        least 2, or multiple is negative, NaN or not a number.

    Reference: [Seetharaman et al. 2020](https://arxiv.org/abs/2007.14469), whose
    history is unbounded.

    >>> import jax.numpy as jnp
    >>> tx = autoclip(50.0, window=100)
    >>> _, state = tx.update(jnp.array([1.0]), tx.init(jnp.zeros(1)))
    >>> print(tx.update(jnp.array([3.0]), state)[0])
    [2.]
    """
    return clip_by(
        _threshold(percentile, window, multiple),
        measure=measure,
        grouping=grouping,
        action=action,
        nonfinite=nonfinite,
        axis_name=axis_name,
        record=record,
    )
