"""Outliers by their distance from a running mean, in running deviations."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optclip._core import checks, numerics
from optclip._core.public import public
from optclip.clipping.thresholds.base import Seen, Threshold, one_more


class ZScoreState(NamedTuple):
    """Mean and deviation of the sizes let through, and how many there were.

    Attributes:
      mean: the block's shape, in the units of the size.
      deviation: standard deviation, likewise; its square would leave float32's range.
      seen: int32, the block's shape.
    """

    mean: jax.Array
    deviation: jax.Array
    seen: jax.Array


@public
def zscore(
    z_threshold: ArrayLike = 2.5,
    decay: ArrayLike = 0.97,
    warmup_steps: int = 25,
    mode: str = "reciprocal",
    eps: ArrayLike = 1e-6,
) -> Threshold:
    """Sizes that lie z_threshold deviations above their running mean are outliers.

        z = (size - μ) / (σ + eps);     an outlier where z > z_threshold
        limit of an outlier = μ + z_threshold²·σ / z     mode="reciprocal"
                            = μ                          mode="mean"
                            = μ + z_threshold·σ          mode="max"

    The first `warmup_steps` sizes pass and give the first μ and σ² (Welford). Then the
    clipped size x enters: μ ← decay·μ + (1 - decay)·x, σ² ← decay·σ² +
    (1 - decay)·(x - μ)² with the new μ. The authors' code names the modes
    `zscore/adaptive_scaling`, `zscore/mean` and `percentile`. A size of zero is not
    learned from, so that an idle group cannot lock itself at zero.

    Because outliers enter clipped, "reciprocal" and "mean" hardly recover from a
    permanent rise of the norm: add a window (`percentile`), or use `robust`.

    Args:
      z_threshold: in deviations, positive.
      decay: of the running averages, in [0, 1).
      warmup_steps: how many sizes pass first, at least 1 (static_args).
      mode: "reciprocal", "mean" or "max" (static_args).
      eps: beside σ in z, in the units of the size.

    Raises:
      ValueError: if an argument is out of its range.

    Reference: Kumar et al. 2025, arXiv 2504.02507.

    >>> import optclip
    >>> ceiling = optclip.thresholds.constant(1.0)
    >>> tx = optclip.clip_by(optclip.thresholds.tightest(zscore(), ceiling))
    """
    checks.positive(z_threshold=z_threshold)
    checks.fraction(decay=decay)
    checks.at_least(1, warmup_steps=warmup_steps)
    checks.choice(("reciprocal", "mean", "max"), mode=mode)
    checks.non_negative(eps=eps)

    def init(seen: Seen) -> ZScoreState:
        return ZScoreState(
            jnp.zeros_like(seen.size),
            jnp.zeros_like(seen.size),
            jnp.zeros_like(seen.size, dtype=jnp.int32),
        )

    def limit(state: ZScoreState, seen: Seen) -> jax.Array:
        dtype = seen.size.dtype
        bar, floor = jnp.asarray(z_threshold, dtype), jnp.asarray(eps, dtype)
        deviation = state.deviation
        edge = state.mean + bar * (deviation + floor)
        outlier = seen.size > edge
        excess = jnp.where(outlier, seen.size - state.mean, 1)
        if mode == "reciprocal":
            share = numerics.quotient(deviation + floor, excess)
            clipped = state.mean + bar**2 * deviation * share
        elif mode == "mean":
            clipped = state.mean
        else:
            clipped = state.mean + bar * deviation
        warm = state.seen >= warmup_steps
        return jnp.where(warm, jnp.where(outlier, clipped, edge), jnp.inf)

    def observe(state: ZScoreState, seen: Seen, limit: jax.Array) -> ZScoreState:
        x = jnp.minimum(seen.size, limit)
        count = (state.seen + 1).astype(x.dtype)
        warming = state.seen < warmup_steps
        keep = jnp.where(warming, 1 - 1 / count, jnp.asarray(decay, x.dtype))
        take = jnp.where(warming, 1 / count, jnp.asarray(1 - decay, x.dtype))
        mean = keep * state.mean + take * x
        # While warming, Welford's increment: (x - old mean)·(x - new mean) / count.
        step = jnp.where(warming, jnp.sqrt(keep) * (x - state.mean), x - mean)
        deviation = numerics.hypot(
            jnp.sqrt(keep) * state.deviation, jnp.sqrt(take) * jnp.abs(step)
        )
        learned = ZScoreState(mean, deviation, one_more(state.seen))
        idle = seen.size == 0  # would give an idle group a limit of zero, for ever
        return jax.tree.map(lambda a, b: jnp.where(idle, a, b), state, learned)

    return Threshold(limit, init, observe)
