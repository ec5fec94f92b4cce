"""What a threshold is, and what it sees.

A threshold is up to three small functions on one block of groups. `limit` gives the
limit from its state and from what it sees, `observe` gives the next state, and `init`
the first. The engine never lets it observe a group that is not finite.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optclip._core.public import Part


class Seen(NamedTuple):
    """What a threshold sees of one block.

    Attributes:
      size: the size of each group, float32 or float64, in the block's shape; one that
        is not finite shows as the largest number, and nothing comes of it.
      step: how many updates came before, an int32 scalar.
      names: the groups' names where they have any (`per_leaf`, `per_label`).
      params: the sizes of the parameters, for a threshold that needs them.
      whole: the size of all finite groups together, a scalar, for one that needs it.
    """

    size: jax.Array
    step: jax.Array
    names: tuple[str, ...] | None = None
    params: jax.Array | None = None
    whole: jax.Array | None = None


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Threshold(Part):
    """How big a group may be; see this module's docstring.

    Attributes:
      limit: (state, seen) to the limits, a scalar or an array of the block's shape, or
        None for no limit at all.
      init: seen (sizes all zero) to the first state, or None for a threshold without
        state. The trailing axes of every array in the state are the block's.
      observe: (state, seen, limit) to the next state.
      needs_params: whether it reads `Seen.params`.
      needs_whole: whether it reads `Seen.whole`.
    """

    limit: Callable[[Any, Seen], Any]
    init: Callable[[Seen], Any] | None = None
    observe: Callable[[Any, Seen, Any], Any] = lambda state, seen, limit: state
    needs_params: bool = False
    needs_whole: bool = False


def one_more(counter: jax.Array) -> jax.Array:
    """The counter after one more event; it stops at the largest number."""
    return jnp.where(counter < jnp.iinfo(counter.dtype).max, counter + 1, counter)
