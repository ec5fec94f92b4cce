"""Both of two sets at once, by Dykstra's algorithm.

    y = P_a(x + p),  p ← x + p - y,  x = P_b(y + q),  q ← y + q - x

Projecting in turns ends in the intersection, but not at its nearest point; p and q
remember what each projection took away, and with them it does, for convex sets.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optclip._core import checks, numerics
from optclip._core.groupings import Shape
from optclip._core.public import public
from optclip.projections.base import Set, as_it_is


@public
def intersection(a: Set, b: Set, *, iterations: int = 32) -> Set:
    """The points of two sets that lie in both.

        {x : x ∈ a, x ∈ b}

    Args:
      a, b: convex sets that have a point in common.
      iterations: of Dykstra's algorithm, each a projection to both sets; a positive
        integer. Static.

    Edge cases: the result lies in b as b itself promises. Its distance from a shrinks
    with the iterations, for most pairs by a constant factor: with 32, a `box` and an
    `l2_ball` are both met to 1e-5 of their size. What lies in both keeps its bits. Sets
    that are not convex (`norm_sphere`, `unit_norm`, `orthogonal`) may end elsewhere.

    Raises:
      ValueError: if a or b is not a set, or iterations not a positive integer; at init,
        as both sets.

    Reference: Boyle, Dykstra 1986, Lecture Notes in Statistics 37.

    >>> import jax.numpy as jnp, optclip
    >>> half = optclip.sets.nonnegative()
    >>> both = intersection(half, optclip.sets.l2_ball(1.0))
    >>> print(optclip.project_params(jnp.array([3.0, -4.0]), both).round(5))
    [1. 0.]
    """
    checks.instance(Set, a=a)
    checks.instance(Set, b=b)
    checks.at_least(1, iterations=iterations)

    def extent(path: str, leaf: jax.Array, shapes: Mapping[str, Shape]) -> Any:
        return a.extent(path, leaf, shapes), b.extent(path, leaf, shapes)

    def project(x: jax.Array, extents: Any, memory: Any) -> jax.Array:
        own_a, own_b = split(x, memory)

        def alternate(_: Any, carry: Any) -> Any:
            w, p, q = carry
            y = a.nearest(w + p, extents[0], own_a)
            p = w + p - y
            w = b.nearest(y + q, extents[1], own_b)
            return w, p, y + q - w

        wide = numerics.widen(x, numerics.wide_dtype(x.dtype))
        zero = jnp.zeros_like(wide)
        found, _, _ = jax.lax.fori_loop(0, iterations, alternate, (wide, zero, zero))
        # Once more in the leaf's own dtype, in which the bounds may be tighter.
        near = a.nearest(found.astype(x.dtype), extents[0], own_a)
        return b.nearest(near, extents[1], own_b)

    def contains(x: jax.Array, extents: Any, memory: Any) -> jax.Array:
        own_a, own_b = split(x, memory)
        in_a = a.holds(x, extents[0], own_a)
        in_b = b.holds(x, extents[1], own_b)
        return jnp.broadcast_to(in_a, x.shape) & jnp.broadcast_to(in_b, x.shape)

    def init(param: jax.Array) -> jax.Array:
        return jnp.concatenate([s.init(param) for s in (a, b) if s.init is not None])

    def split(x: jax.Array, memory: Any) -> tuple[Any, Any]:
        """The memory of each set, None for one without."""
        own_a, own_b = None, None
        if a.init is not None:
            width = jax.eval_shape(a.init, x).size
            own_a, memory = memory[:width], memory[width:]
        if b.init is not None:
            own_b = memory
        return own_a, own_b

    remembers = a.init is not None or b.init is not None
    return Set(extent, as_it_is, project, contains, init if remembers else None)
