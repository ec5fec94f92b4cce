"""Limits from running averages of past sizes: a few scalars a group.

A rule that only ever sees what it let through can lock itself in: its average cannot
follow a level that it clips. Which of these do, and for how long, is said in their
docstrings and measured in the spike-response table.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optclip._core import checks, numerics
from optclip._core.public import public
from optclip.clipping.thresholds.base import Seen, Threshold, one_more


class MultipleState(NamedTuple):
    """A running average of the sizes let through; 0 until there is one.

    Attributes:
      average: the block's shape, in the units of the size.
      seen: int32, the block's shape.
    """

    average: jax.Array
    seen: jax.Array


@public
def ema_multiple(
    multiple: ArrayLike = 1.05,
    decay: ArrayLike = 0.98,
    warmup_steps: int = 100,
    warmup_norm: ArrayLike = 1.0,
) -> Threshold:
    """A multiple of the running average of a group's own sizes.

        limit = multiple · γ,     γ ← decay·γ + (1 - decay)·min(size, limit)

    During the first `warmup_steps` all groups are scaled together, as by a clip of the
    whole norm to `warmup_norm`, and γ is the smallest size let through. A size of zero
    is not learned from: an idle group keeps its γ, and cannot lock itself at zero.

    γ rises by at most decay + (1 - decay)·multiple a step, 1.001 by default: 2300 steps
    for a tenfold rise.

    Args:
      multiple: of the average, without unit.
      decay: of the running average, in [0, 1).
      warmup_steps: at least 1 (static_args).
      warmup_norm: the limit of the whole norm (of the groups that are finite) during
        the warm-up, in its units, positive.

    Raises:
      ValueError: if an argument is out of its range.

    Reference: Wang et al. 2025, arXiv 2502.11034.

    >>> import optclip
    >>> tx = optclip.clip_by(ema_multiple(), grouping=optclip.groupings.per_leaf())
    """
    checks.positive(multiple=multiple)
    checks.fraction(decay=decay)
    checks.at_least(1, warmup_steps=warmup_steps)
    checks.positive(warmup_norm=warmup_norm)

    def init(seen: Seen) -> MultipleState:
        return MultipleState(
            jnp.zeros_like(seen.size), jnp.zeros_like(seen.size, dtype=jnp.int32)
        )

    def starting(state: MultipleState) -> jax.Array:
        return (state.seen < warmup_steps) | (state.average == 0)

    def limit(state: MultipleState, seen: Seen) -> jax.Array:
        assert seen.whole is not None  # the engine gives what `needs_whole` asks for
        whole = jnp.where(seen.whole > 0, seen.whole, 1)
        norm = jnp.asarray(warmup_norm, whole.dtype)
        share = jnp.minimum(numerics.quotient(norm, whole), 1)
        relative = jnp.asarray(multiple, seen.size.dtype) * state.average
        return jnp.where(starting(state), seen.size * share, relative)

    def observe(state: MultipleState, seen: Seen, limit: jax.Array) -> MultipleState:
        x = jnp.minimum(seen.size, limit)
        keep, take = (jnp.asarray(share, x.dtype) for share in (decay, 1 - decay))
        smallest = jnp.where(state.average == 0, x, jnp.minimum(state.average, x))
        running = keep * state.average + take * x
        average = jnp.where(starting(state), smallest, running)
        return MultipleState(
            jnp.where(x == 0, state.average, average), one_more(state.seen)
        )

    return Threshold(limit, init, observe, needs_whole=True)


@public
def online_quantile(
    quantile: ArrayLike = 0.5, learning_rate: ArrayLike = 0.2
) -> Threshold:
    """An estimate of a quantile of the sizes that moves by a fixed ratio.

        C ← C · exp(-learning_rate · (1[size <= C] - quantile))

    One number a group; it starts at the first size, needs no warm-up and never locks:
    it climbs by exp(learning_rate · quantile) a step, 1.105 by default. A size of zero
    is not learned from.

    Args:
      quantile: the share of sizes below the limit, in [0, 1].
      learning_rate: of the logarithm of C, positive.

    Raises:
      ValueError: if an argument is out of its range.

    Reference: Andrew et al. 2019, arXiv 1905.03871 (the geometric update).

    >>> import optclip
    >>> tx = optclip.clip_by(online_quantile(0.9))
    """
    checks.between(0, 1, quantile=quantile)
    checks.positive(learning_rate=learning_rate)

    def observe(estimate: jax.Array, seen: Seen, limit: jax.Array) -> jax.Array:
        dtype = seen.size.dtype
        below = (seen.size <= estimate).astype(dtype)
        rate = jnp.asarray(learning_rate, dtype)
        moved = estimate * jnp.exp(-rate * (below - jnp.asarray(quantile, dtype)))
        learned = jnp.where(estimate == 0, seen.size, moved)
        return jnp.where(seen.size == 0, estimate, learned)

    return Threshold(
        _infinite_at_first, lambda seen: jnp.zeros_like(seen.size), observe
    )


@public
def growth(gamma: ArrayLike = 1.01) -> Threshold:
    """A size may grow by a fixed ratio a step; it falls freely.

        limit_t = gamma · min(size_{t-1}, limit_{t-1})

    The first size passes. A size of zero is not learned from, so that one empty step
    does not hold a group at zero; a fall to a tiny size still takes log(ratio) /
    log(gamma) steps to climb back from.

    Args:
      gamma: the ratio, at least 1, without unit.

    Raises:
      ValueError: if gamma is below 1, NaN or not a number.

    Reference: Chen et al. 2024 (Fira), arXiv 2410.01623.

    >>> import optclip
    >>> tx = optclip.clip_by(growth(1.01), grouping=optclip.groupings.per_leaf())
    """
    checks.between(1, math.inf, gamma=gamma)

    def limit(last: jax.Array, seen: Seen) -> jax.Array:
        grown = jnp.asarray(gamma, seen.size.dtype) * last
        return jnp.where(last == 0, jnp.inf, grown)

    def observe(last: jax.Array, seen: Seen, limit: jax.Array) -> jax.Array:
        return jnp.where(seen.size == 0, last, jnp.minimum(seen.size, limit))

    return Threshold(limit, lambda seen: jnp.zeros_like(seen.size), observe)


@public
def second_moment(
    theta: ArrayLike = 5000.0, decay: ArrayLike = 0.999, warmup_steps: int = 20
) -> Threshold:
    """A size may exceed the root of its own second moment by √theta.

        limit = √(theta · v),     v ← decay·v + (1 - decay)·min(size, limit)²

    With `per_element()` this is SPAM's spike rule, size² > theta·v. v is not corrected
    for its start at zero and the rule is inactive for the first `warmup_steps`, as in
    the authors' code; a v of zero never clips.

    Args:
      theta: the largest ratio of squares, positive, without unit.
      decay: of the running average, in [0, 1).
      warmup_steps: how many steps pass first, at least 1 (static_args).

    Raises:
      ValueError: if an argument is out of its range.

    Reference: Huang et al. 2025, arXiv 2501.06842.

    >>> import optclip
    >>> tx = optclip.clip_by(second_moment(), grouping=optclip.groupings.per_element())
    """
    checks.positive(theta=theta)
    checks.fraction(decay=decay)
    checks.at_least(1, warmup_steps=warmup_steps)

    def limit(root: jax.Array, seen: Seen) -> jax.Array:
        bar = jnp.sqrt(jnp.asarray(theta, seen.size.dtype))
        young = (seen.step < warmup_steps) | (root == 0)
        return jnp.where(young, jnp.inf, bar * root)

    def observe(root: jax.Array, seen: Seen, limit: jax.Array) -> jax.Array:
        x = jnp.minimum(seen.size, limit)
        keep, take = (jnp.asarray(share, x.dtype) for share in (decay, 1 - decay))
        return numerics.hypot(jnp.sqrt(keep) * root, jnp.sqrt(take) * x)

    return Threshold(limit, lambda seen: jnp.zeros_like(seen.size), observe)


def _infinite_at_first(estimate: jax.Array, seen: Seen) -> jax.Array:
    return jnp.where(estimate == 0, jnp.inf, estimate)
