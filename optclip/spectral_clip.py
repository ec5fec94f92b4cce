"""Spectral clipping: no singular value of an update is above a limit.

    U diag(σ) Vᵀ  ->  U diag(min(σ, c)) Vᵀ   for each matrix, c = max_sigma
    U diag(σ) Vᵀ  ->  U diag(σ / √(1 + σ²/c²)) Vᵀ   with soft=True

A rule whose groups are matrices and whose factor differs from direction to direction,
so it does not use the engine. The arithmetic is that of `sets.spectral_ball`, applied
to updates instead of parameters.
"""

from __future__ import annotations

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optclip._core import checks, metrics, numerics
from optclip._core.public import error, public
from optclip._core.types import Limit, Nonfinite, Stacked, Tree, Where
from optclip.clipping.engine import ClipState
from optclip.clipping.thresholds import at_step
from optclip.projections.matrices import capped, spectral_ball
from optclip.projections.project import Member, chosen_by, members


@public
def spectral_clip(
    max_sigma: Limit,
    *,
    soft: bool = False,
    iterations: int | None = None,
    where: Where | None = None,
    stacked: Stacked = None,
    nonfinite: Nonfinite = "propagate",
) -> optax.GradientTransformationExtraArgs:
    """Bounds the singular values of every matrix, keeping its singular vectors.

        U diag(σ) Vᵀ ← U diag(min(σ, max_sigma)) Vᵀ

    A few directions that dominate a gradient are cut down, and all others stay as they
    are, where a norm would shrink everything. A parameter is read as a matrix from its
    inputs to its outputs, as in `sets.spectral_ball`: stacked layers apart, the window
    of a convolution among the inputs, a bias or scale as one column, whose singular
    value is its norm.

    Args:
      max_sigma: the largest singular value, a non-negative scalar in the units of the
        updates, or a schedule.
      soft: whether every σ becomes σ / √(1 + σ²/max_sigma²) instead, SPECTRA's rule:
        below max_sigma too, without a corner; one of max_sigma keeps 71 %. Static
        (static_args).
      iterations: None for singular value decompositions, or how many Newton-Schulz
        steps to take instead, which are products of matrices alone. Results are within
        about a thousandth of the limit after 16, 24 and 32 steps, for singular values
        of ten, a hundred and a thousand times the limit; of larger ones within a
        hundredth above, but small directions beside them are lost. See
        `sets.spectral_ball`. With soft half as many steps do. Static (static_args).
      where: which leaves: a regular expression searched in the "/"-joined path, a
        predicate `(path, leaf) -> bool`, or a tree of booleans that may be a prefix of
        the updates; None for all. Static (static_args).
      stacked: how many leading axes count independent layers: True (one) or a number
        for every leaf, a regular expression for the leaves with one, or None to read it
        off the parameter's layout. Static (static_args).
      nonfinite: what becomes of a matrix with NaN or infinity: `"propagate"` makes all
        of it NaN, `"zero"` all of it zero.

    Returns:
      A gradient transformation with state `ClipState`. Its metrics count matrices; size
      and limit are of the matrix furthest over. With `iterations` they are counters
      only, as products do not find the largest singular value, and a matrix counts as
      clipped if more than a thousandth of the limit was taken off. Leaves outside
      `where`, integers and keys pass untouched.

    Edge cases: a matrix within the limit keeps its bits, unless it is within 12 + 6√n
    units in the last place of it, for n rows or columns (with iterations it stays up to
    rounding, with soft it shrinks). Without iterations results are never above the
    limit, as `sets.spectral_ball` says. Infinity: identity. 0 gives zeros. A NaN limit
    gives NaN. A finite matrix whose size float32 cannot hold is clipped like any other.
    Derivatives are finite at repeated singular values and at zero. It keeps copies of
    a leaf in float32, three, or up to nine with iterations. On a mesh stacked matrices
    that are whole on their devices move nothing but a few numbers for the metrics; of
    others moves what `sets.spectral_ball` says.

    Raises:
      ValueError: if a static max_sigma is negative, NaN or not a number, soft is no
        boolean, iterations is not a positive integer, or nonfinite is unknown; at init
        and update, if `where` selects nothing, a leaf is complex, or it varies over a
        mesh axis inside `shard_map`; at update, if state is another rule's.

    Reference: SPECTRA 2026, https://arxiv.org/abs/2603.14315, for the soft rule; the
    hard cap is among NVIDIA's Emerging-Optimizers too.

    >>> import jax.numpy as jnp
    >>> updates = {"kernel": jnp.array([[3.0, 0.0], [0.0, 0.5]])}
    >>> updates, state = spectral_clip(1.0).update(updates, None)
    >>> print(updates["kernel"].round(4), state.metrics.size.round(4))
    [[1.  0. ]
     [0.  0.5]] 3.0
    >>> updates = {"kernel": jnp.array([[3.0, 0.0], [0.0, 0.5]])}
    >>> print(spectral_clip(1.0, soft=True).update(updates, None)[0]["kernel"].round(2))
    [[0.95 0.  ]
     [0.   0.45]]
    """
    checks.limit_like(max_sigma=max_sigma)
    checks.choice(get_args(Nonfinite), nonfinite=nonfinite)
    if not isinstance(soft, bool):
        raise error(f"soft must be True or False, got {soft!r}.")
    ball = spectral_ball(iterations=iterations, stacked=stacked)
    chosen = chosen_by(where)
    fill = jnp.nan if nonfinite == "propagate" else 0.0

    def matrices_of(tree: optax.Updates) -> tuple[list[Member], np.dtype]:
        """The leaves, and the dtype of their sizes."""
        found = members(tree, lambda path: ball, chosen)
        return found, numerics.accumulation_dtype(*[x.leaf.dtype for x in found])

    def init(params: optax.Params) -> Tree:  # a ClipState
        at_step(max_sigma, jnp.zeros((), jnp.int32))  # a bad limit is reported here
        _, wide = matrices_of(params)
        return ClipState((), metrics.start(wide, iterations is not None, True))

    def update(
        updates: optax.Updates,
        state: Tree,  # a ClipState, or None
        params: optax.Params | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, Tree]:
        del params, extra_args
        state = init(updates) if state is None else state
        if not isinstance(state, ClipState):
            raise checks.other_state(ClipState, state)
        limit = at_step(max_sigma, state.metrics.steps)
        flat, treedef = jax.tree_util.tree_flatten(updates)
        chosen_leaves, wide = matrices_of(updates)
        shown, sizes = numerics.bound_in(limit, wide), []
        for index, _, leaf, _, (sides, _) in chosen_leaves:
            own = numerics.accumulation_dtype(leaf.dtype)
            top = jnp.maximum(numerics.bound_in(limit, own), 0)
            usable = (top > 0) & (top < jnp.inf)
            bound = jnp.where(usable, top, 1)
            found, size = capped(leaf, sides, bound, iterations, spikes=True, soft=soft)
            if iterations is not None:  # of the size only over or not over is known
                some = jnp.max(jnp.abs(leaf)).astype(own)
                size = jnp.where(usable | jnp.isnan(size), size, some)
            # Not finite is the whole matrix, or none of it.
            bad = jnp.isnan(found)
            ends = jnp.where(top == 0, jnp.zeros_like(leaf), jnp.nan)
            ends = jnp.where(top == jnp.inf, leaf, ends)
            found = jnp.where(bad, fill, jnp.where(usable, found, ends))
            flat[index] = found.astype(leaf.dtype)
            sizes.append(size.astype(wide))
        numbers = metrics.after(state.metrics, sizes, [shown] * len(sizes))
        return jax.tree_util.tree_unflatten(treedef, flat), ClipState((), numbers)

    return optax.GradientTransformationExtraArgs(init, update)
