"""Rounding to the numbers that a leaf's dtype holds: to nearest, up, down, inward."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optclip._core import numerics


def rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """Real numbers of x's dtype that a narrower one holds too; finite stays finite.

    Compilers may skip a cast to half precision that is followed by one back. They may
    not skip `reduce_precision`, which takes subnormal numbers for zero: XLA flushes
    those of float32 and bfloat16 as well, but float16 widened keeps its own.
    """
    info = jnp.finfo(dtype)
    if info.bits >= jnp.finfo(x.dtype).bits:
        return x
    if info.nexp >= 8:  # as float32, so that only its last few numbers overflow
        return jax.lax.reduce_precision(x, info.nexp, info.nmant)
    x = jnp.where(jnp.isinf(x), x, jnp.clip(x, float(info.min), float(info.max)))
    spacing = float(info.smallest_subnormal)
    subnormal = jnp.round(x / spacing) * spacing
    normal = jax.lax.reduce_precision(x, info.nexp, info.nmant)
    return jnp.where(jnp.abs(x) < float(info.smallest_normal), subnormal, normal)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def neighbour(x: jax.Array, dtype: Any, upward: jax.Array) -> jax.Array:
    """The next number up or down that a dtype holds, which holds x too; x is finite.

    Of float32 and bfloat16 the neighbour of zero is a normal number, as others would be
    flushed. Its derivative is that of x: the step is one of rounding.
    """
    own, info = jnp.finfo(x.dtype), jnp.finfo(dtype)
    integers = f"int{own.bits}"
    one = jnp.asarray(1 << max(own.nmant - info.nmant, 0), integers)
    bits = jax.lax.bitcast_convert_type(x, integers)
    bits = bits + jnp.where((x > 0) == upward, one, -one)
    stepped = jax.lax.bitcast_convert_type(bits, x.dtype)
    edge = float(info.smallest_normal)
    step = jnp.asarray(edge if info.nexp >= 8 else info.smallest_subnormal, x.dtype)
    return jnp.where(jnp.abs(x) <= edge, x + jnp.where(upward, step, -step), stepped)


@neighbour.defjvp
def _neighbour_jvp(dtype: Any, primals: Any, tangents: Any) -> Any:
    return neighbour(primals[0], dtype, primals[1]), tangents[0]


def rounded_towards(x: jax.Array, dtype: Any, upward: jax.Array) -> jax.Array:
    """As `rounded`, but up or down."""
    nearest = rounded(x, dtype)
    missed = jnp.where(upward, nearest < x, nearest > x)
    return jnp.where(missed, neighbour(nearest, dtype, upward), nearest)


def bound_towards(bound: Any, dtype: Any, toward: float) -> jax.Array:
    """A bound in a real dtype, rounded towards a number that lies on its inner side.

    A Python number is a float64: 0.1 lies below its nearest float32.
    """
    if isinstance(bound, jax.Array):
        wide = numerics.wide_dtype(dtype)
        if jnp.issubdtype(bound.dtype, jnp.floating):
            wide = np.promote_types(wide, bound.dtype)
        bound = bound.astype(wide)
        return rounded_towards(bound, dtype, toward > bound).astype(dtype)
    exact = np.asarray(bound, np.float64)
    with np.errstate(over="ignore"):
        nearest = exact.astype(dtype)
    back = nearest.astype(np.float64)
    missed = np.where(toward > exact, back < exact, back > exact) & (toward != exact)
    stepped = np.nextafter(nearest, np.asarray(toward, dtype))
    return jnp.asarray(np.where(missed, stepped, nearest))
