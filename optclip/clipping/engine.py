"""`clip_by`: the one way that every composed rule goes.

    updates --gather--> blocks --measure--> sizes --threshold--> limits --action-->
    target sizes --spread--> updates'

`update` reads in exactly this order. What was seen on the way, the sizes and limits,
becomes the metrics and the threshold's next state. This is the only file that knows
measures, groupings, thresholds and actions together.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optclip._core import checks, meshes, metrics, numerics
from optclip._core import groups as blocks
from optclip._core import sizes as measuring
from optclip._core.groupings import Grouping, whole
from optclip._core.measures import Measure, l2, max_abs
from optclip._core.metrics import ClipMetrics
from optclip._core.public import error, public
from optclip.clipping import beside
from optclip.clipping.actions import Action, rescale
from optclip.clipping.thresholds.base import Seen, Threshold


class ClipState(NamedTuple):
    """The state of every rule made by `clip_by`.

    Attributes:
      threshold: the threshold's state, () if it has none. For joint groupings arrays
        over the vector of groups; for groupings within leaves each array is a tree like
        the parameters.
      metrics: what the last update saw; read them with `optclip.metrics`.
    """

    threshold: Any
    metrics: ClipMetrics


@public
def clip_by(
    threshold: Threshold,
    *,
    measure: Measure = l2,
    grouping: Grouping = whole(),  # noqa: B008 (an immutable tuple)
    action: Action = rescale(),  # noqa: B008 (an immutable tuple)
    nonfinite: str = "propagate",
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Bounds the size of every group of updates: the parts of every named rule.

        size = measure(group),  limit = threshold(size),
        group ← group · action(size, limit) / size

    Args:
      threshold: how big a group may be, one of `optclip.thresholds`.
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

    Returns:
      A gradient transformation with state `ClipState`. Updates keep their dtypes,
      shapes, shardings and tree; integers, random keys, float0, None and MaskedNode
      pass untouched. `update(updates, None)` starts from a fresh state.

    Edge cases: a group within its limit keeps its bits. Limit infinity: identity.
    Limit 0, size 0: zeros. Limit NaN: NaN. Half precision: sizes are float32, results
    are rounded once.

    Raises:
      ValueError: if a part is not of its kind, nonfinite is unknown, or (at init and
        update) the parts do not fit each other or the tree.

    >>> import jax.numpy as jnp, optclip
    >>> tx = clip_by(optclip.thresholds.constant(1.0), measure=optclip.measures.max_abs)
    >>> updates, state = tx.update({"w": jnp.array([4.0, -2.0])}, None)
    >>> print(updates["w"], state.metrics.size)
    [ 1.  -0.5] 4.0
    """
    checks.instance(Threshold, threshold=threshold)
    checks.instance(Measure, measure=measure)
    checks.instance(Grouping, grouping=grouping)
    checks.instance(Action, action=action)
    checks.choice(("propagate", "zero"), nonfinite=nonfinite)
    if threshold.init is not None and not grouping.keeps_state:
        raise error(
            "threshold must have no state under per_example, whose groups are "
            "others at every step, got one with state."
        )
    spoiled = jnp.nan if nonfinite == "propagate" else 0.0
    # Of one number every size is the same, and this one never overflows.
    measure = max_abs if grouping.is_elementwise else measure

    @jax.jit
    def aim(size: jax.Array, limit: jax.Array) -> jax.Array:
        target = action.target(size, jnp.maximum(limit, 0))
        return jnp.where(jnp.isfinite(size), target, spoiled)

    def init(params: optax.Params) -> ClipState:
        axes = meshes.bound(axis_name)
        gathered = blocks.gather(params, grouping, axes)
        step = jnp.zeros((), jnp.int32)
        state = ()
        if threshold.init is not None:
            # Zeros made from sizes of the parameters inherit their sharding.
            sizes = blocks.stacked(gathered, measuring.totals(gathered, measure))
            seen = [Seen(jnp.zeros_like(s), step, gathered.names) for s in sizes]
            fresh = [threshold.init(block) for block in seen]
            state = _pack(gathered, threshold, fresh)
        if gathered.groups:  # a bad limit is reported here, not at the first update
            for shape, own in zip(
                blocks.block_shapes(gathered),
                _unpack(gathered, threshold, state),
                strict=True,
            ):
                zeros = jnp.zeros(shape, gathered.wide)
                seen = Seen(zeros, step, gathered.names, zeros, zeros.sum())
                threshold.limit(own, seen)
        return ClipState(state, metrics.start(gathered.wide))

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ClipState]:
        del extra_args
        if state is None:
            state = init(updates if params is None else params)
        gathered = blocks.gather(updates, grouping, axis_name)
        states = _unpack(gathered, threshold, state.threshold)

        of_params = [None] * len(states)
        if threshold.needs_params and gathered.groups:
            of_params = beside.param_sizes(
                gathered, params, measure, grouping, axis_name
            )

        def see(sizes: list[jax.Array]) -> list[Seen]:
            whole = None
            if threshold.needs_whole:
                apart = blocks.unstacked(gathered, sizes)
                whole = beside.whole_size(gathered, measure, apart)
            step, names = state.metrics.steps, gathered.names
            return [
                Seen(numerics.finite(size), step, names, own, whole)
                for size, own in zip(sizes, of_params, strict=True)
            ]

        def judge(sizes: list[jax.Array]) -> list[jax.Array | None]:
            limits = [
                threshold.limit(own, seen)
                for own, seen in zip(states, see(sizes), strict=True)
            ]
            return [x if x is None else jnp.asarray(x, gathered.wide) for x in limits]

        learns = threshold.init is not None
        sizes, limits = measuring.measured(gathered, measure, judge, learns)
        if None not in limits:  # there is something to clip to
            limit_of = blocks.unstacked(gathered, limits)
            targets = [aim(*pair) for pair in zip(sizes, limit_of, strict=True)]
            updates = blocks.spread(gathered, sizes, targets)

        in_blocks = blocks.stacked(gathered, sizes)
        learned = [
            _unless_spoiled(size, own, threshold.observe(own, seen, limit))
            for size, own, seen, limit in zip(
                in_blocks, states, see(in_blocks), limits, strict=True
            )
        ]
        numbers = metrics.after(state.metrics, in_blocks, limits, grouping)
        return updates, ClipState(_pack(gathered, threshold, learned), numbers)

    return optax.GradientTransformationExtraArgs(init, update)


def _unless_spoiled(size: jax.Array, old: Any, new: Any) -> Any:
    """The new state of finite groups, the old one of others; block axes come last."""
    finite = jnp.isfinite(size)
    return jax.tree.map(lambda a, b: jnp.where(finite, b, a).astype(a.dtype), old, new)


def _pack(gathered: blocks.Gathered, threshold: Threshold, states: list[Any]) -> Any:
    """States of blocks as kept: one, or one whose every array is a tree like params."""
    if gathered.joint:
        return states[0]

    def like_params(_: Any, *parts: jax.Array) -> Any:
        kept: list[Any] = [()] * len(gathered.leaves)
        for group, part in zip(gathered.groups, parts, strict=True):
            kept[group.members[0].index] = part
        tree = jax.tree_util.tree_unflatten(gathered.treedef, kept)
        return jax.tree.map(_unboxed, tree, is_leaf=_is_box)

    return jax.tree.map(like_params, _blank(threshold), *states)


def _is_box(node: Any) -> bool:
    """Whether it is a Variable of NNX or a boxed parameter of Linen."""
    return hasattr(node, "get_metadata") or hasattr(node, "unbox")


def _unboxed(node: Any) -> Any:
    """Numbers of units without the box, whose sharding names axes that they lack."""
    leaves = jax.tree_util.tree_leaves(node) if _is_box(node) else []
    return leaves[0] if leaves else node


def _unpack(gathered: blocks.Gathered, threshold: Threshold, state: Any) -> list[Any]:
    """The state of each block, by order: NNX gives `init` and `update` other trees."""
    count = len(gathered.groups)
    leaves = jax.tree_util.tree_leaves(state)
    treedef = jax.tree_util.tree_structure(_blank(threshold))
    if not treedef.num_leaves:
        return [state] * (1 if gathered.joint else count)
    if gathered.joint:  # the block is the last axis, also that of an empty tree
        expected, kept = max(count, 1), leaves[0].shape[-1]
    else:
        expected, kept = count, len(leaves) // treedef.num_leaves
    if kept != expected:
        raise error(
            f"updates must have the measured groups that init saw, got {count} "
            f"for a state of {kept}."
        )
    if gathered.joint:
        return [state]
    parts = [leaves[number::count] for number in range(count)]
    return [jax.tree_util.tree_unflatten(treedef, part) for part in parts]


def _blank(threshold: Threshold) -> Any:
    """A state of the threshold, for its structure."""
    if threshold.init is None:
        return ()
    return threshold.init(Seen(jnp.zeros((1,)), jnp.zeros((), jnp.int32)))
