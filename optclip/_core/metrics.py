"""What a clip saw, as scalars in its state, and how to read them anywhere.

The numbers are those that the clip itself used, so they cost nothing: the size before
clipping and the limit of the group furthest over its limit, the share of groups that
were clipped, and three counters. Each block is reduced to scalars before blocks meet.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optclip._core import meshes, numerics
from optclip._core.groupings import Grouping


class ClipMetrics(NamedTuple):
    """Scalars; the same structure and dtypes from `init` on.

    Attributes:
      size: before clipping, of the group furthest over its limit (largest size/limit).
        float32, or float64 if there are float64 leaves. NaN for `per_element`.
      limit: of that group; infinity for no limit. NaN for `per_element`.
      clipped_fraction: of the groups, in [0, 1], at this step. NaN for `per_element`.
      steps: how many updates there were, int32.
      clipped_steps: how many of them clipped at least one group, int32. (Under
        `per_element` a step with a NaN does not count: its largest element is NaN.)
      nonfinite_steps: how many had a group with NaN, infinity or an overflowing size.
    """

    size: jax.Array
    limit: jax.Array
    clipped_fraction: jax.Array
    steps: jax.Array
    clipped_steps: jax.Array
    nonfinite_steps: jax.Array


class SkipMetrics(NamedTuple):
    """The counters of `skip_step`.

    Attributes:
      skipped_steps: how many steps were dropped, int32.
      consecutive_skips: how many of them in a row, up to now, int32.
    """

    skipped_steps: jax.Array
    consecutive_skips: jax.Array


class _Summary(NamedTuple):
    """One or more blocks, as scalars; of one dtype, because XLA:CPU reduces no others.

    The first three are of the group furthest over its limit, the others of all groups.
    """

    ratio: jax.Array
    size: jax.Array
    limit: jax.Array
    clipped: jax.Array
    nonfinite: jax.Array
    nan: jax.Array  # what a comparison of sizes would not see
    count: jax.Array


def start(wide: Any) -> ClipMetrics:
    """The metrics before the first step; every leaf its own buffer."""
    return ClipMetrics(
        size=jnp.zeros((), wide),
        limit=jnp.zeros((), wide),
        clipped_fraction=jnp.zeros((), jnp.float32),
        steps=jnp.zeros((), jnp.int32),
        clipped_steps=jnp.zeros((), jnp.int32),
        nonfinite_steps=jnp.zeros((), jnp.int32),
    )


def after(
    old: ClipMetrics,
    sizes: list[Any],
    limits: list[Any],
    grouping: Grouping,
) -> ClipMetrics:
    """The metrics after a step that saw these sizes and limits."""
    elementwise = grouping.is_elementwise
    wide = old.size.dtype
    by_axes: dict[tuple[Any, ...], list[_Summary]] = {}
    for size, limit in zip(sizes, limits, strict=True):
        limit = jnp.asarray(jnp.inf if limit is None else limit, wide)
        block = (_element_summary if elementwise else _summary)(size, limit)
        by_axes.setdefault(meshes.varying_axes(block.clipped), []).append(block)
    met = [_together(own, axes) for axes, own in by_axes.items()]
    steps = jnp.asarray(optax.safe_increment(old.steps))
    if not met:
        return old._replace(steps=steps)

    overall = _together(met, ())
    size = jnp.where(overall.nan > 0, jnp.nan, overall.size)
    limit, fraction = overall.limit, overall.clipped / overall.count
    if elementwise:
        size = limit = fraction = jnp.full((), jnp.nan)
    return ClipMetrics(
        size=size.astype(wide),
        limit=limit.astype(wide),
        clipped_fraction=fraction.astype(old.clipped_fraction.dtype),
        steps=steps,
        clipped_steps=_count(old.clipped_steps, overall.clipped > 0),
        nonfinite_steps=_count(old.nonfinite_steps, overall.nonfinite > 0),
    )


def _count(counter: jax.Array, happened: jax.Array) -> jax.Array:
    return jnp.where(happened, optax.safe_increment(counter), counter)


@jax.jit
def _summary(size: jax.Array, limit: jax.Array) -> _Summary:
    # Nobody learns from the metrics, and reductions of several arrays have no tangent.
    size, limit = jax.lax.stop_gradient((size, limit))
    finite = jnp.isfinite(size)
    bound = jnp.maximum(limit, 0)
    clipped = finite & (size > bound)
    # Anything over a limit of 0 or NaN, and anything not finite, is the furthest over.
    endless = ~finite | (clipped & (bound == 0)) | jnp.isnan(bound)
    nan = jnp.isnan(size)
    groups = _Summary(
        ratio=jnp.where(endless, jnp.inf, size / jnp.where(bound == 0, 1, bound)),
        size=jnp.where(nan, jnp.inf, size),
        limit=limit,
        clipped=clipped,
        nonfinite=~finite,
        nan=nan,
        count=jnp.ones((), size.dtype),
    )
    return _reduced(*[jnp.broadcast_to(x, size.shape) for x in groups], like=size)


@jax.jit
def _reduced(*fields: jax.Array, like: jax.Array) -> _Summary:
    """The summary of many, in one read: apart, XLA:CPU writes each field to memory."""

    def of_both(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> _Summary:
        a, b = _Summary(*a), _Summary(*b)
        further = (a.ratio > b.ratio) | ((a.ratio == b.ratio) & (a.size > b.size))
        return _Summary(
            ratio=jnp.where(further, a.ratio, b.ratio),
            size=jnp.where(further, a.size, b.size),
            limit=jnp.where(further, a.limit, b.limit),
            clipped=a.clipped + b.clipped,
            nonfinite=jnp.maximum(a.nonfinite, b.nonfinite),
            nan=jnp.maximum(a.nan, b.nan),
            count=a.count + b.count,
        )

    none = (-1.0, -1.0, -np.inf, 0.0, 0.0, 0.0, 0.0)  # in the order of the fields
    return _Summary(
        *jax.lax.reduce(
            tuple(field.astype(like.dtype) for field in fields),
            tuple(like.dtype.type(number) for number in none),
            lambda a, b: tuple(of_both(a, b)),
            tuple(range(like.ndim)),
        )
    )


@jax.jit
def _element_summary(size: jax.Array, limit: jax.Array) -> _Summary:
    finite = jnp.isfinite(size)
    over = finite & (size > jnp.maximum(limit, 0))
    clipped, nonfinite = numerics.any_of_both(over, ~finite)
    unknown, one = jnp.zeros((), size.dtype), jnp.ones((), size.dtype)
    flags = clipped.astype(size.dtype), nonfinite.astype(size.dtype)
    return _Summary(unknown, unknown, unknown, *flags, unknown, one)


def _together(summaries: list[_Summary], axes: tuple) -> _Summary:
    """The summary of all blocks on all shards, in one collective: here they meet.

    In vectors, because a chain of choices between scalars, one for each leaf, takes
    XLA:CPU a minute to fuse.
    """
    if len(summaries) == 1 and not axes:
        return summaries[0]
    numbers = jnp.stack([jnp.stack(own) for own in summaries])
    if axes:
        numbers = meshes.from_all(numbers, axes).reshape(-1, len(_Summary._fields))
    return _reduced(*numbers.T, like=numbers[:, 0])
