"""The rules that set their own limit: each a docstring over one threshold.

What each does to a spike, a burst, a shift and a drift of the norm is measured in the
spike-response table of the README. All work per leaf, per label and per unit through
`grouping=`, never learn from a size that is not finite, and take a hard ceiling through
`thresholds.tightest`.
"""

from typing import Any

import optax
from jax.typing import ArrayLike

from optclip import _checks
from optclip.clipping import thresholds
from optclip.clipping.actions import Action, rescale
from optclip.clipping.engine import clip_by
from optclip.clipping.groupings import (
    Grouping,
    per_element,
    per_leaf,
    per_unit,
    whole,
)
from optclip.clipping.measures import Measure, l2


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
        given; at update, if params are missing or an axis is out of range.

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
        raise ValueError(
            f"adaptive_grad_clip: axis must be None beside a grouping, got {axis}."
        )
    _checks.limit_like("adaptive_grad_clip", clipping=clipping)
    _checks.limit_like("adaptive_grad_clip", eps=eps)
    return clip_by(
        thresholds.relative_to_params(clipping, eps),
        measure=measure,
        grouping=per_unit(axis) if grouping is None else grouping,
        action=action,
        nonfinite=nonfinite,
        axis_name=axis_name,
    )


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
    with _checks.inside("spike_clip"):
        threshold = thresholds.robust(z, window, prior_spread, prior_steps)
    return clip_by(
        threshold,
        measure=measure,
        grouping=grouping,
        action=action,
        nonfinite=nonfinite,
        axis_name=axis_name,
    )


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
    with _checks.inside("autoclip"):
        threshold = thresholds.percentile(percentile, window, multiple)
    return clip_by(
        threshold,
        measure=measure,
        grouping=grouping,
        action=action,
        nonfinite=nonfinite,
        axis_name=axis_name,
    )


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
    with _checks.inside("zclip"):
        threshold = thresholds.zscore(z_threshold, decay, warmup_steps, mode, eps)
        if max_norm is not None:
            ceiling = thresholds.from_limit("zclip", max_norm=max_norm)
            threshold = thresholds.tightest(threshold, ceiling)
    return clip_by(
        threshold,
        measure=measure,
        grouping=grouping,
        action=action,
        nonfinite=nonfinite,
        axis_name=axis_name,
    )


def adagc(
    relative: ArrayLike = 1.05,
    absolute: ArrayLike = 1.0,
    decay: ArrayLike = 0.98,
    warmup_steps: int = 100,
    *,
    measure: Measure = l2,
    grouping: Grouping = per_leaf(),  # noqa: B008 (an immutable tuple)
    action: Action = rescale(),  # noqa: B008 (an immutable tuple)
    nonfinite: str = "propagate",
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """AdaGC: bounds each leaf's norm by a multiple of its own running average.

        ‖g_i‖ ← min(‖g_i‖, relative·γ_i),   γ_i ← decay·γ_i + (1 - decay)·‖g_i‖ clipped

    For the first `warmup_steps` the whole tree is clipped to the norm `absolute`, and
    γ_i is the smallest clipped norm. At the default it clips about four steps in ten at
    10 % noise, and follows a tenfold rise in about 2000 steps.

    Args:
      relative: the multiple of γ, without unit.
      absolute: the limit of the whole norm during the warm-up, in its units, positive.
      decay: of the running average, in [0, 1).
      warmup_steps: at least 1 (static_args).
      measure, grouping, action, nonfinite, axis_name: as in `clip_by`.

    Edge cases: a norm of zero teaches nothing, so an idle leaf is never locked at zero.

    Raises:
      ValueError: as `thresholds.ema_multiple`.

    Reference: Wang et al. 2025, arXiv 2502.11034.

    >>> import jax.numpy as jnp
    >>> tx, state = adagc(warmup_steps=1), None
    >>> for norm in (1.0, 3.0):
    ...     updates, state = tx.update(jnp.array([norm]), state)
    >>> print(updates)
    [1.05]
    """
    _checks.positive("adagc", relative=relative, absolute=absolute)
    with _checks.inside("adagc"):
        threshold = thresholds.ema_multiple(relative, decay, warmup_steps, absolute)
    return clip_by(
        threshold,
        measure=measure,
        grouping=grouping,
        action=action,
        nonfinite=nonfinite,
        axis_name=axis_name,
    )


def quantile_clip(
    quantile: ArrayLike = 0.5,
    learning_rate: ArrayLike = 0.2,
    *,
    measure: Measure = l2,
    grouping: Grouping = whole(),  # noqa: B008 (an immutable tuple)
    action: Action = rescale(),  # noqa: B008 (an immutable tuple)
    nonfinite: str = "propagate",
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Bounds the norm by an online estimate of a quantile of its history.

        ‖g‖ ← min(‖g‖, C),   C ← C · exp(-learning_rate · (1[‖g‖ <= C] - quantile))

    One number of state, no warm-up, no lock-in. The default clips half of the steps.

    Args:
      quantile: the share of norms below the limit, in [0, 1].
      learning_rate: of log C, positive.
      measure, grouping, action, nonfinite, axis_name: as in `clip_by`.

    Edge cases: the first norm passes; a norm of zero teaches nothing.

    Raises:
      ValueError: as `thresholds.online_quantile`.

    Reference: Andrew et al. 2019, arXiv 1905.03871.

    >>> import jax.numpy as jnp
    >>> tx, state = quantile_clip(), None
    >>> for norm in (1.0, 100.0):
    ...     updates, state = tx.update(jnp.array([norm]), state)
    >>> print(updates)
    [1.]
    """
    with _checks.inside("quantile_clip"):
        threshold = thresholds.online_quantile(quantile, learning_rate)
    return clip_by(
        threshold,
        measure=measure,
        grouping=grouping,
        action=action,
        nonfinite=nonfinite,
        axis_name=axis_name,
    )


def norm_growth_clip(
    gamma: ArrayLike = 1.01,
    *,
    measure: Measure = l2,
    grouping: Grouping = per_leaf(),  # noqa: B008 (an immutable tuple)
    action: Action = rescale(),  # noqa: B008 (an immutable tuple)
    nonfinite: str = "propagate",
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Bounds how fast a norm may grow from one step to the next.

        ‖g_t‖ ← min(‖g_t‖, gamma · ‖g_{t-1}‖ limited)

    Fira's norm-growth limiter, per leaf as there. Norms fall freely.

    Args:
      gamma: the largest ratio of one step, at least 1.
      measure, grouping, action, nonfinite, axis_name: as in `clip_by`.

    Edge cases: the first norm passes; a norm of zero teaches nothing, so one empty step
    does not hold a leaf at zero.

    Raises:
      ValueError: as `thresholds.growth`.

    Reference: Chen et al. 2024, arXiv 2410.01623.

    >>> import jax.numpy as jnp
    >>> tx, state = norm_growth_clip(1.5), None
    >>> for norm in (1.0, 0.0, 100.0):
    ...     updates, state = tx.update(jnp.array([norm]), state)
    >>> print(updates)
    [1.5]
    """
    with _checks.inside("norm_growth_clip"):
        threshold = thresholds.growth(gamma)
    return clip_by(
        threshold,
        measure=measure,
        grouping=grouping,
        action=action,
        nonfinite=nonfinite,
        axis_name=axis_name,
    )


def second_moment_clip(
    theta: ArrayLike = 5000.0,
    decay: ArrayLike = 0.999,
    warmup_steps: int = 20,
    *,
    measure: Measure = l2,
    grouping: Grouping = per_element(),  # noqa: B008 (an immutable tuple)
    action: Action = rescale(),  # noqa: B008 (an immutable tuple)
    nonfinite: str = "propagate",
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """SPAM's element rule: bounds each element by its own second moment.

        |g| ← min(|g|, √(theta · v)),   v ← decay·v + (1 - decay)·g² clipped

    With a second moment of its own (as much state as the parameters), so that it goes
    before any optimizer. Inactive while v is young.

    Args:
      theta: the largest ratio of squares, positive.
      decay: of the running average, in [0, 1).
      warmup_steps: how many steps pass first, at least 1 (static_args).
      measure, grouping, action, nonfinite, axis_name: as in `clip_by`.

    Edge cases: an element that never had a gradient (v = 0) is not clipped.

    Raises:
      ValueError: as `thresholds.second_moment`.

    Reference: Huang et al. 2025, arXiv 2501.06842.

    >>> import jax.numpy as jnp
    >>> tx, state = second_moment_clip(theta=4.0, warmup_steps=1), None
    >>> for value in (1.0, 100.0):
    ...     updates, state = tx.update(jnp.array([value]), state)
    >>> print(updates)
    [0.06324556]
    """
    with _checks.inside("second_moment_clip"):
        threshold = thresholds.second_moment(theta, decay, warmup_steps)
    return clip_by(
        threshold,
        measure=measure,
        grouping=grouping,
        action=action,
        nonfinite=nonfinite,
        axis_name=axis_name,
    )
