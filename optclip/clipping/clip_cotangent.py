"""`clip_cotangent`: the identity, whose backward pass clips the gradient through it.

    forward:   y = x          backward:   x̄ = clip(ȳ)

The clip is `clip_by` or `clip_by_value` itself, of the cotangents as its updates.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optclip._core import checks, numerics
from optclip._core.groupings import Grouping, whole
from optclip._core.measures import Measure, l2
from optclip._core.public import caller, error, naming, public
from optclip._core.types import Nonfinite, Tree
from optclip.clipping.clip_by import clip_by
from optclip.clipping.rules.values import clip_by_value


class _How(NamedTuple):
    """What is clipped, and what messages of the backward pass name."""

    by_value: bool
    measure: Measure
    grouping: Grouping
    nonfinite: Nonfinite
    axis_name: str | tuple[str, ...] | None
    name: str


@public
def clip_cotangent(
    x: Tree,
    max_norm: ArrayLike | None = None,
    *,
    max_delta: ArrayLike | None = None,
    measure: Measure = l2,
    grouping: Grouping = whole(),
    nonfinite: Nonfinite = "propagate",
    axis_name: str | tuple[str, ...] | None = None,
) -> Tree:
    """Returns x; the gradient that flows back through it is clipped.

        y = x,    x̄ = ȳ · min(1, max_norm / ‖ȳ‖)    or    x̄ = clip(ȳ, ±max_delta)

    A clip of the finished gradient comes too late for a recurrence: what exploded on
    the way back has drowned the rest. On the state within the `lax.scan` it bounds the
    gradient from each step to the one before.

    Args:
      x: an array, or a tree of them that is measured together.
      max_norm: the largest norm of the cotangent, a non-negative number, array or
        traced value in its units: those of the loss over those of x.
      max_delta: in its place, the largest magnitude of each element.
      measure: how big a cotangent is, one of `optclip.measures`.
      grouping: what is measured together, one of `optclip.groupings`:
        `per_example()` clips each index of the leading axis on its own.
      nonfinite: "propagate" makes a group with NaN or infinity NaN, "zero" makes it
        zero. By max_delta infinity goes to the bound and NaN stays.
      axis_name: the mesh axes that groups span inside `shard_map` or `pmap`, see
        `clip_by`.

    Returns:
      x. Its cotangent has the dtypes and shapes of x; integers and keys have none.

    Edge cases: a cotangent within the limit keeps its bits; limit 0 gives zeros,
    infinity the identity, and size 0 zeros. Under `vmap` each member is clipped on its
    own. A loss that is a mean over n examples has cotangents n times smaller than those
    of each example, and so are the limits that bind. In forward mode (`jax.jvp`,
    `jacfwd`) it raises JAX's TypeError: there is no cotangent.

    Raises:
      ValueError: if not one of max_norm and max_delta is given; if that is negative,
        NaN, a bool or no scalar; if a part is not of its kind; if max_delta is given
        together with measure, grouping or nonfinite.

    Reference: [Pascanu, Mikolov, Bengio 2012](https://arxiv.org/abs/1211.5063).

    >>> import jax, jax.numpy as jnp
    >>> def last_state(h, clips):
    ...     def step(h, _):
    ...         return 3.0 * (clip_cotangent(h, 1.0) if clips else h), None
    ...     return jax.lax.scan(step, h, length=10)[0]
    >>> print(jax.grad(last_state)(1.0, False), jax.grad(last_state)(1.0, True))
    59049.0 1.0
    """
    by_value = max_delta is not None
    if by_value == (max_norm is not None):
        raise error(
            "one of max_norm and max_delta must be given, got "
            f"max_norm={max_norm}, max_delta={max_delta}."
        )
    name, limit = ("max_delta", max_delta) if by_value else ("max_norm", max_norm)
    checks.non_negative(**{name: limit})
    checks.scalar(**{name: limit})
    checks.instance(Measure, measure=measure)
    checks.instance(Grouping, grouping=grouping)
    checks.choice(get_args(Nonfinite), nonfinite=nonfinite)
    parts = measure, grouping, nonfinite
    if by_value and parts != (l2, whole(), "propagate"):
        raise error(
            "max_delta must go without measure, grouping and nonfinite, got "
            f"{measure}, {grouping} and {nonfinite!r}; it bounds each element."
        )
    leaves, treedef = jax.tree_util.tree_flatten(x)
    # What has no magnitude has no cotangent and goes past: None holds its place.
    carried = [leaf if numerics.is_measured(leaf) else None for leaf in leaves]
    how = _How(by_value, *parts, axis_name, caller())
    with np.errstate(over="ignore"):  # what no float holds is infinite
        limit = jnp.asarray(limit, jnp.result_type(float))
    passed = treedef.flatten_up_to(_identity(how, treedef.unflatten(carried), limit))
    both = zip(leaves, passed, strict=True)
    return treedef.unflatten([old if new is None else new for old, new in both])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _identity(how: _How, x: Tree, limit: jax.Array) -> Tree:
    return x


def _forward(how: _How, x: Tree, limit: jax.Array) -> tuple[Tree, jax.Array]:
    return x, limit


def _backward(how: _How, limit: jax.Array, cotangent: Tree) -> tuple[Tree, jax.Array]:
    return _clipped(how, cotangent, limit), jnp.zeros_like(limit)


_identity.defvjp(_forward, _backward)


# Jitted, or every eager backward pass would lower the rare second pass anew.
@functools.partial(jax.jit, static_argnums=0)
def _clipped(how: _How, cotangent: Tree, limit: jax.Array) -> Tree:
    with naming(how.name, makes=True):
        if how.by_value:
            clip = clip_by_value(limit)
        else:
            clip = clip_by(
                limit,
                measure=how.measure,
                grouping=how.grouping,
                nonfinite=how.nonfinite,
                axis_name=how.axis_name,
            )
        return clip.update(cotangent, clip.init(cotangent))[0]
