"""`sweep`: each member is the training with its limit alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip

START = jnp.array([3.0, -2.0])


def train(limit: Any, rate: float = 0.4) -> tuple[jax.Array, Any]:
    """Of a quartic, whose gradient at the start is far too large for the rate."""
    tx = optax.chain(optclip.clip_by_global_norm(limit), optax.sgd(rate))

    def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
        params, state = carry
        loss, grads = jax.value_and_grad(lambda w: jnp.sum(w**4))(params)
        updates, state = tx.update(grads, state)
        return (optax.apply_updates(params, updates), state), loss

    (_, state), losses = jax.lax.scan(step, (START, tx.init(START)), length=40)
    return losses, state


LIMITS = [0.05, 0.5, 100.0, float("inf")]


def test_members_are_the_trainings_alone():
    found = optclip.sweep(train, LIMITS)
    assert found.clip_rates is not None
    for number, limit in enumerate(LIMITS):
        losses, state = train(limit)
        np.testing.assert_allclose(found.losses[number], losses, rtol=1e-4)
        numbers = optclip.metrics(state, short=True)
        rate = numbers["clipped_steps"] / 40
        assert found.clip_rates[number] == pytest.approx(float(rate))
    np.testing.assert_array_equal(found.final, found.losses[:, -4:].mean(1))


def test_the_best_is_finite_and_lowest():
    found = optclip.sweep(train, LIMITS)
    assert found.best == 0.5
    assert not np.isfinite(found.final[-1])
    assert np.isnan(optclip.sweep(train, [jnp.inf]).best)
    assert len(str(found).splitlines()) == 5


def test_losses_alone_have_no_clip_rates():
    found = optclip.sweep(lambda limit: train(limit)[0], LIMITS[:2])
    assert found.clip_rates is None
    assert str(found).endswith("-")


def test_of_several_rules_that_counts_which_clips_most():
    def both(limit: Any) -> Any:
        tx = optax.chain(optclip.monitor(), optclip.clip_by_global_norm(limit))
        _, state = tx.update(START, tx.init(START))
        return jnp.ones(3), state

    rates = optclip.sweep(both, [1.0, 9.0]).clip_rates
    np.testing.assert_array_equal(rates, [1.0, 0.0])


def test_rates_are_over_all_seeds_of_a_member():
    def seeds(limit: Any) -> Any:
        losses, state = jax.vmap(lambda rate: train(limit, rate))(jnp.array([0.0, 0.4]))
        return losses.mean(0), state

    rates = optclip.sweep(seeds, LIMITS).clip_rates
    # At rate 0 the gradient stays as it is, and all limits but infinity clip it.
    alone = optclip.sweep(train, LIMITS).clip_rates
    assert rates is not None and alone is not None
    still = np.array([1.0, 1.0, 1.0, 0.0])
    np.testing.assert_allclose(rates, (still + alone) / 2)


def test_it_is_traced_once():
    calls = []

    def counted(limit: Any) -> jax.Array:
        calls.append(limit.shape)
        return limit * jnp.ones(3)

    optclip.sweep(counted, np.geomspace(0.1, 10, 8))
    assert calls == [()]


@pytest.mark.parametrize(
    ("training", "limits", "message"),
    [
        (train, [], r"limits must be of shape \(m,\), got shape \(0,\)"),
        (train, 1.0, r"limits must be of shape \(m,\), got shape \(\)"),
        (train, [1.0, -1.0], "limits must be positive"),
        (train, [np.nan], "limits must be positive"),
        (
            lambda limit: limit,
            [1.0],
            r"train must return the losses of n .* shape \(\)",
        ),
        (lambda limit: (limit * jnp.ones(3), {}), [1.0], "train must return a state"),
    ],
)
def test_nonsense(training: Any, limits: Any, message: str):
    with pytest.raises(ValueError, match=f"sweep: {message}"):
        optclip.sweep(training, limits)


def test_losses_in_bfloat16_are_averaged_in_float32():
    """A sum of thousands of twos stops at 512 in bfloat16."""
    found = optclip.sweep(lambda c: jnp.full(10_000, 2, jnp.bfloat16), [1.0])
    assert found.losses.dtype == np.float32 and found.final == [2.0]
    assert "2" in str(found)
