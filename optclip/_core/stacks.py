"""Stacks small leaves of one shape and dtype, for groupings of units on one GPU.

    (768,), (768,), (64, 8), ...  ──of──▶  (2, 768), (64, 8), ...

Units of different leaves stay separate: each has its own size and factor. But a stack
is measured in one kernel and scaled in one, and to launch a kernel for a small leaf
costs more than the work in it. Where there are more devices than one, and on CPU,
leaves stay what they are.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from optclip._core import numerics, small_leaves
from optclip._core.grouped import Arrays, Groups


class Stacks(NamedTuple):
    """Leaves that were put together, and how.

    Attributes:
      groups: those of the stacked leaves.
      leaves: the stacked leaves, one a group.
      owners: for each of them the numbers of the groups that it is made of.
    """

    groups: Groups
    leaves: Arrays
    owners: list[list[int]]

    def stack(self, of_groups: Arrays) -> Arrays:
        """One array a stack, from one a group that broadcasts to its shape."""
        found = []
        for group, own in zip(self.groups.groups, self.owners, strict=True):
            each = [of_groups[n] for n in own]
            if len(own) > 1:
                each = [jnp.broadcast_to(x, group.shape[1:]) for x in each]
            found.append(_stacked(each))
        return found

    def split(self, of_stacks: Arrays) -> Arrays:
        """Splits arrays of stacks back into one array a group."""
        found: dict[int, jax.Array] = {}
        for own, x in zip(self.owners, of_stacks, strict=True):
            found |= dict(zip(own, x if len(own) > 1 else [x], strict=True))
        return [found[n] for n in range(len(found))]

    def split_leaves(self, scaled: Arrays, kept: Arrays) -> Arrays:
        """The leaves, from scaled stacks and which groups are unchanged.

        XLA:GPU makes one kernel of all slices of a choice, but one each of slices of an
        array that is there. Hence the second choice.
        """
        found = list(scaled)
        for n, own in enumerate(self.owners):
            if len(own) > 1:
                x = jax.lax.optimization_barrier(scaled[n])
                found[n] = numerics.choose(kept[n], self.leaves[n], x)
        return self.split(found)


def of(groups: Groups, leaves: Arrays) -> Stacks | None:
    """The stacks of leaves whose groups are units; None where nothing is stacked."""
    if groups.stacked or numerics.backend() != "gpu":
        return None
    alike: dict[object, list[int]] = {}
    for n, group in enumerate(groups.groups):
        ((index, axes, mesh),) = group.members
        leaf, key = leaves[index], n
        small = axes and not mesh and leaf.size <= small_leaves.SMALL
        if small and small_leaves.on_one_device(leaf):
            key = leaf.shape, leaf.dtype, axes, bool(group.scaled)
        alike.setdefault(key, []).append(n)
    owners = [own for found in alike.values() for own in small_leaves.chunks(found)]
    if len(owners) == len(groups.groups):
        return None

    together, stacked = [], []
    for number, own in enumerate(owners):
        group = groups.groups[own[0]]
        (member,) = group.members
        axes, shape = member.axes, group.shape
        if len(own) > 1:
            axes, shape = tuple(axis + 1 for axis in axes), (len(own), *shape)
        stacked.append(
            _stacked([leaves[groups.groups[n].members[0].index] for n in own])
        )
        member = member._replace(index=number, axes=axes)
        scaled = (number,) if group.scaled else ()
        together.append(group._replace(members=(member,), shape=shape, scaled=scaled))
    places = tuple(range(len(owners)))
    groups = groups._replace(groups=tuple(together), places=places, stacked=True)
    return Stacks(groups, stacked, owners)


def _stacked(arrays: Arrays) -> jax.Array:
    if len(arrays) == 1:
        return arrays[0]
    # Without a barrier XLA would undo this, and slice the arrays instead.
    return jax.lax.optimization_barrier(jnp.stack(arrays))
