"""From leaves to groups, from groups to blocks, and back.

    tree ──gather──▶ leaves, and which of them belong to which group, over which axes
    sizes of groups ──by_block──▶ what a threshold sees ──by_group──▶ one array a group
    leaves ──rescaled──▶ the tree, every group scaled to its target size

A joint grouping has one block, the vector of its groups; a grouping within leaves has
one block a leaf, with reduced axes kept at size 1. Sizes stay apart, one array a group,
because slicing them out of a vector gives every leaf's kernel its own offset, and
XLA:CPU compiles equal kernels once but these each anew.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optclip._core import meshes, numerics, paths, small_leaves, stacks
from optclip._core.grouped import Apart, Arrays, Group, Groups, Member
from optclip._core.groupings import Grouping
from optclip._core.public import error
from optclip._core.rounding import power_of_two
from optclip._core.types import Shape, Shapes, Tree


def apart(groups: Groups, leaves: Arrays) -> Apart:
    """The leaves of joint groups, each by itself."""
    own = sorted((m, n) for n, group in enumerate(groups.groups) for m in group.members)
    sizes = [meshes.axis_size(m.mesh) if m.mesh else 1 for m, _ in own]
    alone = [
        Group((m,), leaves[m.index].size * size, (), ())
        for (m, _), size in zip(own, sizes, strict=True)
    ]
    return Apart(tuple(alone), tuple(number for _, number in own))


class _Leaf(NamedTuple):
    """A measured leaf, whose path is spelled only if somebody asks."""

    number: int  # among all leaves of the tree
    value: jax.Array
    spelled: Callable[[], list[paths.Path]]

    @property
    def path(self) -> paths.Path:
        return self.spelled()[self.number]


def gather(
    tree: Tree, grouping: Grouping, mesh_axes: meshes.AxesOf
) -> tuple[Groups, Arrays]:
    """How the tree falls into groups, and its measured leaves.

    Args:
      tree: of arrays, or of `jax.ShapeDtypeStruct`s.
      grouping: which elements belong together.
      mesh_axes: from `meshes.axes_of`, the axes that users give a leaf.
    """
    spelled = functools.cache(functools.partial(paths.spelled, tree))
    leaves = [
        _Leaf(number, _as_array(value), spelled)
        for number, value in enumerate(jax.tree_util.tree_leaves(tree))
        if numerics.is_measured(value)
    ]
    if not grouping.integers:
        _refuse_integers(tree)
    shapes: Shapes = {}
    if grouping.axes is not None:
        shapes = {leaf.path: leaf.value.shape for leaf in leaves}
    joint = grouping.label is not None

    members: dict[Hashable, list[Member]] = {}
    scaled: dict[Hashable, list[int]] = {}
    for index, leaf in enumerate(leaves):
        mesh = mesh_axes_of(grouping, leaf, mesh_axes)
        axes = tuple(range(leaf.value.ndim))
        if grouping.axes is not None:
            shape = on_all_devices(leaf.value.shape, mesh)
            axes = grouping.axes(leaf.path, shape, shapes)
        label = index if grouping.label is None else grouping.label(leaf)
        if grouping.measured is None or grouping.measured(leaf.path, leaf.value):
            members.setdefault(label, []).append(Member(index, axes, mesh))
        if grouping.applied is None or grouping.applied(leaf.path, leaf.value):
            scaled.setdefault(label, []).append(index)
    for name, chosen in (("measured", members), ("applied", scaled)):
        if leaves and not chosen:
            listed = paths.some([leaf.path for leaf in leaves])
            raise error(f"{name} must select a leaf, got none of {listed}.")

    groups = []
    for label, own in members.items():
        first = leaves[own[0].index].value.shape
        kept = [size for axis, size in enumerate(first) if axis not in own[0].axes]
        if not joint:
            kept = [1 if n in own[0].axes else size for n, size in enumerate(first)]
        count = sum(
            math.prod(leaves[index].value.shape[axis] for axis in axes)
            * (meshes.axis_size(mesh) if mesh else 1)
            for index, axes, mesh in own
        )
        into = tuple(scaled.get(label, ()))
        groups.append(Group(tuple(own), count, tuple(kept), into))

    values = [leaf.value for leaf in leaves]
    known = Groups(
        groups=tuple(groups),
        places=tuple(leaf.number for leaf in leaves),
        names=None,
        partial=False,
        joint=joint,
        dtype=numerics.accumulation_dtype(*[value.dtype for value in values]),
    )
    return _named(known, tree, leaves, members) if grouping.named else known, values


def _as_array(leaf: Any) -> jax.Array:
    """The leaf as an array; an abstract one, at `init`, stays what it is."""
    kept: Any = leaf
    return kept if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.asarray(leaf)


def _refuse_integers(tree: Tree) -> None:
    """Raises where leaves would escape a bound that privacy depends on."""
    for path, leaf in paths.leaves(tree):
        dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
        if jnp.issubdtype(dtype, jnp.integer) or dtype == jnp.bool_:
            raise error(
                f"leaves must be floating-point under per_example, got {dtype} at "
                f"{str(path)!r}."
            )


def _named(
    groups: Groups,
    tree: Tree,
    leaves: list[_Leaf],
    members: dict[Hashable, list[Member]],
) -> Groups:
    """The same with names: labels, or the path of the leaf where labels are numbers."""
    names = tuple(
        label if isinstance(label, str) else leaves[own[0].index].path
        for label, own in members.items()
    )
    everything = jax.tree_util.tree_leaves(
        tree, is_leaf=lambda x: x is None or isinstance(x, optax.MaskedNode)
    )
    return groups._replace(names=names, partial=len(leaves) < len(everything))


def mesh_axes_of(
    grouping: Grouping, leaf: paths.Leaf | _Leaf, mesh_axes: meshes.AxesOf
) -> meshes.MeshAxes:
    """The mesh axes that groups of a leaf extend over."""
    if grouping.sums is False:
        return ()
    axes = mesh_axes(leaf)
    if axes is not None:
        return axes
    varying = meshes.varying_axes(leaf.value)
    if varying and grouping.sums is None:
        group = "unit" if grouping.label is None else "example"
        raise error(
            f"axis_name must say which mesh axes one {group} is split over, got None "
            f"for {str(leaf.path)!r}, which varies over {varying}; () means that each "
            f"{group} is whole on its device."
        )
    if not varying and jax.sharding.get_abstract_mesh().manual_axes:
        meshes.warn_where_types_say_nothing()
    return varying


def on_all_devices(shape: Shape, mesh: meshes.MeshAxes) -> Shape:
    """An upper bound of a shape on the mesh: no type says which dimension is split.

    What matters is that a row on each of eight devices is no vector.
    """
    return tuple(size * meshes.axis_size(mesh) for size in shape) if mesh else shape


def by_block(groups: Groups, of_groups: Arrays) -> Arrays:
    """One array a block, from one array a group; what comes behind them is left out."""
    of_groups = of_groups[: len(groups.groups)]
    if not groups.joint:
        return of_groups
    return [jnp.stack(of_groups) if of_groups else jnp.zeros((1,), groups.dtype)]


def by_group(groups: Groups, of_blocks: Arrays) -> Arrays:
    """One array a group, from one array a block; a scalar serves every group.

    The inverse of `by_block`, to be used once and on one vector: each slice gives the
    kernel that reads it another offset, and XLA:CPU compiles equal kernels once.
    """
    if not groups.joint:
        return of_blocks
    (vector,) = of_blocks
    if vector.ndim == 0:
        return [vector] * len(groups.groups)
    return [
        jax.lax.index_in_dim(vector, number, keepdims=False)
        for number in range(len(groups.groups))
    ]


def rescaled(
    groups: Groups,
    tree: Tree,
    leaves: Arrays,
    sizes: Arrays,
    targets: Arrays,
    enlarging: bool = False,
) -> Tree:
    """The tree, every group scaled from its size to its target size.

    With `enlarging` targets may be larger than sizes.
    """
    flat, treedef = jax.tree_util.tree_flatten(tree)
    alike = None if groups.joint else stacks.of(groups, leaves)
    if alike is not None:
        own = alike.stack(sizes), alike.stack(targets)
        found = rescaled(alike.groups, alike.leaves, alike.leaves, *own, enlarging)
        kept = [size == target for size, target in zip(*own, strict=True)]
        parts = alike.split_leaves(found, kept)
        for group, leaf in zip(groups.groups, parts, strict=True):
            flat[groups.places[group.members[0].index]] = leaf
        return jax.tree_util.tree_unflatten(treedef, flat)
    for group, size, target in zip(groups.groups, sizes, targets, strict=True):
        own = [((index,), leaves[index]) for index in group.scaled]
        if size.ndim == 0 and numerics.backend() == "gpu":
            own = small_leaves.vectors(group.scaled, leaves)
        if enlarging:
            # First by a power of two to near the target, or near 1: target / size may
            # not fit the dtype, nor that over the size again, as derivatives have it.
            small = (0 < size) & (size < 1) & (size < target)
            goal = power_of_two(jnp.minimum(target, 1))
            lift = jnp.where(small, 2 * goal / power_of_two(size), 1)
            size = size * lift
            own = [(n, numerics.scale_by(x, aligned(lift, x))) for n, x in own]
        if not groups.joint and not group.members[0].axes:  # a group is one element
            for (index,), leaf in own:
                flat[groups.places[index]] = numerics.resized(leaf, size, target)
            continue
        ratio = numerics.factor(size, target)
        for indices, leaf in own:
            spread = ratio if ratio.ndim in (0, leaf.ndim) else aligned(ratio, leaf)
            scaled = numerics.scale_by(leaf, spread)
            parts = [scaled]
            if len(indices) > 1:
                shapes = [leaves[index].shape for index in indices]
                parts = small_leaves.apart(leaf, scaled, ratio == 1, shapes)
            for index, part in zip(indices, parts, strict=True):
                flat[groups.places[index]] = part
    return jax.tree_util.tree_unflatten(treedef, flat)


def aligned(value: jax.Array, leaf: jax.Array) -> jax.Array:
    """Appends axes of size 1, so that a group's numbers broadcast against a leaf."""
    return value.reshape(value.shape + (1,) * (leaf.ndim - value.ndim))
