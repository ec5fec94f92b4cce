"""Arithmetic that keeps its promises in every dtype.

Sizes are computed in at least float32. XLA flushes subnormal numbers to zero, so what
matters is that no *intermediate* value leaves the normal range while the result lies in
it: `range_of` says where a dtype's squares start to overflow or vanish, and `factors`
splits target/size into multipliers that stay normal.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def is_measured(leaf: Any) -> bool:
    """Whether a leaf has a magnitude: real or complex, and not empty.

    Integers, booleans, float0 and random keys pass through every rule untouched.
    """
    if isinstance(leaf, (float, complex)):
        return True
    dtype = getattr(leaf, "dtype", None)
    return (
        dtype is not None and jnp.issubdtype(dtype, jnp.inexact) and jnp.size(leaf) > 0
    )


def wide_dtype(*dtypes: Any) -> np.dtype:
    """The real dtype, float32 or wider, in which these are measured."""
    wide = np.dtype(np.float32)
    for dtype in dtypes:
        # NumPy's promotion, here and below: strict promotion in JAX would refuse.
        wide = np.promote_types(wide, jnp.finfo(dtype).dtype)
    return wide


def widen(x: jax.Array, wide: Any) -> jax.Array:
    """Casts to at least `wide`; a complex array stays complex."""
    return x.astype(np.promote_types(x.dtype, wide))


def for_measuring(x: jax.Array, wide: Any) -> jax.Array:
    """The widened copy of a leaf that only its size is computed from.

    XLA:CPU shares one widened copy between the measuring and the rescaling and writes
    it to memory: 2x the gradients in temporary bytes for a bfloat16 tree. The barrier
    keeps the two apart, so each widens inside its own loop.
    """
    if np.promote_types(x.dtype, wide) == x.dtype:
        return x
    return widen(jax.lax.optimization_barrier(x), wide)


def finite(size: jax.Array) -> jax.Array:
    """Sizes, with the largest number for those that are not finite.

    What is computed from an infinite size in a pass that is not chosen would have an
    infinite derivative, and zero times that is NaN.
    """
    return jnp.where(jnp.isfinite(size), size, jnp.finfo(size.dtype).max)


class Range(NamedTuple):
    """Where squares of a dtype are safe, as powers of two."""

    tiny: float  # a total below this may have lost summands to underflow
    up: float  # units (divisors) that bring tiny and huge numbers back into range
    down: float


def range_of(dtype: Any) -> Range:
    """The range of a real dtype: 2^-63, 2^-72 and 2^80 for float32.

    Up is less far than down, because a tangent of 1 beside a tiny number goes with it.
    """
    info = jnp.finfo(dtype)
    up, down = int(info.maxexp) * 9 // 16, int(info.maxexp) * 5 // 8
    return Range(2.0 ** (int(info.minexp) // 2), 2.0**-up, 2.0**down)


def safe_sqrt(x: jax.Array) -> jax.Array:
    """The square root, with derivative 0 instead of infinity at 0."""
    zero = x == 0
    return jnp.where(zero, x, jnp.sqrt(jnp.where(zero, jnp.ones_like(x), x)))


@jax.custom_jvp
def factors(size: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two factors (a, b) with target = a·b·a·size, both normal numbers.

    `b` alone does for every ordinary ratio, and is exactly 1 where target == size.
    A ratio that float32 would flush (below 2^-100) is split: a = 2^-64, exactly.
    NaN in, NaN out; size 0 gives 1.
    """
    info = jnp.finfo(size.dtype)
    half = 2.0 ** -(int(info.maxexp) // 2)
    ratio = _ratio(size, target)
    flushed = (ratio < 2.0 ** (int(info.minexp) + 26)) & (target != 0)
    split = _ratio(jnp.where(flushed, size * half, size), target / half)
    one = jnp.ones_like(ratio)
    return jnp.where(flushed, half * one, one), jnp.where(flushed, split, ratio)


@factors.defjvp
def _factors_jvp(primals: Any, tangents: Any) -> Any:
    # d(a·b·a) = (dtarget - ratio·dsize) / size, with a constant. Written out because
    # differentiating the quotient squares the size, which leaves float32's range.
    size, target = primals
    d_size, d_target = tangents
    a, b = factors(size, target)
    zero = size == 0
    slope = jnp.where(zero, 0, 1 / jnp.where(zero, 1, size))
    # Where the ratio is split (below 1e-30), 1 / a² leaves the range: taken as 0.
    slope = jnp.where(a == 1, slope, 0)
    change = (d_target - _ratio(size, target) * d_size) * slope
    return (a, b), (jnp.zeros_like(change), change)


def _ratio(size: jax.Array, target: jax.Array) -> jax.Array:
    # 1 for a size of 0; 0 for a target of 0, also where the size is not finite.
    plain = (size != 0) & (target != 0)
    ratio = target / jnp.where(plain, size, jnp.ones_like(size))
    return jnp.where(plain, ratio, (size == 0).astype(size.dtype))


@jax.custom_jvp
def quotient(x: jax.Array, y: jax.Array) -> jax.Array:
    """x / y, with a derivative that does not square y out of range."""
    return x / y


@quotient.defjvp
def _quotient_jvp(primals: Any, tangents: Any) -> Any:
    (x, y), (d_x, d_y) = primals, tangents
    ratio = quotient(x, y)
    return ratio, (d_x - ratio * d_y) / y


def hypot(x: jax.Array, y: jax.Array) -> jax.Array:
    """√(x² + y²) of non-negative numbers, whose derivative squares nothing tiny."""
    large, small = jnp.maximum(x, y), jnp.minimum(x, y)
    share = quotient(small, jnp.where(large == 0, jnp.ones_like(large), large))
    return large * jnp.sqrt(1 + jnp.square(share))


def times(x: jax.Array, factor: jax.Array) -> jax.Array:
    """x · factor for a real factor; a complex x by parts, which mixes no infinities."""
    if jnp.iscomplexobj(x):
        return jax.lax.complex(x.real * factor, x.imag * factor)
    return x * factor


@jax.jit
def scale_to(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Scales a leaf by its group's factors, in the leaf's dtype.

    An unchanged group is selected, never multiplied: its bits stay, and XLA:CPU drops
    the store when the buffer is donated. A target of zero is selected too, so that
    `nonfinite="zero"` holds where 0·NaN would not.
    """
    if jnp.iscomplexobj(x):
        return jax.lax.complex(scale_to(x.real, a, b), scale_to(x.imag, a, b))
    scaled = (widen(x, a.dtype) * a * b * a).astype(x.dtype)
    scaled = jnp.where(b == 0, jnp.zeros_like(x), scaled)
    return jnp.where((a == 1) & (b == 1), x, scaled)


@jax.jit
def resized(x: jax.Array, size: jax.Array, target: jax.Array) -> jax.Array:
    """Gives every element of x its own target size."""
    if jnp.iscomplexobj(x):
        return scale_to(x, *factors(size, target))
    replaced = jnp.copysign(target, widen(x, target.dtype)).astype(x.dtype)
    return jnp.where(target == size, x, replaced)


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
        wide = wide_dtype(dtype)
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
