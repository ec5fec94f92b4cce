"""Landing: updates that `optax.apply_updates` turns into exactly what was meant.

    apply(p, u) = round_P(p + u), the sum in the wider of both dtypes

The plain way, u = target - p, misses: the difference is rounded, then the sum, and p
may end one spacing outside its set (in half of all cases where |p| is far larger than
the bound, or the parameters are bfloat16). So the sum is predicted with the very
arithmetic that `apply_updates` uses, and an update that would miss is moved to its next
representable neighbour, in the direction in which the projection went. One step is
enough: the update is off by at most half of its own spacing, and rounding never passes
a number that the parameters' dtype can represent.

Compiled code may compute p + a·b with one rounding (a fused multiply-add), or keep more
digits of a bfloat16 than it has. `applied` and `rounding.rounded` forbid both, so that
eager and jitted code land on the same numbers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from optclip._core.rounding import neighbour, rounded


def applied(p: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The update as it is in memory, whatever it is fused with, and what becomes of p.

    That is what `optax.apply_updates` makes of one parameter, in its dtype. A finite
    sum beyond the range of float16 is its largest number here, not infinity: what
    follows projects it. The sum of two of half precision is rounded twice, from float32
    on, which does no harm.
    """
    if jnp.iscomplexobj(p):
        parts = applied(p.real, u.real), applied(p.imag, u.imag)
        settled, moved = (jax.lax.complex(*pair) for pair in zip(*parts, strict=True))
        return settled, moved
    if jnp.finfo(u.dtype).bits < 32:
        u = rounded(u.astype(jnp.float32), u.dtype)
    else:
        # A product that ends in a choice cannot melt into the sum that follows.
        u = jnp.where(u < float(jnp.finfo(u.dtype).min), -jnp.inf, u)
    wide = np.promote_types(np.promote_types(p.dtype, u.dtype), np.float32)
    return u, rounded(p.astype(wide) + u.astype(wide), p.dtype)


def steered(p: jax.Array, u: jax.Array, y: jax.Array, target: jax.Array) -> jax.Array:
    """The update, in u's dtype, that takes p to the target instead of y.

    Elements that are at the target anyway keep their update; the others come to the
    target or beyond it, as seen from y, by the least step that there is.
    """
    if jnp.iscomplexobj(p):
        return jax.lax.complex(
            steered(p.real, u.real, y.real, target.real),
            steered(p.imag, u.imag, y.imag, target.imag),
        )
    wide = np.promote_types(np.promote_types(p.dtype, u.dtype), np.float32)
    start, kept, y, goal = (x.astype(wide) for x in (p, u, y, target))
    step, upward = rounded(goal - start, u.dtype).astype(wide), goal > y
    at = start + step  # if this is not short, rounded to p's dtype it is not either
    short = jnp.where(upward, at < goal, at > goal)
    # From outside of what keeps away from zero, as a lower bound above it does, the
    # next step may lead far beyond; the second one lands exactly.
    short &= ((step > 0) != upward) | ((goal > 0) != upward)
    step = jnp.where(short, neighbour(step, u.dtype, upward), step)
    # A difference too large for one update takes two.
    largest = float(jnp.finfo(u.dtype).max)
    step = jnp.where(step > largest, largest, step)
    step = jnp.where(step < -largest, -largest, step)
    return rounded(jnp.where(goal == y, kept, step), u.dtype)
