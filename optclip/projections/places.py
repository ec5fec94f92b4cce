"""Which leaves are projected, on which set: found by their paths.

Paths are the same in the updates, the parameters and the constraint, so that trees
which name their leaves differently at `init` and `update` are the same here.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optclip._core import layouts, numerics, paths
from optclip._core.groupings import Shape
from optclip._core.public import error
from optclip.projections.base import Set

Chosen = Callable[[str, Any, Mapping[str, Shape]], bool]
WEIGHTS = ("kernel", "embedding", "w")


class Place(NamedTuple):
    """A leaf that is projected: where it is in the tree, on what, over which axes."""

    index: int
    path: str
    leaf: jax.Array
    set: Set
    extent: Any


def places(params: Any, set_of: Callable[[str], Set], chosen: Chosen) -> list[Place]:
    leaves = [
        (index, path, jnp.asarray(value))
        for index, (path, value) in enumerate(paths.leaves(params))
        if numerics.is_measured(value)
    ]
    shapes = {path: leaf.shape for _, path, leaf in leaves}
    kept = [entry for entry in leaves if chosen(*entry[1:], shapes)]
    if leaves and not kept:
        listed = paths.some(list(shapes))
        raise error(f"where must select a leaf, got none of {listed}.")
    found = []
    for index, path, leaf in kept:
        own = set_of(path)
        found.append(Place(index, path, leaf, own, own.extent(path, leaf, shapes)))
    return found


def sets_by_path(constraint: Any) -> Callable[[str], Set]:
    """The set of each path."""
    if isinstance(constraint, Set):
        return lambda path: constraint
    leaves = jax.tree_util.tree_leaves(constraint, is_leaf=_is_set)
    if not leaves or isinstance(constraint, tuple) or not all(map(_is_set, leaves)):
        raise error(
            f"constraint must be a Set of optclip or a tree of them, got "
            f"{constraint!r}."
        )
    return paths.prefix_lookup("constraint", constraint, is_leaf=_is_set)


def remembers(constraint: Any) -> bool:
    leaves = jax.tree_util.tree_leaves(constraint, is_leaf=_is_set)
    return any(leaf.init is not None for leaf in leaves)


def _is_set(value: Any) -> bool:
    return isinstance(value, Set)


def chosen_by(where: Any) -> Chosen:
    if where is None:
        return lambda path, leaf, shapes: True
    selects = paths.selector(where)
    return lambda path, leaf, shapes: selects(path, leaf)


def is_weight(path: str, leaf: jax.Array, shapes: Mapping[str, Shape]) -> bool:
    """Whether a leaf is a kernel or embedding: it has outputs, or such a name."""
    name = path.rpartition("/")[2]
    return name in WEIGHTS or bool(layouts.layout(path, shapes).outputs)
