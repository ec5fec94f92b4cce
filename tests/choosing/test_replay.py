"""Replay's summary and what it refuses; what it says of rules is law 14's."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip
from optclip import groupings, measures, thresholds
from optclip.clipping.recorder import Parts
from tests.choosing.histories import recorded

SIZES = [1.0, 4.0, np.nan, 0.0, 2.0]
TWO = optclip.clip_by_global_norm(2.0)


def test_the_summary():
    found = optclip.replay(SIZES, {"two": TWO})["two"]
    np.testing.assert_array_equal(found.out, [1, 2, np.nan, 0, 2])
    np.testing.assert_array_equal(found.limit, [2] * 5)
    np.testing.assert_array_equal(found.clipped, [False, True, False, False, False])
    assert (found.kept, found.worst, found.nonfinite) == (2.5 / 3, 2.0, 1)
    assert (found.clip_rate, found.touched) == (0.2, 0.25)
    assert str(found) == (
        "clips 20.00% of 5 steps, keeps 83.33% of a step, lets at most 2 pass"
    )


def test_rules_of_others():
    """Optax's own are replayed too; one that keeps no metrics tells no limit."""
    rules = {"optax": optax.clip_by_global_norm(2.0), "value": optax.clip(2.0)}
    found = optclip.replay([1.0, 4.0], rules)
    np.testing.assert_allclose(found["optax"].out, [1, 2])
    np.testing.assert_array_equal(found["optax"].clipped, [False, True])
    assert np.isnan(found["optax"].limit).all()
    np.testing.assert_array_equal(found["value"].limit, [2, 2])


def test_a_schedule_and_a_wrapper():
    rules = {
        "schedule": optclip.clip_by_value(optax.linear_schedule(3.0, 0.0, 3)),
        "masked": optax.masked(optclip.spike_clip(), True),
        "chain": optax.chain(optclip.monitor(), TWO, optax.scale(-0.5)),
        "skip": optclip.skip_step(TWO, 3.0),
    }
    found = optclip.replay([1.0, 4.0, 2.5], rules)
    np.testing.assert_allclose(found["schedule"].out, [1, 2, 1], rtol=1e-6)
    np.testing.assert_allclose(found["schedule"].limit, [3, 2, 1], rtol=1e-6)
    np.testing.assert_array_equal(found["masked"].limit[:1], [np.inf])
    np.testing.assert_array_equal(found["chain"].out, [0.5, 1, 1])
    np.testing.assert_array_equal(found["skip"].out, [1, 0, 2])
    np.testing.assert_array_equal(found["skip"].clipped, [False, True, True])


def test_labels_and_limits_go_by_the_paths_of_a_history():
    names = ("enc/a", "head", "enc/b")
    history = recorded(names=names, sizes=np.full((2, 3), 4.0), size=np.ones(2))
    rules = {
        "label": optclip.clip_by(
            5.0, grouping=groupings.per_label({"enc": "e", "head": "h"})
        ),
        "path": optclip.clip_by(
            thresholds.per_path({"enc": 1.0, "head": 3.0}),
            grouping=groupings.per_leaf(),
        ),
    }
    found = optclip.replay(history, rules)
    both = 5 / np.sqrt(2)
    np.testing.assert_allclose(found["label"].out[1], [both, 4, both], rtol=1e-6)
    np.testing.assert_allclose(found["path"].out[1], [1, 3, 1], rtol=1e-6)
    assert found["path"].touched == 1
    # Paths of which one is the start of another stay apart.
    clash = recorded(names=("a", "a/b"), sizes=np.full((1, 2), 4.0), size=np.ones(1))
    assert optclip.replay(clash, {"two": TWO})["two"].out.shape == (1, 2)


def test_wide_numbers():
    """float64 as JAX would have it; what float32 cannot hold is not finite there."""
    found = optclip.replay([1e300, 1.0], {"two": TWO})["two"]
    assert found.nonfinite == 1 and found.out.dtype == np.float32
    assert optclip.replay([3], {"two": TWO})["two"].out == 2


def test_the_table_shows_what_is_missing():
    table = optclip.replay_table(
        optclip.replay([np.nan, np.inf], {"two": TWO, "optax": optax.zero_nans()})
    )
    assert table.splitlines()[0] == "2 steps, 2 of them not finite; no size is finite"
    assert table.splitlines()[2].split() == ["two", "0.0", "%", "-", "-", "2", "2", "2"]
    with pytest.raises(
        ValueError, match="replay_table: replays must hold at least one"
    ):
        optclip.replay_table({})


NOTHING = (
    r"rules\['r'\] must need nothing but the size of each leaf or of the whole tree"
)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (optclip.adaptive_grad_clip(), NOTHING + r", got groups of per_unit\("),
        (
            optclip.adaptive_grad_clip(grouping=groupings.per_leaf()),
            NOTHING + ", got limits relative to the parameters",
        ),
        (
            optax.masked(optax.chain(optclip.second_moment_clip()), {"a": True}),
            NOTHING + ", got groups of per_element",
        ),
        (
            optclip.clip_by_global_norm(1.0, measure=measures.rms),
            NOTHING + ", got rms of several leaves",
        ),
        (optclip.adagc(measure=measures.rms), NOTHING + ", got rms of several leaves"),
        (
            optax.inject_hyperparams(optclip.clip_by_global_norm)(1.0),
            NOTHING
            + ", got a rule of matrices, or one that is built anew at each step",
        ),
        (
            optclip.clip_by_value(min_value=-1.0, max_value=2.0),
            NOTHING + ", got a rule that treats negative and positive",
        ),
        (optax.add_decayed_weights(0.1), NOTHING + ", got a rule that says: .*params"),
        (optax.adaptive_grad_clip(0.1), NOTHING + ", got a rule that says: .*params"),
        (
            optclip.clip_by(
                thresholds.per_path({"other": 1.0}), grouping=groupings.per_leaf()
            ),
            NOTHING + ", got a rule that says: .*'other'",
        ),
        (abs, r"rules\['r'\] must be a gradient transformation, got <built-in"),
    ],
)
def test_what_cannot_be_replayed(rule: Any, message: str):
    with pytest.raises(ValueError, match=f"^replay: {message}"):
        optclip.replay(np.ones((2, 2)), {"r": rule})


@pytest.mark.parametrize(
    ("measure", "parts", "message"),
    [
        (
            "rms",
            "leaves",
            r"rules\['two'\] must measure as the history did, by rms, got l2",
        ),
        (
            "l2",
            "units",
            "sizes must be those of leaves or groups, got those of single un",
        ),
    ],
)
def test_what_a_history_says_of_itself(measure: str, parts: Parts, message: str):
    history = recorded(("a", "b"), np.ones((60, 2)), np.ones(60), measure, parts)
    with pytest.raises(ValueError, match=f"^replay: {message}"):
        optclip.replay(history, {"two": TWO})
    if parts == "units":  # whose `size` is what the limit was compared with
        assert optclip.suggest(history).limit == 1
    else:
        with pytest.raises(
            ValueError, match="suggest: measure must be that of the size"
        ):
            optclip.suggest(history)


def test_averages_of_single_leaves_are_replayed():
    found = optclip.replay(
        np.full((2, 2), 3.0), {"rms": optclip.clip_by_block_rms(1.0)}
    )
    np.testing.assert_array_equal(found["rms"].out, np.ones((2, 2)))


@pytest.mark.parametrize(
    ("sizes", "rules", "message"),
    [
        ([1.0], {}, r"rules must be a dict of at least one rule, got \{\}"),
        ([1.0], [TWO], "rules must be a dict of at least one rule"),
        ([1.0], {"a": TWO, "b": TWO}, "must be different, got .* as 'a' and as 'b'"),
        ([-1.0], {"a": TWO}, r"sizes must be .* got -1.0 at step 0"),
        ([1j], {"a": TWO}, "sizes must be .* got an array of dtype complex128"),
        ([True], {"a": TWO}, "sizes must be .* got an array of dtype bool"),
        ([], {"a": TWO}, r"sizes must be .* got shape \(0,\)"),
        (jnp.ones((1, 1, 1)), {"a": TWO}, r"sizes must be .* got shape \(1, 1, 1\)"),
        (
            recorded(names=("a", "a"), sizes=np.ones((3, 2)), size=np.ones(3)),
            {"a": TWO},
            "must have one name for each column, got 2 names, 1 of them different",
        ),
    ],
)
def test_bad_input(sizes: Any, rules: Any, message: str):
    with pytest.raises(ValueError, match=f"^replay: .*{message}"):
        optclip.replay(sizes, rules)
