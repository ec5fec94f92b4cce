"""What a set is: a few small pure functions, from which every projection is made.

    extent    path, leaf, all shapes -> over which axes one point of the set extends
    measure   a sum, extent -> what is to be known of a point as a whole: its norm, say
    project   x, what was measured, memory -> the nearest point, in x's dtype
    contains  x, what was measured, memory -> whether each point lies in the set
    init      parameter, extent -> memory, for a set that remembers the start

A point is a group of elements within one leaf: an element, a unit, a matrix, the leaf.
All points of a leaf are projected at once, each on its own. `project` calls `extent`,
`measure` and `project`, in this order, for every leaf.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from optclip._core import checks, groupings, groups, meshes, paths
from optclip._core.groupings import Grouping
from optclip._core.public import Part, caller, error, naming
from optclip._core.types import AxisName, Shapes

T = TypeVar("T")
ExtentOf = Callable[[str, jax.Array, Shapes], "Extent"]


@dataclasses.dataclass
class Sum:
    """The sum of a parameter and its update, which need not be in memory.

    XLA computes it once in the loop that measures and once in the loop that writes, if
    nothing joins the two; so each call of `value` computes it anew.

    Attributes:
      terms: its arrays. What measures it may replace the last one by an equal one that
        lies in memory: what projects then reads that.
    """

    terms: tuple[jax.Array, ...]

    def value(self, *after: jax.Array) -> jax.Array:
        """The sum, in the widest dtype of its terms and float32.

        A second one, `after` what a first was reduced to, shares no copy with it.
        """
        terms, _ = jax.lax.optimization_barrier((self.terms, after))
        # NumPy's promotion: JAX's strict one would refuse.
        dtypes = [np.dtype(np.float32), *(term.dtype for term in terms)]
        wide = functools.reduce(np.promote_types, dtypes)
        return functools.reduce(jnp.add, [term.astype(wide) for term in terms])


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Set(Part):
    """Where parameters must stay: what the functions of `optclip.sets` return.

    A set of your own is made of the same functions. It is used by `project`,
    `project_params` and `sets.intersection`.

    Attributes:
      extent: (path, leaf, shapes of all leaves by path) to whatever `measure` needs;
        raises if the set does not fit the leaf.
      measure: (sum, extent) to whatever `project` and `contains` need. `sum.value()` is
        the array; sets that look at it only once return the extent.
      project: (x, measured, memory) to the nearest point, of x's shape and dtype, which
        lies in the set as the dtype holds it.
      contains: (x, measured, memory) to booleans that broadcast against x.
      init: None for a set without memory; else (parameter, extent) to what it remembers
        of the start: a vector, or an array of the parameter's rank, which may be
        sharded as the parameter is.

    >>> import jax.numpy as jnp, optclip
    >>> signs = optclip.sets.Set(
    ...     extent=lambda path, leaf, shapes: None,
    ...     measure=lambda total, extent: extent,
    ...     project=lambda x, measured, memory: jnp.where(x < 0, -1.0, 1.0),
    ...     contains=lambda x, measured, memory: jnp.abs(x) == 1,
    ... )
    >>> print(optclip.project_params(jnp.array([0.3, -2.0]), signs))
    [ 1. -1.]
    """

    extent: Callable[[str, jax.Array, Shapes], Any]
    measure: Callable[[Sum, Any], Any]
    project: Callable[[jax.Array, Any, Any], jax.Array]
    contains: Callable[[jax.Array, Any, Any], jax.Array]
    init: Callable[[jax.Array, Any], jax.Array] | None = None

    def __post_init__(self) -> None:
        # `extent` runs inside `project`, but its errors name who made the set.
        object.__setattr__(self, "extent", naming(caller())(self.extent))

    def nearest(
        self, x: jax.Array, extent: object, memory: jax.Array | None = None
    ) -> jax.Array:
        """The nearest point to an array that is in memory anyway."""
        total = Sum((x,))
        measured = self.measure(total, extent)
        return self.project(total.terms[-1], measured, memory)

    def holds(
        self, x: jax.Array, extent: object, memory: jax.Array | None = None
    ) -> jax.Array:
        """Whether the points of such an array lie in the set."""
        return self.contains(x, self.measure(Sum((x,)), extent), memory)

    def remembered(self, leaf: jax.Array, extent: object) -> jax.Array | None:
        """What it remembers of a leaf at the start; NaN of an abstract one."""
        if self.init is None or not isinstance(leaf, jax.ShapeDtypeStruct):
            return None if self.init is None else self.init(leaf, extent)
        kept = self.memory_like(leaf, extent)
        return jnp.full(kept.shape, jnp.nan, kept.dtype)

    def memory_like(self, leaf: jax.Array, extent: object) -> jax.ShapeDtypeStruct:
        """The shape and dtype of that."""
        assert self.init is not None
        init = self.init
        return jax.eval_shape(lambda leaf: init(leaf, extent), leaf)


class Extent(NamedTuple):
    """The axes over which a point extends: of the array, and of the mesh around it."""

    axes: tuple[int, ...]
    mesh: tuple[Hashable, ...] = ()


def as_it_is(total: Sum, extent: T) -> T:
    """The measure of sets that need none."""
    return extent


def joined(memories: list[jax.Array]) -> jax.Array:
    """What is remembered as one vector, in a dtype that holds all of it."""
    wide = np.result_type(*(memory.dtype for memory in memories))
    return jnp.concatenate([memory.reshape(-1).astype(wide) for memory in memories])


def extent_of(grouping: Grouping, axis_name: AxisName = None) -> ExtentOf:
    """The extent of sets whose points are the groups of a grouping within leaves.

    Raises:
      ValueError: if grouping is none, or its groups extend over several leaves.
    """
    checks.instance(Grouping, grouping=grouping)
    if grouping.label not in (None, groupings.by_number):
        raise error(
            "grouping must lie within leaves (per_leaf, per_unit, "
            "per_element), got one whose groups join leaves or examples."
        )
    given = meshes.axes_of(axis_name)

    def extent(path: str, leaf: jax.Array, shapes: Shapes) -> Extent:
        mesh = groups.mesh_axes_of(grouping, paths.Leaf(path, leaf), given)
        shape = leaf.shape  # at `init` outside of `pmap`, names mean nothing yet
        if meshes.bound(mesh):
            shape = groups.on_all_devices(shape, mesh)
        if grouping.axes is None:
            return Extent(tuple(range(len(shape))), mesh)
        return Extent(grouping.axes(path, shape, shapes), mesh)

    return extent


def require_whole(path: str, leaf: jax.Array) -> None:
    """Raises if the leaf is in parts, of a set whose points no sum can join."""
    varying = meshes.varying_axes(leaf)
    if varying:
        raise error(
            f"parameters must be whole on each device, got {path!r}, which "
            f"varies over {varying}; project outside shard_map."
        )


def not_real(path: str) -> ValueError:
    """What is wrong with a complex leaf: of its numbers none is larger than another."""
    return error(f"parameters must be real, got complex ones at {path!r}.")


def is_complex(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.complexfloating)


def trailing(
    x: jax.Array, *sides: tuple[int, ...]
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """x with the axes of each side as one trailing axis, and what undoes it.

    The trailing axes are whole on each device, as sorts and factorisations need them.
    """
    inner = [axis for side in sides for axis in side]
    rest = [axis for axis in range(x.ndim) if axis not in inner]
    order = rest + inner
    placed, sent_back = _whole_along(x, inner)
    moved = jnp.transpose(placed, order)
    ends = [math.prod(x.shape[axis] for axis in side) for side in sides]

    def undo(y: jax.Array) -> jax.Array:
        inverse = sorted(range(x.ndim), key=order.__getitem__)
        return sent_back(jnp.transpose(y.reshape(moved.shape), inverse))

    return moved.reshape(*moved.shape[: len(rest)], *ends), undo


def _whole_along(
    x: jax.Array, inner: list[int]
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """x with the inner axes whole on each device, and what sends it back.

    Only Explicit mesh axes act here: with Auto ones a type says nothing, and XLA moves
    what it must. A mesh axis that splits an inner axis comes to split the first other
    axis whose size allows it, so that devices share the points; else it splits none.
    """
    sharding: Any = jax.typeof(x).sharding
    split = [meshes.as_tuple(part) or () for part in sharding.spec]
    places = [sharding]
    for axis in inner:
        for name in reversed(split[axis]):
            split[axis] = split[axis][:-1]
            for other in sorted({*range(x.ndim)} - {*inner}):
                names = (*split[other], name)
                if x.shape[other] % math.prod(map(sharding.mesh.shape.get, names)) == 0:
                    split[other] = names
                    break
            places.append(NamedSharding(sharding.mesh, PartitionSpec(*split)))

    # One mesh axis at a time, which is one all-to-all; XLA gathers if two move at once.
    def send(y: jax.Array, there: list[NamedSharding]) -> jax.Array:
        return functools.reduce(jax.sharding.reshard, there, y)

    return send(x, places[1:]), lambda y: send(y, places[-2::-1])


def bound_array(
    check: Callable[..., None] = checks.real, **named: ArrayLike
) -> np.ndarray | jax.Array:
    """One number or array as floats that can be negated, compared and rounded.

    JAX's arrays are not checked: one that may not be negative counts as 0 if it is.

    Raises:
      ValueError: if `check` refuses it, or it is an integer that no float can hold.
    """
    ((name, value),) = named.items()
    if isinstance(value, int) and value.bit_length() > 63:
        try:
            value = float(value)
        except OverflowError:
            raise error(
                f"{name} must be a number that a float can hold, got an integer of "
                f"{value.bit_length()} bits."
            ) from None
    if isinstance(value, jax.Array):
        check(**{name: value})
        floating = jnp.issubdtype(value.dtype, jnp.floating)
        own = value.dtype if floating else jax.dtypes.canonicalize_dtype(np.float64)
        value = value.astype(np.promote_types(own, np.float32))
        signed = check not in (checks.non_negative, checks.positive)
        return value if signed else jnp.maximum(value, 0)
    if isinstance(value, (np.ndarray, np.generic)):
        if jnp.issubdtype(value.dtype, jnp.floating):  # also types that NumPy lacks
            value = np.asarray(value, np.float64)
    check(**{name: value})
    return np.asarray(value, np.float64)
