"""What docs/guides/beside_muon.md says of `optax.contrib.muon`, claim by claim.

First its programs, then the numbers behind its words, with the limits between which
each of them holds.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip
from optclip import actions, groupings, thresholds
from tests import pages
from tests.untyped import untyped

MUON = optax.contrib.muon(1.0)


# Optax's Muon needs it too.
pytestmark = pytest.mark.usefixtures("as_a_reader_has_it")


def draw(seed, layers=1, norm=100.0):
    rng = np.random.default_rng(seed)
    grads = {
        str(n): {"kernel": rng.normal(size=(16, 8)), "bias": rng.normal(size=8)}
        for n in range(layers)
    }
    grads = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), grads)
    return jax.tree.map(lambda x: norm * x / optclip.global_norm(grads), grads)


STREAM = [draw(seed) for seed in range(12)]


def last(tx, stream):
    state, update = tx.init(stream[0]), jax.jit(untyped(tx).update)
    for grads in stream:
        updates, state = update(grads, state, stream[0])
    return updates


def kernels(updates):
    return {name: layer["kernel"] for name, layer in updates.items()}


def off(tx, stream, other=MUON, others=STREAM):
    """How far the kernels' last updates are from others, relatively."""
    a, b = kernels(last(tx, stream)), kernels(last(other, others))
    apart = optclip.global_norm(jax.tree.map(jnp.subtract, a, b))
    return float(apart / optclip.global_norm(b))


def test_programs_print_what_the_page_says():
    pages.run("docs/guides/beside_muon.md")


def test_the_singular_values_are_about_one():
    s = jnp.linalg.svd(last(MUON, STREAM)["0"]["kernel"], compute_uv=False)
    s = s / np.sqrt(16 / 8) if s.max() > 1.3 else s  # Optax's factor for its shape
    assert 0.6 < s.min() and s.max() < 1.3


@pytest.mark.parametrize("limit", [10.0, 1.0, 0.1])
def test_the_same_factor_at_every_step_cancels(limit):
    clip = optclip.clip_by_global_norm(limit)
    assert off(optax.chain(clip, MUON), STREAM) < 1e-5
    # And does not cancel where nothing divides it out: the test can fail.
    sgd = optax.sgd(1.0)
    assert off(optax.chain(clip, sgd), STREAM, sgd) > 0.5


def test_of_several_norms_every_step_comes_to_weigh_the_same():
    """Other updates than without a clip, at any limit below all norms the same ones."""
    factors = np.exp(np.random.default_rng(0).normal(size=len(STREAM)))
    varied = [
        jax.tree.map(lambda x, by=by: x * jnp.float32(by), grads)
        for by, grads in zip(factors, STREAM, strict=True)
    ]
    assert min(optclip.global_norm(grads) for grads in varied) > 10
    for limit in (10.0, 1.0):
        tx = optax.chain(optclip.clip_by_global_norm(limit), MUON)
        assert off(tx, varied, MUON, varied) > 0.2
        assert off(tx, varied) < 1e-5  # of STREAM, whose norms are one


def test_a_tiny_limit_acts_through_eps():
    assert off(optax.chain(optclip.clip_by_global_norm(1e-7), MUON), STREAM) > 0.1


def test_adaptive_muon_is_proportional():
    adaptive = optax.contrib.muon(1.0, adaptive=True)
    norms = [
        optclip.global_norm(
            kernels(
                last(optax.chain(optclip.clip_by_global_norm(limit), adaptive), STREAM)
            )
        )
        for limit in (10.0, 1.0)
    ]
    np.testing.assert_allclose(norms[0] / norms[1], 10, rtol=1e-4)


@pytest.mark.parametrize(
    ("clip", "most"),
    [(optclip.clip_by_global_norm(100.0), 1e-4), (optclip.spike_clip(), 0.3)],
    ids=["fixed", "spike_clip"],
)
def test_a_spike_is_kept_from_the_momentum(clip, most):
    spiked = list(STREAM)
    spiked[6] = jax.tree.map(lambda x: 1000 * x, spiked[6])
    assert off(MUON, spiked) > 1.0
    assert off(optax.chain(clip, MUON), spiked) < most


def test_after_muon_a_clip_is_a_learning_rate():
    """No gradient changes the step; its share falls as 1 / √(number of matrices)."""
    after = optax.chain(MUON, optclip.clip_by_global_norm(1.0))
    shares = []
    for layers in (1, 4, 16):
        norms = []
        for norm in (1.0, 1e4):
            updates = last(after, [draw(0, layers, norm)])
            np.testing.assert_allclose(optclip.global_norm(updates), 1.0, rtol=1e-5)
            norms.append(optclip.global_norm(kernels(updates)))
        np.testing.assert_allclose(norms[0], norms[1], rtol=1e-3)
        free = optclip.global_norm(last(MUON, [draw(0, layers)]))
        shares.append(1 / free)
    np.testing.assert_allclose(shares[0] / shares[1], 2, rtol=0.1)
    np.testing.assert_allclose(shares[0] / shares[2], 4, rtol=0.1)


def test_a_share_of_the_norm_of_the_weights():
    share = optclip.clip_by(
        thresholds.relative_to_params(0.01),
        grouping=groupings.per_leaf(),
        action=actions.normalize(),
    )
    params, tx = draw(1, 3), optax.chain(MUON, share)
    updates, _ = untyped(tx).update(draw(2, 3), tx.init(params), params)
    for path, norm in optclip.leaf_norms(updates).items():
        want = 0.01 * optclip.leaf_norms(params)[path]
        np.testing.assert_allclose(norm, want, rtol=1e-5)


NORMS = {"0": {"kernel": jnp.full((16, 8), 10.0), "bias": jnp.full(8, 0.1)}}


def test_the_matrices_decide_how_far_the_rest_is_clipped():
    """.28 shrinks to .0025 because of a matrix of norm 113; alone it is within 1."""

    def bias_of(tx):
        return optclip.global_norm(untyped(tx).update(NORMS, None)[0]["0"]["bias"])

    biases = groupings.whole(measured="bias", applied="bias")
    np.testing.assert_allclose(
        bias_of(optclip.clip_by_global_norm(1.0)), 0.0025, rtol=0.01
    )
    updates, state = untyped(optclip.clip_by(1.0, grouping=biases)).update(NORMS, None)
    assert np.all(updates["0"]["bias"] == NORMS["0"]["bias"])
    assert np.all(updates["0"]["kernel"] == NORMS["0"]["kernel"])
    np.testing.assert_allclose(state.metrics.size, 0.1 * np.sqrt(8), rtol=1e-6)


def test_experts_are_clipped_apart_by_two_rules_in_a_row():
    grads = {"experts": jnp.array([30.0, 40.0]), "head": jnp.array([0.3, 0.4])}
    rules = [
        optclip.clip_by(1.0, grouping=groupings.whole(measured=where, applied=where))
        for where in ("experts", "^(?!.*experts)")
    ]
    tx = untyped(optax.chain(*rules))
    updates, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(updates["experts"], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(updates["head"], grads["head"])
