"""Resuming a run whose checkpoint was written with another chain.

Adding a clip to a chain changes the structure of its state, so that a checkpoint
written before no longer fits. `adopt_state` takes both states apart into parts, one for
each transformation, pairs the parts that fit, and fills the new structure:

    new state ──▶ its parts ─┐
                             ├──▶ pairs ──▶ the new state, filled from the old one
    old state ──▶ its nodes ─┘
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optclip._core.public import error, public
from optclip._core.types import Tree
from optclip.insight import state_parts


class Adopted(NamedTuple):
    """What `adopt_state` made of two states.

    Attributes:
      state: the new structure, with every part of the old state that fits.
      kept: paths, in the new state, of the parts taken from the old one.
      fresh: paths, in the new state, of the leaves that start fresh.
      unused: paths, in the old state, of the leaves that fit nowhere.
    """

    state: Tree
    kept: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]


@public
def adopt_state(new_state: Tree, old_state: Tree) -> Adopted:
    """Moves an optimizer state into the structure of another chain.

    For a run whose checkpoint was written without the clip, or with Optax's stateless
    one. The state of each transformation is a part, and is taken whole or not at all:
    Adam's count without its moments would make the next step three times too large. A
    part is taken if the names, shapes and dtypes of its leaves are the same, and its
    type where both states have one. Names decide which of two parts alike it is (named
    chains, partitions), then their order.

    A state cannot tell everything. What a rule learned under another `measure`, `decay`
    or percentile is taken if its arrays look the same, and so are those of a threshold
    of your own whose state has no names: leave such a clip out of `old_state` to start
    it fresh. Another `window` is noticed, as it changes a shape.

    Args:
      new_state: `tx.init(params)` of the new chain, or an `nnx.Optimizer`'s
        `opt_state`: gives the structure, and the values of what starts fresh.
      old_state: the restored state. Dicts and lists may stand where the state has
        NamedTuples and tuples, as in a checkpoint restored without a target; it may be
        `nnx.state(optimizer)`, and hold more than the optimizer state.

    Returns:
      `Adopted(state, kept, fresh, unused)`: whatever is not kept is listed. Under NNX,
      assign `state` to `optimizer.opt_state`; `optimizer.step` is not part of it.

    Raises:
      ValueError: if the old state has leaves and no part of it fits; if one of the two
        is a gradient transformation or an `nnx.Optimizer`, or new_state an `nnx.State`.

    >>> import jax.numpy as jnp, optax, optclip
    >>> params = {"w": jnp.ones(2)}
    >>> old = optax.adam(0.1)
    >>> new = optax.chain(optclip.clip_by_global_norm(1.0), optax.adam(0.1))
    >>> adopted = adopt_state(new.init(params), old.init(params))
    >>> adopted.kept, len(adopted.fresh), adopted.unused
    (('1/0',), 6, ())
    """
    for name, state in (("new_state", new_state), ("old_state", old_state)):
        _check_kind(name, state)
    new, old = state_parts.node(new_state), state_parts.node(old_state)
    pairs = state_parts.pairs(new, old)
    taken: dict[state_parts.Path, state_parts.Node] = {}
    for part, source in pairs:
        taken |= state_parts.sources(part, source)
    used = {source.path for source in taken.values()}
    unused = tuple(leaf.name for leaf in old.leaves() if leaf.path not in used)
    if unused and not taken:
        raise error(
            "old_state must share a part with new_state, got none that fits among "
            f"{', '.join(unused[:5])}."
        )
    leaves = new.leaves()
    filled = [
        jnp.asarray(taken[leaf.path].value) if leaf.path in taken else leaf.value
        for leaf in leaves
    ]
    treedef = jax.tree_util.tree_structure(new_state)
    return Adopted(
        state=jax.tree_util.tree_unflatten(treedef, filled),
        kept=tuple(name for part, _ in pairs for name in part.names),
        fresh=tuple(leaf.name for leaf in leaves if leaf.path not in taken),
        unused=unused,
    )


def _check_kind(name: str, state: Tree) -> None:
    if isinstance(state, optax.GradientTransformation):
        raise error(
            f"{name} must be a state, as tx.init(params) gives, got a gradient "
            "transformation."
        )
    kind = type(state)
    of_nnx = kind.__module__.startswith("flax.nnx")  # known without importing flax
    if of_nnx and (name == "new_state" or kind.__name__ != "State"):
        raise error(
            f"{name} must be the state of a gradient transformation, got an "
            f"nnx.{kind.__name__}; call adopt_state(optimizer.opt_state, restored) and "
            "assign what it returns as state to optimizer.opt_state."
        )
