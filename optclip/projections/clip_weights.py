"""WGAN weight clipping: `project` with a box, for weights and not for scales or biases.

w ← clip(w + u, -c, c)
"""

from __future__ import annotations

import jax
import optax
from jax.typing import ArrayLike

from optclip._core import checks, layouts
from optclip._core.public import public
from optclip._core.types import Shapes, Where
from optclip.projections.base import bound_array
from optclip.projections.boxes import linf_ball
from optclip.projections.project import chosen_by, projecting

WEIGHTS = ("kernel", "embedding", "w")


@public
def clip_weights(
    c: ArrayLike = 0.01, where: Where | None = None, every: int = 1
) -> optax.GradientTransformationExtraArgs:
    """WGAN weight clipping: keeps weights in [-c, c], after the step.

        w ← clip(w + u, -c, c)

    The last transform of the critic's chain: `optax.chain(optax.rmsprop(5e-5),
    clip_weights(0.01))`. So the critic that the generator meets is clipped, as in the
    paper; code that clips before the step leaves it unclipped.

    Args:
      c: the largest magnitude of a weight, a non-negative number of any type.
      where: which leaves: a regular expression searched in the "/"-joined path, a
        predicate `(path, leaf) -> bool`, or a tree of booleans. None takes weights:
        leaves named kernel, embedding or w, a `weight` or any other leaf of at least
        two axes beside those of stacked layers, and never a scale or bias. Clipping a
        batch norm's scale to 0.01 all but turns it off. `where=optclip.everything`
        clips all, as the authors' code did. Static (static_args).
      every: clips at every so many-th step, a positive integer. Static (static_args).

    Returns:
      A gradient transformation with state `ProjectState`; all but weights pass.

    Edge cases: ±inf goes to the bound, NaN stays NaN, c = 0 gives zeros. c is rounded
    towards zero to each weight's dtype.

    Raises:
      ValueError: if c is negative, NaN or not a number, or every is not a positive
        integer; at init, if nothing is selected in a tree that has leaves; at update,
        if params are missing or of other shapes than the updates.

    Reference: Arjovsky, Chintala, Bottou 2017, https://arxiv.org/abs/1701.07875.

    >>> import jax.numpy as jnp, optax
    >>> params = {"kernel": jnp.array([[0.005, 0.002]]), "scale": jnp.ones(2)}
    >>> tx = clip_weights(0.01)
    >>> updates = {"kernel": jnp.array([[0.5, -0.001]]), "scale": jnp.ones(2)}
    >>> updates, _ = tx.update(updates, tx.init(params), params)
    >>> after = optax.apply_updates(params, updates)
    >>> print(after["kernel"], after["scale"])
    [[0.01  0.001]] [2. 2.]
    """
    c = bound_array(checks.non_negative, c=c)
    chosen = is_weight if where is None else chosen_by(where)
    return projecting(linf_ball(c), chosen, every)


def is_weight(path: str, leaf: jax.Array, shapes: Shapes) -> bool:
    """Whether a leaf is a kernel or embedding: it has outputs, or such a name."""
    name = path.rpartition("/")[2]
    return name in WEIGHTS or bool(layouts.layout(path, shapes).outputs)
