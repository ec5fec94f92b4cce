"""`clip_by`: a rule from four parts; every named rule is one.

    size = measure(group),  limit = threshold(size),
    group ← group · action(size, limit) / size

It checks the parts; `engine` is the way of the updates through them.
"""

from __future__ import annotations

from typing import get_args

import jax.numpy as jnp
import optax

from optclip._core import checks, meshes
from optclip._core.groupings import Grouping, whole
from optclip._core.measures import Measure, l2, max_abs
from optclip._core.public import error, public
from optclip._core.types import AxisName, Limit, Nonfinite
from optclip.clipping.actions import Action, rescale, target_of
from optclip.clipping.engine import Clip
from optclip.clipping.recorder import recorder
from optclip.clipping.thresholds import Threshold, as_threshold


@public
def clip_by(
    threshold: Limit | Threshold,
    *,
    measure: Measure = l2,
    grouping: Grouping = whole(),
    action: Action = rescale(),
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
    record: int | None = None,
    ratios: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Bounds the size of every group of updates: the parts of every named rule.

        size = measure(group),  limit = threshold(size),
        group ← group · action(size, limit) / size

    Args:
      threshold: how big a group may be, one of `optclip.thresholds`; a number or a
        schedule stands for `constant` or `scheduled`.
      measure: how big a group is, one of `optclip.measures`.
      grouping: what is measured together, one of `optclip.groupings`.
      action: to what size a group is scaled, one of `optclip.actions`.
      nonfinite: what becomes of a group that holds NaN or infinity, or whose size does
        not fit float32 (float64 for float64 leaves): `"propagate"` makes all of it NaN,
        visible at once; `"zero"` makes all of it zero.
      axis_name: inside `shard_map` and `pmap`, the mesh axes that groups extend over: a
        name, a tuple of names (() for none), or a tree of these that may be a prefix of
        the updates. None reads them from the types, which is right inside `shard_map`
        and all that is needed under `jit`; `pmap` and `check_vma=False` need names, and
        so do units and examples in `shard_map`: no type says along which dimension an
        array is split. Without them the former warn, the latter raise. Gradients that
        `pmean` has averaged are whole on every device: `()` for them, or the norm is √n
        times too large on n devices.
      record: how many of the last steps are kept in the state, for `optclip.history`
        and `optclip.explain`: the size of every group, or of every leaf where they make
        one group together, beside the limit and whether it clipped. Of units, each leaf
        keeps the one furthest over its limit. It takes no further pass over the updates
        and 4·K·n bytes for K steps of n leaves. None or 0 keeps nothing. A Python
        integer (static_args).
      ratios: whether it also keeps the sizes divided by those of the parameters. This
        takes one pass over the parameters, which `update` then needs. Not for units.

    Returns:
      A gradient transformation with state `ClipState`, or `RecordedClipState` if it
      records. Updates keep their dtypes, shapes, shardings and tree; integers, random
      keys, float0, None and MaskedNode pass untouched. `update(updates, None)` starts
      from a fresh state, and `init` takes trees of `jax.ShapeDtypeStruct` too.

    Edge cases: a group within its limit keeps its bits. Limit infinity: identity.
    Limit 0, size 0: zeros. Limit NaN: NaN. Half precision: sizes are float32, results
    are rounded once.

    Raises:
      ValueError: if a part is not of its kind, nonfinite is unknown, record is not such
        an integer or does not go with the grouping (`per_element`, `per_example`), or
        (at init and update) the parts do not fit each other, the tree, or the state
        that is given.

    >>> import jax.numpy as jnp, optclip
    >>> tx = clip_by(1.0, measure=optclip.measures.max_abs)
    >>> updates, state = tx.update({"w": jnp.array([4.0, -2.0])}, None)
    >>> print(updates["w"], state.metrics.size)
    [ 1.  -0.5] 4.0
    """
    threshold = as_threshold(threshold=threshold)
    checks.instance(Measure, measure=measure)
    checks.instance(Grouping, grouping=grouping)
    checks.instance(Action, action=action)
    checks.choice(get_args(Nonfinite), nonfinite=nonfinite)
    if threshold.init is not None and not grouping.keeps_state:
        raise error(
            f"threshold must have no state under {grouping}, whose groups are others "
            f"at every step, got {threshold}."
        )
    keeps = recorder(record, ratios, grouping, measure)
    clip = Clip(
        threshold=threshold,
        # Of one number every size is the same, and this one never overflows.
        measure=max_abs if grouping.elementwise else measure,
        grouping=grouping,
        target_of=target_of(action, jnp.nan if nonfinite == "propagate" else 0.0),
        enlarges=action.enlarges,
        mesh_axes=meshes.axes_of(axis_name),
        axis_name=axis_name,
        recorder=keeps,
        with_leaves=keeps is not None and keeps.parts == "leaves",
    )
    return optax.GradientTransformationExtraArgs(clip.init, clip.update)
