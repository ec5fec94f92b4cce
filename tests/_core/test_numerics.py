"""Arithmetic whose promise no rule shows by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optclip._core import numerics as _numerics


def test_bfloat16_is_rounded_as_a_cast_rounds():
    """Every 257th float32: ties, subnormal and huge numbers, infinities, NaNs."""
    bits = np.arange(0, 2**32, 257, dtype=np.uint32)
    # Ties, which lie half a unit from both neighbours, are all odd multiples of 2^15.
    bits = np.concatenate([bits, np.arange(2**15, 2**32, 2**16, dtype=np.uint32)])
    x = bits.view(np.float32)
    ours = np.asarray(jax.jit(_numerics.narrow, static_argnums=1)(x, jnp.bfloat16))
    with np.errstate(invalid="ignore", over="ignore"):
        theirs = x.astype(jnp.bfloat16)
    number = ~np.isnan(x)
    np.testing.assert_array_equal(
        ours.view(np.uint16)[number], theirs.view(np.uint16)[number]
    )
    assert np.isnan(ours[~number].astype(np.float32)).all()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_narrowing_has_the_derivative_of_a_cast(dtype):
    x = jnp.array([0.1, -3.0], jnp.float32)
    ones = jnp.ones_like(x)
    out, tangent = jax.jvp(lambda x: _numerics.narrow(x, dtype), (x,), (ones,))
    assert out.dtype == tangent.dtype == dtype
    np.testing.assert_array_equal(tangent, ones.astype(dtype))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_a_choice_is_one_of_bits(dtype):
    """NaN, infinity and minus zero are handed on as they are."""
    x = jnp.array([jnp.nan, -jnp.inf, -0.0, 1.5], dtype)
    which = jnp.array([True, True, True, False])
    chosen = np.asarray(_numerics.choose(which, x, jnp.zeros_like(x)))
    expected = np.where(which, x, np.zeros_like(x))
    integers = f"uint{8 * chosen.dtype.itemsize}"
    np.testing.assert_array_equal(chosen.view(integers), expected.view(integers))
    tangent = jax.jvp(
        lambda x: _numerics.choose(which, x, jnp.zeros_like(x)),
        (x,),
        (jnp.ones_like(x),),
    )[1]
    np.testing.assert_array_equal(tangent, which.astype(dtype))


def test_the_square_root_is_flat_at_zero():
    x = jnp.array([0.0, 4.0, jnp.inf])
    np.testing.assert_array_equal(_numerics.safe_sqrt(x), jnp.sqrt(x))
    slope = jax.vmap(jax.grad(_numerics.safe_sqrt))(x)
    np.testing.assert_array_equal(slope, [0.0, 0.25, 0.0])


def test_a_factor_below_the_range_of_ratios_has_no_slope():
    """It comes in other units, in which the derivative of a quotient means nothing."""
    size, target = jnp.float32(1e3), jnp.float32(1e-30)
    assert _numerics.factor(size, target) < 0
    slopes = jax.grad(_numerics.factor, argnums=(0, 1))(size, target)
    assert slopes == (0, 0)


def test_what_rounding_took_off_a_product():
    """Exactly, whatever XLA makes of the halves' products."""
    rng = np.random.default_rng(0)
    x, y = (np.exp(rng.normal(0, 9, 4096)).astype(np.float32) for _ in range(2))
    product = x * y
    found = jax.jit(_numerics.rounding_error)(x, y, product)
    exact = x.astype(np.float64) * y - product
    np.testing.assert_array_equal(found, exact.astype(np.float32))
