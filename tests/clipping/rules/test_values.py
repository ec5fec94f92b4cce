"""`clip_by_value` and `clip`: bounds of any numeric type, in leaves of any dtype."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import optclip
from optclip._core import numerics
from tests.untyped import untyped

X = np.array([-3.0, 0.25, 3.0], np.float32)
TWO = [
    2, 2.0, np.uint8(2), np.int8(2), np.uint64(2), np.float16(2), np.float64(2),
    np.array(2, np.uint32), jnp.uint8(2), jnp.int32(2), jnp.bfloat16(2),
    jnp.float8_e4m3fn(2), ml_dtypes.bfloat16(2),
]  # fmt: skip
HUGE = [
    np.int64(10**12), 10**12, 10**40, np.uint64(2**64 - 1), np.float64(1e300),
    jnp.int32(2**31 - 1), float("inf"),
]  # fmt: skip
HALF_AND_LESS = [
    jnp.float16, jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e4m3fnuz, jnp.float8_e5m2,
    jnp.float8_e5m2fnuz, jnp.float8_e3m4,
]  # fmt: skip


def name(value):
    dtype = getattr(value, "dtype", type(value).__name__)
    return f"{dtype}-{float(value):g}"


def symmetric(bound):
    return optclip.clip_by_value(bound)


def interval(bound):
    # Negated by Python, so that unsigned bounds stay what they mean.
    return optclip.clip_by_value(min_value=-float(bound), max_value=bound)


def scheduled(bound):
    return optclip.clip(lambda step: bound)


def clipped(tx, x):
    out, _ = tx.update(x, tx.init(x))
    assert out.dtype == x.dtype
    return np.asarray(out).astype(np.float64).tolist()


@pytest.mark.parametrize("build", [symmetric, interval, scheduled])
@pytest.mark.parametrize("bound", TWO, ids=name)
def test_a_bound_of_any_type_is_the_same_number(build, bound):
    assert clipped(build(bound), jnp.asarray(X)) == [-2.0, 0.25, 2.0]


@pytest.mark.parametrize("build", [symmetric, scheduled])
@pytest.mark.parametrize("bound", HUGE, ids=name)
def test_a_bound_that_no_int32_holds_bounds_nothing_here(build, bound):
    assert clipped(build(bound), jnp.asarray(X)) == X.tolist()


@pytest.mark.parametrize("low", [np.int64(-3 * 10**9), -(10**12), np.float64(-1e300)])
def test_a_lower_bound_alone(low):
    assert clipped(optclip.clip_by_value(min_value=low), jnp.asarray(X)) == X.tolist()
    high = optclip.clip_by_value(min_value=low, max_value=np.uint8(2))
    assert clipped(high, jnp.asarray(X)) == [-3.0, 0.25, 2.0]


@pytest.mark.parametrize("dtype", HALF_AND_LESS, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize(
    "bound", [1e6, 10**12, jnp.float32(1e6), jnp.int32(10**6), np.float64(1e300)],
    ids=name,
)  # fmt: skip
def test_a_bound_beyond_the_range_of_the_leaf_bounds_nothing(dtype, bound):
    """Also where the dtype has no infinity, which the bound would become NaN for."""
    x = jnp.asarray([3.0, -4.0, 12.0]).astype(dtype)
    for tx in (symmetric(bound), interval(bound), scheduled(bound)):
        assert clipped(tx, x) == [3.0, -4.0, 12.0]
        assert clipped(tx, -x) == [-3.0, 4.0, -12.0]
    assert clipped(symmetric(4), x) == [3.0, -4.0, 4.0]


def test_a_thousand_in_float8():
    x = jnp.asarray([3.0, -4.0, 96.0]).astype(jnp.float8_e4m3fn)
    assert clipped(optclip.clip_by_value(1000.0), x) == [3.0, -4.0, 96.0]


@pytest.mark.parametrize("bound", [*TWO, *HUGE], ids=name)
def test_traced_and_static_bounds_agree(bound):
    def run(x, bound):
        return untyped(optclip.clip_by_value(bound)).update(x, None)[0]

    if isinstance(bound, int) and bound > np.iinfo(np.int32).max:
        pytest.skip("JAX refuses to trace it")
    if np.asarray(bound).dtype.itemsize == 8:
        pytest.skip("JAX truncates it before it is traced")
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn):
        x = jnp.asarray(X).astype(dtype)
        assert np.array_equal(jax.jit(run)(x, bound), run(x, bound))


def test_a_nan_bound_is_never_taken_for_a_large_one():
    for dtype in (jnp.float32, *HALF_AND_LESS):
        x = jnp.ones(3, dtype)
        for tx in (
            symmetric(jnp.float32(jnp.nan)),
            optclip.clip_by_value(min_value=jnp.float32(jnp.nan)),
            optclip.clip_by_value(max_value=jnp.float32(jnp.nan)),
            optclip.clip_by_value(min_value=jnp.float32(jnp.nan), max_value=1.0),
        ):
            assert np.isnan(clipped(tx, x)).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_crossed_bounds_of_a_schedule_give_the_upper_one(dtype):
    """As `jnp.clip` does, whatever the element."""
    tx = optclip.clip_by_value(min_value=lambda step: 2.0, max_value=1.0)
    assert clipped(tx, jnp.asarray([-9.0, 1.5, 9.0], dtype)) == [1.0] * 3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("length", [1, 3, 17])  # XLA compiles the last ones apart
@pytest.mark.parametrize("both", [True, False])
def test_subnormal_numbers_within_the_bounds_keep_their_bits(dtype, length, both):
    smallest, largest = 1, np.asarray(jnp.finfo(dtype).tiny).view(np.uint16) - 1
    for magnitude in (smallest, largest):
        for bits in (magnitude, magnitude | 0x8000):
            x = jnp.asarray(np.full(length, bits, np.uint16).view(dtype))

            @jax.jit
            def run(x, bound):
                one = untyped(optclip.clip_by_value(max_value=bound))
                two = untyped(optclip.clip_by_value(bound))
                return (two if both else one).update(x, None)[0]

            out = run(x, np.float32(0.957))
            assert np.asarray(out).tobytes() == np.asarray(x).tobytes()


def test_float64_bounds_keep_their_digits():
    jax.config.update("jax_enable_x64", True)
    try:
        for bound in (2**53 + 2, np.uint64(2**53 + 2), jnp.int64(2**53 + 2)):
            out = clipped(optclip.clip_by_value(bound), jnp.full(1, 1e300, jnp.float64))
            assert out == [float(2**53 + 2)]
    finally:
        jax.config.update("jax_enable_x64", False)


@pytest.mark.parametrize("sign", [1, -1])
def test_an_integer_larger_than_any_float(sign):
    assert numerics.bound_in(sign * 10**400, jnp.float32) == sign * jnp.inf
    largest = float(jnp.finfo(jnp.float8_e4m3fn).max)
    assert float(numerics.bound_in(sign * 10**400, jnp.float8_e4m3fn)) == sign * largest


def test_a_complex_element_by_its_modulus():
    x = jnp.asarray([3 + 4j, 0.1j, -6 - 8j], jnp.complex64)
    out, _ = untyped(optclip.clip_by_value(np.uint8(5))).update(x, None)
    np.testing.assert_allclose(out, [3 + 4j, 0.1j, -3 - 4j], rtol=1e-6)


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 3e38])
def test_a_modulus_beyond_the_range_keeps_its_direction(magnitude):
    """√2 · 3e38 is no float32, but both parts are."""
    x = np.asarray([magnitude * (1 - 1j)], np.complex64)
    bound = np.float32(0.5 * magnitude)
    out = untyped(optclip.clip_by_value(bound)).update(x, None)[0]
    np.testing.assert_allclose(out, bound * np.sqrt(0.5) * (1 - 1j), rtol=1e-6)


@pytest.mark.parametrize("bound", [np.inf, 1e39])
def test_complex_numbers_under_an_infinite_bound_keep_their_bits(bound):
    parts = jnp.array([[np.inf, 1.0, -np.inf, 3e38], [2.0, 2.0, -np.inf, 3e38]])
    x = jax.lax.complex(*parts)
    out, _ = untyped(optclip.clip_by_value(bound)).update(x, None)
    np.testing.assert_array_equal(out.real, x.real)
    np.testing.assert_array_equal(out.imag, x.imag)


def test_complex_zero_under_a_bound_of_nan():
    x = jnp.zeros(1, jnp.complex64)
    tx = untyped(optclip.clip_by_value(jnp.array(jnp.nan)))
    assert np.isnan(tx.update(x, None)[0]).all()


@pytest.mark.parametrize("bad", ["1", [1.0]])
def test_a_bound_that_is_no_number_is_named(bad):
    with pytest.raises(ValueError, match="clip_by_value: min_value must be"):
        optclip.clip_by_value(min_value=bad)
