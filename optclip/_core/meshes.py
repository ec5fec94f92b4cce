"""Which mesh axes a leaf's elements are spread over, inside `shard_map` and `pmap`.

Under `jax.jit` arrays are global and nothing here acts. Inside `shard_map` a leaf's
type says over which manual axes it varies; a sum over exactly those axes is the sum
over the whole array, and a replicated leaf is counted once. `axis_name` replaces the
reading of types where they say nothing (`pmap`, `check_vma=False`) or something else
than meant (gradients before their reduction, all_gathered leaves).

Two things need care under `jit` as well. An all-reduce of maxima may forget the NaN of
one device (XLA:CPU's does, and NCCL's is free to); of integers in the same order it
does not. And XLA:CPU needs one reduction of several arrays to read them once, but where
XLA splits them over devices it gathers them whole for that; `is_split` says where.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from optclip._core import paths
from optclip._core.public import caller, error
from optclip._core.types import Arrays, AxisName


class HasPath(Protocol):
    """Anything with the path of a leaf."""

    @property
    def path(self) -> str: ...


MeshAxes = tuple[Hashable, ...]
AxesOf = Callable[[HasPath], MeshAxes | None]


def varying_axes(x: Any) -> MeshAxes:
    """The manual mesh axes over which a value varies, by its type."""
    aval = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    # The set moved from `vma` to `manual_axis_type.varying` after jax 0.9.
    manual = getattr(aval, "manual_axis_type", None)
    axes = manual.varying if manual is not None else getattr(aval, "vma", None) or ()
    return tuple(sorted(axes, key=str))


def warn_where_types_say_nothing() -> None:
    """Warns inside `pmap` and `shard_map(check_vma=False)`: every shard seems whole."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in mesh.manual_axes if mesh.shape[axis] > 1)
    if axes and not varying_axes(jax.lax.axis_index(axes)):
        warnings.warn(
            f"{caller()}: axis_name must say over which of the mesh axes {axes} groups "
            "extend, got None under pmap or check_vma=False, where no type does; () "
            "means that they are whole on each device, as gradients after pmean are.",
            stacklevel=2,
        )


def axes_of(axis_name: AxisName) -> AxesOf:
    """Leaf -> the axes that `axis_name` gives it; None means: read its type."""
    if axis_name is None or _is_axes(axis_name):
        axes = as_tuple(axis_name)
        return lambda leaf: axes
    lookup = paths.prefix_lookup("axis_name", axis_name, is_leaf=_is_axes)
    return lambda leaf: as_tuple(lookup(leaf.path))


def bound(axis_name: AxisName | MeshAxes) -> bool:
    """Whether the names mean something here: `init` often runs outside."""
    try:
        axis_size(tuple(jax.tree_util.tree_leaves(axis_name)))
    except ValueError:
        return False
    return True


def axis_size(axes: MeshAxes) -> int:
    """How many devices these axes span together."""
    if not axes:
        return 1
    try:
        return int(jax.lax.psum(1, axes))
    except NameError:
        raise error(
            f"axis_name must name axes of the shard_map or pmap around the update, got "
            f"{', '.join(map(repr, axes))}."
        ) from None


def is_split(x: jax.Array) -> bool:
    """Whether XLA may split a value: it knows of a mesh with axes that are not manual.

    False under `jit(in_shardings=...)` of arrays that lie on one device, in no mesh's
    scope: there the mesh is not known before XLA has the program.
    """
    mesh = jax.typeof(x).sharding.mesh
    automatic = set(mesh.axis_names).difference(mesh.manual_axes)
    return any(mesh.shape[axis] > 1 for axis in automatic)


def any_of_both(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether any flag is set in a, and whether any is in b, in one read.

    One array of comparisons by itself XLA:CPU writes to memory first, and then reduces
    it in three kernels; two that are reduced together it makes on the way, in one.
    """
    if is_split(a):
        return jnp.any(a), jnp.any(b)
    return tuple(
        jax.lax.reduce(
            (a, b),
            (False, False),
            lambda x, y: (x[0] | y[0], x[1] | y[1]),
            tuple(range(a.ndim)),
        )
    )


def anywhere(flag: jax.Array, axes: MeshAxes) -> jax.Array:
    """Whether a flag is set on any device along these axes."""
    return jax.lax.psum(flag.astype(jnp.int32), axes) > 0 if axes else flag


def from_all(x: jax.Array, axes: MeshAxes) -> jax.Array:
    """The values of all devices along a new leading axis, the same on each of them.

    A sum in which each device fills its own row, because an all_gather's type says that
    its result varies.
    """
    places = jnp.arange(axis_size(axes)).reshape(-1, *[1] * x.ndim)
    own = places == jax.lax.axis_index(axes)
    return jax.lax.psum(jnp.where(own, x[None], jnp.zeros_like(x)[None]), axes)


def remembering(largest: jax.Array, total: jax.Array) -> jax.Array:
    """A maximum, or NaN where the total of the same numbers' squares is NaN."""
    return jnp.where(jnp.isnan(total), jnp.nan, largest)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def largest(
    x: jax.Array, axis: tuple[int, ...] | None = None, keepdims: bool = False
) -> jax.Array:
    """The maximum, NaN if any is NaN: as `jnp.max`, wherever the array lies."""
    return _from_ordered(jnp.max(_ordered(x), axis, keepdims=keepdims), x.dtype)


@largest.defjvp
def _largest_jvp(
    axis: tuple[int, ...] | None, keepdims: bool, primals: Arrays, tangents: Arrays
) -> tuple[jax.Array, jax.Array]:
    def maximum(x: jax.Array) -> jax.Array:
        return jnp.max(x, axis, keepdims=keepdims)

    return largest(*primals, axis, keepdims), jax.jvp(maximum, primals, tangents)[1]


def _ordered(x: jax.Array) -> jax.Array:
    """Numbers as integers of the same order, every NaN at the top."""
    bits = jax.lax.bitcast_convert_type(
        jnp.where(jnp.isnan(x), jnp.nan, x), f"int{8 * x.dtype.itemsize}"
    )
    return jnp.where(bits < 0, bits ^ jnp.iinfo(bits.dtype).max, bits)


def _from_ordered(bits: jax.Array, dtype: np.dtype) -> jax.Array:
    bits = jnp.where(bits < 0, bits ^ jnp.iinfo(bits.dtype).max, bits)
    return jax.lax.bitcast_convert_type(bits, dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def largest_across(x: jax.Array, axes: MeshAxes) -> jax.Array:
    """The maximum over mesh axes, NaN if any is NaN."""
    return _from_ordered(jax.lax.pmax(_ordered(x), axes), x.dtype)


@largest_across.defjvp
def _largest_across_jvp(
    axes: MeshAxes, primals: Arrays, tangents: Arrays
) -> tuple[jax.Array, jax.Array]:
    # JAX has no derivative of pmax. Devices that share the maximum share its tangent.
    (x,), (d_x,) = primals, tangents
    top = largest_across(x, axes)
    shared = x == top
    d_sum = jax.lax.psum(jnp.where(shared, d_x, 0), axes)
    return top, d_sum / jnp.maximum(jax.lax.psum(shared.astype(x.dtype), axes), 1)


def _is_axes(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(isinstance(name, str) for name in value)
    return value is None or isinstance(value, str)


def as_tuple(axes: AxisName) -> MeshAxes | None:
    if axes is None or isinstance(axes, tuple):
        return axes
    return (axes,) if isinstance(axes, str) else tuple(axes)
