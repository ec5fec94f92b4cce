"""Sums of squares at three scales in one pass, for programs without a conditional.

    Σ x²     Σ (up · x)²     Σ (down · x)²     up and down powers of two

Which of them holds is seen when all are there: the first if it is finite and not tiny,
then it is the same number as on CPU; the second for tiny groups; the third for huge
ones. A GPU waits for memory and has arithmetic to spare, while the predicate of a
conditional may have to travel to the host and back in the middle of a step. On CPU the
three sums would take four times as long as one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from optclip._core import numerics


def scales(dtype: np.dtype) -> tuple[float, float, float]:
    """What multiplies the elements in each of the sums."""
    usable = numerics.RANGES[dtype]
    return 1.0, usable.up, usable.down


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
        return jnp.square(jnp.minimum(jnp.abs(part * scale), top))

    found = []
    for scale in scales(wide):
        squares = functools.reduce(jnp.add, [square(part, scale) for part in parts])
        if axes:
            squares = jnp.sum(squares, axis=axes, keepdims=keepdims)
        found.append(squares)
    return found


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def size(
    totals: list[jax.Array],
    finalize: Callable[[jax.Array, float], jax.Array],
    count: int,
    edge: float,
) -> jax.Array:
    """The size of a group from its three sums, the first of which holds above edge."""
    plain, up, down = (
        finalize(total, count) / scale
        for total, scale in zip(totals, scales(totals[0].dtype), strict=True)
    )
    return jnp.where(jnp.isfinite(plain), jnp.where(plain < edge, up, plain), down)
