"""Sizes that a threshold may ask for beside those of its groups.

The size of all groups together comes from the sizes of the groups, without a pass of
its own; the sizes of the parameters take one pass over the parameters.
"""

from typing import Any

import jax
import jax.numpy as jnp

from optclip._core import checks, meshes
from optclip._core import groups as blocks
from optclip._core import sizes as measuring
from optclip._core.groupings import Grouping
from optclip._core.measures import MAX, Combine, Measure, joined
from optclip._core.public import error


def whole_size(
    gathered: blocks.Gathered, measure: Measure, sizes: list[jax.Array]
) -> jax.Array:
    """The size of the union of all groups that are finite: the others touch no limit.

    Sizes are divided by the largest first, so that it is right wherever it is
    representable.
    """
    if not sizes:
        return jnp.zeros((), gathered.wide)
    sizes = [jnp.where(jnp.isfinite(size), size, 0) for size in sizes]
    largest = jax.lax.stop_gradient(_union(MAX, sizes))
    unit = jnp.where(largest > 0, largest, 1)
    counts = [group.count for group in gathered.groups]
    summands = [
        measure.lift(size / unit) * (count if measure.averages else 1)
        for size, count in zip(sizes, counts, strict=True)
    ]
    everything = sum(
        count * size.size * meshes.axis_size(meshes.varying_axes(size))
        for size, count in zip(sizes, counts, strict=True)
    )
    return measure.lower(_union(measure.combine, summands), everything) * unit


def _union(combine: Combine, parts: list[jax.Array]) -> jax.Array:
    """Arrays combined to one scalar, across the mesh axes over which they vary."""
    by_axes: dict[tuple[Any, ...], list[jax.Array]] = {}
    for part in parts:
        reduced = combine.reduce(part)
        by_axes.setdefault(meshes.varying_axes(part), []).append(reduced)
    totals = []
    for axes, own in by_axes.items():
        total = joined(combine, own)
        totals.append(combine.across(total, axes) if axes else total)
    return joined(combine, totals)


def param_sizes(
    gathered: blocks.Gathered,
    params: Any,
    measure: Measure,
    grouping: Grouping,
    axis_name: Any,
) -> list[jax.Array]:
    """The sizes of the parameters, block by block as the updates have them.

    Raises:
      ValueError: if params is None, or lacks a leaf of the updates or its shape.
    """
    if params is None:
        raise error(
            "params must be given to update, because limits are relative to "
            "them, got None."
        )
    beside = blocks.gather(params, grouping, axis_name)
    own = _leaves(beside)
    for path, leaf in _leaves(gathered).items():
        checks.same_shape(path, own.get(path, leaf), leaf)
    # An infinite limit: parameters that are zero need no second look, large ones do.
    sizes, _ = measuring.measured(
        beside, measure, lambda seen: [jnp.full((), jnp.inf, beside.wide) for _ in seen]
    )
    by_label = {
        group.label: size.astype(gathered.wide)
        for group, size in zip(beside.groups, sizes, strict=True)
    }
    missing = [g.label for g in gathered.groups if g.label not in by_label]
    if missing:
        raise error(
            f"params must have every leaf of updates, got none at {missing[0]!r}."
        )
    return blocks.stacked(
        gathered, [by_label[group.label] for group in gathered.groups]
    )


def _leaves(gathered: blocks.Gathered) -> dict[str, jax.Array]:
    members = [member for group in gathered.groups for member in group.members]
    return {member.path: member.leaf for member in members}
