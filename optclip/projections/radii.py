"""How large the points of a set may be: a number, one number a point, or a tree.

    radius=1.0                          every point of every leaf
    radius=jnp.array([1.0, 2.0])        one number a group: a unit, a layer, an expert
    radius={"encoder": 1.0, "head": …}  leaf by leaf, each of the above

A set asks for the size once it knows a leaf and the axes over which a point extends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

from optclip._core import numerics, paths
from optclip._core.public import error
from optclip._core.rounding import bound_towards
from optclip._core.types import Radius, Shape, Shapes
from optclip.projections.base import bound_array


class Sized(NamedTuple):
    """An extent, and how large its points may be: one number, or one a point."""

    extent: Any
    size: float | jax.Array

    def bound(self, dtype: DTypeLike, rank: int) -> jax.Array:
        """The size in a dtype, rounded towards zero, with this many axes."""
        bound = bound_towards(self.size, dtype, 0.0)
        return bound.reshape((1,) * (rank - bound.ndim) + bound.shape)


def sized(
    found: Callable[[str, jax.Array, Shapes], Any],
    check: Callable[..., None],
    **named: Radius,
) -> Callable[[str, jax.Array, Shapes], Sized]:
    """The extents of a set, each with the size of its points.

    That is one number, a static one exactly, or an array of the leaf's rank in the
    dtype of its norms, rounded towards zero.

    Args:
      found: the extents, which have `axes`.
      check: raises for numbers that are none.
      **named: the size, by its name in messages.

    Raises:
      ValueError: if `check` refuses a number; for a leaf, if a tree has none for it, or
        an array does not fit its points.
    """
    lookup = by_path(check, **named)
    (name,) = named

    def extent(path: str, leaf: jax.Array, shapes: Shapes) -> Sized:
        own, bound = found(path, leaf, shapes), lookup(path)
        if bound.ndim == 0:
            return Sized(own, float(bound) if isinstance(bound, np.ndarray) else bound)
        places = list(enumerate(leaf.shape))
        points = tuple(1 if n in own.axes else size for n, size in places)
        if bound.shape == tuple(size for n, size in places if n not in own.axes):
            bound = bound.reshape(points)
        if not broadcasts(bound.shape, points):
            raise error(
                f"{name} must have one number a group, got shape {bound.shape} for "
                f"{path!r}, whose groups have shape {points}."
            )
        bound = bound.reshape((1,) * (leaf.ndim - bound.ndim) + bound.shape)
        wide = numerics.accumulation_dtype(leaf.dtype)
        return Sized(own, bound_towards(bound, wide, 0.0))

    return extent


def by_path(
    check: Callable[..., None], **named: Radius
) -> Callable[[str], np.ndarray | jax.Array]:
    """The number, or array, of each leaf: one for all, or those of a tree."""
    ((name, value),) = named.items()
    none = {"is_leaf": lambda x: x is None}  # which is no number, and refused
    bounds = [
        bound_array(check, **{f"{name} at {'/'.join(place)!r}" if place else name: own})
        for place, own in paths.prefixes(value, **none)
    ]
    tree = jax.tree_util.tree_structure(value, **none).unflatten(bounds)
    return paths.prefix_lookup(name, tree)


def broadcasts(shape: Shape, against: Shape) -> bool:
    """Whether an array does, without making the other one larger."""
    own = (1,) * (len(against) - len(shape)) + shape
    pairs = zip(own, against, strict=False)
    return len(own) == len(against) and all(n in (1, size) for n, size in pairs)
