"""`project_params`: parameters that are projected at once, outside of a chain."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from optclip._core.public import error, public
from optclip._core.types import Tree, Where
from optclip.projections.project import (
    Constraint,
    chosen_by,
    members,
    sets_by_path,
)


@public
def project_params(
    params: Tree,
    constraint: Constraint,
    where: Where | None = None,
    *,
    strict: bool = False,
) -> Tree:
    """The nearest parameters in a set: for the start, or after `apply_updates`.

        p ← P(p)

    After `apply_updates`, in the same `jit`: boxes join the optimizer's pass over
    memory, sets of norms read the parameters twice and write over them; neither keeps a
    temporary copy. A Linen `TrainState` and an `nnx.Optimizer` apply updates on their
    own: project their parameters behind that, or put `project` in the chain.

    Args:
      params: a tree (dicts, FrozenDict, `nnx.State`, an Equinox module, …), of which a
        new one is returned; or an `nnx.Module`, whose parameters are changed in place.
      constraint: one of `optclip.sets`, or a tree of them that may be a prefix of the
        parameters.
      where: which leaves: a regular expression searched in the "/"-joined path, a
        predicate `(path, leaf) -> bool`, or a tree of booleans that may be a prefix of
        the parameters; None for all.
      strict: True raises where a parameter lies outside of its set, instead of moving
        it. After a step this says whether `project` was the last of its chain: if it
        was not, parameters have left the set. It reads values, so not inside `jit`.

    Returns:
      The tree with its dtypes and structure, or the same module. Leaves outside
      `where`, None, integers and keys are as they were.

    Edge cases: NaN stays NaN, for its whole group if the set has groups; infinity goes
    to a bound, and makes a group NaN.

    Raises:
      ValueError: if constraint is no set, does not fit a leaf, or `where` selects
        nothing in a tree that has leaves; with strict, if a parameter lies outside.

    >>> import jax.numpy as jnp, optclip
    >>> print(project_params({"w": jnp.array([-1.0, 3.0])}, optclip.sets.box(0.0, 2.0)))
    {'w': Array([0., 2.], dtype=float32)}
    """
    set_of = sets_by_path(constraint)
    if _is_nnx_module(params):
        from flax import nnx

        held = nnx.state(params, nnx.Param)
        nnx.update(params, project_params(held, constraint, where, strict=strict))
        return params
    flat, treedef = jax.tree_util.tree_flatten(params)
    for member in members(params, set_of, chosen_by(where)):
        memory = member.set.remembered(member.leaf, member.extent)
        if strict and not jnp.all(member.set.holds(member.leaf, member.extent, memory)):
            raise error(
                f"params must lie in their set, got {member.path!r} outside of "
                f"{member.set!r}. If it left at a step, project was not the last "
                "transform of its chain, and what followed changed its updates."
            )
        flat[member.index] = member.set.nearest(member.leaf, member.extent, memory)
    return jax.tree_util.tree_unflatten(treedef, flat)


def _is_nnx_module(params: Tree) -> bool:
    # Avoids importing flax: an nnx.Module implies that it is loaded.
    return any(
        base.__module__.startswith("flax.nnx") and base.__name__ == "Module"
        for base in type(params).__mro__
    )
