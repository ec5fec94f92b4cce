"""A threshold's state, as it is kept and as the engine takes it: block by block.

    state ──unpacked──▶ one state a block ──threshold──▶ ... ──repacked──▶ state

For a joint grouping both are the same, arrays over the vector of groups. For groupings
within leaves every array of the kept state is a tree like the parameters, Flax's boxes
of metadata included, as Adam's moments are. A state that belongs to another rule or
another tree is refused here, before anything is computed.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from optclip._core import paths
from optclip._core.grouped import Groups
from optclip._core.public import error
from optclip._core.types import Shape, Tree
from optclip.clipping.thresholds import Observation, Threshold


def blank_state(threshold: Threshold) -> Any:
    """The shapes of a threshold's state of a single group."""
    assert threshold.init is not None
    one, step = jnp.zeros((1,), jnp.float32), jnp.zeros((), jnp.int32)
    return jax.eval_shape(threshold.init, Observation(one, step))


def packed(
    params: Tree, groups: Groups, blank: Any, states: list[Any]
) -> optax.OptState:
    """States of blocks as kept: one, or one whose every array is a tree like params."""
    if groups.joint:
        return states[0]
    flat, treedef = jax.tree_util.tree_flatten(params)

    def like_params(_: Any, *parts: jax.Array) -> Tree:
        kept: list[Any] = [()] * len(flat)
        for group, part in zip(groups.groups, parts, strict=True):
            kept[groups.places[group.members[0].index]] = part
        tree = jax.tree_util.tree_unflatten(treedef, kept)
        return jax.tree.map(_boxed, params, tree, is_leaf=paths.is_box)

    return jax.tree.map(like_params, blank, *states)


def _boxed(param: Tree, node: Tree) -> Tree:
    """What is kept of a parameter, in a box whose sharding names only axes it has."""
    kept = jax.tree_util.tree_leaves(node)
    shapes = [np.shape(leaf) for leaf in jax.tree_util.tree_leaves(param)]
    if not paths.is_box(param) or [leaf.shape for leaf in kept] == shapes:
        return node
    if len(kept) == len(shapes) == 1:
        named = functools.partial(_named, shapes[0], kept[0].shape)
        if hasattr(node, "names"):  # Linen
            return node.replace(names=named(node.names))
        if hasattr(node, "get_metadata"):  # NNX
            own = node.get_metadata()
            names = {key: named(own[key]) for key in _NNX_NAMES if own.get(key)}
            return node.replace(kept[0], **names)
    # Not measured, or a box of another library, whose sharding nobody here can read.
    return jax.tree_util.tree_structure(node).children()[0].unflatten(kept)


# The first is called like one of the last two before Flax 0.12.
_NNX_NAMES = ("out_sharding", "optimizer_sharding", "sharding", "sharding_names")


def _named(param: Shape, kept: Shape, names: Any) -> object:
    """The names of the axes that are left of a parameter; leading axes have none."""
    names = getattr(names, "sharding", names)  # a Format's layout is of all axes
    own = getattr(names, "spec", names)
    own = [*own, *[None] * (len(param) - len(own))]
    ends = zip(reversed(own), reversed(param), reversed(kept), strict=False)
    left = [name if was == now else None for name, was, now in ends][::-1]
    left = [None] * (len(kept) - len(left)) + left
    if isinstance(names, NamedSharding):
        return NamedSharding(names.mesh, PartitionSpec(*left))
    return PartitionSpec(*left) if isinstance(names, PartitionSpec) else tuple(left)


def unpacked(groups: Groups, blank: Any, state: optax.OptState) -> list[Any]:
    """The state of each block, matched by order.

    Raises:
      ValueError: if the state is another rule's, or of groups of other shapes.
    """
    treedef = jax.tree_util.tree_structure(blank)
    try:
        parts = treedef.flatten_up_to(state)
    except (ValueError, TypeError):
        raise error(
            f"state must be that of this rule, {_described(blank)}, got "
            f"{_described(state)}."
        ) from None
    blocks = zip(*map(jax.tree_util.tree_leaves, parts), strict=False)
    states = [treedef.unflatten(block) for block in blocks]
    expected = [
        [(*leaf.shape[:-1], *shape) for leaf in jax.tree_util.tree_leaves(blank)]
        for shape in groups.block_shapes()
    ]
    found = [[leaf.shape for leaf in jax.tree_util.tree_leaves(s)] for s in states]
    if treedef.num_leaves and found != expected:
        raise error(
            f"state must have the shapes of the groups of updates, {expected} in "
            f"{_kind(blank)}, got {found}."
        )
    return states if treedef.num_leaves else [state] * len(groups.block_shapes())


def repacked(old: optax.OptState, states: list[Any]) -> optax.OptState:
    """New states of blocks in the structure that the old state has."""
    by_array = zip(*map(jax.tree_util.tree_leaves, states), strict=True)
    leaves = [leaf for arrays in by_array for leaf in arrays]
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(old), leaves)


def _described(state: Any) -> str:
    shapes = [jnp.shape(leaf) for leaf in jax.tree_util.tree_leaves(state)]
    return f"{_kind(state)} of {shapes}"


def _kind(state: Any) -> str:
    return "an array" if hasattr(state, "dtype") else type(state).__name__
