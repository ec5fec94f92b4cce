"""Sizes that a threshold may ask for beside those of its groups.

The size of all groups together comes from the sizes of the groups, without a pass of
its own; the sizes of the parameters take one pass over the parameters.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from optclip._core import checks, meshes, numerics, paths
from optclip._core.grouped import Arrays, Groups
from optclip._core.groupings import Grouping
from optclip._core.groups import by_block, by_group, gather
from optclip._core.measures import MAX, Combine, Measure, joined
from optclip._core.public import error
from optclip._core.rounding import power_of_two
from optclip._core.sizes import sizes_of
from optclip._core.types import Tree


def combined_size(groups: Groups, measure: Measure, blocks: Arrays) -> jax.Array:
    """The size of the union of all groups that are finite: the others touch no limit.

    Sizes are divided by a power of two near the largest first, which rounds nothing (or
    by the largest, where summands are powers above squares), so that it is right
    wherever it is representable.
    """
    if not groups.groups:
        return jnp.zeros((), groups.dtype)
    sizes = [
        jnp.where(jnp.isfinite(size), size, 0) for size in by_group(groups, blocks)
    ]
    largest = _union(MAX, sizes)
    unit = power_of_two(largest)
    if measure.power is not None and measure.power > 2:  # powers of 0.5 would vanish
        unit = jax.lax.stop_gradient(jnp.where(largest > 0, largest, 1))
    counts = [group.count for group in groups.groups]
    summands = [
        measure.map(size / unit) * (count if measure.averages else 1)
        for size, count in zip(sizes, counts, strict=True)
    ]
    total_count = sum(
        count * size.size * meshes.axis_size(meshes.varying_axes(size))
        for size, count in zip(sizes, counts, strict=True)
    )
    return measure.finalize(_union(measure.combine, summands), total_count) * unit


def _union(combine: Combine, parts: Arrays) -> jax.Array:
    """Arrays combined to one scalar, across the mesh axes over which they vary."""
    by_axes: dict[meshes.MeshAxes, Arrays] = {}
    for part in parts:
        reduced = combine.reduce(part)
        by_axes.setdefault(meshes.varying_axes(part), []).append(reduced)
    totals = []
    for axes, own in by_axes.items():
        total = joined(combine, own)
        totals.append(combine.across(total, axes) if axes else total)
    return joined(combine, totals)


def sizes_of_params(
    groups: Groups,
    updates: optax.Updates,
    params: optax.Params | None,
    measure: Measure,
    grouping: Grouping,
    mesh_axes: meshes.AxesOf,
) -> Arrays:
    """The sizes of the parameters, block by block as the updates have them."""
    beside, leaves = gathered_params(groups, updates, params, grouping, mesh_axes)
    # An infinite limit: parameters that are zero need no second look, large ones do.
    sizes = sizes_of(beside, leaves, measure, jnp.inf)
    return by_block(groups, [size.astype(groups.dtype) for size in sizes])


def gathered_params(
    groups: Groups,
    updates: optax.Updates,
    params: optax.Params | None,
    grouping: Grouping,
    mesh_axes: meshes.AxesOf,
) -> tuple[Groups, Arrays]:
    """The parameters as `gather` has them, in the groups of the updates.

    Raises:
      ValueError: if params is None, or lacks a leaf of the updates or its shape.
    """
    if params is None:
        raise error(
            "params must be given to update, because limits or ratios are relative to "
            "them, got None."
        )
    return gather(_like(updates, params, groups), grouping, mesh_axes)


def _like(updates: optax.Updates, params: optax.Params, groups: Groups) -> Tree:
    """The updates' tree with the parameters in it, matched by path."""
    flat, treedef = jax.tree_util.tree_flatten(updates)
    if jax.tree_util.tree_structure(params) == treedef:
        found = list(jax.tree_util.tree_leaves(params))
    else:
        by_path = dict(paths.leaves(params))
        found = [by_path.get(path) for path in paths.spelled(updates)]
    for place in groups.places:
        if found[place] is None:
            path = paths.spelled(updates)[place]
            raise error(
                f"params must have every leaf of updates, got none at {str(path)!r}."
            )
        own, update = jnp.asarray(found[place]), jnp.asarray(flat[place])
        if own.shape != update.shape:
            raise checks.other_shape(paths.spelled(updates)[place], own, update)
        if not numerics.is_measured(found[place]):
            raise error(
                f"params must be floating-point where updates are, got {own.dtype} at "
                f"{str(paths.spelled(updates)[place])!r}."
            )
        flat[place] = found[place]
    return jax.tree_util.tree_unflatten(treedef, flat)
