"""Rounding to the numbers that a leaf's dtype holds: to nearest, up, down, inward.

What lands parameters in a set stands on it, and every bound that is compared with an
array. "Inward" means that a bound which the dtype cannot hold becomes the next number
on its inner side: 0.01 is 0.009949 in bfloat16, whose nearest number is 0.01001.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from optclip._core import numerics


def rounded(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Real numbers in a dtype that may be narrower; finite stays finite.

    Compilers may skip a cast to half precision that is followed by one back. They may
    not skip one of integers, or `reduce_precision`, which takes subnormal numbers for
    zero: XLA flushes those of float32 as well, but float16 widened keeps its own.
    """
    info = jnp.finfo(dtype)
    if info.bits >= jnp.finfo(x.dtype).bits:
        return x
    if x.dtype == jnp.float32 and dtype == jnp.bfloat16:
        return numerics.narrow(x, dtype)
    if info.nexp >= 8:  # as float32, so that only its last few numbers overflow
        return jax.lax.reduce_precision(x, info.nexp, info.nmant).astype(dtype)
    top = float(info.max)
    x = jnp.where(jnp.isinf(x), x, jnp.clip(x, -top, top))
    spacing = float(info.smallest_subnormal)
    subnormal = jnp.round(x / spacing) * spacing
    # One exponent more, because types without infinity use the last one for numbers.
    normal = jax.lax.reduce_precision(x, info.nexp + 1, info.nmant)
    found = jnp.where(jnp.abs(x) < float(info.smallest_normal), subnormal, normal)
    return found.astype(dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def neighbour(x: jax.Array, dtype: DTypeLike, upward: jax.Array) -> jax.Array:
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
    if info.nexp >= 8:  # subnormal numbers are zero
        return jnp.where(x == 0, jnp.where(upward, edge, -edge), stepped)
    step = jnp.asarray(info.smallest_subnormal, x.dtype)
    return jnp.where(jnp.abs(x) <= edge, x + jnp.where(upward, step, -step), stepped)


@neighbour.defjvp
def _neighbour_jvp(
    dtype: DTypeLike,
    primals: tuple[jax.Array, jax.Array],
    tangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    return neighbour(primals[0], dtype, primals[1]), tangents[0]


def rounded_towards(x: jax.Array, dtype: DTypeLike, upward: jax.Array) -> jax.Array:
    """As `rounded`, but up or down."""
    if x.dtype == dtype:
        return x
    nearest = rounded(x, dtype).astype(x.dtype)
    missed = jnp.where(upward, nearest < x, nearest > x)
    return jnp.where(missed, neighbour(nearest, dtype, upward), nearest)


def bound_towards(bound: ArrayLike, dtype: DTypeLike, toward: float) -> jax.Array:
    """A bound in a real dtype, rounded towards a number that lies on its inner side.

    A Python number is a float64: 0.1 lies below its nearest float32. A bound beyond a
    dtype's numbers is its infinity on the outer side or, where it has none, its largest
    number, which bounds as little.
    """
    if isinstance(bound, jax.Array):
        wide = numerics.accumulation_dtype(dtype)
        if jnp.issubdtype(bound.dtype, jnp.floating):
            wide = np.promote_types(wide, bound.dtype)
        found = bound.astype(wide)
        found = rounded_towards(found, dtype, toward > found)
        if np.isnan(np.asarray(np.inf, dtype)):  # some types of 8 bits
            top = float(jnp.finfo(dtype).max)
            found = jnp.clip(found, -top, top)
        return found.astype(dtype)
    return jnp.asarray(static_bound(bound, dtype, toward).astype(dtype))


def static_bound(bound: ArrayLike, dtype: DTypeLike, toward: float) -> np.ndarray:
    """The same of a bound that is no JAX array, as float64 whatever the dtype.

    It is infinite where the dtype has no number on the inner side.
    """
    exact, top = np.asarray(bound, np.float64), float(jnp.finfo(dtype).max)
    if np.isnan(np.asarray(np.inf, dtype)):
        lowest, highest = np.maximum(exact, -top), np.minimum(exact, top)
        exact = np.where(toward >= exact, lowest, highest)
    with np.errstate(over="ignore", invalid="ignore"):
        nearest = exact.astype(dtype)
    back = nearest.astype(np.float64)
    back = np.where(np.isnan(back), np.copysign(np.inf, exact), back)
    missed = np.where(toward > exact, back < exact, back > exact) & (toward != exact)
    end = np.asarray(np.clip(toward, -top, top), dtype)
    stepped = np.nextafter(nearest, end).astype(np.float64)
    return np.where(missed, stepped, back)


def power_of_two(x: jax.Array, room: int = 0) -> jax.Array:
    """The next one above x > 0, times 2^room: dividing by it rounds nothing.

    Cut off where its reciprocal would not be a normal number; 1 for any other x.
    """
    info = jnp.finfo(x.dtype)
    x = jax.lax.stop_gradient(x)
    x = jnp.where((x > 0) & jnp.isfinite(x), x, 0.5)
    # The bits of infinity are those of an exponent. (`jnp.ldexp` gathers on meshes.)
    mask = np.asarray(np.inf, x.dtype).view(f"uint{info.bits}")
    exponent = jax.lax.bitcast_convert_type(x, mask.dtype) & mask
    below = jax.lax.bitcast_convert_type(exponent, x.dtype)  # 0 below normal numbers
    step, end = 2.0 ** (1 + room), 2.0 ** (int(info.maxexp) - 3)
    lowest = max(1 / end / step, float(info.smallest_normal))
    return jnp.clip(below, lowest, end / step) * step
