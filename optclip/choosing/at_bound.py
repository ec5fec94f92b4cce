"""How many weights sit at their bound: whether a constraint binds, and how hard.

at bound = a small step leaves the set: w·(1 + s), w·(1 - s), or ±tiny of a zero
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from optclip._core.public import error, public
from optclip._core.types import Tree, Where
from optclip.projections.project import (
    Constraint,
    Member,
    chosen_by,
    members,
    sets_by_path,
)


@public
def at_bound(
    params: Tree, constraint: Constraint, where: Where | None = None
) -> jax.Array:
    """The share of weights that sit at the bound of their set.

        share = |{i : w_i is on the boundary of its set, or outside}| / |{i}|

    A weight clip needs tuning like a gradient clip: at 0 the bound is decoration, near
    1 every weight is ±c and the network has lost its magnitudes (WGAN's critics do).

    Args:
      params: a tree of real parameters.
      constraint: one of `optclip.sets`, or a tree of them, as for `project`.
      where: which leaves, as for `project`: a regular expression searched in the
        "/"-joined path, a predicate `(path, leaf) -> bool`, or a tree of booleans; None
        for all.

    Returns:
      A float32 scalar in [0, 1], which works under `jit`. For sets of elements, such as
      `box`, these are elements. For sets whose points are units, leaves or matrices,
      all weights of a point on the boundary count.

    Edge cases: what lies within 0.01 % of its bound sits at it; in half precision
    within one rounding, or eight for points of several weights. Sets without an
    interior, such as `unit_norm` and `simplex`, give 1. NaN counts.

    Raises:
      ValueError: if constraint is no set, does not fit a leaf or remembers something of
        the run (`init_box`, `init_sphere`, an `intersection` with one of them: give
        the bounds themselves), or `where` selects nothing in a tree that has leaves.

    >>> import jax.numpy as jnp, optclip
    >>> weights = {"kernel": jnp.array([-0.01, 0.002, 0.01, 0.0])}
    >>> print(at_bound(weights, optclip.sets.linf_ball(0.01)))
    0.5
    """
    found = members(params, sets_by_path(constraint), chosen_by(where))
    counts = [jnp.sum(_is_at_bound(member), dtype=jnp.float32) for member in found]
    total = sum(member.leaf.size for member in found)
    return sum(counts, jnp.zeros((), jnp.float32)) / max(total, 1)


def _is_at_bound(member: Member) -> jax.Array:
    """Whether each weight, or all of its point, is not inside by more than a step."""
    leaf, own = member.leaf, member.set
    if own.init is not None:
        raise error(
            f"constraint must not depend on the run, got {own!r} for {member.path!r}."
        )
    limits = jnp.finfo(leaf.dtype)
    held = jax.eval_shape(lambda x: own.holds(x, member.extent), leaf)
    step = max(1e-4, float(limits.eps) * (1 if held.shape == leaf.shape else 8))
    inside = jnp.ones((), bool)
    for way in (1, -1):
        beside = jnp.asarray(way * float(limits.tiny), leaf.dtype)
        moved = jnp.where(
            leaf == 0, beside, leaf * jnp.asarray(1 + way * step, leaf.dtype)
        )
        inside &= own.holds(moved, member.extent)
    return jnp.broadcast_to(~inside, leaf.shape)
