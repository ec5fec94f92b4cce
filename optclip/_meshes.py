"""Which mesh axes a leaf's elements are spread over, inside `shard_map` and `pmap`.

Under `jax.jit` arrays are global and nothing here acts. Inside `shard_map` a leaf's
type says over which manual axes it varies; a sum over exactly those axes is the sum
over the whole array, and a replicated leaf is counted once. `axis_name` replaces the
reading of types where they say nothing (`pmap`, `check_vma=False`) or something else
than meant (gradients before their reduction, all_gathered leaves).

Maxima are taken here too, under `jit` as well: XLA's all-reduce of floats forgets a NaN
that another device holds (its CPU and NCCL's maximum return the other number).
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp

from optclip import _paths

AxisName = Any  # None, (), a name, a tuple of names, or a prefix tree of these


def varying_axes(x: Any) -> tuple[Hashable, ...]:
    """The manual mesh axes over which a value varies, by its type."""
    aval = jax.typeof(x)
    # The set moved from `vma` to `manual_axis_type.varying` after jax 0.8.
    manual = getattr(aval, "manual_axis_type", None)
    axes = manual.varying if manual is not None else getattr(aval, "vma", ())
    return tuple(sorted(axes, key=str))


def axes_of(rule: str, axis_name: AxisName) -> Callable[[str], Any]:
    """path -> the axes that `axis_name` gives that leaf; None means: read its type."""
    if axis_name is None or _is_axes(axis_name):
        axes = _tuple(axis_name)
        return lambda path: axes
    lookup = _paths.prefix_lookup(rule, "axis_name", axis_name, is_leaf=_is_axes)
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


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def largest(
    x: jax.Array, axis: tuple[int, ...] | None = None, keepdims: bool = False
) -> jax.Array:
    """The maximum of non-negative numbers in one array, NaN if any is NaN."""
    return _from_bits(jnp.max(_bits(x), axis=axis, keepdims=keepdims), x.dtype)


@largest.defjvp
def _largest_jvp(axis: Any, keepdims: bool, primals: Any, tangents: Any) -> Any:
    (x,), (d_x,) = primals, tangents
    top = largest(x, axis, keepdims)
    shared = x == largest(x, axis, True)
    d_top = jnp.sum(jnp.where(shared, d_x, 0), axis=axis, keepdims=keepdims)
    return top, d_top / jnp.maximum(_number(shared, d_x, axis, keepdims), 1)


def _number(flags: jax.Array, like: jax.Array, axis: Any, keepdims: bool) -> jax.Array:
    return jnp.sum(flags, axis=axis, keepdims=keepdims, dtype=like.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def largest_across(x: jax.Array, axes: tuple[Hashable, ...]) -> jax.Array:
    """The maximum of non-negative numbers over mesh axes, NaN if any is NaN."""
    return _from_bits(jax.lax.pmax(_bits(x), axes), x.dtype)


@largest_across.defjvp
def _largest_across_jvp(axes: tuple[Hashable, ...], primals: Any, tangents: Any) -> Any:
    (x,), (d_x,) = primals, tangents
    top = largest_across(x, axes)
    shared = x == top
    d_top = jax.lax.psum(jnp.where(shared, d_x, 0), axes)
    return top, d_top / jnp.maximum(jax.lax.psum(shared.astype(d_x.dtype), axes), 1)


def _bits(x: jax.Array) -> jax.Array:
    """Integers in the order of non-negative floats, with every NaN at the top."""
    kind = jnp.dtype(f"int{8 * x.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(jnp.abs(x), kind)  # abs: NaN has a sign too


def _from_bits(bits: jax.Array, dtype: Any) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, dtype)


def _is_axes(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(isinstance(name, str) for name in value)
    return value is None or isinstance(value, str)


def _tuple(axes: Any) -> tuple[Hashable, ...] | None:
    if axes is None or isinstance(axes, tuple):
        return axes
    return tuple(axes) if isinstance(axes, list) else (axes,)
