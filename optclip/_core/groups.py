"""From leaves to blocks of groups, and back.

    leaves --gather---> who belongs to which group, over which axes
    sizes  --stacked--> one array a block: what a threshold sees
           --spread---> leaves, scaled to their groups' target sizes

A joint grouping has one block, the vector of its groups; a grouping within leaves has
one block a leaf, with reduced axes kept at size 1. Sizes stay apart, one array a group,
because slicing them out of a vector gives every leaf's kernel its own offset, and
XLA:CPU compiles equal kernels once but these each anew.
"""

import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optclip._core import meshes, numerics, paths
from optclip._core.groupings import Grouping
from optclip._core.public import error


class Member(NamedTuple):
    """A measured leaf: its place in the tree and its part in its group."""

    index: int
    path: str
    leaf: jax.Array
    axes: tuple[int, ...]  # reduced
    mesh: tuple[Hashable, ...]  # summed over


class Group(NamedTuple):
    """The leaves measured together, and how many elements they have on all devices."""

    label: str  # a leaf's path where groups lie within leaves
    members: tuple[Member, ...]
    count: int


class Gathered(NamedTuple):
    """A tree, seen as blocks of groups."""

    leaves: list[Any]
    treedef: Any
    groups: list[Group]
    names: tuple[str, ...] | None  # of the groups, where users can refer to them
    joint: bool
    wide: Any  # the dtype of sizes


def gather(tree: Any, grouping: Grouping, axis_name: Any) -> Gathered:
    """Decides which leaves are measured, over which axes, with which others."""
    leaves, treedef = jax.tree_util.tree_flatten(tree)
    named = [
        (index, path, jnp.asarray(value))
        for index, (path, value) in enumerate(paths.leaves(tree))
        if numerics.is_measured(value)
    ]
    shapes = {path: leaf.shape for _, path, leaf in named}
    given_axes = meshes.axes_of(axis_name)

    by_label: dict[str, list[Member]] = {}
    for index, path, leaf in named:
        mesh = mesh_axes(grouping, path, leaf, given_axes(path))
        axes = grouping.axes(path, on_all_devices(leaf.shape, mesh), shapes)
        label = path if grouping.label is None else grouping.label(path)
        by_label.setdefault(label, []).append(Member(index, path, leaf, axes, mesh))

    groups = [
        Group(label, tuple(members), _count(members))
        for label, members in by_label.items()
    ]
    return Gathered(
        leaves=leaves,
        treedef=treedef,
        groups=groups,
        names=tuple(by_label) if grouping.named else None,
        joint=grouping.label is not None,
        wide=numerics.wide_dtype(*[leaf.dtype for _, _, leaf in named]),
    )


def mesh_axes(
    grouping: Grouping, path: str, leaf: jax.Array, given: Any
) -> tuple[Hashable, ...]:
    """The mesh axes that groups of a leaf extend over; `given` by the user, or None."""
    if grouping.sums is False:
        return ()
    if given is not None:
        return given
    varying = meshes.varying_axes(leaf)
    if varying and grouping.sums is None:
        raise error(
            f"axis_name must say which mesh axes a unit extends over, got None "
            f"for {path!r}, which varies over {varying}; () means that units are whole."
        )
    return varying


def on_all_devices(
    shape: tuple[int, ...], mesh: tuple[Hashable, ...]
) -> tuple[int, ...]:
    """An upper bound of a shape on the mesh: no type says which dimension is split.

    What matters is that a row on each of eight devices is no vector.
    """
    return tuple(size * meshes.axis_size(mesh) for size in shape)


def _count(members: list[Member]) -> int:
    return sum(
        math.prod(m.leaf.shape[axis] for axis in m.axes) * meshes.axis_size(m.mesh)
        for m in members
    )


def block_shapes(gathered: Gathered) -> list[tuple[int, ...]]:
    """The shape of every block, without measuring. At least one joint group exists."""
    if not gathered.joint:
        return [_kept_shape(group.members[0]) for group in gathered.groups]
    kept = gathered.groups[0].members[0] if gathered.groups else None
    rest = tuple(
        size
        for axis, size in enumerate(kept.leaf.shape if kept else ())
        if axis not in (kept.axes if kept else ())
    )
    return [(max(len(gathered.groups), 1), *rest)]


def _kept_shape(member: Member) -> tuple[int, ...]:
    return tuple(
        1 if axis in member.axes else size
        for axis, size in enumerate(member.leaf.shape)
    )


def stacked(gathered: Gathered, by_group: list[jax.Array]) -> list[jax.Array]:
    """One array a block, from one array a group."""
    if not gathered.joint:
        return by_group
    return [jnp.stack(by_group)] if by_group else [jnp.zeros((1,), gathered.wide)]


def unstacked(gathered: Gathered, by_block: list[jax.Array]) -> list[jax.Array]:
    """One array a group, from one array a block; a scalar serves every group.

    The inverse of `stacked`, to be used once and on one vector: each slice gives the
    kernel that reads it another offset, and XLA:CPU compiles equal kernels once.
    """
    if not gathered.joint:
        return by_block
    (vector,) = by_block
    if vector.ndim == 0:
        return [vector] * len(gathered.groups)
    return [
        jax.lax.index_in_dim(vector, number, keepdims=False)
        for number in range(len(gathered.groups))
    ]


def spread(gathered: Gathered, sizes: list[jax.Array], targets: list[jax.Array]) -> Any:
    """The tree, every group scaled from its size to its target size."""
    leaves = list(gathered.leaves)
    for group, size, target in zip(gathered.groups, sizes, targets, strict=True):
        if not gathered.joint and not group.members[0].axes:  # a group is one element
            (only,) = group.members
            leaves[only.index] = numerics.resized(only.leaf, size, target)
            continue
        ratio = numerics.factor(size, target)
        for member in group.members:
            own = aligned(ratio, member)
            leaves[member.index] = numerics.scale_by(member.leaf, own)
    return jax.tree_util.tree_unflatten(gathered.treedef, leaves)


def aligned(value: jax.Array, member: Member) -> jax.Array:
    """Appends axes of size 1, so that a group's numbers broadcast against a leaf."""
    if value.ndim in (0, member.leaf.ndim):
        return value
    return value.reshape(value.shape + (1,) * (member.leaf.ndim - value.ndim))
