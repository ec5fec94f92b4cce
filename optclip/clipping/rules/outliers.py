"""Rules that tell outliers from ordinary sizes by the history of the size.

What each does to a spike, a burst, a shift and a drift is measured in the
spike-response table of the README. All work per leaf, per label and per unit through
`grouping=`, never learn from a size that is not finite, and take a hard ceiling through
`thresholds.tightest`.
"""

from typing import Any

import optax
from jax.typing import ArrayLike

from optclip._core.groupings import Grouping, whole
from optclip._core.measures import Measure, l2
from optclip._core.public import public
from optclip.clipping import thresholds
from optclip.clipping.actions import Action, rescale
from optclip.clipping.engine import clip_by


@public
def spike_clip(
    z: ArrayLike = 3.0,
    window: int = 48,
    prior_spread: ArrayLike = 0.22,
    prior_steps: ArrayLike = 8.0,
    *,
    measure: Measure = l2,
    grouping: Grouping = whole(),  # noqa: B008 (an immutable tuple)
    action: Action = rescale(),  # noqa: B008 (an immutable tuple)
    nonfinite: str = "propagate",
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Bounds spikes of the norm and leaves ordinary steps alone: the robust default.

        limit = median(last norms) · exp(z · spread of their logarithms)

    For when the norm's scale is unknown: it has no threshold in the units of the norm.
    It protects from the second step on, clips fewer than one ordinary step in a
    hundred at up to 30 % noise, and follows a lasting change of level within 30 steps.
    `thresholds.robust` has the equation and says why this statistic.

    Args:
      z, window, prior_spread, prior_steps: as in `thresholds.robust`.
      measure, grouping, action, nonfinite, axis_name: as in `clip_by`.

    Edge cases: the first norm passes; a norm of zero teaches nothing.

    Raises:
      ValueError: as `thresholds.robust`.

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
    threshold = thresholds.robust(z, window, prior_spread, prior_steps)
    return clip_by(
        threshold,
        measure=measure,
        grouping=grouping,
        action=action,
        nonfinite=nonfinite,
        axis_name=axis_name,
    )


@public
def autoclip(
    percentile: ArrayLike = 10.0,
    window: int = 1000,
    multiple: ArrayLike = 1.0,
    *,
    measure: Measure = l2,
    grouping: Grouping = whole(),  # noqa: B008 (an immutable tuple)
    action: Action = rescale(),  # noqa: B008 (an immutable tuple)
    nonfinite: str = "propagate",
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """AutoClip: bounds the norm by a percentile of its own history.

        limit = multiple · percentile(‖g_{t-window+1}‖, ..., ‖g_t‖)

    The default clips nine steps in ten, by design. `percentile=50, multiple=2` is the
    rule of ScaledAdam (with window=100).

    Args:
      percentile, window, multiple: as in `thresholds.percentile`.
      measure, grouping, action, nonfinite, axis_name: as in `clip_by`.

    Raises:
      ValueError: as `thresholds.percentile`.

    Reference: Seetharaman et al. 2020, arXiv 2007.14469 (its history is unbounded).

    >>> import jax.numpy as jnp
    >>> tx = autoclip(50.0, window=100)
    >>> _, state = tx.update(jnp.array([1.0]), tx.init(jnp.zeros(1)))
    >>> print(tx.update(jnp.array([3.0]), state)[0])
    [2.]
    """
    threshold = thresholds.percentile(percentile, window, multiple)
    return clip_by(
        threshold,
        measure=measure,
        grouping=grouping,
        action=action,
        nonfinite=nonfinite,
        axis_name=axis_name,
    )


@public
def zclip(
    z_threshold: ArrayLike = 2.5,
    decay: ArrayLike = 0.97,
    warmup_steps: int = 25,
    mode: str = "reciprocal",
    max_norm: ArrayLike | optax.Schedule | None = None,
    eps: ArrayLike = 1e-6,
    *,
    measure: Measure = l2,
    grouping: Grouping = whole(),  # noqa: B008 (an immutable tuple)
    action: Action = rescale(),  # noqa: B008 (an immutable tuple)
    nonfinite: str = "propagate",
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """ZClip: bounds norms that are outliers against their running mean.

        z = (‖g‖ - μ) / (σ + eps);   where z > z_threshold, ‖g‖ ← μ + z_threshold²·σ / z

    That is `mode="reciprocal"` (`zscore/adaptive_scaling` in the authors' code);
    "mean" clips to μ, "max" to μ + z_threshold·σ (their `percentile`). The first
    `warmup_steps` norms pass, under `max_norm` only. Their code also sets max_norm=1.

    After a permanent rise of the norm, "reciprocal" and "mean" may clip for ever; see
    the spike-response table. A norm of zero teaches nothing.

    Args:
      z_threshold, decay, warmup_steps, mode, eps: as in `thresholds.zscore`.
      max_norm: a fixed ceiling beside it, or None.
      measure, grouping, action, nonfinite, axis_name: as in `clip_by`.

    Raises:
      ValueError: as `thresholds.zscore`; if a static max_norm is negative or NaN.

    Reference: Kumar et al. 2025, arXiv 2504.02507.

    >>> import jax.numpy as jnp
    >>> tx, state = zclip(warmup_steps=2), None
    >>> for norm in (1.0, 2.0, 100.0):
    ...     updates, state = tx.update(jnp.array([norm]), state)
    >>> print(updates)
    [1.515863]
    """
    threshold = thresholds.zscore(z_threshold, decay, warmup_steps, mode, eps)
    if max_norm is not None:
        ceiling = thresholds.from_limit(max_norm=max_norm)
        threshold = thresholds.tightest(threshold, ceiling)
    return clip_by(
        threshold,
        measure=measure,
        grouping=grouping,
        action=action,
        nonfinite=nonfinite,
        axis_name=axis_name,
    )
