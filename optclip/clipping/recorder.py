"""The flight recorder: what a rule measured at its last steps, kept in its state.

    sizes of the parts, metrics ──after──▶ one row of the tables, the oldest overwritten

The numbers are those that the rule itself used, so they cost no pass and no collective:
for one group of several leaves the sizes of the leaves, whose sums it is made of; for
named groups their sizes; for units that of each leaf's unit furthest over its limit.
Ratios to the parameters cost one pass over the parameters. `optclip.history` reads it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from optclip._core import checks, paths
from optclip._core.grouped import Groups
from optclip._core.groupings import Grouping
from optclip._core.measures import Measure
from optclip._core.metrics import ClipMetrics
from optclip._core.public import error

# What a column of the sizes is; see `optclip.History`.
Parts: TypeAlias = Literal["leaves", "groups", "units"]


@jax.tree_util.register_static
class Labels(NamedTuple):
    """What the columns are called, beside arrays in a state: a node without leaves.

    One that names nothing equals every other, because wrappers compare the structure of
    a state with that of one made from a tree without leaves: `optax.tree.map_params`,
    which gives back that one.
    It is a NamedTuple, because Flax's serialization knows nothing else.
    """

    names: tuple[str, ...] = ()
    parts: Parts = "leaves"
    measure: str = "l2"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Labels):
            return False
        same = tuple(self) == tuple(other)
        return same or not self.names or not other.names

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(Labels)


class RecorderState(NamedTuple):
    """The last K steps of a rule; read them with `optclip.history`.

    The row of step s is (s - 1) mod K in every array.

    Attributes:
      labels: the names of the columns, which are no array.
      steps: (K,) which update it was, from 1; 0 for a row that is still empty.
      sizes: (K, names) of the parts. A leaf whose squares vanish while its group's size
        is in range counts as 0, as in `ClipMetrics`.
      size: (K,) what the rule compared with its limit, as in `ClipMetrics`.
      limit: (K,) the limit, as there; None for a rule that never limits.
      clipped: (K,) whether a group was clipped.
      ratios: (K, names) sizes over those of the parameters; None if not asked for.
    """

    labels: Labels
    steps: jax.Array
    sizes: jax.Array
    size: jax.Array
    limit: jax.Array | None
    clipped: jax.Array
    ratios: jax.Array | None


@dataclasses.dataclass(frozen=True, eq=False)
class Recorder:
    """How much a rule records, and of what."""

    length: int
    parts: Parts
    measure: Measure
    ratios: bool

    def start(
        self, params: optax.Params, groups: Groups, limited: bool
    ) -> RecorderState:
        """Nothing recorded yet; every array its own buffer."""
        spelled = paths.unique_names(params)
        first = [spelled[groups.places[g.members[0].index]] for g in groups.groups]
        measured = sorted(m.index for g in groups.groups for m in g.members)
        names = [spelled[groups.places[index]] for index in measured]
        if self.parts != "leaves":  # a `Path` is that of a leaf, a string is a label
            given = groups.names or [paths.Path(())] * len(first)
            pairs = zip(first, given, strict=True)
            names = [
                path if isinstance(own, paths.Path) else own for path, own in pairs
            ]
        row = (self.length,)
        table = (self.length, max(len(names), 1))
        return RecorderState(
            labels=Labels(tuple(names), self.parts, repr(self.measure)),
            steps=jnp.zeros(row, jnp.int32),
            sizes=jnp.zeros(table, groups.dtype),
            size=jnp.zeros(row, groups.dtype),
            limit=jnp.zeros(row, groups.dtype) if limited else None,
            clipped=jnp.zeros(row, bool),
            ratios=jnp.zeros(table, groups.dtype) if self.ratios else None,
        )

    def after(
        self,
        old: RecorderState,
        sizes: jax.Array,
        params: jax.Array | None,
        numbers: ClipMetrics,
    ) -> RecorderState:
        """The same after a step: sizes of the parts, of their parameters, metrics."""
        if old.sizes.shape != (self.length, *sizes.shape):
            raise error(
                f"state must have recorded {self.length} steps of {sizes.size} "
                f"{self.parts}, got an array of shape {old.sizes.shape}."
            )
        assert numbers.size is not None and numbers.clipped_fraction is not None
        new = old._replace(
            steps=numbers.steps,
            sizes=sizes,
            size=numbers.size,
            limit=numbers.limit,
            clipped=numbers.clipped_fraction > 0,
            ratios=None if params is None else _ratio(sizes, params),
        )
        # Not the labels: some equal others, whose names would come out of the cache.
        return RecorderState(old.labels, *_written(old[1:], new[1:]))


@jax.jit
def _ratio(size: jax.Array, params: jax.Array) -> jax.Array:
    """Infinite over parameters that are zero, and 0 if the size is zero too."""
    there = params > 0
    over_zero = jnp.where(size == 0, 0, jnp.inf).astype(size.dtype)
    return jnp.where(there, size / jnp.where(there, params, 1), over_zero)


@jax.jit
def _written(tables: tuple[Any, ...], row: tuple[Any, ...]) -> tuple[Any, ...]:
    """The tables with one row replaced, in place where they are donated."""
    index = (row[0] - 1) % len(tables[0])  # by the number of the step
    return jax.tree.map(
        lambda table, own: jax.lax.dynamic_update_index_in_dim(
            table, jax.lax.stop_gradient(own).astype(table.dtype), index, 0
        ),
        tables,
        row,
    )


def recorder(
    record: int | None, ratios: bool, grouping: Grouping, measure: Measure
) -> Recorder | None:
    """The recorder that a rule asks for, if it does.

    Raises:
      ValueError: if record is no integer of at least 0, or the grouping has no parts
        that are the same at every step and few enough to keep.
    """
    if record is not None:
        checks.at_least(0, record=record)
    if not record:
        if ratios:
            raise error(
                f"ratios must be False where nothing is recorded, got {ratios}."
            )
        return None
    within = grouping.label is None
    if grouping.elementwise or (grouping.axes is not None and not within):
        raise error(f"record must be 0 under {grouping}, got {record}.")
    if ratios and within:
        raise error(f"ratios must be False under {grouping}, got {ratios}.")
    parts = "units" if within else "groups" if grouping.named else "leaves"
    return Recorder(record, parts, measure, ratios)
