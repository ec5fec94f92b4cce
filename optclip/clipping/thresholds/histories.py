"""Limits from a window of past sizes.

The window is a ring buffer in the state, window x groups numbers, written in place; a
group's own count says how much of it is filled. Sizes enter as they were before
clipping, so that a limit can always rise to a new level.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optclip._core import checks
from optclip._core.public import public
from optclip.clipping.thresholds.base import Seen, Threshold


class History(NamedTuple):
    """The last sizes of each group.

    Attributes:
      sizes: (window, *block) array, a ring buffer.
      seen: how many sizes each group has had, int32, the block's shape; it wraps from
        three times the window to twice.
    """

    sizes: jax.Array
    seen: jax.Array


def empty(window: int, seen: Seen) -> History:
    """A history of nothing, in the sharding of the block's sizes."""
    row = jnp.zeros_like(seen.size)
    return History(
        sizes=jnp.zeros_like(jnp.broadcast_to(row, (window, *row.shape))),
        seen=jnp.zeros_like(row, dtype=jnp.int32),
    )


def remember(history: History, size: jax.Array) -> History:
    """The history with one more size of each group, the oldest forgotten."""
    window = history.sizes.shape[0]
    slots = jnp.arange(window, dtype=jnp.int32).reshape((window,) + (1,) * size.ndim)
    here = slots == (history.seen % window)[None]
    return History(
        jnp.where(here, size[None], history.sizes),
        # Wraps by whole windows: still full, and at the same place of the ring.
        jnp.where(history.seen < 3 * window - 1, history.seen + 1, 2 * window),
    )


def quantile(history: History, percentile: ArrayLike) -> jax.Array:
    """The percentile of each group's sizes, interpolated linearly.

    Written as lo + f·(hi - lo), so that a constant history gives exactly its constant.
    """
    window = history.sizes.shape[0]
    filled = jnp.minimum(history.seen, window)
    ordered = jnp.sort(jnp.where(_filled(history), history.sizes, jnp.inf), axis=0)
    last = jnp.maximum(filled - 1, 0)
    place = last.astype(ordered.dtype) * (jnp.asarray(percentile, ordered.dtype) / 100)
    below = jnp.clip(jnp.floor(place).astype(jnp.int32), 0, last)
    above = jnp.minimum(below + 1, last)
    low = jnp.take_along_axis(ordered, below[None], axis=0)[0]
    high = jnp.take_along_axis(ordered, above[None], axis=0)[0]
    return low + (place - below.astype(ordered.dtype)) * (high - low)


@public
def percentile(
    percentile: ArrayLike = 10.0, window: int = 1000, multiple: ArrayLike = 1.0
) -> Threshold:
    """A percentile of the last sizes, the current one included.

        limit = multiple · percentile(size_{t-window+1}, ..., size_t)

    `percentile=50, multiple=2` is the rule of ScaledAdam. A constant history never
    clips. Sizes of zero are left out: an idle group would come back to a limit of zero.
    State: window x groups floats, so 1000 floats a unit under `per_unit()`.

    Args:
      percentile: in [0, 100]; 0 gives the running minimum, 100 with multiple 1 never
        clips.
      window: how many sizes are kept, at least 2; a Python integer (static_args).
      multiple: of the percentile, without unit.

    Raises:
      ValueError: if percentile is outside [0, 100], window is not an integer of at
        least 2, or multiple is negative, NaN or not a number.

    Reference: Seetharaman et al. 2020, arXiv 2007.14469.

    >>> import optclip
    >>> tx = optclip.clip_by(percentile(50.0, window=100, multiple=2.0))
    """
    checks.between(0, 100, percentile=percentile)
    checks.at_least(2, window=window)
    checks.non_negative(multiple=multiple)
    chosen = percentile

    def limit(history: History, seen: Seen) -> jax.Array:
        with_current = remember(history, seen.size)
        times = jnp.asarray(multiple, seen.size.dtype)
        return times * quantile(with_current, chosen)

    return Threshold(
        limit,
        init=lambda seen: empty(window, seen),
        observe=_learn,
    )


def _learn(history: History, seen: Seen, limit: jax.Array) -> History:
    """One more size of each group that had one."""
    new, idle = remember(history, seen.size), seen.size == 0
    return jax.tree.map(lambda a, b: jnp.where(idle, a, b), history, new)


def _filled(history: History) -> jax.Array:
    """Which places of the ring hold a size."""
    window = history.sizes.shape[0]
    slots = jnp.arange(window, dtype=jnp.int32).reshape(
        (window,) + (1,) * history.seen.ndim
    )
    return slots < history.seen[None]


@public
def robust(
    z: ArrayLike = 3.0,
    window: int = 48,
    prior_spread: ArrayLike = 0.22,
    prior_steps: ArrayLike = 8.0,
) -> Threshold:
    """The median of the last sizes, times a bound on their spread in log space.

        limit  = median(history) · exp(z · spread)
        spread = (m · 1.4826 · MAD(log history) + prior_steps · prior_spread)
                 / (m + prior_steps)

    over the last `window` sizes before clipping, m of which are there yet. A median
    forgets a spike at once and follows a lasting shift after window/2 steps, at any
    level, because logarithms have no unit. The prior is all there is at the second
    size, fades as sizes come in, and is what remains when they do not vary at all: a
    limit 10 % above a constant history.

    State: 48 floats a group. Sizes of zero are left out, so that an idle group comes
    back to its old limit.

    Why this statistic: raw sizes, because an average of clipped sizes locks itself in;
    the median, because a mean moves with every spike; half-spread over 48 sizes,
    because fewer clip ordinary steps and more follow a shift too late; logarithms,
    because sizes vary by ratios. The spike-response table has the numbers.

    Args:
      z: how many spreads above the median, positive.
      window: how many sizes are kept, at least 2; a Python integer (static_args).
      prior_spread: the spread of log sizes expected before any is known.
      prior_steps: how many sizes the prior counts for.

    Raises:
      ValueError: if an argument is negative, NaN or not a number, z is 0, or window is
        not an integer of at least 2.

    >>> import jax.numpy as jnp, optclip
    >>> tx = optclip.clip_by(robust())
    >>> state = tx.init(jnp.zeros(1))
    >>> for size in (1.0, 1.1, 1000.0):
    ...     updates, state = tx.update(jnp.array([size]), state)
    >>> print(f"{updates[0]:.2f}")
    1.70
    """
    checks.positive(z=z)
    checks.at_least(2, window=window)
    checks.non_negative(prior_spread=prior_spread, prior_steps=prior_steps)

    def limit(history: History, seen: Seen) -> jax.Array:
        dtype = seen.size.dtype
        bar, prior, weight = (
            jnp.asarray(number, dtype) for number in (z, prior_spread, prior_steps)
        )
        there = _filled(history)
        logs = jnp.log(jnp.where(there, history.sizes, 1))
        centre = _lower_median(logs, there)
        deviation = _lower_median(jnp.abs(logs - centre[None]), there)
        count = jnp.minimum(history.seen, window).astype(dtype)
        # 1.4826 makes the median deviation of a normal law its standard deviation.
        known = count * jnp.asarray(1.4826, dtype) * deviation
        spread = (known + weight * prior) / jnp.maximum(count + weight, 1)
        return jnp.where(count > 0, jnp.exp(centre + bar * spread), jnp.inf)

    return Threshold(limit, lambda seen: empty(window, seen), _learn)


def _lower_median(values: jax.Array, there: jax.Array) -> jax.Array:
    """The lower median over the window of the values that are there; 0 if none is.

    Ranks by counting: XLA:CPU sorts a short axis of many groups 30 times slower.
    """
    values = jnp.where(there, values, jnp.inf)
    ranks = jax.lax.fori_loop(
        0,
        values.shape[0],
        lambda row, ranks: ranks + (values[row][None] <= values).astype(jnp.int32),
        jnp.zeros_like(values, dtype=jnp.int32),
    )
    count = jnp.sum(there, axis=0, dtype=jnp.int32)
    upper = ranks > jnp.maximum(count - 1, 0)[None] // 2
    median = jnp.min(jnp.where(upper, values, jnp.inf), axis=0)
    return jnp.where(count > 0, median, 0)
