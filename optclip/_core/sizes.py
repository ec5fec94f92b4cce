"""The size of every group: the one pass over the leaves, and the rare second one.

    leaves ──summed_sizes──▶ one size a group, one collective a set of mesh axes
    sizes, limits ──in_doubt──▶ whether a sum left its range where that matters
    leaves ──precise_sizes──▶ in doubt, the sizes of a second pass at a good scale

Sums of squares overflow float32 above 1e19 and lose digits below 1e-9. Choosing between
one pass and two costs no pass, but no leaf is scaled before all are measured: a fifth
of the time on CPU where each could be scaled from the cache. Three accumulators in one
pass would cost four times as much.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optclip._core import meshes, numerics, small_leaves, stacks, three_sums
from optclip._core.grouped import Apart, Arrays, Group, Groups
from optclip._core.groups import aligned, by_block
from optclip._core.measures import ANY, MAX, Combine, Measure, joined, l2, max_abs


def summed_sizes(
    groups: Groups,
    leaves: Arrays,
    measure: Measure,
    scales: Arrays | None = None,
    apart: Apart | None = None,
) -> Arrays:
    """The size of every group from plain sums, of elements times its scale if given.

    For a GPU without a scale: from sums that hold at every magnitude. Behind the groups
    comes one vector of the sizes of the leaves, if they are wanted apart.
    """
    in_one = scales is None and numerics.backend() == "gpu"
    in_one = in_one and _fits_one_pass(groups, leaves, measure)
    alike = None if groups.joint or in_one else stacks.of(groups, leaves)
    if alike is not None:
        scales = scales and alike.stack(scales)
        return alike.split(summed_sizes(alike.groups, alike.leaves, measure, scales))
    if in_one and measure.power != 2:
        in_one = False
        largest = summed_sizes(groups, leaves, max_abs)
        unknown = [jnp.full_like(size, jnp.inf) for size in largest]
        scales = list(map(_largest, unknown, _edges(groups, measure), largest))
    each = groups.groups if apart is None else apart.groups
    owners = range(len(each)) if apart is None else apart.owners
    how, kind = (measure.map, measure.combine), (not groups.joint, groups.dtype)
    by_mesh: dict[meshes.MeshAxes, dict[tuple[int, int], Arrays]] = {}
    for number, group in enumerate(each):
        scale = None if scales is None else scales[owners[number]]
        found = (
            three_sums.of_group(group, leaves, groups)
            if in_one
            else [
                (mesh, [_reduced(leaves[index], scale, *how, axes, *kind)])
                for index, axes, mesh in group.members
            ]
        )
        for mesh, sums in found:
            of_mesh = by_mesh.setdefault(mesh, {})
            for place, total in enumerate(sums):
                of_mesh.setdefault((number, place), []).append(total)

    totals: dict[tuple[int, int], Arrays] = {}
    for mesh, parts in by_mesh.items():
        if in_one and groups.joint:
            of_mesh = three_sums.totals_of_rows(list(parts.values()))
        else:
            of_mesh = [joined(measure.combine, own) for own in parts.values()]
        met = _across(measure.combine.across, of_mesh, mesh) if mesh else of_mesh
        for key, total in zip(parts, met, strict=True):
            totals.setdefault(key, []).append(total)

    places = range(3 if in_one else 1)
    whole = [
        [joined(measure.combine, totals[number, place]) for place in places]
        for number in range(len(each))
    ]
    counts = [group.count for group in groups.groups]
    edges = _edges(groups, measure) if in_one else []
    if apart is not None:
        whole = _with_leaves(groups, apart, measure, whole)
        counts.append(1)
        edges += [max(_edges(groups._replace(groups=each), measure))] if in_one else []
        own = [] if scales is None else [scales[n] for n in owners]
        scales = None if scales is None else [*scales, jnp.stack(own)]
    if in_one:
        return three_sums.sizes(measure, whole, counts, edges)
    own = scales or [None] * len(whole)
    each = zip(whole, own, counts, strict=True)
    return [_size(*sums, scale, measure.finalize, count) for sums, scale, count in each]


def _with_leaves(
    groups: Groups, apart: Apart, measure: Measure, alone: list[Arrays]
) -> list[Arrays]:
    """The totals of the groups, from those of the leaves, and these as vectors."""
    places = range(len(alone[0]))
    row = {own.members[0].index: n for n, own in enumerate(apart.groups)}
    together = [
        [
            joined(measure.combine, [alone[row[m.index]][place] for m in group.members])
            for place in places
        ]
        for group in groups.groups
    ]
    vectors = [jnp.stack([sums[place] for sums in alone]) for place in places]
    if measure.averages:  # `finalize` takes one count, not one for each leaf
        counts = np.array([own.count for own in apart.groups], groups.dtype)
        vectors = [total / counts for total in vectors]
    return [*together, vectors]


def _fits_one_pass(groups: Groups, leaves: Arrays, measure: Measure) -> bool:
    """Whether a GPU sums at three scales: whole leaves, or elements, but not units.

    XLA:GPU writes the squares of all scales but one to memory where it sums columns.
    """
    members = [member for group in groups.groups for member in group.members]
    fitting = (
        len(m.axes) == leaves[m.index].ndim or (not m.axes and not groups.joint)
        for m in members
    )
    return measure.power is not None and all(fitting)


class Rough(NamedTuple):
    """Sizes from plain sums, one array a block, and what they came from.

    Attributes:
      groups: of the tree.
      leaves: its measured leaves.
      sizes: which may have lost summands.
      known: below which sizes they may count as 0, one array a block.
    """

    groups: Groups
    leaves: Arrays
    sizes: Arrays
    known: Arrays


def in_doubt(measure: Measure, *trees: Rough) -> jax.Array | None:
    """Whether a second pass is needed, one for all trees; None where none ever is.

    It is if a size is not finite, or is tiny while what is known of its limit is
    tinier: never for groups that are merely zero under an ordinary limit.
    """
    blocks = []
    for groups, leaves, sizes, known in trees:
        # float16's squares, and their sums, lie well inside float32's range.
        half = measure.power == 2 and all(leaf.dtype == jnp.float16 for leaf in leaves)
        if measure.power is None or half or not groups.groups:
            continue
        if numerics.backend() == "gpu" and _fits_one_pass(groups, leaves, measure):
            continue
        edges = _edges(groups, measure)
        if groups.joint:
            shared = min(edges) == max(edges)
            edges = [edges[0] if shared else jnp.asarray(edges, groups.dtype)]
        blocks += zip(sizes, known, edges, strict=True)
    if not blocks:
        return None
    doubt = _has_doubts(*blocks[0]) if len(blocks) == 1 else _some_have_doubts(blocks)
    all_groups = [group for tree in trees for group in tree.groups.groups]
    if not any(member.mesh for group in all_groups for member in group.members):
        return doubt
    all_leaves = [leaf for tree in trees for leaf in tree.leaves]
    return meshes.anywhere(doubt, _divided(all_groups, all_leaves, doubt))


def precise_sizes(
    groups: Groups,
    leaves: Arrays,
    measure: Measure,
    rough: Arrays,
    apart: Apart | None = None,
) -> Arrays:
    """The sizes of a second pass, of elements multiplied so that all sums fit."""
    scales_of = _scales(groups, leaves, measure)
    scales = scales_of(rough)
    precise = summed_sizes(groups, leaves, measure, scales, apart)
    if not groups.joint:
        # Found anew, and behind barriers, or XLA would keep the first ones while it
        # sums everything: AGC's temporary bytes would be 1.07 % of the gradients of
        # GPT-2 in bfloat16 instead of 0.85 %.
        scales = scales_of(list(map(jax.lax.optimization_barrier, rough)))
    # Groups in range keep the bits that they have when no group is in doubt.
    keep = [scale == 1 for scale in scales]
    if apart is not None:
        # Beside one that overflows or holds a NaN, a leaf would vanish at its scale.
        scale = jnp.stack([scales[number] for number in apart.owners])
        keep.append(jnp.where(scale < 1, jnp.isfinite(rough[-1]), scale == 1))
    return list(map(jnp.where, keep, rough, precise))


def sizes_of(
    groups: Groups, leaves: Arrays, measure: Measure, limit: ArrayLike = 0.0
) -> Arrays:
    """The sizes on their own, by both passes; below the limit they may count as 0."""
    rough = summed_sizes(groups, leaves, measure)
    blocks = by_block(groups, rough)
    known = [jnp.asarray(limit, groups.dtype)] * len(blocks)
    doubt = in_doubt(measure, Rough(groups, leaves, blocks, known))
    if doubt is None:
        return rough
    return jax.lax.cond(doubt, _second_look(groups, measure), _keep, leaves, rough)


# One function for each structure, which JAX traces and compiles once: a new function at
# each eager call would be compiled anew.
@functools.lru_cache
def _second_look(
    groups: Groups, measure: Measure
) -> Callable[[Arrays, Arrays], Arrays]:
    return lambda leaves, rough: precise_sizes(groups, leaves, measure, rough)


def _keep(leaves: Arrays, rough: Arrays) -> Arrays:
    return rough


# Jitted so that equal leaves are traced once: 1000 leaves trace in the time of a few.
@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
def _reduced(
    x: jax.Array,
    scale: jax.Array | None,
    summand_of: Callable[[jax.Array], jax.Array],
    combine: Combine,
    axes: tuple[int, ...],
    keepdims: bool,
    wide: np.dtype,
) -> jax.Array:
    leaf = x
    if scale is None:
        x = numerics.for_measuring(x, wide)
    else:
        # Together: a barrier on x alone would let XLA widen and scale it once more.
        spread = aligned(scale, x) if scale.ndim else scale  # a unit's has its shape
        x, barred = jax.lax.optimization_barrier((x, spread))
        x = numerics.at_scale(numerics.widen(x, wide), barred)
    summands = summand_of(x)
    if not axes:
        return summands
    if combine is MAX and meshes.is_split(leaf):
        return meshes.largest(summands, axes, keepdims)
    total = combine.reduce(summands, axis=axes, keepdims=keepdims)
    if combine is MAX:
        squares = _squares_beside(leaf, wide)
        total = meshes.remembering(total, jnp.sum(squares, axes, keepdims=keepdims))
    return total


def _squares_beside(leaf: jax.Array, wide: np.dtype) -> jax.Array:
    """Squares that share no widened copy with any other reduction of the leaf."""
    barred, _ = jax.lax.optimization_barrier((leaf, jnp.zeros((2,))))
    return l2.map(numerics.widen(barred, wide))


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


def _divided(groups: list[Group], leaves: Arrays, doubt: jax.Array) -> meshes.MeshAxes:
    """The mesh axes to agree over: summed along in the branch, but not by every group.

    Devices that take different branches would wait for each other forever. None where
    all groups extend over the same axes.
    """
    of_groups = [{a for m in group.members for a in m.mesh} for group in groups]
    summed, by_all = set.union(*of_groups), set.intersection(*of_groups)
    if any(map(meshes.varying_axes, leaves)):
        differs = summed.intersection(meshes.varying_axes(doubt))
    else:  # pmap, check_vma=False: types say nothing
        differs = summed - by_all
    return tuple(sorted(differs, key=str))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _size(
    total: jax.Array,
    scale: jax.Array | None,
    finalize: Callable[[jax.Array, float], jax.Array],
    count: int,
) -> jax.Array:
    size = finalize(total, count)
    return size if scale is None else numerics.at_scale(size, 1 / scale)


def _edges(groups: Groups, measure: Measure) -> list[float]:
    """The size of every group below which its summands may have vanished."""
    assert measure.power is not None
    tiny = numerics.RANGES[groups.dtype].tiny
    counts = [group.count if measure.averages else 1 for group in groups.groups]
    return [(tiny / max(count, 1)) ** (1 / measure.power) for count in counts]


@jax.jit
def _has_doubts(size: jax.Array, limit: jax.Array, edge: ArrayLike) -> jax.Array:
    """Whether a block has a size that overflowed, or vanished where it matters."""
    lost, vanished = ~jnp.isfinite(size), (size < edge) & ~(limit >= edge)
    return jnp.logical_or(*meshes.any_of_both(lost, vanished))


def _some_have_doubts(
    blocks: list[tuple[jax.Array, jax.Array, ArrayLike]],
) -> jax.Array:
    sizes, limits, edges = zip(*blocks, strict=True)
    met = small_leaves.in_one_block(list(sizes), limits, edges)
    return _joined_doubts(*zip(*met, strict=True))


@jax.jit  # one program in eager use
def _joined_doubts(*blocks: tuple[jax.Array, jax.Array, ArrayLike]) -> jax.Array:
    return joined(ANY, [_has_doubts(*block) for block in blocks])


def _scales(
    groups: Groups, leaves: Arrays, measure: Measure
) -> Callable[[Arrays], Arrays]:
    """From sizes to what multiplies each group, so that summands fit: 1 if they do."""
    edges = _edges(groups, measure)
    if measure.power is not None and measure.power <= 2:
        return lambda sizes: list(map(_power_of_two, sizes, edges))
    largest = summed_sizes(groups, leaves, max_abs)
    return lambda sizes: list(map(_largest, sizes, edges, largest))


@jax.jit
def _power_of_two(size: jax.Array, edge: ArrayLike) -> jax.Array:
    """By the size alone; up to squares this is enough and needs no pass."""
    usable = numerics.RANGES[size.dtype]
    up_or_none = jnp.where(size < edge, usable.up, 1.0)
    scale = jnp.where(jnp.isfinite(size), up_or_none, usable.down)
    return jax.lax.stop_gradient(scale.astype(size.dtype))


@jax.jit
def _largest(size: jax.Array, edge: ArrayLike, largest: jax.Array) -> jax.Array:
    """One over the largest element, capped to be normal; 1 for groups in range."""
    fits = jnp.isfinite(size) & ~(size < edge)
    usable = ~fits & (largest > 0) & jnp.isfinite(largest)
    capped = jnp.minimum(largest, 2.0 ** (int(jnp.finfo(largest.dtype).maxexp) - 3))
    return jax.lax.stop_gradient(1 / jnp.where(usable, capped, jnp.ones_like(capped)))
