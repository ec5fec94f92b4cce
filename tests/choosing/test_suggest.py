"""The advice: a simulation study of its two statements, its words, and bad input."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip
from optclip import measures
from optclip.choosing.limit_for_rate import correlation_time, limit_for_rate
from tests.choosing.histories import recorded
from tests.choosing.processes import PROCESSES, STEPS

SEEDS = 200


@functools.cache
def drawn(name: str) -> np.ndarray:
    return PROCESSES[name].draw(np.random.default_rng(16), SEEDS, STEPS)


@functools.cache
def advised(name: str) -> list[optclip.Advice]:
    return list(map(optclip.suggest, drawn(name)))


@pytest.mark.parametrize("name", PROCESSES)
def test_the_verdict_is_right(name: str):
    """In at least 90 % of 200 seeds."""
    right = [advice.verdict == PROCESSES[name].verdict for advice in advised(name)]
    assert np.mean(right) >= 0.9


@pytest.mark.parametrize("name", [n for n, p in PROCESSES.items() if p.limit])
@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_the_interval_holds_the_limit(name: str, rate: float):
    """The one that truly clips the share, in at least 90 % of 200 seeds."""
    limit_of = PROCESSES[name].limit
    assert limit_of is not None
    # A constant is known to every digit, but not computed to every digit.
    limit, slack = limit_of(rate), 1e-9
    found: list[Any] = advised(name)
    if rate != 0.05:
        found = [limit_for_rate(x, rate) for x in drawn(name)]
    held = [x.low * (1 - slack) <= limit <= x.high * (1 + slack) for x in found]
    assert np.mean(held) >= 0.9
    assert all(x.low <= x.limit <= x.high for x in found)


def test_independent_intervals_are_no_wider_than_they_must_be():
    """Half a log-normal's interval is 2 spreads of its quantile, not more."""
    found = [limit_for_rate(x, 0.2) for x in drawn("log-normal, 30 %")]
    width = np.median([np.log(x.high / x.low) for x in found])
    density = np.exp(-(0.8416**2) / 2) / np.sqrt(2 * np.pi) / 0.3  # of logs at 80 %
    exact = 2 * 1.96 * np.sqrt(0.2 * 0.8 / STEPS) / density
    assert exact < width < 1.25 * exact


def test_the_closed_form_is_what_a_block_bootstrap_draws():
    """The variance of the count of steps over the limit, of 4000 drawn logs."""
    x = drawn("autocorrelated, 0.9")[0][:2000]
    over = x > np.quantile(x, 0.9)
    blocks = over.reshape(-1, 40).sum(1)
    rng = np.random.default_rng(0)
    logs = rng.choice(blocks, (4000, len(blocks))).sum(1)
    np.testing.assert_allclose(logs.var(), len(blocks) * blocks.var(), rtol=0.1)


def test_neighbours_that_are_alike_count_as_fewer():
    """An AR(1) of coefficient a has the correlation time (1 + a) / (1 - a)."""
    times = [correlation_time(np.log(x)) for x in drawn("autocorrelated, 0.8")[:20]]
    np.testing.assert_allclose(np.median(times), 9, rtol=0.2)
    assert correlation_time(np.ones(100)) == 1
    widths = {
        name: np.median([np.log(a.high / a.low) for a in advised(name)])
        for name in ("log-normal, 30 %", "autocorrelated, 0.9")
    }
    assert widths["autocorrelated, 0.9"] > 2 * widths["log-normal, 30 %"]


@pytest.mark.parametrize(
    ("limit", "verdict", "words"),
    [
        (1e3, "never binds", "A limit of 1e+03 never binds: the largest norm is"),
        (0.1, "always binds", "your limit is the learning rate"),
        (1.5, "fixed", "A fixed 1.6"),
    ],
)
def test_a_limit_in_use(limit: float, verdict: str, words: str):
    right = [
        optclip.suggest(x, limit=limit).verdict == verdict
        for x in drawn("log-normal, 30 %")
    ]
    assert np.mean(right) >= 0.9
    assert words in str(optclip.suggest(drawn("log-normal, 30 %")[0], limit=limit))


WORDS = {
    "log-normal, 30 %": r"^A fixed 1\.6\d? clips 5 % of the steps \(95 % interval: ",
    "constant": "clips nothing, and any lower limit more steps than wanted",
    "heavy-tailed": r"spikes, up to .* The tail is heavy \(index 1\.[2-9]\)",
    "bursts": r"are spikes, up to 1\d\.?\d? times the median norm: optclip.spike_clip",
    "drifting up 8-fold": r"The norm drifts [56]\.?\d?-fold.* bind always or never",
    "diverging": r"diverges from the start.*rules would follow it. Use a fixed limit",
    "diverging to NaN": "Not finite: 1,600 of 4,000 steps",
}


@pytest.mark.parametrize("name", WORDS)
def test_the_text_says_what_was_found(name: str):
    advice = advised(name)[1]
    assert re.search(WORDS[name], str(advice)), str(advice)
    assert str(advice) == advice.text


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("log-normal, 30 %", "optclip.clip_by_global_norm("),
        ("drifting up 8-fold", "optclip.spike_clip()"),
        ("bursts", "optclip.spike_clip()"),
        ("diverging", "optclip.clip_by_global_norm("),
    ],
)
def test_the_rule_is_ready_for_use(name: str, code: str):
    advice = advised(name)[0]
    assert advice.code.startswith(code)
    tx = optax.chain(advice.rule, optax.sgd(0.1))
    grads = {"w": jnp.array([1e6, 1.0])}
    updates, state = tx.update(grads, tx.init(grads))
    assert optclip.metrics(state, short=True)["steps"] == 1
    if "global" in code:
        np.testing.assert_allclose(
            optclip.global_norm(updates), 0.1 * advice.limit, rtol=1e-5
        )
        # The limit is that of the start, not of what it grew to.
        assert advice.limit < 20


def test_a_warm_up_is_left_out():
    steady = drawn("log-normal, 30 %")[0]
    high = np.concatenate([9 * steady[:100], steady])
    advice = optclip.suggest(high)
    assert advice.verdict == "fixed"
    assert 60 <= advice.evidence.warmup <= 200
    assert "a warm-up, are left out" in advice.text
    np.testing.assert_allclose(advice.limit, optclip.suggest(steady).limit, rtol=0.03)


def test_a_real_run_that_diverges():
    """Plain SGD above the largest stable rate: the norm grows by 9 % a step."""
    tx = optax.chain(optclip.monitor(), optax.sgd(2.09))

    def step(carry: Any, _: None) -> Any:
        x, state = carry
        updates, state = tx.update(x, state)
        size = optclip.metrics(state)["0/size"]
        return (optax.apply_updates(x, updates), state), size

    start: Any = jnp.array([0.3, -0.2])
    _, norms = jax.lax.scan(step, (start, tx.init(start)), length=2000)
    assert np.isinf(norms[-1]) or np.isnan(norms[-1])
    assert optclip.suggest(norms).verdict == "diverges"
    # Such a run passes an adaptive rule, which takes the usual size as good.
    spike = optclip.replay(norms[:900], {"spike": optclip.spike_clip()})["spike"]
    assert spike.worst > 1e6


def test_values():
    """Largest elements, of steps and of a recorder's leaves, for a clip by value."""
    rng = np.random.default_rng(0)
    leaves = np.exp(0.2 * rng.normal(size=(1000, 3))) * [1.0, 2.0, 5.0]
    advice = optclip.suggest(leaves, measure=measures.max_abs)
    assert advice.code == f"optclip.clip_by_value({advice.limit:.4g})"
    np.testing.assert_allclose(advice.limit, np.sort(leaves.max(1))[-51])
    assert "Of the sizes of the 3 groups, 1.67 % exceed" in advice.text
    assert "norm" not in advice.text.replace(advice.code, "")
    updates: Any = advice.rule.update(jnp.array([100.0, 1.0]), ())[0]
    np.testing.assert_allclose(updates, [advice.limit, 1.0], rtol=1e-6)
    found = optclip.replay(leaves, {"value": advice.rule})["value"]
    np.testing.assert_allclose([found.clip_rate, found.touched], [0.05, 0.05 / 3])


def test_a_table_is_joined_by_the_measure():
    table = np.stack([3 * np.ones(60), 4 * np.ones(60)], 1)
    table[7, 1] = np.inf
    history = recorded(names=("a", "b"), sizes=table, size=4 * np.ones(60))
    for sizes, measure, limit in (
        (table, measures.l2, 5.0),
        (table, measures.l1, 7.0),
        (table, measures.max_abs, 4.0),
        (history, measures.l2, 4.0),
        (table[:, 0], measures.rms, 3.0),
    ):
        np.testing.assert_allclose(
            optclip.suggest(sizes, measure=measure).limit, limit, rtol=1e-12
        )
    with pytest.raises(ValueError, match="suggest: sizes must be one column under rms"):
        optclip.suggest(table, measure=measures.rms)


GOOD = np.ones(60)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": GOOD[:49]}, "at least 50 steps, .* got 49 and 49"),
        ({"sizes": []}, r"sizes must be .* got shape \(0,\)"),
        ({"sizes": GOOD * np.nan}, "10 of them finite and above 0, got 60 and 0"),
        ({"sizes": 0 * GOOD}, "got 60 and 0"),
        ({"sizes": -GOOD}, r"sizes must be non-negative .* got -1.0 at step 0"),
        ({"sizes": GOOD * 1j}, "sizes must be .* got an array of dtype complex128"),
        ({"sizes": ["a"]}, "sizes must be .* got an array of dtype <U1"),
        ({"sizes": np.ones((2, 3, 4))}, r"got shape \(2, 3, 4\)"),
        (
            {"sizes": GOOD, "clip_rate": 0.0},
            "clip_rate must lie between 0 and 1, got 0",
        ),
        ({"sizes": GOOD, "clip_rate": 1.5}, r"clip_rate must be in \[0, 1\], got 1.5"),
        ({"sizes": GOOD, "limit": -1.0}, "limit must be non-negative, got -1.0"),
        ({"sizes": GOOD, "measure": "l2"}, "measure must be a Measure of optclip"),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"suggest: .*{message}"):
        optclip.suggest(**arguments)


def test_a_run_that_is_soon_lost_diverges():
    """Though it has few finite steps, which do not grow at every one."""
    sizes = np.full(600, np.nan)
    sizes[:24] = 10.0 ** (np.arange(24) + 4 * (np.arange(24) % 3 == 0))
    assert optclip.suggest(sizes).verdict == "diverges"


def test_zeros_before_the_warm_up_are_no_steps_of_it():
    """Sizes of zero have no logarithm, so that the warm-up is counted without them."""
    rest = np.exp(0.2 * np.random.default_rng(0).normal(size=1000))
    warming = np.r_[np.full(100, 50.0), rest]
    advice = optclip.suggest(np.r_[np.zeros(100), warming])
    assert advice.limit == optclip.suggest(warming).limit < 2


def test_the_largest_norm_of_a_limit_that_never_binds_is_of_all_steps():
    rest = np.exp(0.2 * np.random.default_rng(0).normal(size=1000))
    advice = optclip.suggest(np.r_[np.full(100, 50.0), rest], limit=60.0)
    assert advice.verdict == "never binds" and "is 50." in str(advice)
