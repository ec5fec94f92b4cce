"""The size of every group: the one pass over the leaves.

    leaves --totals--> one total a group, one collective for each set of mesh axes
           --lower---> one size a group
           --judge---> their limits, which say whether a tiny total matters

A second pass, in a better unit, runs only where summands left float32's range.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp

from optclip import _meshes, _numerics
from optclip.clipping.blocks import Gathered, Member, aligned, stacked, unstacked
from optclip.clipping.measures import MAX, Measure, fold, l2, max_abs


def measured(
    gathered: Gathered,
    measure: Measure,
    judge: Callable[[list[jax.Array]], list[Any]],
    learns: bool = False,
) -> tuple[list[jax.Array], list[Any]]:
    """The size of every group, and the limits that `judge` gives their blocks.

    Sums of squares overflow float32 above 1e19 and lose digits below 1e-9. So after
    the one ordinary pass, a second, in a better unit, runs only if a total is not
    finite, or is tiny and its limit (None or 0: unknown) tinier: never for groups that
    are merely zero under an ordinary limit. A limit that `learns` is unknown while it
    is infinite: what it learns first has to be right. Choosing costs nothing at run
    time; three accumulators in one pass would cost 4x.
    """
    plain = totals(gathered, measure)
    sizes = _lowered(gathered, measure, plain)
    limits = judge(stacked(gathered, sizes))
    if not gathered.groups or _never_leaves_range(gathered, measure):
        return sizes, limits

    usable = _numerics.range_of(gathered.wide)
    zero = jnp.zeros((), gathered.wide)
    known = [zero if limit is None else limit for limit in limits]
    if learns:
        known = [jnp.where(limit < jnp.inf, limit, 0) for limit in known]
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
    unit = None if unit is None else aligned(unit, member)
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
