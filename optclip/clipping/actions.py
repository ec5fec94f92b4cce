"""To what size: what happens to a group, given its size and its limit.

An action returns the *target size*; the engine scales the group to it. A target equal
to the size leaves the group's bits alone.

| action | target size |
|---|---|
| `rescale()` | min(size, limit) |
| `rescale(div_eps)` | size · min(1, limit / (size + div_eps)) |
| `smooth()` | size / (1 + size / limit) |
| `normalize()` | limit |
| `floor()` | max(size, limit) |

Of the last two a group of size 0 stays 0, because it has no direction.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optclip._core import checks, numerics
from optclip._core.public import Part, public


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Action(Part):
    """What happens to a group.

    Attributes:
      target: (size, limit) to the target size; both arrays, the limit non-negative or
        NaN. Of a group of size 0 it must be 0 or NaN.
      enlarges: whether a target may be above the size. Sizes are then right however
        small they are, and the metrics count what was changed.
    """

    target: Callable[[jax.Array, jax.Array], jax.Array]
    enlarges: bool = False


@public
def rescale(div_eps: ArrayLike = 0.0) -> Action:
    """Scales a group that is over its limit down to the limit.

        target = min(size, limit)                              div_eps = 0
        target = size · min(1, limit / (size + div_eps))       div_eps > 0

    Args:
      div_eps: 0, or PyTorch's 1e-6, in the units of the size. Above 0 a group within
        `div_eps` of its limit shrinks slightly, as it does there.

    Returns:
      The action.

    Raises:
      ValueError: if div_eps is negative, NaN, or not a number.

    >>> import jax.numpy as jnp
    >>> print(rescale().target(jnp.array([0.5, 2.0]), jnp.array(1.0)))
    [0.5 1. ]
    """
    checks.non_negative(div_eps=div_eps)

    def target(size: jax.Array, limit: jax.Array) -> jax.Array:
        return jnp.where(size <= limit, size, limit)

    def target_with_eps(size: jax.Array, limit: jax.Array) -> jax.Array:
        padded = size + div_eps
        within = padded <= limit
        # Infinity, not chosen, would still turn a zero cotangent into NaN.
        finite = jnp.where(within, jnp.zeros_like(limit), limit)
        return jnp.where(within, size, finite * (size / padded))

    # A traced div_eps may be anything; only a number known to be 0 takes the short way.
    static_zero = isinstance(div_eps, (int, float)) and div_eps == 0
    return Action(target if static_zero else target_with_eps)


@public
def smooth() -> Action:
    """Shrinks every group, small ones little, large ones towards the limit.

        target = size / (1 + size / limit)

    Differentiable everywhere and always below both size and limit; the normalisation of
    AUTO-S times the limit. An infinite limit leaves
    a group as it is, a limit of 0 gives 0.

    Returns:
      The action.

    Reference: [Bu et al. 2022](https://arxiv.org/abs/2206.07136).

    >>> import jax.numpy as jnp
    >>> print(smooth().target(jnp.array([0.1, 1.0, 1e9]), jnp.array(1.0)))
    [0.09090909 0.5        1.        ]
    """

    def target(size: jax.Array, limit: jax.Array) -> jax.Array:
        # Both forms are the same number; the ratio of the smaller to the larger never
        # overflows.
        small = size <= limit
        large = jnp.where(small, limit, size)
        zero = large == 0
        ratio = numerics.quotient(
            jnp.where(small, size, limit), jnp.where(zero, 1, large)
        )
        return jnp.where(small, size, limit) / (1 + ratio)

    return Action(target)


@public
def normalize() -> Action:
    """Scales every group to its limit, up or down.

        target = limit

    With `thresholds.relative_to_params(c)` the updates have a fixed share of the norm
    of their parameters.

    Returns:
      The action.

    Edge cases: a group of size 0 stays 0, and an infinite limit leaves a group as it
    is. A limit of 0 gives 0, NaN gives NaN. Elements that would have to leave their
    dtype's range to reach the limit become infinite.

    Reference: [Hyperball 2026](https://arxiv.org/abs/2606.16899).

    >>> import jax.numpy as jnp
    >>> print(normalize().target(jnp.array([0.0, 0.5, 2.0]), jnp.array(1.0)))
    [0. 1. 1.]
    """

    def target(size: jax.Array, limit: jax.Array) -> jax.Array:
        return jnp.where((size == 0) | (limit == jnp.inf), size, limit)

    return Action(target, enlarges=True)


@public
def floor() -> Action:
    """Scales a group that is below its limit up to the limit, and leaves the others.

        target = max(size, limit)

    The limit is the least size that a group may have. With
    `thresholds.relative_to_params(c)` and `groupings.per_unit()` no row of the updates
    is smaller than c times the norm of its parameters.

    Returns:
      The action.

    Edge cases: a group of size 0 stays 0, and an infinite limit leaves a group as it
    is. A limit of NaN gives NaN. Elements that would have to leave their dtype's range
    to reach the limit become infinite.

    >>> import jax.numpy as jnp
    >>> print(floor().target(jnp.array([0.0, 0.5, 2.0]), jnp.array(1.0)))
    [0. 1. 2.]
    """

    def target(size: jax.Array, limit: jax.Array) -> jax.Array:
        stays = (size == 0) | (limit == jnp.inf) | (limit <= size)
        return jnp.where(stays, size, limit)

    return Action(target, enlarges=True)


def target_of(action: Action, nonfinite_value: float) -> Callable[..., jax.Array]:
    """(size, limit) to the size that a group is scaled to."""

    @jax.jit
    def target(size: jax.Array, limit: jax.Array) -> jax.Array:
        wanted = action.target(size, jnp.maximum(limit, 0))
        return jnp.where(jnp.isfinite(size), wanted, nonfinite_value)

    return target
