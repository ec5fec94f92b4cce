"""`sweep`: one training for each of many limits, all at once.

limits ──vmap(train)──▶ losses, optimizer states ──▶ final losses, clip rates
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optclip._core import checks
from optclip._core.metrics import ClipMetrics
from optclip._core.public import error, public
from optclip._core.types import Tree
from optclip.insight.metrics import found, unwrapped

Train: TypeAlias = Callable[[jax.Array], jax.Array | tuple[jax.Array, Tree]]


class Sweep(NamedTuple):
    """What trainings with m limits came to, as NumPy arrays.

    Attributes:
      limits: (m,), as they were given.
      losses: (m, n), of every step.
      clip_rates: (m,), the share of steps that were clipped; None if `train` returned
        no state. Of several rules in a state, that of the one that clips most.
    """

    limits: np.ndarray
    losses: np.ndarray
    clip_rates: np.ndarray | None

    @property
    def final(self) -> np.ndarray:
        """(m,), the mean loss of the last tenth; not finite for a run that was lost."""
        return self.losses[:, -max(self.losses.shape[1] // 10, 1) :].mean(1)

    @property
    def best(self) -> float:
        """The limit with the lowest final loss; NaN if every run was lost."""
        final = np.where(np.isfinite(self.final), self.final, np.inf)
        return float(self.limits[final.argmin()] if final.min() < np.inf else np.nan)

    def __str__(self) -> str:
        rates = self.clip_rates
        rates = [None] * len(self.limits) if rates is None else rates
        lines = ["   limit  final loss  clipped"]
        for limit, loss, rate in zip(self.limits, self.final, rates, strict=True):
            clipped = "-" if rate is None else f"{100 * rate:.1f} %"
            lines.append(f"{limit:8.4g}  {loss:10.4g}  {clipped:>7}")
        return "\n".join(lines)


@public
def sweep(train: Train, limits: Sequence[float] | ArrayLike) -> Sweep:
    """Trains once for each limit, all of them at the same time.

        losses_i, state_i = train(limit_i),   under one jit(vmap)

    The members share one program and differ by the limit only, so it costs the memory
    of that many trainings, and less than their time while a model is small.

    Args:
      train: a function of a scalar limit, traced, that runs a whole training, such as
        by `lax.scan`, and returns the losses of its steps (n,); or these and the last
        optimizer state, from which the clip rates come. To try each limit with several
        seeds, train under `jax.vmap` within it and return the mean of the losses: clip
        rates are over all seeds of the state.
      limits: m positive numbers; infinity trains without a clip.

    Returns:
      A `Sweep`; `print` shows it as a table, `optclip.plot.sweep` as a picture.

    Edge cases: a run that diverges has a final loss of NaN or infinity and never
    counts as the best.

    Raises:
      ValueError: if limits are not positive, not one-dimensional or none, train returns
        no losses of n steps, or a state without a clip.

    >>> import jax, jax.numpy as jnp, optax, optclip
    >>> def train(limit):
    ...     tx = optax.chain(optclip.clip_by_global_norm(limit), optax.sgd(1.5))
    ...     def step(carry, _):
    ...         w, state = carry
    ...         loss, grad = jax.value_and_grad(lambda w: jnp.abs(w) ** 3)(w)
    ...         updates, state = tx.update(grad, state)
    ...         return (w + updates, state), loss
    ...     w = jnp.array(2.0)
    ...     (_, state), losses = jax.lax.scan(step, (w, tx.init(w)), length=20)
    ...     return losses, state
    >>> found = sweep(train, [0.03, 0.3, jnp.inf])
    >>> print(found.best, found.clip_rates)
    0.3 [1.  0.2 0. ]
    """
    values = np.asarray(limits, np.float64)
    if values.ndim != 1 or not values.size:
        raise error(f"limits must be of shape (m,), got shape {values.shape}.")
    checks.positive(limits=values)
    made = jax.jit(jax.vmap(train))(jnp.asarray(values, jnp.result_type(float)))
    losses, state = made if isinstance(made, tuple) else (made, None)
    shape = np.shape(losses)
    if len(shape) != 2 or not shape[1]:
        raise error(
            f"train must return the losses of n steps, (n,), got shape {shape[1:]}."
        )
    rates = None
    if state is not None:
        clips = [metrics for _, metrics in found(state, ClipMetrics)]
        if not clips:
            raise error("train must return a state with a clip, got one without.")
        rates = np.max([_rate(clip, len(values)) for clip in clips], axis=0)
    losses = np.asarray(losses)  # NumPy adds bfloat16 up in bfloat16
    losses = losses.astype(np.promote_types(losses.dtype, np.float32))
    return Sweep(values, losses, rates)


def _rate(clip: ClipMetrics, members: int) -> np.ndarray:
    """The share of the steps that each member clipped, over all its seeds if it has."""
    counts = unwrapped(clip.clipped_steps), unwrapped(clip.steps)
    clipped, steps = (np.reshape(count, (members, -1)).sum(1) for count in counts)
    return clipped / np.maximum(steps, 1)
