"""From leaves to blocks of groups, and back.

    leaves --gather---> who belongs to which group, over which axes
           --measured-> one size a group    (the only pass over the leaves, and one
                                             collective for each set of mesh axes)
           --stacked--> one array a block   (what a threshold sees)
           --spread---> leaves, scaled to their groups' target sizes

A joint grouping has one block, the vector of its groups; a grouping within leaves has
one block a leaf, with reduced axes kept at size 1. Sizes stay apart, one array a group,
because slicing them out of a vector gives every leaf's kernel its own offset, and
XLA:CPU compiles equal kernels once but these each anew.
"""

import functools
import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optclip import _meshes, _numerics, _paths
from optclip.clipping.groupings import Grouping
from optclip.clipping.measures import MAX, Measure, fold, l2, max_abs


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


def gather(rule: str, tree: Any, grouping: Grouping, axis_name: Any) -> Gathered:
    """Decides which leaves are measured, over which axes, with which others."""
    leaves, treedef = jax.tree_util.tree_flatten(tree)
    named = [
        (index, path, jnp.asarray(value))
        for index, (path, value) in enumerate(_paths.leaves(tree))
        if _numerics.is_measured(value)
    ]
    shapes = {path: leaf.shape for _, path, leaf in named}
    given_axes = _meshes.axes_of(rule, axis_name)

    by_label: dict[str, list[Member]] = {}
    for index, path, leaf in named:
        axes = grouping.axes(path, leaf.shape, shapes)
        mesh = _mesh_axes(rule, grouping, path, leaf, given_axes(path))
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
        wide=_numerics.wide_dtype(*[leaf.dtype for _, _, leaf in named]),
    )


def _mesh_axes(
    rule: str, grouping: Grouping, path: str, leaf: jax.Array, given: Any
) -> tuple[Hashable, ...]:
    if grouping.sums is False:
        return ()
    if given is not None:
        return given
    varying = _meshes.varying_axes(leaf)
    if varying and grouping.sums is None:
        raise ValueError(
            f"{rule}: axis_name must say which mesh axes a unit extends over, got None "
            f"for {path!r}, which varies over {varying}; () means that units are whole."
        )
    return varying


def _count(members: list[Member]) -> int:
    return sum(
        math.prod(m.leaf.shape[axis] for axis in m.axes) * _meshes.axis_size(m.mesh)
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


def totals(
    gathered: Gathered, measure: Measure, units: list[jax.Array] | None = None
) -> list[jax.Array]:
    """The total of every group, in its unit if it has one."""
    combine = measure.combine
    partial: dict[tuple[Hashable, ...], dict[int, jax.Array]] = {}
    for number, group in enumerate(gathered.groups):
        unit = None if units is None else units[number]
        by_mesh: dict[tuple[Hashable, ...], list[jax.Array]] = {}
        for member in group.members:
            total = _leaf_total(gathered, member, measure, unit)
            by_mesh.setdefault(member.mesh, []).append(total)
        for mesh, parts in by_mesh.items():
            partial.setdefault(mesh, {})[number] = fold(combine.join, parts)

    joined: list[list[jax.Array]] = [[] for _ in gathered.groups]
    for mesh, parts in partial.items():
        values = list(parts.values())
        if mesh:
            values = _across(combine.across, values, mesh)
        for number, value in zip(parts, values, strict=True):
            joined[number].append(value)
    return [fold(combine.join, parts) for parts in joined]


def _leaf_total(
    gathered: Gathered, member: Member, measure: Measure, unit: jax.Array | None
) -> jax.Array:
    keepdims = not gathered.joint
    unit = None if unit is None else _aligned(unit, member)
    return _reduced(member.leaf, unit, measure, member.axes, keepdims, gathered.wide)


# Jitted so that equal leaves are traced once: 1000 leaves trace in the time of a few.
@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _reduced(
    x: jax.Array,
    unit: jax.Array | None,
    measure: Measure,
    axes: tuple[int, ...],
    keepdims: bool,
    wide: Any,
) -> jax.Array:
    leaf = x
    if unit is None:
        x = _numerics.for_measuring(x, wide)
    else:
        # Together: a barrier on x alone would let XLA widen and divide it once more.
        x, inverse = jax.lax.optimization_barrier((x, 1 / unit))
        x = _numerics.times(_numerics.widen(x, wide), inverse)
    summands = measure.lift(x)
    if not axes:
        return summands
    total = measure.combine.reduce(summands, axis=axes, keepdims=keepdims)
    if measure.combine is MAX:
        squares = _squares_beside(leaf, wide)
        total = _meshes.remembering(total, jnp.sum(squares, axes, keepdims=keepdims))
    return total


def _squares_beside(leaf: jax.Array, wide: Any) -> jax.Array:
    """Squares that share no widened copy with any other reduction of the leaf."""
    barred, _ = jax.lax.optimization_barrier((leaf, jnp.zeros((2,))))
    return l2.lift(_numerics.widen(barred, wide))


def _across(
    collective: Callable[..., jax.Array],
    values: list[jax.Array],
    mesh: tuple[Hashable, ...],
) -> list[jax.Array]:
    """One collective for a list of arrays."""
    flat = jnp.concatenate([value.reshape(-1) for value in values])
    flat = collective(flat, mesh)
    out, start = [], 0
    for value in values:
        out.append(flat[start : start + value.size].reshape(value.shape))
        start += value.size
    return out


def stacked(gathered: Gathered, by_group: list[jax.Array]) -> list[jax.Array]:
    """One array a block, from one array a group."""
    if not gathered.joint:
        return by_group
    return [jnp.stack(by_group)] if by_group else [jnp.zeros((1,), gathered.wide)]


def apart(gathered: Gathered) -> list[tuple[jax.Array, jax.Array]]:
    """The sizes of single elements, once more, to be reduced; and their sum of squares.

    XLA:CPU writes |x| to memory if a reduction shares it with the clipping itself. All
    leaves stand behind one barrier, which is none of those in `for_measuring`: equal
    barriers would be merged.
    """
    leaves = [group.members[0].leaf for group in gathered.groups]
    barred, _ = jax.lax.optimization_barrier((leaves, jnp.zeros(())))
    return [
        (
            jnp.abs(_numerics.widen(again, gathered.wide)),
            jnp.sum(_squares_beside(leaf, gathered.wide)),
        )
        for leaf, again in zip(leaves, barred, strict=True)
    ]


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
            scale, numbers = _numerics.resized, (size, target)
        else:
            scale, numbers = _numerics.scale_to, _numerics.factors(size, target)
        for member in group.members:
            aligned = [_aligned(number, member) for number in numbers]
            leaves[member.index] = scale(member.leaf, *aligned)
    return jax.tree_util.tree_unflatten(gathered.treedef, leaves)


def _aligned(value: jax.Array, member: Member) -> jax.Array:
    """Appends axes of size 1, so that a group's numbers broadcast against a leaf."""
    if value.ndim in (0, member.leaf.ndim):
        return value
    return value.reshape(value.shape + (1,) * (member.leaf.ndim - value.ndim))


def measured(
    gathered: Gathered,
    measure: Measure,
    judge: Callable[[list[jax.Array]], list[Any]],
) -> tuple[list[jax.Array], list[Any]]:
    """The size of every group, and the limits that `judge` gives their blocks.

    Sums of squares overflow float32 above 1e19 and lose digits below 1e-9. So after
    the one ordinary pass, a second, in a better unit, runs only if a total is not
    finite, or is tiny and its limit (None or 0: unknown) tinier: never for groups that
    are merely zero under an ordinary limit. Choosing costs nothing at run time; three
    accumulators in one pass would cost 4x.
    """
    plain = totals(gathered, measure)
    sizes = _lowered(gathered, measure, plain)
    limits = judge(stacked(gathered, sizes))
    if not gathered.groups or _never_leaves_range(gathered, measure):
        return sizes, limits

    usable = _numerics.range_of(gathered.wide)
    zero = jnp.zeros((), gathered.wide)
    known = [zero if limit is None else limit for limit in limits]
    doubts = [
        _is_doubtful(total, limit, measure.lower(usable.tiny + zero, group.count))
        for group, total, limit in zip(
            gathered.groups, plain, unstacked(gathered, known), strict=True
        )
    ]

    def again() -> tuple[list[jax.Array], list[Any]]:
        units = _units(gathered, measure, plain)
        precise = _lowered(gathered, measure, totals(gathered, measure, units), units)
        # Others keep the bits that they have when no group is in doubt.
        precise = [
            jnp.where(*all_) for all_ in zip(doubts, precise, sizes, strict=True)
        ]
        return precise, judge(stacked(gathered, precise))

    doubt = fold(jnp.logical_or, [jnp.any(doubt) for doubt in doubts])
    doubt = _meshes.anywhere(doubt, _divided(gathered, doubt))
    return jax.lax.cond(doubt, again, lambda: (sizes, limits))


def _divided(gathered: Gathered, doubt: jax.Array) -> tuple[Hashable, ...]:
    """The mesh axes to agree over: summed along in the branch, but not by every group.

    Devices that take different branches would wait for each other forever. None where
    all groups extend over the same axes.
    """
    members = [member for group in gathered.groups for member in group.members]
    by_group = [{a for m in group.members for a in m.mesh} for group in gathered.groups]
    summed, by_all = set.union(*by_group), set.intersection(*by_group)
    if any(_meshes.varying_axes(member.leaf) for member in members):
        differs = summed.intersection(_meshes.varying_axes(doubt))
    else:  # pmap, check_vma=False: types say nothing
        differs = summed - by_all
    return tuple(sorted(differs, key=str))


def _lowered(
    gathered: Gathered,
    measure: Measure,
    group_totals: list[jax.Array],
    units: list[jax.Array] | None = None,
) -> list[jax.Array]:
    sizes = [
        measure.lower(total, group.count)
        for total, group in zip(group_totals, gathered.groups, strict=True)
    ]
    if units is None:
        return sizes
    return [size * unit for size, unit in zip(sizes, units, strict=True)]


@jax.jit
def _is_doubtful(total: jax.Array, limit: jax.Array, edge: jax.Array) -> jax.Array:
    tiny = _numerics.range_of(total.dtype).tiny
    return ~jnp.isfinite(total) | ((total < tiny) & ~(limit >= edge))


def _never_leaves_range(gathered: Gathered, measure: Measure) -> bool:
    """Whether no total can overflow or vanish unless the size itself does."""
    members = [member for group in gathered.groups for member in group.members]
    return (
        measure.power is None
        # float16's squares, and their sums, lie well inside float32's range.
        or (measure.power == 2 and all(m.leaf.dtype == jnp.float16 for m in members))
    )


def _units(
    gathered: Gathered, measure: Measure, plain: list[jax.Array]
) -> list[jax.Array]:
    """What to divide each group by, so that its summands stay in range."""
    if measure.power is not None and measure.power <= 2:
        return [_fixed_unit(total) for total in plain]
    return [_nonzero(largest) for largest in totals(gathered, max_abs)]


@jax.jit
def _fixed_unit(total: jax.Array) -> jax.Array:
    """A power of two by the total; up to squares this is enough and needs no pass."""
    usable = _numerics.range_of(total.dtype)
    up_or_none = jnp.where(total < usable.tiny, usable.up, 1.0)
    unit = jnp.where(jnp.isfinite(total), up_or_none, usable.down)
    return jax.lax.stop_gradient(unit.astype(total.dtype))


@jax.jit
def _nonzero(largest: jax.Array) -> jax.Array:
    """The largest element, kept where its reciprocal is a normal number too."""
    usable = (largest > 0) & jnp.isfinite(largest)
    unit = jnp.minimum(largest, 2.0 ** (int(jnp.finfo(largest.dtype).maxexp) - 3))
    return jax.lax.stop_gradient(jnp.where(usable, unit, jnp.ones_like(unit)))
