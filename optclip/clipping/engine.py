"""The engine: the one way of updates through a rule that `clip_by` composes.

    updates ──gather──▶ groups ──▶ rough sizes ──threshold──▶ limits
        ──▶ refined sizes and limits ──action──▶ targets ──▶ rescaled updates
        ──▶ metrics ──▶ the threshold's next state

`update` reads in exactly this order. This is the only file that knows measures,
groupings, thresholds and actions together; `clip_by` puts one of each into it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optclip._core import checks, meshes, metrics
from optclip._core.grouped import Arrays, Groups
from optclip._core.groupings import Grouping, per_leaf, whole
from optclip._core.groups import (
    apart,
    by_block,
    by_group,
    gather,
    rescaled,
)
from optclip._core.measures import Measure
from optclip._core.metrics import ClipMetrics
from optclip._core.sizes import Rough, in_doubt, precise_sizes, summed_sizes
from optclip._core.types import AxisName, Tree
from optclip.clipping.other_sizes import (
    combined_size,
    gathered_params,
    sizes_of_params,
)
from optclip.clipping.recorder import Recorder, RecorderState
from optclip.clipping.state_blocks import blank_state, packed, repacked, unpacked
from optclip.clipping.thresholds import Observation, Threshold


class ClipState(NamedTuple):
    """The state of every rule made by `clip_by`, unless it records.

    Attributes:
      threshold: the threshold's state, () if it has none. For joint groupings arrays
        over the vector of groups; for groupings within leaves each array is a tree like
        the parameters, in Flax's boxes where those are, whose sharding names the axes
        that are left.
      metrics: what the last update saw; read them with `optclip.metrics`.
    """

    threshold: optax.OptState
    metrics: ClipMetrics


class RecordedClipState(NamedTuple):
    """The state of a rule with `record=K`.

    Attributes:
      threshold: as in `ClipState`.
      metrics: as in `ClipState`.
      recorder: the last K steps; read them with `optclip.history`.
    """

    threshold: optax.OptState
    metrics: ClipMetrics
    recorder: RecorderState


# Sizes by group, the same by block, and the limits of the blocks. Behind the sizes of
# the groups are those of their leaves, one vector, if a recorder wants them.
_Measured = tuple[Arrays, Arrays, Arrays]


# What a second pass may change: sizes by group, limits, and sizes of the parameters.
_Again = tuple[Arrays, Arrays | None, Arrays | None]


class _Known(NamedTuple):
    """What limits depend on beside the sizes of the groups, block by block."""

    states: list[Any] | None
    params: Arrays | None
    step: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """What `clip_by` returns: the parts, and the way of the updates through them.

    Sizes come one array a group where leaves are scaled by them, and one array a block
    where a threshold sees them.
    """

    threshold: Threshold
    measure: Measure
    grouping: Grouping
    target_of: Callable[..., jax.Array]
    enlarges: bool
    mesh_axes: meshes.AxesOf
    axis_name: AxisName
    recorder: Recorder | None = None
    with_leaves: bool = False  # whether the recorder's sizes are not those of groups
    second_looks: dict[Any, Callable[..., Any]] = field(default_factory=dict)

    @functools.cached_property
    def blank(self) -> Any:
        """The threshold's state of one group, as shapes."""
        return blank_state(self.threshold)

    @functools.cached_property
    def learns(self) -> bool:
        return self.threshold.init is not None

    def init(self, params: optax.Params) -> Tree:
        # `init` often runs outside the shard_map whose axes are named.
        here = self.mesh_axes if meshes.bound(self.axis_name) else meshes.axes_of(())
        # Parameters have no examples; nothing of a group of them would be kept.
        grouping = self.grouping if self.grouping.keeps_state else whole()
        groups, leaves = gather(params, grouping, here)
        zeros = self.zeros(groups, leaves)
        step = jnp.zeros((), jnp.int32)
        states: list[Any] | None = None
        if self.threshold.init is not None:
            fresh = [Observation(x, step, groups.names) for x in zeros]
            states = list(map(self.threshold.init, fresh))
        # A bad limit is reported here.
        self.limits(groups, zeros, _Known(states, zeros, step))
        limited = self.threshold.limit is not None
        elementwise = self.grouping.elementwise
        state = ClipState(
            () if states is None else packed(params, groups, self.blank, states),
            metrics.start(
                groups.dtype, elementwise, limited, limited and self.enlarges
            ),
        )
        if self.recorder is None:
            return state
        recorded = self.recorder.start(params, groups, limited)
        return RecordedClipState(*state, recorded)

    def update(
        self,
        updates: optax.Updates,
        state: Tree,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Tree]:
        del extra_args
        if state is None:
            # A leaf without an update has no group.
            same = jax.tree.structure(params) == jax.tree.structure(updates)
            state = self.init(params if same and params is not None else updates)
        kind = ClipState if self.recorder is None else RecordedClipState
        if not isinstance(state, kind):
            raise checks.other_state(kind, state)
        groups, leaves = gather(updates, self.grouping, self.mesh_axes)
        known = _Known(None, None, state.metrics.steps)
        if self.learns:
            known = known._replace(states=unpacked(groups, self.blank, state.threshold))
        measured = None
        if self.threshold.needs_params and groups.groups:
            own, measured = self.params_beside(groups, leaves, updates, params)
            known = known._replace(params=own)

        alone = apart(groups, leaves) if self.with_leaves and leaves else None
        sizes = summed_sizes(groups, leaves, self.measure, apart=alone)
        blocks = by_block(groups, sizes)
        limits = self.limits(groups, blocks, known)
        rough = sizes, blocks, limits
        refined, known = self.refined(groups, leaves, rough, known, measured)
        sizes, blocks, limits = refined
        reached = None
        if self.threshold.limit is not None:
            targets = list(map(self.target_of, sizes, by_group(groups, limits)))
            scaled = sizes[: len(targets)]
            updates = rescaled(groups, updates, leaves, scaled, targets, self.enlarges)
            reached = by_block(groups, targets) if self.enlarges else None
        met: list[Any] = []
        wanted = None if self.recorder is None else met
        numbers = metrics.after(state.metrics, blocks, limits, wanted, reached)
        learned = state.threshold
        if self.learns:
            learned = repacked(learned, self.learned(groups, blocks, limits, known))
        if self.recorder is None:
            return updates, ClipState(learned, numbers)
        parts = self.parts(groups, sizes, met)
        beside = None
        if self.recorder.ratios:
            beside = self.parts_of_params(groups, leaves, updates, params)
        assert isinstance(state, RecordedClipState)
        recorded = self.recorder.after(state.recorder, parts, beside, numbers)
        return updates, RecordedClipState(learned, numbers, recorded)

    def params_beside(
        self,
        groups: Groups,
        leaves: Arrays,
        updates: optax.Updates,
        params: optax.Params | None,
    ) -> tuple[Arrays, tuple[Groups, Arrays] | None]:
        """The sizes of the parameters, and what is measured again if the updates are.

        On a mesh both trees share one second pass, for fewer collectives; elsewhere
        each has its own, for less memory.
        """
        given = groups, updates, params
        if not any(map(meshes.is_split, leaves)):
            parts = self.measure, self.grouping, self.mesh_axes
            return sizes_of_params(*given, *parts), None
        beside = gathered_params(*given, self.grouping, self.mesh_axes)
        sizes = by_block(beside[0], summed_sizes(*beside, self.measure))
        return [size.astype(groups.dtype) for size in sizes], beside

    def zeros(self, groups: Groups, leaves: Arrays) -> Arrays:
        """A zero for every group, by block; made from sizes it has their sharding."""
        abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
        if abstract or not leaves or not self.learns:
            return [jnp.zeros(shape, groups.dtype) for shape in groups.block_shapes()]
        sizes = by_block(groups, summed_sizes(groups, leaves, self.measure))
        return [jnp.zeros_like(size) for size in sizes]

    def observations(
        self, groups: Groups, blocks: Arrays, known: _Known
    ) -> list[Observation]:
        """What the threshold sees of every block."""
        combined = None
        if self.threshold.needs_combined:
            combined = combined_size(groups, self.measure, blocks)
        params = known.params or [None] * len(blocks)
        # `numerics.finite`, written out: tests limit how many functions a call enters.
        finite = [jnp.where(jnp.isfinite(x), x, jnp.finfo(x.dtype).max) for x in blocks]
        return [
            Observation(size, known.step, groups.names, groups.partial, own, combined)
            for size, own in zip(finite, params, strict=True)
        ]

    def limits(self, groups: Groups, blocks: Arrays, known: _Known) -> Arrays:
        """The limit of every block: a scalar, or a number for each of its groups."""
        if self.threshold.limit is None or not groups.groups:
            return [jnp.asarray(jnp.inf, groups.dtype) for _ in blocks]
        states = known.states or [()] * len(blocks)
        seen = self.observations(groups, blocks, known)
        with np.errstate(over="ignore"):  # a limit that no float32 holds is infinite
            limits = list(map(self.threshold.limit, states, seen))
            for limit, size in zip(limits, blocks, strict=True):
                static = isinstance(limit, (int, float, np.ndarray, np.generic))
                wrong = limit is None or jnp.shape(limit) not in ((), size.shape)
                if wrong or (static and not np.all(np.asarray(limit) >= 0)):
                    checks.limits(size.shape, threshold=limit)
            return [jnp.asarray(limit, groups.dtype) for limit in limits]

    def refined(
        self,
        groups: Groups,
        leaves: Arrays,
        rough: _Measured,
        known: _Known,
        beside: tuple[Groups, Arrays] | None,
    ) -> tuple[_Measured, _Known]:
        """The same numbers, of a second pass where plain sums left their range."""
        sizes, blocks, limits = rough
        reliable = limits
        alone = groups.joint and blocks[0].shape == (1,)
        if self.threshold.limit is None or self.enlarges or alone:
            # Metrics show this size, or it is raised, however far below its limit.
            reliable = [jnp.zeros((), groups.dtype) for _ in limits]
        elif self.learns:
            # An infinite limit has nothing learned yet: what it learns must be right.
            reliable = [jnp.where(limit < jnp.inf, limit, 0) for limit in limits]
        trees = [Rough(groups, leaves, blocks, reliable)]
        if beside is not None and known.params is not None:
            # Parameters that are zero need no second look, large ones do.
            endless = [jnp.asarray(jnp.inf, groups.dtype) for _ in known.params]
            trees.append(Rough(*beside, known.params, endless))
        doubt = in_doubt(self.measure, *trees)
        if doubt is None:
            return rough, known
        # Limits that learn nothing are sooner found again than kept beside the sizes:
        # for AGC those would be 1.2 % of bfloat16 gradients in temporary bytes.
        kept = limits if self.learns else None
        # One function for each structure of the trees, which JAX compiles once: a new
        # one at each eager update would be compiled anew.
        structure = tuple(tree.groups for tree in trees)
        if structure not in self.second_looks:
            look = functools.partial(self.second_look, structure)
            self.second_looks[structure] = look
        again, both = self.second_looks[structure], [tree.leaves for tree in trees]
        sizes, kept, own = jax.lax.cond(doubt, again, _keep, both, sizes, kept, known)
        if own is not None:
            known = known._replace(params=own)
        blocks = by_block(groups, sizes)
        return (sizes, blocks, kept or self.limits(groups, blocks, known)), known

    def second_look(
        self,
        structure: tuple[Groups, ...],
        leaves: list[Arrays],
        rough: Arrays,
        kept: Arrays | None,
        known: _Known,
    ) -> _Again:
        """Sizes of a second pass, their limits if those of the first were kept, and the
        sizes of parameters that come with the updates."""
        groups, *beside = structure
        alone = apart(groups, leaves[0]) if self.with_leaves else None
        sizes = precise_sizes(groups, leaves[0], self.measure, rough, alone)
        own = None
        if beside:
            (params,) = beside
            assert known.params is not None
            plain = by_group(params, [x.astype(params.dtype) for x in known.params])
            found = precise_sizes(params, leaves[1], self.measure, plain)
            own = [size.astype(groups.dtype) for size in by_block(params, found)]
            known = known._replace(params=own)
        if kept is not None:
            kept = self.limits(groups, by_block(groups, sizes), known)
        return sizes, kept, own

    def learned(
        self, groups: Groups, blocks: Arrays, limits: Arrays, known: _Known
    ) -> list[Any]:
        """The next state of every block, of groups that are finite."""
        assert known.states is not None
        if not groups.groups:
            return known.states
        seen = self.observations(groups, blocks, known)
        with np.errstate(over="ignore"):
            new = list(map(self.threshold.observe, known.states, seen, limits))
        return list(map(_where_finite, blocks, new, known.states))

    def parts(self, groups: Groups, sizes: Arrays, met: list[Any]) -> jax.Array:
        """What is recorded: a vector of sizes of leaves, of groups or of units."""
        if not groups.groups:
            return jnp.zeros((1,), groups.dtype)
        if self.with_leaves:
            return sizes[-1]
        return by_block(groups, sizes)[0] if groups.joint else metrics.furthest(met)

    def parts_of_params(
        self,
        groups: Groups,
        leaves: Arrays,
        updates: optax.Updates,
        params: optax.Params | None,
    ) -> jax.Array:
        """The parameters' sizes to those of `parts`, by a pass over them."""
        if not groups.groups:
            return jnp.ones((1,), groups.dtype)
        grouping = self.grouping
        if self.with_leaves:
            groups = groups._replace(groups=apart(groups, leaves).groups)
            grouping = dataclasses.replace(per_leaf(), measured=grouping.measured)
        beside = self.measure, grouping, self.mesh_axes
        return sizes_of_params(groups, updates, params, *beside)[0]


def _keep(
    leaves: list[Arrays], rough: Arrays, kept: Arrays | None, known: _Known
) -> _Again:
    return rough, kept, known.params if len(leaves) > 1 else None


def _where_finite(size: jax.Array, new: Any, old: Any) -> Any:
    """The new state of finite groups, the old one of others; block axes come last."""
    finite = jnp.isfinite(size)
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b).astype(b.dtype), new, old)
