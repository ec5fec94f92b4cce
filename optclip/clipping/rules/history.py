"""The last sizes of each group, from which `autoclip` and `spike_clip` take statistics.

A ring buffer in the state, window × groups numbers, written in place; a group's own
count says how much of it is filled. Sizes enter as they were before clipping, so that a
limit can always rise to a new level. Sizes of zero are left out, because an idle group
would come back to a limit of zero.
"""

from __future__ import annotations

from typing import Protocol, Self, TypeVar

import jax
import jax.numpy as jnp

from optclip.clipping.thresholds import Observation


class History(Protocol):
    """A state of `sizes`, (window, *block), and of `sizes_seen`, int32 of the block.

    `sizes_seen` wraps from three times the window to twice.
    """

    @property
    def sizes(self) -> jax.Array: ...
    @property
    def sizes_seen(self) -> jax.Array: ...
    def _replace(self, **fields: jax.Array) -> Self: ...


H = TypeVar("H", bound=History)


def blank_history(window: int, observation: Observation) -> tuple[jax.Array, jax.Array]:
    """The fields of a history of nothing, in the sharding of the block's sizes."""
    row = jnp.zeros_like(observation.size)
    sizes = jnp.zeros_like(jnp.broadcast_to(row, (window, *row.shape)))
    return sizes, jnp.zeros_like(row, dtype=jnp.int32)


def remember(history: H, size: jax.Array) -> H:
    """The history with one more size of each group, the oldest forgotten."""
    window = history.sizes.shape[0]
    here = _slots(history) == (history.sizes_seen % window)[None]
    return history._replace(
        sizes=jnp.where(here, size[None], history.sizes),
        # Wraps by whole windows: still full, and at the same place of the ring.
        sizes_seen=jnp.where(
            history.sizes_seen < 3 * window - 1, history.sizes_seen + 1, 2 * window
        ),
    )


def learn(history: H, observation: Observation, limit: jax.Array) -> H:
    """One more size of each group that had one."""
    idle = observation.size == 0
    new = remember(history, observation.size)
    return jax.tree.map(lambda a, b: jnp.where(idle, a, b), history, new)


def filled(history: History) -> jax.Array:
    """Which places of the ring hold a size."""
    return _slots(history) < history.sizes_seen[None]


def _slots(history: History) -> jax.Array:
    window, rank = history.sizes.shape[0], history.sizes_seen.ndim
    return jnp.arange(window, dtype=jnp.int32).reshape((window,) + (1,) * rank)
