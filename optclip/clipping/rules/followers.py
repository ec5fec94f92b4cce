"""Rules whose limit follows the size by one running number a group.

What each does to a spike, a burst, a shift and a drift is measured in the
spike-response table of the README. A size of zero or one that is not finite teaches
none of them anything (but zeros enter a second moment).
"""

from typing import Any

import optax
from jax.typing import ArrayLike

from optclip._core import checks
from optclip._core.groupings import Grouping, per_element, per_leaf, whole
from optclip._core.measures import Measure, l2
from optclip._core.public import public
from optclip.clipping import thresholds
from optclip.clipping.actions import Action, rescale
from optclip.clipping.engine import clip_by


@public
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
    checks.positive(relative=relative, absolute=absolute)
    threshold = thresholds.ema_multiple(relative, decay, warmup_steps, absolute)
    return clip_by(
        threshold,
        measure=measure,
        grouping=grouping,
        action=action,
        nonfinite=nonfinite,
        axis_name=axis_name,
    )


@public
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
    threshold = thresholds.online_quantile(quantile, learning_rate)
    return clip_by(
        threshold,
        measure=measure,
        grouping=grouping,
        action=action,
        nonfinite=nonfinite,
        axis_name=axis_name,
    )


@public
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
    threshold = thresholds.growth(gamma)
    return clip_by(
        threshold,
        measure=measure,
        grouping=grouping,
        action=action,
        nonfinite=nonfinite,
        axis_name=axis_name,
    )


@public
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
    threshold = thresholds.second_moment(theta, decay, warmup_steps)
    return clip_by(
        threshold,
        measure=measure,
        grouping=grouping,
        action=action,
        nonfinite=nonfinite,
        axis_name=axis_name,
    )
