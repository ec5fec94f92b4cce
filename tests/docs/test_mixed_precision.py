"""The page on mixed precision: under any loss scale the clip sees true gradients."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.dynamic_scale import DynamicScale

import optclip
from tests import pages
from tests.untyped import untyped

X = jax.random.normal(jax.random.key(7), (16, 4))


pytestmark = pytest.mark.usefixtures("as_a_reader_has_it")


@pytest.fixture(scope="module")
def page():
    """What the page defines at its end."""
    *_, (defined, printed) = pages.execute("docs/guides/mixed_precision.md")
    assert "skipped 0" not in printed.splitlines()[0]  # the first scale overflows
    return defined


@pytest.fixture(scope="module")
def params():
    return {"kernel": jnp.full((4, 2), 0.5), "bias": jnp.zeros(2)}


def true_norm():
    """That of the loss's gradient, by hand in float64."""
    x = np.asarray(X, np.float64)
    out = x @ np.full((4, 2), 0.5) - 1
    kernel, bias = x.T @ out, out.sum(axis=0)
    return 2 / out.size * np.sqrt((kernel**2).sum() + (bias**2).sum())


@pytest.mark.parametrize("power", [0, 4, 10])
def test_the_clip_sees_unscaled_gradients(power, page, params):
    scale = DynamicScale(scale=jnp.float32(2.0**power))
    state = page["optimizer"].init(params)
    _, state, *_ = page["train_step"](params, state, scale, X)
    seen = optclip.metrics(state)
    assert seen["skipped_steps"] == 0
    for key in ("watch/size", "inner_state/0/size"):
        np.testing.assert_allclose(seen[key], true_norm(), rtol=5e-3)


def test_before_the_division_the_norm_is_of_the_scale():
    """The other order, so that the tests above can fail."""
    grads = {"w": jnp.array([0.3, 0.4])}
    scaled = jax.tree.map(lambda g: 1024 * g, grads)
    unscale, clip = optax.scale(1 / 1024), optclip.clip_by_global_norm(1.0)
    for order, norm, after in (
        ((unscale, clip), 0.5, 0.5),
        ((clip, unscale), 512, 1 / 1024),
    ):
        tx = untyped(optax.chain(*order))
        updates, state = tx.update(scaled, tx.init(grads))
        (size,) = (v for k, v in optclip.metrics(state).items() if k.endswith("/size"))
        np.testing.assert_allclose(size, norm, rtol=1e-6)
        np.testing.assert_allclose(optclip.global_norm(updates), after, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_fixed_scale_is_undone_first_also_with_accumulation(steps, page):
    tx = untyped(page["fixed_scale"])
    tx = untyped(optax.MultiSteps(tx, steps)) if steps > 1 else tx
    grads = [{"w": jnp.array([0.3, 0.4 * n])} for n in range(1, steps + 1)]
    state = tx.init(grads[0])
    for own in grads:
        scaled = jax.tree.map(lambda g: page["SCALE"] * g, own)
        _, state = tx.update(scaled, state)
    mean = jax.tree.map(lambda *g: sum(g) / steps, *grads)
    (size,) = (v for k, v in optclip.metrics(state).items() if k.endswith("1/size"))
    np.testing.assert_allclose(size, optclip.global_norm(mean), rtol=1e-6)


def test_an_overflow_is_skipped_and_halves_the_scale(page, params):
    scale = DynamicScale(scale=jnp.float32(2.0**24))
    before = page["optimizer"].init(params)
    moved, state, after, _ = page["train_step"](params, before, scale, X)
    chex.assert_trees_all_equal(moved, params)
    chex.assert_trees_all_equal(state.inner_state, before.inner_state)
    assert after.scale == 2.0**23
    assert optclip.metrics(state)["skipped_steps"] == 1
    assert optclip.metrics(state)["inner_state/0/steps"] == 0
