"""Sums of squares that hold at every magnitude, in one pass and without a choice.

    Σ (x · up)² of |x| < low     ──▶ a / up    ╮
    Σ x² of the rest             ──▶ b         ├──▶ √(a² + b² + c²)
    Σ (x · down)² of |x| > high  ──▶ c / down  ╯

A GPU's conditional copies its predicate to the host and blocks the stream until it is
there, so a program for one cannot choose between one pass and two as those for CPUs do.
It has arithmetic to spare instead, while it waits for memory. On CPU the three sums
would take four times as long as one.

Reference: Blue 1978, https://dl.acm.org/doi/10.1145/355769.355771.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from optclip._core import numerics
from optclip._core.types import Arrays

# The platform that programs are made for; tests replace it.
backend = jax.default_backend


# Jitted so that equal leaves are traced once.
@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def sums_of_squares(
    x: jax.Array, axes: tuple[int, ...], keepdims: bool, wide: np.dtype
) -> jax.Array:
    """The sums of |x| < low, of the rest and of |x| > high along a new first axis.

    NaN counts among the rest, infinity among the large ones.
    """
    info, usable = jnp.finfo(wide), numerics.RANGES[wide]
    low, high = 2.0 ** (int(info.minexp) // 2 + 3), 2.0 ** (int(info.maxexp) // 2 - 24)
    x = numerics.for_measuring(x, wide)

    def squares(part: jax.Array) -> Arrays:
        tiny, huge = jnp.abs(part) < low, jnp.abs(part) > high
        return [
            jnp.square(jnp.where(tiny, part * usable.up, 0)),
            jnp.square(jnp.where(tiny | huge, 0, part)),
            jnp.square(jnp.where(huge, part * usable.down, 0)),
        ]

    parts = (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)
    summands = [sum(of_bin) for of_bin in zip(*map(squares, parts), strict=True)]
    if axes:
        summands = [jnp.sum(y, axis=axes, keepdims=keepdims) for y in summands]
    return jnp.stack(summands)


@functools.partial(jax.jit, static_argnums=(1, 2))
def size(
    totals: jax.Array, finalize: Callable[[jax.Array, float], jax.Array], count: int
) -> jax.Array:
    """The size of a group from its three sums."""
    usable = numerics.RANGES[totals.dtype]
    small, middle, large = (finalize(total, count) for total in totals)
    parts = small / usable.up, middle, large / usable.down
    return functools.reduce(numerics.hypot, parts)
