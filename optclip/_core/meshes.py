"""Which mesh axes a leaf's elements are spread over, inside `shard_map` and `pmap`.

Under `jax.jit` arrays are global and nothing here acts. Inside `shard_map` a leaf's
type says over which manual axes it varies; a sum over exactly those axes is the sum
over the whole array, and a replicated leaf is counted once. `axis_name` replaces the
reading of types where they say nothing (`pmap`, `check_vma=False`) or something else
than meant (gradients before their reduction, all_gathered leaves).

Maxima need care under `jit` as well: an all-reduce of them may forget the NaN of one
device (XLA:CPU's does, and NCCL's is free to), which a sum beside them remembers.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp

from optclip._core import paths

AxisName = Any  # None, (), a name, a tuple of names, or a prefix tree of these


def varying_axes(x: Any) -> tuple[Hashable, ...]:
    """The manual mesh axes over which a value varies, by its type."""
    aval = jax.typeof(x)
    # The set moved from `vma` to `manual_axis_type.varying` after jax 0.8.
    manual = getattr(aval, "manual_axis_type", None)
    axes = manual.varying if manual is not None else getattr(aval, "vma", ())
    return tuple(sorted(axes, key=str))


def axes_of(axis_name: AxisName) -> Callable[[str], Any]:
    """path -> the axes that `axis_name` gives that leaf; None means: read its type."""
    if axis_name is None or _is_axes(axis_name):
        axes = _tuple(axis_name)
        return lambda path: axes
    lookup = paths.prefix_lookup("axis_name", axis_name, is_leaf=_is_axes)
    return lambda path: _tuple(lookup(path))


def bound(axis_name: AxisName) -> AxisName:
    """The same, or () where the names mean nothing: `init` often runs outside."""
    try:
        axis_size(tuple(jax.tree.leaves(axis_name)))
    except NameError:
        return ()
    return axis_name


def axis_size(axes: tuple[Hashable, ...]) -> int:
    """How many devices these axes span together."""
    return int(jax.lax.psum(1, axes)) if axes else 1


def anywhere(flag: jax.Array, axes: tuple[Hashable, ...]) -> jax.Array:
    """Whether a flag is set on any device along these axes."""
    return jax.lax.psum(flag.astype(jnp.int32), axes) > 0 if axes else flag


def from_all(x: jax.Array, axes: tuple[Hashable, ...]) -> jax.Array:
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


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def largest_across(x: jax.Array, axes: tuple[Hashable, ...]) -> jax.Array:
    """The maximum of non-negative numbers over mesh axes, NaN if any is NaN."""
    # As integers these have the same order, and every NaN is at the top.
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), f"int{8 * x.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(jax.lax.pmax(bits, axes), x.dtype)


@largest_across.defjvp
def _largest_across_jvp(axes: tuple[Hashable, ...], primals: Any, tangents: Any) -> Any:
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


def _tuple(axes: Any) -> tuple[Hashable, ...] | None:
    if axes is None or isinstance(axes, tuple):
        return axes
    return tuple(axes) if isinstance(axes, list) else (axes,)
