"""Law 5: jit equals eager within 2 ulp.

All programs are compiled as users compile them, unlike in the rest of law 5: rounding
is what is compared, and the order of a sum is chosen by what makes the kernel.
"""

import chex
import jax.numpy as jnp
import pytest

from tests.laws.steps import (
    EVERY,
    PARAMS,
    SETS,
    STREAM,
    assert_within_ulps,
    forget,
    projected,
    run,
)

pytestmark = pytest.mark.ordinary


@pytest.fixture(autouse=True, scope="module")
def _compiled_here():
    forget()
    yield
    forget()


def test_the_comparison_can_fail():
    ones, more = jnp.ones(2), jnp.full(2, 1 + 3 * 2.0**-23)
    assert_within_ulps(ones, more, ulps=3)
    with pytest.raises(AssertionError):
        assert_within_ulps(ones, more)
    with pytest.raises(AssertionError):
        assert_within_ulps(ones, ones.astype(jnp.bfloat16))


@EVERY
def test_jit_equals_eager(row):
    """Every step, from the state that the jitted run had before it."""
    tx = row.build(1.0)
    state = tx.init(PARAMS)
    for updates, jitted in zip(STREAM, run(row.name), strict=True):
        out = tx.update(updates, state, PARAMS)
        assert_within_ulps(out, jitted, row.ulps)
        _, state = jitted


# One of each kind of point.
HALVES_TOO = ("box", "l2_ball", "max_norm", "simplex", "hyperball", "spectral_ball")


@SETS
def test_projections_jitted_equal_eager(row):
    """In float32; in bfloat16 too for one set of each kind."""
    tx, want = projected(row.name)
    parts = ("alpha", "beta") if row.name in HALVES_TOO else ("alpha",)
    updates, params, want = (
        {part: tree[part] for part in parts} for tree in (STREAM[2], PARAMS, want)
    )
    out, _ = tx.update(updates, None, params)
    if row.lands == "iterative":  # a series of products, as good as its row says
        chex.assert_trees_all_close(out, want, rtol=row.tolerance, atol=row.tolerance)
    else:
        assert_within_ulps(out, want, of_largest=row.digits is not True)
