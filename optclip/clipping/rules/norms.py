"""Rules with a given limit on a norm, and `monitor`, which only measures.

    clip_by_global_norm    the norm of the whole tree
    clip_by_norm           the norm of each leaf
    clip_by_block_rms      the root mean square of each leaf

Each takes a number, an array, a traced value or an Optax schedule as its limit, works
under `optax.inject_hyperparams` (static_args: `record`, and `axis_name` if it is a
name), and keeps `ClipState`.
"""

from __future__ import annotations

import optax

from optclip._core.groupings import Grouping, per_leaf, whole
from optclip._core.measures import Measure, l2, rms
from optclip._core.public import public
from optclip._core.types import AxisName, Limit, Nonfinite
from optclip.clipping.actions import Action, rescale
from optclip.clipping.clip_by import clip_by
from optclip.clipping.thresholds import as_threshold, unlimited


@public
def clip_by_global_norm(
    max_norm: Limit,
    *,
    measure: Measure = l2,
    action: Action = rescale(),
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    record: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Bounds the norm of the whole tree, keeping its direction.

        g ← g · min(1, max_norm / ‖g‖),   ‖g‖ over all leaves together

    Equals `optax.clip_by_global_norm`, `tf.clip_by_global_norm` and Keras'
    `global_clipnorm`; with `action=rescale(div_eps=1e-6)` PyTorch's `clip_grad_norm_`
    (`measure=lp(p)` for its `norm_type`).

    Args:
      max_norm: the largest norm, a non-negative scalar in the units of the updates, or
        a schedule.
      measure: how big a group is, one of `optclip.measures`.
      action: to what size a group is scaled, one of `optclip.actions`.
      nonfinite: "propagate" makes a group with NaN or infinity NaN, "zero" makes it
        zero.
      axis_name: the mesh axes that groups span inside `shard_map` or `pmap`, see
        `clip_by`.
      record: how many of the last steps are kept for `optclip.history`, see `clip_by`.

    Returns:
      A gradient transformation with state `ClipState` (`RecordedClipState` if it
      records).

    Edge cases: the norm is right over all of float32's range, in every dtype (a
    float16 [300, 400] clipped to 1 gives [0.6, 0.8]). 0 gives zeros, infinity never
    clips, NaN or infinity anywhere follows `nonfinite`.

    Raises:
      ValueError: if a static max_norm is negative, NaN, a bool or not a number.

    Reference: [Pascanu, Mikolov, Bengio 2012](https://arxiv.org/abs/1211.5063).

    >>> import jax.numpy as jnp
    >>> tx = clip_by_global_norm(1.0)
    >>> updates, state = tx.update({"a": jnp.array([3.0]), "b": jnp.array([4.0])}, None)
    >>> print(updates["a"], updates["b"], state.metrics.size)
    [0.6] [0.8] 5.0
    """
    return clip_by(
        as_threshold(max_norm=max_norm),
        measure=measure,
        grouping=whole(),
        action=action,
        nonfinite=nonfinite,
        axis_name=axis_name,
        record=record,
    )


@public
def clip_by_norm(
    max_norm: Limit,
    *,
    measure: Measure = l2,
    grouping: Grouping = per_leaf(),
    action: Action = rescale(),
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    record: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Bounds the norm of each leaf on its own.

        g_i ← g_i · min(1, max_norm / ‖g_i‖)   for each leaf i

    Equals `tf.clip_by_norm` and Keras' `clipnorm`; `grouping=per_unit(axes)` is
    `tf.clip_by_norm(t, clip_norm, axes)`.

    Args:
      max_norm: the largest norm of a group, a non-negative scalar in the units of the
        updates, or a schedule.
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
        as_threshold(max_norm=max_norm),
        measure=measure,
        grouping=grouping,
        action=action,
        nonfinite=nonfinite,
        axis_name=axis_name,
        record=record,
    )


@public
def clip_by_block_rms(
    threshold: Limit,
    *,
    grouping: Grouping = per_leaf(),
    action: Action = rescale(),
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    record: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Bounds the root mean square of each leaf.

        u_i ← u_i / max(1, RMS(u_i) / threshold)   for each leaf i

    Adafactor's update clipping; equals `optax.clip_by_block_rms`.

    Args:
      threshold: the largest RMS, a non-negative scalar in the units of the updates, or
        a schedule.
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

    Edge cases: as for `clip_by_global_norm`, group by group.

    Raises:
      ValueError: if a static threshold is negative, NaN, a bool or not a number.

    Reference: [Shazeer, Stern 2018](https://arxiv.org/abs/1804.04235).

    >>> import jax.numpy as jnp
    >>> updates, _ = clip_by_block_rms(1.0).update(jnp.array([2.0, 2.0]), None)
    >>> print(updates)
    [1. 1.]
    """
    return clip_by(
        as_threshold(threshold=threshold),
        measure=rms,
        grouping=grouping,
        action=action,
        nonfinite=nonfinite,
        axis_name=axis_name,
        record=record,
    )


@public
def monitor(
    measure: Measure = l2,
    grouping: Grouping = whole(),
    axis_name: AxisName = None,
    record: int | None = None,
    ratios: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Measures and changes nothing, not even a NaN.

    Put it before or after any transform to see the norm there in `optclip.metrics`.

    Args:
      measure: how big a group is, one of `optclip.measures`.
      grouping: what is measured together, one of `optclip.groupings`.
      axis_name: the mesh axes that groups span inside `shard_map` or `pmap`, see
        `clip_by`.
      record: how many of the last steps are kept for `optclip.history`, see `clip_by`.
      ratios: whether it also keeps the sizes divided by those of the parameters, see
        `clip_by`. At the end of a chain that is how far a step moves each leaf.

    Returns:
      A gradient transformation with state `ClipState` (`RecordedClipState` if it
      records), whose metrics have no limit.

    Edge cases: a size that is not finite shows as it is, and is counted.

    Raises:
      ValueError: if measure or grouping is not of its kind.

    >>> import jax.numpy as jnp, optclip
    >>> updates, state = monitor().update({"w": jnp.array([3.0, 4.0])}, None)
    >>> print(updates["w"], optclip.metrics(state)["size"])
    [3. 4.] 5.0
    """
    return clip_by(
        unlimited(),
        measure=measure,
        grouping=grouping,
        axis_name=axis_name,
        record=record,
        ratios=ratios,
    )
