"""Arithmetic that keeps its promises in every dtype.

Sizes are computed in at least float32. XLA flushes subnormal numbers to zero, so what
matters is that no *intermediate* value leaves the normal range while the result lies in
it: `RANGES` says where a dtype's squares start to overflow or vanish, and `factor`
and `split` take target/size apart into multipliers that stay normal.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from optclip._core.types import Arrays

# The platform that programs are made for, and on how many devices; tests replace them.
backend = jax.default_backend
devices = jax.device_count


def is_measured(leaf: Any) -> bool:
    """Whether a leaf has a magnitude: real or complex, and not empty.

    Integers, booleans, float0 and random keys pass through every rule untouched.
    """
    if isinstance(leaf, (float, complex)):
        return True
    dtype = getattr(leaf, "dtype", None)
    return (
        dtype is not None
        and jnp.issubdtype(dtype, jnp.inexact)
        and math.prod(leaf.shape) > 0  # not `jnp.size`, which takes no abstract leaf
    )


def accumulation_dtype(*dtypes: DTypeLike) -> np.dtype:
    """The real dtype, float32 or wider, in which these are measured."""
    wide = np.dtype(np.float32)
    for dtype in dtypes:
        # NumPy's promotion, here and below: strict promotion in JAX would refuse.
        wide = np.promote_types(wide, jnp.finfo(dtype).dtype)
    return wide


def bound_in(bound: ArrayLike, dtype: DTypeLike) -> jax.Array:
    """A bound of any numeric type in a leaf's dtype, to be negated or compared there.

    Unsigned integers have no negative, JAX's int32 holds no 10**12, and float8_e4m3fn
    has no infinity. A bound beyond the dtype's range becomes infinity, or the largest
    number where there is none, so it bounds nothing. NaN stays NaN.
    """
    dtype = np.dtype(dtype)
    if isinstance(bound, jax.Array):
        wide = accumulation_dtype(dtype)
        real = jnp.issubdtype(bound.dtype, jnp.floating)
        value = widen(bound, wide) if real else bound.astype(wide)
    else:
        value = np.asarray(as_float(bound), np.float64)
    with np.errstate(over="ignore"):
        if not np.isinf(np.float64(np.inf).astype(dtype)):
            largest = np.asarray(jnp.finfo(dtype).max, value.dtype)
            value = value.clip(-largest, largest)
        return jnp.asarray(value.astype(dtype))


def as_float(number: ArrayLike) -> ArrayLike:
    """Python's and NumPy's integers as floats, infinite beyond those that there are."""
    if isinstance(number, int | np.integer):
        try:
            return float(number)
        except OverflowError:
            return math.inf if number > 0 else -math.inf
    if isinstance(number, np.ndarray) and number.dtype.kind in "iu":
        return number.astype(np.float64)
    return number


def widen(x: jax.Array, wide: DTypeLike) -> jax.Array:
    """Casts to at least `wide`; a complex array stays complex."""
    return x.astype(np.promote_types(x.dtype, wide))


def for_measuring(x: jax.Array, wide: DTypeLike) -> jax.Array:
    """The widened copy of a leaf that only its size is computed from.

    XLA:CPU writes to memory what a sum shares with another kernel: the widened copy
    that the rescaling needs too (2x the gradients in temporary bytes for a bfloat16
    tree), or the squares that Adam takes of gradients that nothing rescaled. The
    barrier keeps them apart, so each computes its own inside its own loop.
    """
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
    up: float  # multipliers that bring tiny and huge numbers back into range
    down: float


def _range_of(dtype: type) -> Range:
    # Up is less far than down: a tangent of 1 beside a tiny number goes with it.
    info = np.finfo(dtype)
    up, down = int(info.maxexp) * 9 // 16, int(info.maxexp) * 5 // 8
    return Range(2.0 ** (int(info.minexp) // 2), 2.0**up, 2.0**-down)


# 2^-63, 2^72 and 2^-80 for float32.
RANGES = {np.dtype(dtype): _range_of(dtype) for dtype in (np.float32, np.float64)}


@jax.custom_jvp
def safe_sqrt(x: jax.Array) -> jax.Array:
    """The square root, with derivative 0 instead of infinity at 0."""
    return jnp.sqrt(x)


@safe_sqrt.defjvp
def _safe_sqrt_jvp(primals: Arrays, tangents: Arrays) -> tuple[jax.Array, jax.Array]:
    root = safe_sqrt(*primals)
    zero = root == 0
    half = 0.5 / jnp.where(zero, 1, root)
    return root, jnp.where(zero, 0, half) * tangents[0]


@jax.custom_jvp
def _factor(size: jax.Array, target: jax.Array) -> jax.Array:
    """target / size as one number: 1 exactly where they are equal, 1 for a size of 0.

    A ratio that float32 would flush (below 2^-100) comes in units of 2^-128 and with a
    minus sign; `split` takes it apart. A target of 0 gives a zero of either sign. NaN
    in, NaN out.

    It ends in a division, which XLA does not repeat in every kernel that reads it: with
    a choice at the end, the kernel of each leaf would hold all of this, at every
    element of a leaf with many units. (AGC of 24 leaves of 768 × 3072 float32, two
    cores: 31 ms instead of 22.)
    """
    info = jnp.finfo(size.dtype)
    half = 2.0 ** (int(info.maxexp) // 2)
    # A size so small that this product vanishes has no target below it.
    flushed = target < size * 2.0 ** (int(info.minexp) + 26)
    kept = size == 0
    if backend() == "gpu":  # where x / x need not be 1
        kept |= size == target
    wanted = jnp.where(kept, 1, jnp.where(flushed, target * -half, target))
    # Where the size is not finite, a target of 0 still gives 0.
    present = jnp.where(flushed, size / half, size)
    ratio = wanted / jnp.where(kept | (target == 0), 1, present)
    if backend() != "gpu":
        return ratio
    # The quotient may be off by 2 units in the last place there.
    return jnp.where(target <= size, jnp.minimum(ratio, 1), ratio)


@_factor.defjvp
def _factor_jvp(primals: Arrays, tangents: Arrays) -> tuple[jax.Array, jax.Array]:
    # d(target/size) = (dtarget - ratio·dsize) / size. Written out because
    # differentiating the quotient squares the size, which leaves float32's range.
    size, target = primals
    d_size, d_target = tangents
    ratio = _factor(size, target)
    # Below 1e-30 its units leave the range: taken as 0.
    flat = (size == 0) | (ratio < 0)
    slope = jnp.where(flat, 0, 1 / jnp.where(size == 0, 1, size))
    return ratio, (d_target - ratio * d_size) * slope


# Jitted, because to trace a custom_jvp takes a millisecond.
factor = jax.jit(_factor)


def split(ratio: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(a, b) with target = a·b·a·size for a `factor`, both normal numbers."""
    small = 2.0 ** -(int(jnp.finfo(ratio.dtype).maxexp) // 2)
    one = jnp.ones_like(ratio)
    return jnp.where(ratio < 0, small * one, one), jnp.abs(ratio)


@jax.custom_jvp
def quotient(x: jax.Array, y: jax.Array) -> jax.Array:
    """x / y, with a derivative that does not square y out of range."""
    return x / y


@quotient.defjvp
def _quotient_jvp(primals: Arrays, tangents: Arrays) -> tuple[jax.Array, jax.Array]:
    (x, y), (d_x, d_y) = primals, tangents
    ratio = quotient(x, y)
    return ratio, (d_x - ratio * d_y) / y


def rounding_error(x: jax.Array, y: jax.Array, product: jax.Array) -> jax.Array:
    """x · y - product, of a product that was rounded to their dtype.

    Both are split into halves whose products are exact (Dekker, 1971), so nothing
    changes where XLA fuses a product and a sum. No derivative flows through it.
    """

    def halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        info = jnp.finfo(x.dtype)
        low = np.asarray(2 ** ((info.nmant + 1) // 2) - 1, f"uint{info.bits}")
        bits = jax.lax.bitcast_convert_type(x, low.dtype) & ~low
        high = jax.lax.bitcast_convert_type(bits, x.dtype)
        return high, x - high

    x, y, product = map(jax.lax.stop_gradient, (x, y, product))
    (a, b), (c, d) = halves(x), halves(y)
    return ((a * c - product) + a * d + b * c) + b * d


@jax.custom_jvp
def at_scale(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x · scale, with the derivative of x.

    A size grows with its elements. Measured at a scale and brought back from it, the
    two factors cancel in its derivative; alone they would leave float32's range there.
    """
    # Real ones without `times`: tests limit how many functions an eager call enters.
    return times(x, scale) if jnp.iscomplexobj(x) else x * scale


@at_scale.defjvp
def _at_scale_jvp(primals: Arrays, tangents: Arrays) -> tuple[jax.Array, jax.Array]:
    return at_scale(*primals), tangents[0]


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
def scale_by(x: jax.Array, ratio: jax.Array) -> jax.Array:
    """Scales a leaf by its groups' `factor`s, in the leaf's dtype.

    An unchanged group is selected, never multiplied: its bits stay, and XLA:CPU drops
    the store when the buffer is donated. A target of zero is selected too, so that
    `nonfinite="zero"` holds where 0·NaN would not.
    """
    if jnp.iscomplexobj(x):
        return jax.lax.complex(scale_by(x.real, ratio), scale_by(x.imag, ratio))
    a, b = split(ratio)
    scaled = narrow(widen(x, ratio.dtype) * a * b * a, x.dtype)
    # In this order: XLA:CPU takes longer for the other inside AdamW of bfloat16, which
    # scales twice (12 leaves of 768 × 3072, two cores: 42.4 ms instead of 40.4).
    return choose(ratio == 0, jnp.zeros_like(x), choose(ratio == 1, x, scaled))


def narrow(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """A cast to a leaf's dtype; from float32 to bfloat16 by integers, bit for bit.

    XLA:CPU does not repeat a rounding: updates that two kernels of an optimizer read
    are written to memory first, in float32 never. Integers are repeated, so that
    bfloat16 updates are scaled inside both kernels too.
    """
    if x.dtype == jnp.float32 and dtype == jnp.bfloat16:
        return _bfloat16(x)
    return x.astype(dtype)


@jax.custom_jvp
def _bfloat16(x: jax.Array) -> jax.Array:
    """To nearest, ties to even; a NaN stays one."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    nearest = bits + jnp.uint32(0x7FFF) + ((bits >> 16) & 1)
    quiet = bits | jnp.uint32(0x400000)
    bits = jnp.where(jnp.isnan(x), quiet, nearest) >> 16
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16)


@_bfloat16.defjvp
def _bfloat16_jvp(primals: Arrays, tangents: Arrays) -> tuple[jax.Array, jax.Array]:
    return _bfloat16(*primals), tangents[0].astype(jnp.bfloat16)


def choose(which: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """x where it says so, y of the same dtype elsewhere; of bfloat16 by their bits.

    XLA:CPU rounds a bfloat16 number at every choice: to scale 24 leaves of 768 × 3072
    in place takes two cores 10.5 ms with two of them, 4.8 ms if they are of integers.
    """
    if x.dtype == jnp.bfloat16:
        return _chosen_bits(which, x, y)
    return jnp.where(which, x, y)


@jax.custom_jvp
def _chosen_bits(which: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    bits = [jax.lax.bitcast_convert_type(z, jnp.uint16) for z in (x, y)]
    return jax.lax.bitcast_convert_type(jnp.where(which, *bits), x.dtype)


@_chosen_bits.defjvp
def _chosen_bits_jvp(primals: Arrays, tangents: Arrays) -> tuple[jax.Array, jax.Array]:
    # Bits have no derivative; a choice between the tangents is that of the numbers.
    which, x, y = primals
    _, d_x, d_y = tangents
    return _chosen_bits(which, x, y), jnp.where(which, d_x, d_y)


@jax.jit
def resized(x: jax.Array, size: jax.Array, target: jax.Array) -> jax.Array:
    """Gives every element of x its own target size."""
    if jnp.iscomplexobj(x):
        return scale_by(x, factor(size, target))
    replaced = narrow(jnp.copysign(target, widen(x, target.dtype)), x.dtype)
    return choose(target == size, x, replaced)
