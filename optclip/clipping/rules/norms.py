"""The named rules: each a docstring, a threshold, and where it applies.

Every rule takes a number, an array, a traced value or an Optax schedule as its limit,
works under `optax.inject_hyperparams` (static_args: `axis_name` if it is a name), and
keeps `ClipState` unless its docstring says otherwise.
"""

from typing import Any

import optax
from jax.typing import ArrayLike

from optclip._core.groupings import Grouping, per_leaf, whole
from optclip._core.measures import Measure, l2, rms
from optclip._core.public import public
from optclip.clipping.actions import Action, rescale
from optclip.clipping.engine import clip_by
from optclip.clipping.thresholds.fixed import from_limit, unlimited

Limit = ArrayLike | optax.Schedule


@public
def clip_by_global_norm(
    max_norm: Limit,
    *,
    measure: Measure = l2,
    action: Action = rescale(),  # noqa: B008 (an immutable tuple)
    nonfinite: str = "propagate",
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Bounds the norm of the whole tree, keeping its direction.

        g ← g · min(1, max_norm / ‖g‖),   ‖g‖ over all leaves together

    Equals `optax.clip_by_global_norm`, `tf.clip_by_global_norm` and Keras'
    `global_clipnorm`; with `action=rescale(div_eps=1e-6)` PyTorch's `clip_grad_norm_`
    (`measure=lp(p)` for its `norm_type`).

    Args:
      max_norm: the largest norm, a non-negative scalar in the units of the updates, or
        a schedule.
      measure, action, nonfinite, axis_name: as in `clip_by`.

    Edge cases: the norm is right over all of float32's range, in every dtype (a
    float16 [300, 400] clipped to 1 gives [0.6, 0.8]). 0 gives zeros, infinity never
    clips, NaN or infinity anywhere follows `nonfinite`.

    Raises:
      ValueError: if a static max_norm is negative, NaN, a bool or not a number.

    Reference: Pascanu, Mikolov, Bengio 2012, arXiv 1211.5063.

    >>> import jax.numpy as jnp
    >>> tx = clip_by_global_norm(1.0)
    >>> updates, state = tx.update({"a": jnp.array([3.0]), "b": jnp.array([4.0])}, None)
    >>> print(updates["a"], updates["b"], state.metrics.size)
    [0.6] [0.8] 5.0
    """
    return clip_by(
        from_limit(max_norm=max_norm),
        measure=measure,
        grouping=whole(),
        action=action,
        nonfinite=nonfinite,
        axis_name=axis_name,
    )


@public
def clip_by_norm(
    max_norm: Limit,
    *,
    measure: Measure = l2,
    grouping: Grouping = per_leaf(),  # noqa: B008 (an immutable tuple)
    action: Action = rescale(),  # noqa: B008 (an immutable tuple)
    nonfinite: str = "propagate",
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Bounds the norm of each leaf on its own.

        g_i ← g_i · min(1, max_norm / ‖g_i‖)   for each leaf i

    Equals `tf.clip_by_norm` and Keras' `clipnorm`; `grouping=per_unit(axes)` is
    `tf.clip_by_norm(t, clip_norm, axes)`.

    Args:
      max_norm: the largest norm of a group, a non-negative scalar in the units of the
        updates, or a schedule.
      measure, grouping, action, nonfinite, axis_name: as in `clip_by`.

    Edge cases: as for `clip_by_global_norm`, group by group.

    Raises:
      ValueError: if a static max_norm is negative, NaN, a bool or not a number.

    >>> import jax.numpy as jnp
    >>> grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}
    >>> updates, _ = clip_by_norm(1.0).update(grads, None)
    >>> print(updates["a"], updates["b"])
    [0.6 0.8] [0.5]
    """
    return clip_by(
        from_limit(max_norm=max_norm),
        measure=measure,
        grouping=grouping,
        action=action,
        nonfinite=nonfinite,
        axis_name=axis_name,
    )


@public
def clip_by_block_rms(
    threshold: Limit,
    *,
    grouping: Grouping = per_leaf(),  # noqa: B008 (an immutable tuple)
    action: Action = rescale(),  # noqa: B008 (an immutable tuple)
    nonfinite: str = "propagate",
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Bounds the root mean square of each leaf.

        u_i ← u_i / max(1, RMS(u_i) / threshold)   for each leaf i

    Adafactor's update clipping; equals `optax.clip_by_block_rms`.

    Args:
      threshold: the largest RMS, a non-negative scalar in the units of the updates, or
        a schedule.
      grouping, action, nonfinite, axis_name: as in `clip_by`.

    Edge cases: as for `clip_by_global_norm`, group by group.

    Raises:
      ValueError: if a static threshold is negative, NaN, a bool or not a number.

    Reference: Shazeer, Stern 2018, arXiv 1804.04235.

    >>> import jax.numpy as jnp
    >>> updates, _ = clip_by_block_rms(1.0).update(jnp.array([2.0, 2.0]), None)
    >>> print(updates)
    [1. 1.]
    """
    return clip_by(
        from_limit(threshold=threshold),
        measure=rms,
        grouping=grouping,
        action=action,
        nonfinite=nonfinite,
        axis_name=axis_name,
    )


@public
def monitor(
    measure: Measure = l2,
    grouping: Grouping = whole(),  # noqa: B008 (an immutable tuple)
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Measures and changes nothing, not even a NaN.

    Put it before or after any transform to see the norm there in `optclip.metrics`.

    Args:
      measure, grouping, axis_name: as in `clip_by`.

    >>> import jax.numpy as jnp, optclip
    >>> updates, state = monitor().update({"w": jnp.array([3.0, 4.0])}, None)
    >>> print(updates["w"], optclip.metrics(state)["size"])
    [3. 4.] 5.0
    """
    return clip_by(unlimited(), measure=measure, grouping=grouping, axis_name=axis_name)
