"""The numbers that a clip keeps in its state: what it saw, as scalars.

They are those that the clip itself used, so they cost nothing: the size before clipping
and the limit of the group furthest over its limit, the share of groups that were
clipped, and three counters. Each block is reduced to scalars before blocks meet.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optclip._core import meshes, small_leaves


class ClipMetrics(NamedTuple):
    """Scalars; the same structure and dtypes from `init` on.

    Attributes:
      size: before clipping, of the group furthest over its limit (largest size/limit).
        Of groups whose ratios agree to 16 bits it is the largest size, so that no mesh
        chooses another by how it rounds. float32, or float64 if there are float64
        leaves; None under `per_element`. Right to the smallest normal number for a
        single group. Of several, a size whose squares vanish counts as 0 unless its
        limit is as small: below 3e-10 in float32 for the Euclidean norm.
      limit: of that group, or the largest of those whose ratios agree, which is less
        than 1 % above; the largest finite number where nothing is limited at this step,
        None for a rule that never limits and under `per_element`.
      clipped_fraction: of the groups, in [0, 1], at this step; None under
        `per_element`.
      steps: how many updates there were, int32; 0 before the first, when size and limit
        are 0 too.
      clipped_steps: how many of them clipped at least one group, int32.
      nonfinite_steps: how many had a group with NaN, infinity or an overflowing size.
      changed_fraction: of the groups, in [0, 1], that came out larger or smaller at
        this step. None under `per_element`, and for actions that never enlarge: what
        they change is what they clip (`smooth` shrinks the others a little too).
        Beside it "clipped" means made smaller: `floor` clips nothing.
      changed_steps: how many steps changed at least one group, int32; None for actions
        that never enlarge.
    """

    size: jax.Array | None
    limit: jax.Array | None
    clipped_fraction: jax.Array | None
    steps: jax.Array
    clipped_steps: jax.Array
    nonfinite_steps: jax.Array
    changed_fraction: jax.Array | None = None
    changed_steps: jax.Array | None = None


class SkipMetrics(NamedTuple):
    """The counters of `skip_step`.

    Attributes:
      skipped_steps: how many steps were dropped, int32.
      consecutive_skips: how many of them in a row, up to now, int32.
    """

    skipped_steps: jax.Array
    consecutive_skips: jax.Array


def start(
    dtype: np.dtype, elementwise: bool, limited: bool, enlarging: bool = False
) -> ClipMetrics:
    """The metrics before the first step; every leaf its own buffer."""
    part = enlarging and not elementwise
    return ClipMetrics(
        size=None if elementwise else jnp.zeros((), dtype),
        limit=jnp.zeros((), dtype) if limited and not elementwise else None,
        clipped_fraction=None if elementwise else jnp.zeros((), jnp.float32),
        steps=jnp.zeros((), jnp.int32),
        clipped_steps=jnp.zeros((), jnp.int32),
        nonfinite_steps=jnp.zeros((), jnp.int32),
        changed_fraction=jnp.zeros((), jnp.float32) if part else None,
        changed_steps=jnp.zeros((), jnp.int32) if enlarging else None,
    )


def after(
    old: ClipMetrics,
    sizes: list[jax.Array],
    limits: list[jax.Array],
    blocks: list[_Summary] | None = None,
    reached: list[jax.Array] | None = None,
) -> ClipMetrics:
    """The metrics after a step with these sizes and limits, one array a block.

    A list for `blocks` is filled with what `furthest` needs; `reached` are the sizes
    after the step, of actions that may enlarge.
    """
    steps = jnp.asarray(optax.safe_increment(old.steps))
    targets = reached or sizes
    if blocks is None and len(sizes) > 1:
        sizes, limits, targets = small_leaves.in_one_block(sizes, limits, targets)
    summarise = _counts if old.size is None else _summary
    by_axes: dict[meshes.MeshAxes, list[_Summary]] = {}
    for size, limit, target in zip(sizes, limits, targets, strict=True):
        block = summarise(size, limit, None if reached is None else target)
        if blocks is not None:
            blocks.append(block)
        by_axes.setdefault(meshes.varying_axes(block.clipped), []).append(block)
    if not by_axes:
        return old._replace(steps=steps)

    met = [
        own[0] if len(own) == 1 and not axes else _together(own, axes)
        for axes, own in by_axes.items()
    ]
    overall = met[0] if len(met) == 1 else _together(met, ())
    counted = old._replace(
        steps=steps,
        clipped_steps=_count(old.clipped_steps, overall.clipped > 0),
        nonfinite_steps=_count(old.nonfinite_steps, ~jnp.isfinite(overall.size)),
    )
    if old.changed_steps is not None and overall.changed is not None:
        changed = _count(old.changed_steps, overall.changed > 0)
        counted = counted._replace(changed_steps=changed)
    if old.size is None or old.clipped_fraction is None:
        return counted
    size = overall.size.astype(old.size.dtype)
    fraction = (overall.clipped / overall.count).astype(old.clipped_fraction.dtype)
    limit = None if old.limit is None else overall.limit.astype(old.limit.dtype)
    if old.changed_fraction is not None and overall.changed is not None:
        changed = (overall.changed / overall.count).astype(fraction.dtype)
        counted = counted._replace(changed_fraction=changed)
    return counted._replace(size=size, limit=limit, clipped_fraction=fraction)


def furthest(blocks: list[_Summary]) -> jax.Array:
    """A vector: of each block the size of the group furthest over its limit.

    On all shards, by what `_together` sends for all blocks; XLA sends it once.
    """
    found: dict[int, jax.Array] = {}
    by_axes: dict[meshes.MeshAxes, dict[int, _Summary]] = {}
    for number, block in enumerate(blocks):
        by_axes.setdefault(meshes.varying_axes(block.clipped), {})[number] = block
    for axes, own in by_axes.items():
        sizes = [block.size for block in own.values()]
        if axes:
            numbers = jnp.stack([jnp.stack(_known(block)) for block in own.values()])
            numbers = meshes.from_all(numbers, axes)
            sizes = jax.vmap(lambda x: _reduced(*x.T), 1)(numbers).size
        found |= dict(zip(own, sizes, strict=True))
    return jnp.stack([found[number] for number in range(len(blocks))])


class _Summary(NamedTuple):
    """One or more blocks, as scalars; of one dtype, because XLA:CPU reduces no others.

    The first three are of the groups furthest over their limits, the largest of each,
    the others of all groups. A group that is not finite is the furthest.
    """

    ratio: jax.Array
    size: jax.Array
    limit: jax.Array
    clipped: jax.Array
    count: jax.Array
    changed: jax.Array | None = None  # of actions that may enlarge


def _known(summary: _Summary) -> list[jax.Array]:
    """The fields that it has."""
    return [x for x in summary if x is not None]


def _count(counter: jax.Array, happened: jax.Array) -> jax.Array:
    return jnp.where(happened, optax.safe_increment(counter), counter)


@jax.jit
def _summary(size: jax.Array, limit: jax.Array, target: jax.Array | None) -> _Summary:
    # Nobody learns from the metrics, and reductions of several arrays have no tangent.
    size, limit, target = jax.lax.stop_gradient((size, limit, target))
    finite = jnp.isfinite(size)
    bound = jnp.maximum(limit, 0)
    over = finite & (size > bound)
    # Anything over a limit of 0 or NaN, and anything not finite, is the furthest over.
    endless = ~finite | (over & (bound == 0)) | jnp.isnan(bound)
    ratio = jnp.where(endless, jnp.inf, size / jnp.where(bound == 0, 1, bound))
    # To 16 bits, so that groups equally far over are so however their sums are rounded.
    ratio = jax.lax.reduce_precision(ratio, jnp.finfo(ratio.dtype).nexp, 7)
    # Infinity would make NaN in states that a wrapper mixes by a·x + (1 - a)·y.
    limit = jnp.minimum(limit, jnp.finfo(limit.dtype).max)
    clipped = over if target is None else finite & (target < size)
    changed = None if target is None else finite & (target != size)
    one = jnp.ones((), size.dtype)
    if meshes.is_split(size):  # one array at a time
        top = jnp.max(ratio)
        return _Summary(
            ratio=top,
            size=meshes.largest(jnp.where(ratio == top, size, -jnp.inf)),
            limit=meshes.largest(jnp.where(ratio == top, limit, -jnp.inf)),
            clipped=jnp.sum(clipped, dtype=size.dtype),
            count=size.size * one,
            changed=None if changed is None else jnp.sum(changed, dtype=size.dtype),
        )
    groups = _Summary(ratio, size, limit, clipped, one, changed)
    known = [jnp.broadcast_to(x, size.shape) for x in groups if x is not None]
    return _reduced(*known)


@jax.jit
def _reduced(*fields: jax.Array) -> _Summary:
    """The summary of many, in one read: apart, XLA:CPU writes each field to memory."""

    def of_both(a: _Summary, b: _Summary) -> _Summary:
        top = jnp.maximum(a.ratio, b.ratio)
        size, limit = (
            jnp.maximum(
                jnp.where(a.ratio == top, x, -jnp.inf),
                jnp.where(b.ratio == top, y, -jnp.inf),
            )
            for x, y in ((a.size, b.size), (a.limit, b.limit))
        )
        return _Summary(
            ratio=top,
            size=size,
            limit=limit,
            clipped=a.clipped + b.clipped,
            count=a.count + b.count,
            changed=None
            if a.changed is None or b.changed is None
            else a.changed + b.changed,
        )

    none = (-1.0, -1.0, -np.inf, 0.0, 0.0, 0.0)  # in the order of the fields
    first, *_ = fields
    return _Summary(
        *jax.lax.reduce(
            tuple(field.astype(first.dtype) for field in fields),
            tuple(first.dtype.type(number) for number in none[: len(fields)]),
            lambda a, b: of_both(_Summary(*a), _Summary(*b))[: len(fields)],
            tuple(range(first.ndim)),
        )
    )


@jax.jit
def _counts(size: jax.Array, limit: jax.Array, target: jax.Array | None) -> _Summary:
    """The summary of single elements, of which only flags are wanted."""
    finite = jnp.isfinite(size)
    over = size > jnp.maximum(limit, 0) if target is None else target < size
    clipped, nonfinite = meshes.any_of_both(finite & over, ~finite)
    unknown, one = jnp.zeros((), size.dtype), jnp.ones((), size.dtype)
    largest = jnp.where(nonfinite, jnp.inf, unknown)
    known = _Summary(unknown, largest, unknown, clipped.astype(size.dtype), one)
    if target is None:
        return known
    return known._replace(changed=jnp.any(finite & (target != size)).astype(size.dtype))


@functools.partial(jax.jit, static_argnums=1)  # one program in eager use
def _together(summaries: list[_Summary], axes: meshes.MeshAxes) -> _Summary:
    """The summary of all blocks on all shards, in one collective: here they meet.

    In vectors, because a chain of choices between scalars, one for each leaf, takes
    XLA:CPU a minute to fuse.
    """
    numbers = jnp.stack([jnp.stack(_known(own)) for own in summaries])
    if axes:
        numbers = meshes.from_all(numbers, axes).reshape(-1, numbers.shape[-1])
    return _reduced(*numbers.T)
