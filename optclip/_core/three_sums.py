"""Sums of squares at three scales in one pass, for programs without a conditional.

    Σ x²     Σ (up · x)²     Σ (down · x)²     up and down powers of two

Which of them holds is seen when all are there: the first if it is finite and not tiny,
then it is the same number as on CPU; the second for tiny groups; the third for huge
ones. A GPU waits for memory and has arithmetic to spare; on CPU the three sums would
take four times as long as one.

On an H100 profiles of either form show no copy to the host, and a step of a small
network takes 0.147 ms with the one pass and 0.186 with a conditional. That holds for
whole leaves and squares: units keep the conditional, and measures of other powers take
two passes. (benchmarks/results/accelerator-*.json)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from optclip._core import meshes, numerics, small_leaves
from optclip._core.grouped import Arrays, Group, Groups
from optclip._core.measures import Measure

ROW = 256  # elements that are summed before they meet those of other leaves
# Elements above which a leaf is summed by itself: XLA:GPU reads a gigabyte by rows at a
# third of the speed (0.98 ms instead of 0.36 on an H100), and three kernels more are
# nothing beside it.
LARGE = 2**24


def scales(dtype: np.dtype) -> tuple[float, float, float]:
    """What multiplies the elements in each of the sums."""
    usable = numerics.RANGES[dtype]
    return 1.0, usable.up, usable.down


def of_group(
    group: Group, leaves: Arrays, groups: Groups
) -> list[tuple[meshes.MeshAxes, list[jax.Array]]]:
    """The three sums of each part of a group, and the mesh axes to sum over at last."""
    if groups.joint:
        parts = _in_rows(group, leaves)
    else:
        parts = [(leaves[m.index], m.axes, m.mesh) for m in group.members]
    return [
        (mesh, sums_of_squares(leaf, axes, not groups.joint, groups.dtype))
        for leaf, axes, mesh in parts
    ]


def _in_rows(
    group: Group, leaves: Arrays
) -> list[tuple[jax.Array, tuple[int, ...], meshes.MeshAxes]]:
    """Whole leaves, the axes to sum over first, and the mesh axes to sum over at last.

    Where no leaf is sharded, small leaves come as one, and the sums of rows of
    larger ones wait for those of the other leaves: XLA:GPU would take a second kernel
    for each leaf and each of the three sums.
    """
    by_mesh: dict[meshes.MeshAxes, list[int]] = {}
    for index, _, mesh in group.members:
        by_mesh.setdefault(mesh, []).append(index)
    found = []
    for mesh, indices in by_mesh.items():
        for _, leaf in small_leaves.vectors(indices, leaves):
            first = 0
            if leaf.size <= LARGE and small_leaves.on_one_device(leaf):
                long = [math.prod(leaf.shape[n:]) >= ROW for n in range(leaf.ndim)]
                first = max(long.count(True) - 1, 0)
            found.append((leaf, tuple(range(first, leaf.ndim)), mesh))
    return found


@jax.jit  # one program in eager use
def totals_of_rows(parts: list[Arrays]) -> Arrays:
    """The total of each list of sums of rows; those of one length in one kernel."""
    found: dict[int, jax.Array] = {}
    alike: dict[object, dict[int, jax.Array]] = {}
    for number, own in enumerate(parts):
        if len(own) == 1 and own[0].ndim == 0:
            found[number] = own[0]
            continue
        rows = jnp.concatenate([x.reshape(-1) for x in own])
        alike.setdefault((rows.size, meshes.varying_axes(rows)), {})[number] = rows
    for each in alike.values():
        # Without a barrier XLA would sum the rows of every leaf by themselves.
        rows = jax.lax.optimization_barrier(jnp.stack(list(each.values())))
        found |= zip(each, jnp.sum(rows, axis=1), strict=True)
    return [found[number] for number in range(len(parts))]


# Jitted so that equal leaves are traced once.
@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def sums_of_squares(
    x: jax.Array, axes: tuple[int, ...], keepdims: bool, wide: np.dtype
) -> list[jax.Array]:
    """The three sums; a complex element counts by its modulus."""
    x = numerics.for_measuring(x, wide)
    parts = (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)
    top = 2.0 ** (int(jnp.finfo(wide).maxexp) - 2)

    def square(part: jax.Array, scale: float) -> jax.Array:
        if scale == 1:
            return jnp.square(part)
        # The minimum changes no sum that is used. Without it XLA would square the scale
        # apart, to infinity or zero, and what is not used would have such derivatives.
        at_scale = numerics.at_scale(part, jnp.asarray(scale, wide))
        return jnp.square(jnp.minimum(jnp.abs(at_scale), top))

    found = []
    for scale in scales(wide):
        squares = functools.reduce(jnp.add, [square(part, scale) for part in parts])
        if axes:
            squares = jnp.sum(squares, axis=axes, keepdims=keepdims)
        found.append(squares)
    return found


def sizes(
    measure: Measure, totals: list[Arrays], counts: list[int], edges: list[float]
) -> Arrays:
    """The sizes of groups from their three sums, the first of which holds above edge.

    On one device those of as many elements are computed side by side: apart, XLA:GPU
    would take a kernel for each.
    """
    alike: dict[object, list[int]] = {}
    for n, (own, *key) in enumerate(zip(totals, counts, edges, strict=True)):
        together = own[0].ndim == 0 and small_leaves.on_one_device(own[0])
        alike.setdefault(tuple(key) if together else n, []).append(n)
    found: dict[int, jax.Array] = {}
    for numbers in alike.values():
        first = numbers[0]
        how = measure.finalize, counts[first], edges[first]
        found |= zip(numbers, _sizes([totals[n] for n in numbers], *how), strict=True)
    return [found[n] for n in range(len(totals))]


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _sizes(
    totals: list[Arrays],
    finalize: Callable[[jax.Array, float], jax.Array],
    count: int,
    edge: float,
) -> Arrays:
    """The sizes of groups of one count."""
    each = totals[0]
    if len(totals) > 1:
        each = [jnp.stack(own) for own in zip(*totals, strict=True)]
    plain, up, down = (
        numerics.at_scale(finalize(total, count), jnp.asarray(1 / scale, total.dtype))
        for total, scale in zip(each, scales(each[0].dtype), strict=True)
    )
    down = jnp.where(jnp.isnan(plain), plain, down)  # XLA:CPU's minimum may lose a NaN
    size = jnp.where(jnp.isfinite(plain), jnp.where(plain < edge, up, plain), down)
    return list(size) if len(totals) > 1 else [size]
