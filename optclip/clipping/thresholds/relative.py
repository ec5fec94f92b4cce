"""Limits relative to the parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optclip._core import checks
from optclip._core.public import public
from optclip.clipping.thresholds.base import Seen, Threshold


@public
def relative_to_params(
    ratio: ArrayLike | optax.Schedule, eps: ArrayLike = 1e-3
) -> Threshold:
    """A share of the size of the group's parameters.

        limit = ratio · max(size(params), eps)

    Args:
      ratio: the share, a non-negative scalar or a schedule, without unit.
      eps: the floor under the size of the parameters, in their units: what a group that
        starts at zero may move.

    Raises:
      ValueError: if a static argument is negative, NaN or not a number; at update, if
        params are missing.

    Reference: Brock et al. 2021, arXiv 2102.06171.

    >>> import jax.numpy as jnp, optclip
    >>> tx = optclip.clip_by(relative_to_params(0.01))
    >>> updates, _ = tx.update(jnp.array([3.0, 4.0]), None, jnp.array([0.0, 10.0]))
    >>> print(updates)
    [0.06 0.08]
    """
    checks.limit_like(ratio=ratio)
    checks.limit_like(eps=eps)

    def limit(state: Any, seen: Seen) -> jax.Array:
        share = ratio
        if callable(ratio):
            share = ratio(seen.step)
            checks.given(**{"schedule(step)": share})
        floor = jnp.asarray(eps, seen.size.dtype)
        assert seen.params is not None  # the engine gives what `needs_params` asks for
        return jnp.asarray(share, seen.size.dtype) * jnp.maximum(seen.params, floor)

    return Threshold(limit, needs_params=True)
