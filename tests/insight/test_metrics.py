"""What `ClipMetrics` says of each step, and that `metrics` finds it anywhere."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import optclip
from optclip import groupings, measures, metrics, thresholds
from optclip.thresholds import Threshold
from tests.untyped import untyped

FIELDS = (
    "size", "limit", "clipped_fraction", "steps", "clipped_steps", "nonfinite_steps",
    "changed_fraction", "changed_steps",
)  # fmt: skip
SHRINKING = FIELDS[:6]  # of actions that never enlarge
GRADS = {"a": jnp.array([6.0, 8.0]), "b": jnp.array([0.0, 2.0])}  # sizes 10 and 2
EXAMPLES = {"a": jnp.array([[3.0, 0.0], [0.3, 0.0]]), "b": jnp.array([4.0, 0.4])}


def seen(tx, *stream, state=None):
    """The metrics after some steps, as Python numbers."""
    for updates in stream:
        _, state = tx.update(updates, state)
    return {name: value.item() for name, value in metrics(state).items()}


def clip(limit, grouping=None, **options):
    threshold = limit if isinstance(limit, Threshold) else thresholds.constant(limit)
    grouping = groupings.whole() if grouping is None else grouping
    return optclip.clip_by(threshold, grouping=grouping, **options)


def test_the_fields_are_those_documented():
    assert optclip.ClipMetrics._fields == FIELDS
    assert not set(FIELDS) & {"count", "mu", "nu", "trace", "inner_state"}
    _, state = untyped(clip(1.0)).update(GRADS, None)
    assert list(metrics(state)) == list(SHRINKING)
    _, state = untyped(clip(1.0, action=optclip.actions.floor())).update(GRADS, None)
    dtypes = {name: value.dtype.name for name, value in metrics(state).items()}
    assert list(dtypes) == list(FIELDS)
    floats = {name for name, dtype in dtypes.items() if dtype == "float32"}
    assert floats == {"size", "limit", "clipped_fraction", "changed_fraction"}
    assert set(dtypes.values()) == {"float32", "int32"}
    chex.assert_shape(list(state.metrics), ())


@pytest.mark.parametrize("limit", [1.0, 100.0])
def test_before_the_first_step(limit):
    state = clip(limit).init(GRADS)
    assert {
        name: value.item() for name, value in metrics(state).items()
    } == dict.fromkeys(SHRINKING, 0)


def test_changed_is_not_clipped():
    """A group raised 30-fold was changed and not clipped; a floor clips nothing."""
    small = {"a": jnp.array([0.06, 0.08]), "b": jnp.array([0.0, 3.0])}  # .1 and 3
    fields = ("clipped_fraction", "changed_fraction", "clipped_steps", "changed_steps")
    for action, wanted in (
        (optclip.actions.floor(), (0.0, 0.5, 0, 1)),
        (optclip.actions.normalize(), (0.0, 0.5, 0, 1)),
    ):
        numbers = seen(clip(3.0, groupings.per_leaf(), action=action), small)
        assert tuple(numbers[name] for name in fields) == wanted
    normalize = clip(1.0, groupings.per_leaf(), action=optclip.actions.normalize())
    numbers = seen(normalize, small, {"a": jnp.zeros(2), "b": jnp.array([0.0, 1.0])})
    assert tuple(numbers[name] for name in fields) == (0.0, 0.0, 1, 1)


GROUPS = {
    # (grouping, updates, sizes and limits of the furthest group, fraction)
    "whole, over": (groupings.whole(), GRADS, 5.0, 104**0.5, 1.0),
    "whole, within": (groupings.whole(), GRADS, 11.0, 104**0.5, 0.0),
    "per_leaf": (groupings.per_leaf(), GRADS, 5.0, 10.0, 0.5),
    "per_leaf, all": (groupings.per_leaf(), GRADS, 1.0, 10.0, 1.0),
    "per_leaf, none": (groupings.per_leaf(), GRADS, 10.0, 10.0, 0.0),
    "per_label": (groupings.per_label(lambda path: "x"), GRADS, 5.0, 104**0.5, 1.0),
    "per_unit": (
        groupings.per_unit(axes=0),
        {"a": jnp.array([[3.0, 0.3], [4.0, 0.4]]), "b": jnp.array([[6.0, 0.1]])},
        1.0, 6.0, 0.5,
    ),
    "per_example": (groupings.per_example(), EXAMPLES, 1.0, 5.0, 0.5),
}  # fmt: skip


@pytest.mark.parametrize(
    ("grouping", "updates", "limit", "size", "fraction"), GROUPS.values(), ids=GROUPS
)
def test_size_limit_and_fraction(grouping, updates, limit, size, fraction):
    numbers = seen(clip(limit, grouping), updates)
    assert numbers == {
        "size": pytest.approx(size, rel=1e-6),
        "limit": limit,
        "clipped_fraction": fraction,
        "steps": 1,
        "clipped_steps": int(fraction > 0),
        "nonfinite_steps": 0,
    }


def test_per_element_reports_counters_only():
    """What it never has is None in the state, and no key for a logger."""
    tx = untyped(clip(5.0, groupings.per_element()))
    numbers = seen(tx, GRADS, jax.tree.map(lambda x: 0.1 * x, GRADS))
    assert numbers == {"steps": 2, "clipped_steps": 1, "nonfinite_steps": 0}
    state = tx.init(GRADS).metrics
    assert state.size is state.limit is state.clipped_fraction is None
    spoiled = {**GRADS, "b": jnp.array([jnp.inf, 0.0])}
    assert seen(tx, GRADS, spoiled)["nonfinite_steps"] == 1


def test_the_group_furthest_over_is_not_the_largest():
    """10 against 8 is 1.25 times its limit, 2 against 0.5 four times."""
    limits = thresholds.per_path({"a": 8.0, "b": 0.5})
    numbers = seen(clip(limits, groupings.per_leaf()), GRADS)
    assert (numbers["size"], numbers["limit"]) == (2.0, 0.5)
    assert numbers["clipped_fraction"] == 1.0
    limits = thresholds.per_path({"a": 8.0, "b": 4.0})
    numbers = seen(clip(limits, groupings.per_leaf()), GRADS)
    assert (numbers["size"], numbers["limit"]) == (10.0, 8.0)
    assert numbers["clipped_fraction"] == 0.5


def test_where_none_is_over_it_is_the_nearest_to_its_limit():
    limits = thresholds.per_path({"a": 100.0, "b": 4.0})
    numbers = seen(clip(limits, groupings.per_leaf()), GRADS)
    assert (numbers["size"], numbers["limit"]) == (2.0, 4.0)
    assert numbers["clipped_fraction"] == 0.0


def of_ordinals():
    """Limits 1, 2, 3, … along the last axis of each block."""
    return Threshold(
        lambda state, block: (
            1.0
            + jax.lax.broadcasted_iota(
                jnp.float32, block.size.shape, block.size.ndim - 1
            )
        )
    )


@pytest.mark.parametrize("name", ["per_leaf", "per_unit", "per_example"])
def test_against_numpy_with_a_limit_for_each_group(name):
    grouping = getattr(groupings, name)()
    update = jax.jit(clip(of_ordinals(), grouping).update)
    state = None
    clipped_steps = 0
    rng = np.random.default_rng(0)
    for scale in (0.1, 0.5, 1.0, 3.0):
        updates = {
            key: jnp.asarray(scale * rng.standard_normal((4, 3)), jnp.float32)
            for key in "pqr"  # a `b` would be a bias, which is one unit
        }
        _, state = update(updates, state or clip(of_ordinals(), grouping).init(updates))
        x = np.stack([np.asarray(leaf, np.float64) for leaf in updates.values()])
        axes = {"per_leaf": (1, 2), "per_unit": (1,), "per_example": (0, 2)}[name]
        sizes = np.sqrt(np.sum(x**2, axis=axes))
        limits = np.broadcast_to(1.0 + np.arange(sizes.shape[-1]), sizes.shape)
        worst = np.unravel_index(np.argmax(sizes / limits), sizes.shape)
        clipped_steps += (sizes > limits).any()
        numbers = metrics(state)
        assert numbers["size"] == pytest.approx(sizes[worst], rel=1e-6)
        assert numbers["limit"] == limits[worst]
        assert numbers["clipped_fraction"] == pytest.approx((sizes > limits).mean())
        assert numbers["clipped_steps"] == clipped_steps
    assert 0 < clipped_steps < 4  # both outcomes were seen


def test_the_measure_is_the_rules_own():
    assert seen(clip(1.0, measure=measures.l1), GRADS)["size"] == 16.0
    assert seen(clip(1.0, measure=measures.max_abs), GRADS)["size"] == 8.0
    by_rms = optclip.clip_by_block_rms(1.0)
    assert seen(by_rms, GRADS)["size"] == pytest.approx(50**0.5)


@pytest.mark.parametrize(
    ("grouping", "size"), [(groupings.whole(), 104**0.5), (groupings.per_leaf(), 10.0)]
)
def test_monitor_has_no_limit(grouping, size):
    numbers = seen(optclip.monitor(grouping=grouping), GRADS)
    assert "limit" not in numbers
    assert numbers["clipped_fraction"] == 0.0
    assert numbers["size"] == pytest.approx(size)


def test_a_limit_of_infinity_shows_as_the_largest_number():
    """So that no arithmetic on states makes NaN, and JSON takes it."""
    numbers = seen(clip(jnp.inf), GRADS)
    assert numbers["limit"] == float(jnp.finfo(jnp.float32).max)
    assert numbers["clipped_fraction"] == 0.0


RULES = {
    name: getattr(optclip, name)
    for name in ("adagc", "autoclip", "norm_growth_clip", "quantile_clip", "spike_clip",
                 "zclip", "second_moment_clip", "adaptive_grad_clip", "monitor")
} | {
    "clip_by_global_norm": lambda: optclip.clip_by_global_norm(1.0),
    "inf": lambda: optclip.clip_by_norm(jnp.inf),
    "per_element": lambda: clip(1.0, groupings.per_element()),
    "skip_step": lambda: optclip.skip_step(
        optax.chain(optclip.monitor(), optax.sgd(0.1)), jnp.inf
    ),
    "sam": lambda: optax.contrib.sam(
        optax.chain(optclip.spike_clip(), optax.sgd(0.1)),
        optax.chain(optax.contrib.normalize(), optax.sgd(0.1)),
    ),
}  # fmt: skip


@pytest.mark.usefixtures("standard")
@pytest.mark.parametrize("name", RULES)
def test_loggers_take_it(name):
    """Finite numbers, before and after the first steps."""
    tx = RULES[name]()
    state = tx.init(GRADS)
    for _ in range(3):
        found = metrics(state)
        assert found and None not in found.values()
        json.dumps({key: float(value) for key, value in found.items()}, allow_nan=False)
        _, state = tx.update(GRADS, state, GRADS)


def test_a_limit_of_zero():
    numbers = seen(clip(0.0, groupings.per_leaf()), GRADS)
    assert (numbers["size"], numbers["limit"]) == (10.0, 0.0)
    assert numbers["clipped_fraction"] == 1.0
    nothing = jax.tree.map(jnp.zeros_like, GRADS)
    numbers = seen(clip(0.0, groupings.per_leaf()), nothing)
    assert (numbers["size"], numbers["clipped_fraction"]) == (0.0, 0.0)


def test_a_schedule_shows_its_value_as_it_is():
    falling = optax.linear_schedule(8.0, -1e-9, 2)
    tx = optclip.clip_by_global_norm(falling)
    assert seen(tx, GRADS)["limit"] == 8.0
    assert seen(tx, GRADS, GRADS)["limit"] == 4.0
    numbers = seen(tx, GRADS, GRADS, GRADS)
    assert numbers["limit"] == np.float32(-1e-9)
    assert (numbers["clipped_fraction"], numbers["clipped_steps"]) == (1.0, 3)


@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("grouping", "others_clipped"),
    [(groupings.whole(), 0), (groupings.per_leaf(), 0.5), (groupings.per_unit(), 0.5)],
    ids=["whole", "per_leaf", "per_unit"],
)
def test_a_step_that_is_not_finite(grouping, others_clipped, bad, nonfinite):
    """It shows in the size and in its own counter; only finite groups are clipped."""
    tx = clip(5.0, grouping, nonfinite=nonfinite)
    spoiled = {**GRADS, "b": jnp.array([0.0, bad])}
    numbers = seen(tx, GRADS, spoiled)
    np.testing.assert_equal(numbers["size"], bad)
    assert numbers["limit"] == 5.0
    assert numbers["clipped_fraction"] == others_clipped
    assert numbers["steps"] == 2
    assert numbers["clipped_steps"] == 1 + (others_clipped > 0)
    assert numbers["nonfinite_steps"] == 1
    # And the next step is clean again.
    numbers = seen(tx, GRADS, spoiled, GRADS)
    assert numbers["nonfinite_steps"] == 1 and np.isfinite(numbers["size"])


def test_a_size_that_float32_cannot_hold_counts_as_not_finite():
    numbers = seen(clip(5.0), {"a": jnp.full(4, 3e38)})
    assert (numbers["size"], numbers["nonfinite_steps"]) == (np.inf, 1)
    numbers = seen(clip(5.0), {"a": jnp.full(4, 1e38)})
    assert numbers["size"] == pytest.approx(2e38)
    assert (numbers["clipped_steps"], numbers["nonfinite_steps"]) == (1, 0)


def test_counters_count_and_stop_at_the_largest_integer():
    tx = untyped(clip(5.0))
    small = jax.tree.map(lambda x: 0.1 * x, GRADS)
    numbers = seen(tx, GRADS, small, GRADS, small, small)
    assert [numbers[name] for name in SHRINKING[3:]] == [5, 2, 0]
    assert numbers["clipped_fraction"] == 0.0  # of the last step
    state = tx.init(GRADS)
    last = jnp.iinfo(jnp.int32).max
    full = {name: jnp.int32(last) for name in SHRINKING[3:]}
    state = state._replace(metrics=state.metrics._replace(**full))
    numbers = seen(tx, GRADS, state=state)
    assert [numbers[name] for name in SHRINKING[3:]] == [last] * 3


def test_without_groups_only_steps_count():
    for updates in ({}, {"n": jnp.arange(3)}):
        for grouping in (groupings.per_unit(), groupings.per_element()):
            assert seen(clip(1.0, grouping), updates, updates)["steps"] == 2
        numbers = seen(clip(1.0), updates)
        assert (numbers["size"], numbers["clipped_steps"]) == (0.0, 0)


# Finding them.


def one():
    return optclip.clip_by_global_norm(5.0)


LABELS = {"a": "x", "b": "y"}
HOLDERS = {
    "alone": (one(), [""]),
    "chain": (optax.chain(optax.scale(1.0), one(), optax.sgd(0.1)), ["1/"]),
    "nested chains": (
        optax.chain(optax.chain(one(), optax.adam(0.1)), one()), ["0/0/", "1/"],
    ),
    "two alike": (optax.chain(one(), one()), ["0/", "1/"]),
    "named_chain": (
        optax.named_chain(("first", one()), ("sgd", optax.sgd(0.1)), ("last", one())),
        ["first/", "last/"],
    ),
    "masked": (optax.masked(one(), {"a": True, "b": False}), ["inner_state/"]),
    "partition": (
        optax.partition({"x": one(), "y": optax.chain(optax.sgd(0.1), one())}, LABELS),
        ["inner_states/x/inner_state/", "inner_states/y/inner_state/1/"],
    ),
    "MultiSteps": (
        optax.MultiSteps(one(), 1).gradient_transformation(), ["inner_opt_state/"],
    ),
    "inject_hyperparams": (
        optax.inject_hyperparams(optclip.clip_by_global_norm)(max_norm=5.0),
        ["inner_state/"],
    ),
    "apply_if_finite": (optax.apply_if_finite(one(), 3), ["inner_state/"]),
    "none": (optax.adam(0.1), []),
    "flat": (optax.chain(optclip.clip_by_value(1.0), optax.clip(1.0)), []),
}  # fmt: skip


@pytest.fixture
def standard():
    """Optax's counters meet floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize(("tx", "prefixes"), HOLDERS.values(), ids=HOLDERS)
def test_found_wherever_it_hangs(tx, prefixes, standard):
    update = jax.jit(lambda g, s: (lambda s: (s, metrics(s)))(tx.update(g, s, g)[1]))
    state, inside_jit = update(GRADS, tx.init(GRADS))
    found = metrics(state)
    assert list(found) == [prefix + field for prefix in prefixes for field in SHRINKING]
    for prefix in prefixes:
        assert found[prefix + "steps"] == 1
        assert found[prefix + "limit"] == 5.0
    chex.assert_trees_all_equal(inside_jit, found)
    dotted = [key.replace("/", ".") for key in found]
    assert list(metrics(state, separator=".")) == dotted


def test_each_clip_of_a_chain_reports_what_it_saw():
    tx = optax.chain(clip(5.0), optax.scale(2.0), clip(4.0, groupings.per_leaf()))
    _, state = tx.update(GRADS, tx.init(GRADS))
    found = metrics(state)
    assert found["0/size"] == pytest.approx(104**0.5)
    assert found["2/size"] == pytest.approx(2 * 5 * 10 / 104**0.5)
    assert (found["0/limit"], found["2/limit"]) == (5.0, 4.0)
    assert (found["0/clipped_fraction"], found["2/clipped_fraction"]) == (1.0, 0.5)


def test_a_name_may_hold_the_separator_of_others():
    """Names are joined, never split: what a user called a part comes out whole."""
    tx = optax.named_chain(("clip/first", one()))
    assert "clip/first/size" in metrics(tx.init(GRADS))
    assert "clip/first.size" in metrics(tx.init(GRADS), separator=".")


def test_names_that_spell_alike_are_told_apart():
    inner = optax.named_chain(("first", clip(4.0)))
    state = optax.named_chain(("clip/first", one()), ("clip", inner)).init(GRADS)
    found = metrics(state)
    assert len(found) == 2 * len(SHRINKING)
    assert {key for key in found if key.endswith("size")} == {
        "['clip/first'].size", "['clip']['first'].size",
    }  # fmt: skip


# Short names.

OURS = {
    "alone": (one(), [""]),
    "chain": (optax.chain(optax.scale(1.0), one(), optax.sgd(0.1)), [""]),
    "nested": (optax.chain(optax.chain(optax.masked(one(), True))), [""]),
    "MultiSteps": (optax.MultiSteps(one(), 1).gradient_transformation(), [""]),
    "inject_hyperparams": (
        optax.inject_hyperparams(optclip.clip_by_global_norm)(max_norm=5.0), [""],
    ),
    "named_chain": (
        optax.named_chain(("first", one()), ("sgd", optax.sgd(0.1)), ("last", one())),
        ["first/", "last/"],
    ),
    "chain in named_chain": (
        optax.named_chain(("only", optax.chain(optax.scale(1.0), one()))), ["only/"],
    ),
    "partition": (
        optax.partition({"x": one(), "y": optax.chain(optax.sgd(0.1), one())}, LABELS),
        ["x/", "y/"],
    ),
    "none": (optax.sgd(0.1), []),
}  # fmt: skip


@pytest.mark.parametrize(("tx", "prefixes"), OURS.values(), ids=OURS)
def test_short_names_are_those_that_users_gave(tx, prefixes):
    """So that a dashboard's keys outlive a change of the chain."""
    state = tx.init(GRADS)
    wanted = [prefix + field for prefix in prefixes for field in SHRINKING]
    assert list(metrics(state, short=True)) == wanted
    assert list(metrics(state).values()) == list(metrics(state, short=True).values())
    dotted = [key.replace("/", ".") for key in wanted]
    assert list(metrics(state, separator=".", short=True)) == dotted


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(one(), optax.sgd(0.1), one()),
        optax.named_chain(("all", optax.chain(one(), one()))),
        optclip.skip_step(one(), 1.0),
    ],
    ids=["chain", "named_chain", "a clip in skip_step"],
)
def test_short_names_never_hide_one_of_two(tx):
    with pytest.raises(
        ValueError, match=r"^metrics: short must be False where keys of"
    ):
        metrics(tx.init(GRADS), short=True)


def test_short_names_of_skip_step():
    state = optclip.skip_step(optax.sgd(0.1), 1.0, value_threshold=2.0).init(GRADS)
    own = ["skipped_steps", "consecutive_skips"]
    loss = [f"value_watch/{field}" for field in SHRINKING]
    assert list(metrics(state, short=True)) == [*SHRINKING, *loss, *own]


def test_in_a_linen_train_state():
    tx = untyped(optax.chain(one(), optax.sgd(0.1)))
    state = TrainState.create(apply_fn=None, params=GRADS, tx=tx)
    state = state.apply_gradients(grads=GRADS)
    assert metrics(state.opt_state)["0/size"] == pytest.approx(104**0.5)
    assert list(metrics(state)) == [f"opt_state/0/{field}" for field in SHRINKING]


@pytest.mark.parametrize("wrapped", [False, True], ids=["chain", "masked in chain"])
def test_in_an_nnx_optimizer(wrapped):
    """Whose opt_state wraps every leaf in a Variable; plain arrays come out."""
    tx = optax.masked(one(), optclip.mask("kernel")) if wrapped else one()
    model = nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(tx, optax.sgd(0.1)), wrt=nnx.Param)

    def step(model, optimizer):
        grads = nnx.grad(lambda m: 6.0 * jnp.sum(m(jnp.ones((1, 2)))))(model)
        optimizer.update(model, grads)
        return metrics(optimizer.opt_state)

    prefix = "0/inner_state/" if wrapped else "0/"
    for found in (
        step(model, optimizer), nnx.jit(step)(model, optimizer),
        metrics(optimizer.opt_state),
    ):  # fmt: skip
        assert set(found) == {prefix + field for field in SHRINKING}
        assert all(isinstance(value, jax.Array) for value in found.values())
        assert found[prefix + "size"] == 12.0
    assert found[prefix + "steps"] == 2
    assert list(metrics(optimizer)) == [f"opt_state/{key}" for key in found]
    assert list(metrics(optimizer, short=True)) == list(SHRINKING)
    assert metrics(nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param).opt_state) == {}


def test_an_nnx_state_has_lost_the_types():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, one(), wrt=nnx.Param)
    with pytest.raises(ValueError, match=r"call metrics\(optimizer.opt_state\)"):
        metrics(nnx.state(optimizer))


@pytest.mark.parametrize(
    "nothing", [(), {}, None, optax.EmptyState(), [jnp.ones(2)]], ids=repr
)
def test_empty_where_there_is_no_clip(nothing):
    assert metrics(nothing) == {}


def test_a_vmapped_state_gives_a_number_for_each():
    tx = untyped(optclip.clip_by_global_norm(5.0))
    stacked = jax.tree.map(lambda x: jnp.stack([x, 0.1 * x]), GRADS)
    _, state = jax.vmap(lambda u: tx.update(u, None))(stacked)
    np.testing.assert_array_equal(metrics(state)["clipped_steps"], [1, 0])


@pytest.mark.parametrize("leaf", ["a", "b"])
def test_a_limit_of_nan_is_the_furthest_over(leaf):
    """It spoils its leaf, so that is what a dashboard must show."""
    limits = {"a": 1e-3, "b": 1e-3, leaf: lambda step: jnp.float32(jnp.nan)}
    tx = untyped(
        optclip.clip_by(thresholds.per_path(limits), grouping=groupings.per_leaf())
    )
    _, state = tx.update(GRADS, tx.init(GRADS))
    assert np.isnan(state.metrics.limit)
    assert state.metrics.size == {"a": 10, "b": 2}[leaf]
