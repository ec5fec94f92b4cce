"""AGC: limits relative to the parameters, unit by unit.

    G_i ← G_i · min(1, clipping · max(‖W_i‖, eps) / ‖G_i‖)   for each output unit i

The parameters' sizes take one pass over the parameters, beside that over the updates.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optclip._core import checks, numerics
from optclip._core.groupings import Grouping, per_unit
from optclip._core.measures import Measure, l2
from optclip._core.public import caller, error, naming, public
from optclip._core.types import Axes, AxisName, Limit, Nonfinite
from optclip.clipping.actions import Action, rescale
from optclip.clipping.clip_by import clip_by
from optclip.clipping.thresholds import Observation, Threshold, at_step


@public
def relative_to_params(ratio: Limit, eps: ArrayLike = 1e-3) -> Threshold[tuple[()]]:
    """A share of the size of the group's parameters.

        limit = ratio · max(size(params), eps)

    Args:
      ratio: the share, a non-negative scalar or a schedule, without unit.
      eps: the floor under the size of the parameters, in their units: what a group that
        starts at zero may move.

    Returns:
      The threshold, without state.

    Raises:
      ValueError: if a static argument is negative, NaN or not a number; at update, if
        params are missing.

    Reference: [Brock et al. 2021](https://arxiv.org/abs/2102.06171).

    >>> import jax.numpy as jnp, optclip
    >>> tx = optclip.clip_by(relative_to_params(0.01))
    >>> updates, _ = tx.update(jnp.array([3.0, 4.0]), None, jnp.array([0.0, 10.0]))
    >>> print(updates)
    [0.06 0.08]
    """
    checks.limit_like(ratio=ratio)
    checks.limit_like(eps=eps)

    @naming(caller())
    def limit(state: tuple[()], observation: Observation) -> jax.Array:
        dtype, params = observation.size.dtype, observation.params
        assert params is not None  # the engine gives what `needs_params` asks for
        share = jnp.asarray(at_step(ratio, observation.step), dtype)
        floor = jnp.maximum(params, jnp.asarray(numerics.as_float(eps), dtype))
        if isinstance(ratio, (int, float)) and ratio < math.inf:
            return share * floor
        # An infinite share limits nothing, not even where the floor is 0. A schedule or
        # an array may have one; a plain number is spared these operations above.
        known = jnp.minimum(share, jnp.finfo(dtype).max)
        return jnp.where(share == jnp.inf, share, known * floor)

    return Threshold(limit, needs_params=True)


@public
def adaptive_grad_clip(
    clipping: Limit = 0.01,
    eps: ArrayLike = 1e-3,
    axis: Axes | None = None,
    *,
    measure: Measure = l2,
    grouping: Grouping | None = None,
    action: Action = rescale(),
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    record: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AGC: bounds each unit's norm relative to the norm of its parameters.

        G_i ← G_i · min(1, clipping · max(‖W_i‖, eps) / ‖G_i‖)   for each output unit i

    Equals `optax.adaptive_grad_clip` for Dense and 2-D convolution kernels, biases and
    scales; units are also right for 1-D convolutions, attention kernels, embeddings,
    stacked layers and any rank. The paper leaves the weights of the last layer
    unclipped, and only those:
    `optax.masked(adaptive_grad_clip(), optclip.mask(r"^(?!head/kernel)"))`; but a mask
    also hides a kernel's bias from the layout, so name what is `stacked` if masked.
    `grouping=groupings.per_leaf()` is the form of DreamerV3 (with clipping=0.3).

    Args:
      clipping: the largest ratio of norms, a non-negative scalar or a schedule, without
        unit.
      eps: the floor under the parameters' norm, in their units: a unit that starts at
        zero still moves.
      axis: the axes to reduce in every leaf, as in Optax, instead of the layout's;
        static (static_args).
      measure: how big a group is, one of `optclip.measures`.
      grouping: instead of units, one of `optclip.groupings`.
      action: to what size a group is scaled, one of `optclip.actions`.
      nonfinite: "propagate" makes a group with NaN or infinity NaN, "zero" makes it
        zero.
      axis_name: the mesh axes that groups span inside `shard_map` or `pmap`, see
        `clip_by`.
      record: how many of the last steps are kept for `optclip.history`, see `clip_by`.

    Returns:
      A gradient transformation with state `ClipState` (`RecordedClipState` if it
      records); `update` needs the parameters.

    Edge cases: the metrics are of the unit furthest over its limit, often one of a bias
    that is still zero, whose limit is clipping · eps.

    Raises:
      ValueError: if a static number is negative or NaN; axis and grouping are both
        given, or axis is no integer; at update, if params are missing or of other
        shapes than the updates, or an axis is out of range.

    Reference: [Brock et al. 2021](https://arxiv.org/abs/2102.06171).

    >>> import jax.numpy as jnp
    >>> tx = adaptive_grad_clip(0.1)
    >>> params = {"kernel": jnp.array([[3.0, 0.0], [4.0, 10.0]])}
    >>> grads = {"kernel": jnp.array([[0.0, 2.0], [1.0, 0.0]])}
    >>> updates, _ = tx.update(grads, tx.init(params), params)
    >>> print(updates["kernel"])
    [[0.  1. ]
     [0.5 0. ]]
    """
    if axis is not None and grouping is not None:
        raise error(f"axis must be None beside a grouping, got {axis}.")
    checks.limit_like(clipping=clipping)
    checks.axes(axis=axis)
    return clip_by(
        relative_to_params(clipping, eps),
        measure=measure,
        grouping=per_unit(axis) if grouping is None else grouping,
        action=action,
        nonfinite=nonfinite,
        axis_name=axis_name,
        record=record,
    )
