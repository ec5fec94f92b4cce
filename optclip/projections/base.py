"""What a set is: a few small pure functions, from which every projection is made.

    extent    path, leaf, all shapes -> over which axes one point of the set extends
    measure   x, extent -> what is to be known of a point as a whole: its norm, say
    project   x, what was measured, memory -> the nearest point, in x's dtype
    contains  x, what was measured, memory -> whether each point lies in the set
    init      parameter -> memory, for a set that remembers how the parameter started

A point is a group of elements within one leaf: an element, a unit, a matrix, the leaf.
All points of a leaf are projected at once, each on its own. Measuring stands apart from
projecting because x is a sum that need not be in memory: XLA computes it once in the
loop that measures and once in the loop that writes, if nothing else joins the two.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optclip._core import groupings, meshes, paths
from optclip._core import groups as blocks
from optclip._core.groupings import Grouping
from optclip._core.public import Part, error

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Set(Part):
    """Where parameters must stay; see this module's docstring for the functions.

    Made by the functions of `optclip.sets` and used by `project`, `project_params` and
    `sets.intersection`.

    Attributes:
      extent: raises if the set does not fit the leaf.
      measure: `as_it_is` gives the extent itself, for sets that look at x only once.
      project: keeps shape and dtype; the result lies in the set as the dtype holds it.
      contains: booleans that broadcast against x.
      init: None for a set without memory; else to a vector of float32.
    """

    extent: Callable[[str, jax.Array, Mapping[str, Shape]], Any]
    measure: Callable[[jax.Array, Any], Any]
    project: Callable[[jax.Array, Any, Any], jax.Array]
    contains: Callable[[jax.Array, Any, Any], jax.Array]
    init: Callable[[jax.Array], jax.Array] | None = None

    def nearest(self, x: jax.Array, extent: Any, memory: Any = None) -> jax.Array:
        """The nearest point to an array that is in memory anyway."""
        return self.project(x, self.measure(x, extent), memory)


class Extent(NamedTuple):
    """The axes over which a point extends: of the array, and of the mesh around it."""

    axes: tuple[int, ...]
    mesh: tuple[Hashable, ...] = ()


def as_it_is(x: jax.Array, extent: Any) -> Any:
    """The measure of sets that need none."""
    return extent


def extent_of(
    grouping: Grouping, axis_name: Any = None, real: bool = False
) -> Callable[[str, jax.Array, Mapping[str, Shape]], Extent]:
    """The extent of sets whose points are the groups of a grouping within leaves.

    Raises:
      ValueError: if groups extend over several leaves.
    """
    if not grouping.keeps_state or (
        grouping.label is not None and grouping != groupings.per_leaf()
    ):
        raise error(
            "grouping must lie within leaves (per_leaf, per_unit, "
            "per_element), got one whose groups join leaves or examples."
        )
    given = meshes.axes_of(axis_name)

    def extent(path: str, leaf: jax.Array, shapes: Mapping[str, Shape]) -> Extent:
        if real:
            require_real(path, leaf)
        mesh = blocks.mesh_axes_of(grouping, paths.Leaf(path, leaf), given)
        shape = blocks.on_all_devices(jnp.shape(leaf), mesh)
        axes = tuple(range(len(shape)))
        if grouping.axes is not None:
            axes = grouping.axes(path, shape, shapes)
        return Extent(axes, mesh)

    return extent


def require_whole(path: str, leaf: jax.Array) -> None:
    """Raises if the leaf is in parts, of a set whose points no sum can join."""
    varying = meshes.varying_axes(leaf)
    if varying:
        raise error(
            f"parameters must be whole on each device, got {path!r}, which "
            f"varies over {varying}; project outside shard_map."
        )


def gathered(
    x: jax.Array, *sides: tuple[int, ...]
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """x with the axes of each side as one trailing axis, and the way back."""
    inner = [axis for side in sides for axis in side]
    rest = [axis for axis in range(x.ndim) if axis not in inner]
    order = rest + inner
    moved = jnp.transpose(x, order)
    ends = [math.prod(x.shape[axis] for axis in side) for side in sides]

    def back(y: jax.Array) -> jax.Array:
        places = sorted(range(x.ndim), key=order.__getitem__)
        return jnp.transpose(y.reshape(moved.shape), places)

    return moved.reshape(*moved.shape[: len(rest)], *ends), back


def require_real(path: str, leaf: jax.Array) -> None:
    """Raises if the leaf is complex, of which no number is larger than another."""
    if jnp.iscomplexobj(leaf):
        raise error(f"parameters must be real, got complex ones at {path!r}.")
