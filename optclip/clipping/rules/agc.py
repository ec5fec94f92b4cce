"""The rule whose limit is relative to the parameters."""

from typing import Any

import optax
from jax.typing import ArrayLike

from optclip._core import checks
from optclip._core.groupings import Grouping, per_unit
from optclip._core.measures import Measure, l2
from optclip._core.public import error, public
from optclip.clipping import thresholds
from optclip.clipping.actions import Action, rescale
from optclip.clipping.engine import clip_by


@public
def adaptive_grad_clip(
    clipping: ArrayLike | optax.Schedule = 0.01,
    eps: ArrayLike = 1e-3,
    axis: Any = None,
    *,
    measure: Measure = l2,
    grouping: Grouping | None = None,
    action: Action = rescale(),  # noqa: B008 (an immutable tuple)
    nonfinite: str = "propagate",
    axis_name: Any = None,
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
      clipping: the largest ratio of norms, a non-negative scalar or a schedule.
      eps: the floor under the parameters' norm, in their units: a unit that starts at
        zero still moves.
      axis: the axes to reduce in every leaf, as in Optax, instead of the layout's;
        static (static_args).
      grouping: instead of units.
      measure, action, nonfinite, axis_name: as in `clip_by`.

    Raises:
      ValueError: if a static number is negative or NaN; axis and grouping are both
        given, or axis is no integer; at update, if params are missing or of other
        shapes than the updates, or an axis is out of range.

    Reference: Brock et al. 2021, arXiv 2102.06171.

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
    checks.limit_like(eps=eps)
    checks.axes(axis=axis)
    return clip_by(
        thresholds.relative_to_params(clipping, eps),
        measure=measure,
        grouping=per_unit(axis) if grouping is None else grouping,
        action=action,
        nonfinite=nonfinite,
        axis_name=axis_name,
    )
