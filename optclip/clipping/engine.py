"""`clip_by`: the one way that every composed rule goes.

    updates ──gather──▶ groups ──▶ rough sizes ──threshold──▶ limits
        ──▶ refined sizes and limits ──action──▶ targets ──▶ rescaled updates
        ──▶ metrics ──▶ the threshold's next state

`update` reads in exactly this order. This is the only file that knows measures,
groupings, thresholds and actions together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from optclip._core import checks, meshes, metrics
from optclip._core.groupings import Grouping, whole
from optclip._core.groups import (
    Arrays,
    Groups,
    by_block,
    by_group,
    gather,
    rescaled,
)
from optclip._core.measures import Measure, l2, max_abs
from optclip._core.metrics import ClipMetrics
from optclip._core.public import error, public
from optclip._core.sizes import in_doubt, precise_sizes, summed_sizes
from optclip._core.types import AxisName, Limit, Nonfinite
from optclip.clipping.actions import Action, rescale
from optclip.clipping.other_sizes import combined_size, sizes_of_params
from optclip.clipping.state_blocks import blank_state, packed, repacked, unpacked
from optclip.clipping.thresholds import Observation, Threshold, as_threshold


class ClipState(NamedTuple):
    """The state of every rule made by `clip_by`.

    Attributes:
      threshold: the threshold's state, () if it has none. For joint groupings arrays
        over the vector of groups; for groupings within leaves each array is a tree like
        the parameters.
      metrics: what the last update saw; read them with `optclip.metrics`.
    """

    threshold: optax.OptState
    metrics: ClipMetrics


class _Known(NamedTuple):
    """What limits depend on beside the sizes of the groups, block by block."""

    states: list[Any] | None
    params: Arrays | None
    step: jax.Array


@public
def clip_by(
    threshold: Limit | Threshold,
    *,
    measure: Measure = l2,
    grouping: Grouping = whole(),
    action: Action = rescale(),
    nonfinite: Nonfinite = "propagate",
    axis_name: AxisName = None,
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
        and all that is needed under `jit`; `pmap` and `check_vma=False` need names.
        Gradients that `pmean` has averaged are whole on every device: name no axis for
        them, or the norm is √n times too large on n devices.

    Returns:
      A gradient transformation with state `ClipState`. Updates keep their dtypes,
      shapes, shardings and tree; integers, random keys, float0, None and MaskedNode
      pass untouched. `update(updates, None)` starts from a fresh state, and `init`
      takes trees of `jax.ShapeDtypeStruct` too.

    Edge cases: a group within its limit keeps its bits. Limit infinity: identity.
    Limit 0, size 0: zeros. Limit NaN: NaN. Half precision: sizes are float32, results
    are rounded once.

    Raises:
      ValueError: if a part is not of its kind, nonfinite is unknown, or (at init and
        update) the parts do not fit each other, the tree, or the state that is given.

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
    limit_of, learns = threshold.limit, threshold.init is not None
    if learns and not grouping.keeps_state:
        raise error(
            f"threshold must have no state under {grouping}, whose groups are others "
            f"at every step, got {threshold}."
        )
    nonfinite_value = jnp.nan if nonfinite == "propagate" else 0.0
    # Of one number every size is the same, and this one never overflows.
    measure = max_abs if grouping.elementwise else measure
    blank = functools.cache(functools.partial(blank_state, threshold))
    mesh_axes = meshes.axes_of(axis_name)

    def init(params: optax.Params) -> ClipState:
        here = mesh_axes if meshes.bound(axis_name) else meshes.axes_of(())
        groups, leaves = gather(params, grouping, here)
        zeros = _zeros(groups, leaves, measure if learns else None)
        step = jnp.zeros((), jnp.int32)
        state: optax.OptState = ()
        if threshold.init is not None:
            fresh = [Observation(x, step, groups.names) for x in zeros]
            own = list(map(threshold.init, fresh))
            state = packed(params, groups, blank(), own)
        if grouping.keeps_state and groups.groups:  # a bad limit is reported here
            known = _Known(own if state else [()] * len(zeros), zeros, step)
            for limit, zero in zip(limits_of(groups, zeros, known), zeros, strict=True):
                checks.limits(zero.shape, threshold=limit)
        limited = limit_of is not None
        numbers = metrics.start(groups.dtype, grouping.elementwise, limited)
        return ClipState(state, numbers)

    def update(
        updates: optax.Updates,
        state: ClipState | None,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ClipState]:
        del extra_args
        if state is None:
            state = init(updates if params is None else params)
        if not isinstance(state, ClipState):
            raise error(f"state must be a ClipState, got {type(state).__name__}.")
        groups, leaves = gather(updates, grouping, mesh_axes)
        known = _Known(None, None, state.metrics.steps)
        if learns:
            own = unpacked(groups, blank(), state.threshold)
            known = known._replace(states=own)
        if threshold.needs_params:
            own = sizes_of_params(groups, updates, params, measure, grouping, mesh_axes)
            known = known._replace(params=own)

        rough = summed_sizes(groups, leaves, measure)
        blocks = by_block(groups, rough)
        limits = limits_of(groups, blocks, known)
        sizes, blocks, limits = refine(groups, leaves, rough, blocks, limits, known)
        if limit_of is not None:
            targets = list(map(target_of, sizes, by_group(groups, limits)))
            updates = rescaled(groups, updates, leaves, sizes, targets)
        numbers = metrics.after(state.metrics, blocks, limits)
        learned = state.threshold
        if learns:
            learned = repacked(learned, next_states(groups, blocks, limits, known))
        return updates, ClipState(learned, numbers)

    def observations(
        groups: Groups, blocks: Arrays, known: _Known
    ) -> list[Observation]:
        """What the threshold sees of every block."""
        combined = None
        if threshold.needs_combined:
            combined = combined_size(groups, measure, blocks)
        params = known.params or [None] * len(blocks)
        # An infinite size in a branch that is not chosen would still have an infinite
        # derivative, and zero times that is NaN.
        finite = [
            jnp.where(jnp.isfinite(size), size, jnp.finfo(size.dtype).max)
            for size in blocks
        ]
        return [
            Observation(size, known.step, groups.names, groups.partial, own, combined)
            for size, own in zip(finite, params, strict=True)
        ]

    def limits_of(groups: Groups, blocks: Arrays, known: _Known) -> Arrays:
        """The limit of every block: a scalar, or a number for each of its groups."""
        if limit_of is None:
            return [jnp.asarray(jnp.inf, groups.dtype) for _ in blocks]
        states = known.states or [()] * len(blocks)
        limits = map(limit_of, states, observations(groups, blocks, known))
        return [jnp.asarray(limit, groups.dtype) for limit in limits]

    def refine(
        groups: Groups,
        leaves: Arrays,
        rough: Arrays,
        blocks: Arrays,
        limits: Arrays,
        known: _Known,
    ) -> tuple[Arrays, Arrays, Arrays]:
        """Sizes by group and by block, and limits, where need be of a second pass."""
        reliable = limits
        if limit_of is None or (groups.joint and blocks[0].shape == (1,)):
            # Metrics show this size, however far below its limit it is.
            reliable = [jnp.zeros((), groups.dtype) for _ in limits]
        elif learns:
            # An infinite limit has nothing learned yet: what it learns must be right.
            reliable = [jnp.where(limit < jnp.inf, limit, 0) for limit in limits]
        doubt = in_doubt(groups, leaves, measure, blocks, reliable)
        if doubt is None:
            return rough, blocks, limits
        # Limits that learn nothing are sooner found again than kept beside the sizes:
        # for AGC those would be 1.2 % of bfloat16 gradients in temporary bytes.
        kept = limits if learns else None
        look_again = second_look(groups)
        sizes, kept = jax.lax.cond(doubt, look_again, _keep, leaves, rough, kept, known)
        blocks = by_block(groups, sizes)
        return sizes, blocks, kept or limits_of(groups, blocks, known)

    # One function for each structure of the tree, which JAX traces and compiles once: a
    # new function at each eager update would be compiled anew.
    @functools.cache
    def second_look(groups: Groups) -> Callable[..., tuple[Arrays, Arrays | None]]:
        def look_again(
            leaves: Arrays, rough: Arrays, kept: Arrays | None, known: _Known
        ) -> tuple[Arrays, Arrays | None]:
            sizes = precise_sizes(groups, leaves, measure, rough)
            if kept is None:
                return sizes, None
            return sizes, limits_of(groups, by_block(groups, sizes), known)

        return look_again

    @jax.jit
    def target_of(size: jax.Array, limit: jax.Array) -> jax.Array:
        """The size that a group is scaled to."""
        target = action.target(size, jnp.maximum(limit, 0))
        return jnp.where(jnp.isfinite(size), target, nonfinite_value)

    def next_states(
        groups: Groups, blocks: Arrays, limits: Arrays, known: _Known
    ) -> list[Any]:
        """What the threshold learns, group by group: nothing where none is finite."""
        assert known.states is not None
        seen = observations(groups, blocks, known)
        learned = list(map(threshold.observe, known.states, seen, limits))
        return list(map(_where_finite, blocks, learned, known.states))

    return optax.GradientTransformationExtraArgs(init, update)


def _zeros(groups: Groups, leaves: Arrays, measure: Measure | None) -> Arrays:
    """A zero for every group; made from sizes it inherits their sharding."""
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    if measure is None or abstract or not leaves:
        return [jnp.zeros(shape, groups.dtype) for shape in groups.block_shapes()]
    sizes = by_block(groups, summed_sizes(groups, leaves, measure))
    return [jnp.zeros_like(size) for size in sizes]


def _keep(
    leaves: Arrays, rough: Arrays, kept: Arrays | None, known: _Known
) -> tuple[Arrays, Arrays | None]:
    return rough, kept


def _where_finite(size: jax.Array, new: Any, old: Any) -> Any:
    """The new state of finite groups, the old one of others; block axes come last."""
    finite = jnp.isfinite(size)
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b).astype(b.dtype), new, old)
