"""What adaptive rules promise beside their equations (see `tests/oracles`).

Errors that name what the user wrote, idle groups that come back, histories that do not
clip what is constant, state of the promised size, and what each rule does to a shift.
"""

import functools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optclip
from optclip import groupings, measures, thresholds
from tests.laws.trees import in_x64
from tests.oracles import adaptive
from tests.untyped import untyped


def step_by_step(tx, stream, params=None):
    """The last state and the updates at every step, by a scan to be compiled."""
    start = tx.init(jax.tree.map(lambda x: x[0], stream))
    step = lambda state, updates: tx.update(updates, state, params)[::-1]  # noqa: E731
    return jax.lax.scan(step, start, stream)


def scanned(tx, stream, params=None):
    """The updates at every step and the last state, in one compiled scan."""
    last, outs = jax.jit(lambda stream: step_by_step(tx, stream, params))(stream)
    return jax.device_get(outs), jax.device_get(last)


def noisy(steps, seed=0, noise=0.1):
    """Norms around 1, as the single number of a leaf of shape (1,)."""
    rng = np.random.default_rng(seed)
    return np.exp(noise * rng.standard_normal((steps, 1))).astype(np.float32)


# Bad input.

SCALARS = {
    "autoclip": {
        "percentile": ("in [0, 100]", [101, -1.0, float("nan"), True, "10"]),
        "window": ("an integer of at least 2", [1, 0, 2.5, True, None]),
        "multiple": ("non-negative", [-1.0, float("nan"), "2"]),
    },
    "spike_clip": {
        "z": ("positive", [0, -3.0, float("nan"), True]),
        "window": ("an integer of at least 2", [1, 8.0]),
        "prior_spread": ("non-negative", [-0.1, float("nan")]),
        "prior_steps": ("non-negative", [-1, "8"]),
    },
    "zclip": {
        "z_threshold": ("positive", [0, -1.0, float("nan"), False]),
        "decay": ("in [0, 1)", [1.0, -0.1, float("nan"), 2]),
        "warmup_steps": ("an integer of at least 1", [0, -3, 2.0, True]),
        "mode": ("'reciprocal' or 'mean' or 'max'", ["median", "", None]),
        "max_norm": ("non-negative", [-1.0, float("nan"), True]),
        "eps": ("non-negative", [-1e-6, float("nan")]),
    },
    "adagc": {
        "relative": ("positive", [0.0, -1.0, float("nan"), "1"]),
        "absolute": ("positive", [0.0, -1.0, float("nan")]),
        "decay": ("in [0, 1)", [1.0, -0.5, float("nan")]),
        "warmup_steps": ("an integer of at least 1", [0, 1.0]),
    },
    "quantile_clip": {
        "quantile": ("in [0, 1]", [1.5, -0.1, float("nan"), 50]),
        "learning_rate": ("positive", [0.0, -0.2, float("nan")]),
    },
    "norm_growth_clip": {
        "gamma": ("in [1, inf]", [0.99, 0.0, -1.0, float("nan"), None]),
    },
    "second_moment_clip": {
        "theta": ("positive", [0.0, -1.0, float("nan")]),
        "decay": ("in [0, 1)", [1.0, -0.1]),
        "warmup_steps": ("an integer of at least 1", [0, 1.5]),
    },
    "adaptive_grad_clip": {
        "clipping": ("non-negative", [-0.01, float("nan"), True]),
        "eps": ("non-negative", [-1e-3, float("nan")]),
    },
}
NONSENSE = [
    pytest.param(rule, name, wanted, value, id=f"{rule}-{name}-{value}")
    for rule, arguments in SCALARS.items()
    for name, (wanted, values) in arguments.items()
    for value in values
]


@pytest.mark.parametrize(("rule", "name", "wanted", "value"), NONSENSE)
def test_nonsense_is_named(rule, name, wanted, value):
    """The function that the user called, the parameter, the rule and the value."""
    shown = value if isinstance(value, float | int) else repr(value)
    message = f"{rule}: {name} must be {wanted}, got {shown}."
    if value is None and rule == "norm_growth_clip":
        message = f"{rule}: {name} must be"
    if isinstance(value, bool) or wanted == "non-negative":
        message = f"{rule}: {name} must be"
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(optclip, rule)(**{name: value})


THRESHOLDS = {
    "percentile": ("percentile", 101),
    "robust": ("z", 0),
    "zscore": ("z_threshold", 0),
    "ema_multiple": ("multiple", 0),
    "online_quantile": ("quantile", 2),
    "growth": ("gamma", 0.5),
    "second_moment": ("theta", 0),
    "relative_to_params": ("ratio", -1.0),
}


@pytest.mark.parametrize("name", THRESHOLDS)
def test_a_threshold_names_itself(name):
    argument, value = THRESHOLDS[name]
    with pytest.raises(ValueError, match=rf"^{name}: {argument} must be .*got {value}"):
        getattr(thresholds, name)(**{argument: value})


EDGES = [
    ("autoclip", {"percentile": 0}),
    ("autoclip", {"percentile": 100.0, "window": 2, "multiple": 0.0}),
    ("spike_clip", {"window": 2, "prior_spread": 0.0, "prior_steps": 0.0}),
    ("zclip", {"decay": 0.0, "warmup_steps": 1, "eps": 0.0, "max_norm": 0.0}),
    ("adagc", {"decay": 0, "warmup_steps": 1, "relative": 0.5}),
    ("quantile_clip", {"quantile": 0.0}),
    ("quantile_clip", {"quantile": 1}),
    ("norm_growth_clip", {"gamma": 1}),
    ("second_moment_clip", {"decay": 0.0, "warmup_steps": 1}),
    ("adaptive_grad_clip", {"clipping": 0.0, "eps": 0.0}),
]


@pytest.mark.parametrize(("rule", "arguments"), EDGES)
def test_the_ends_of_ranges_are_allowed(rule, arguments):
    updates = {"w": jnp.ones((2, 2))}
    tx = getattr(optclip, rule)(**arguments)
    out, _ = jax.jit(lambda u: tx.update(u, tx.init(u), u))(updates)
    assert np.all(np.isfinite(out["w"]))


def test_agc_needs_parameters():
    updates = {"w": jnp.ones(2), "b": jnp.ones(2)}
    tx = optclip.adaptive_grad_clip()
    state = tx.init(updates)
    with pytest.raises(ValueError, match=r"^adaptive_grad_clip: params must be .*None"):
        tx.update(updates, state)
    with pytest.raises(
        ValueError, match=r"^adaptive_grad_clip: params must have every .*'b'"
    ):
        tx.update(updates, state, {"w": jnp.ones(2)})


def test_agc_takes_axes_or_a_grouping():
    with pytest.raises(
        ValueError, match=r"^adaptive_grad_clip: axis must be None beside .*got 0\."
    ):
        optclip.adaptive_grad_clip(axis=0, grouping=groupings.per_leaf())
    with pytest.raises(
        ValueError, match=r"^adaptive_grad_clip: axes must exist .* got 1 .*'b'"
    ):
        optclip.adaptive_grad_clip(axis=1).init(
            {"a": jnp.ones((2, 2)), "b": jnp.ones(2)}
        )


# Histories.


@functools.cache
def constant_run(window):
    """(percentile, stream) to updates and state, compiled once."""

    @jax.jit
    def run(percentile, stream):
        return step_by_step(optclip.autoclip(percentile, window), stream)

    return run


@pytest.mark.parametrize("percentile", [0.0, 10.0, 37.3, 50.0, 99.9, 100.0])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 7e-31, 3e37])
def test_a_constant_history_never_clips(percentile, value):
    """Bit for bit, while the window fills and after."""
    one = np.array([0.3, -1.0, 0.7], np.float32) * np.float32(value)
    stream = np.tile(one, (25, 1))
    state, outs = jax.device_get(constant_run(9)(np.float32(percentile), stream))
    assert outs.tobytes() == stream.tobytes()
    assert state.metrics.clipped_steps == 0


def test_a_history_that_rises_clips():
    stream = np.linspace(1, 2, 25, dtype=np.float32)[:, None]
    outs, state = scanned(optclip.autoclip(90.0, window=9), stream)
    assert state.metrics.clipped_steps == 24
    assert np.all(outs[1:] < stream[1:])


TREE = {"a/bias": (3,), "a/kernel": (4, 3), "b/kernel": (2, 5)}
LABELS = groupings.per_label(lambda path: path[0])
SIZES = {  # of the histories, all groups together
    "whole": (groupings.whole(), [(7, 1)]),
    "per_leaf": (groupings.per_leaf(), [(7, 3)]),
    "per_label": (LABELS, [(7, 2)]),
    "per_unit": (groupings.per_unit(), [(7, 1), (7, 1, 3), (7, 1, 5)]),
}


@pytest.mark.parametrize(("grouping", "shapes"), SIZES.values(), ids=SIZES)
def test_autoclip_keeps_window_times_groups(grouping, shapes):
    tx = optclip.autoclip(window=7, grouping=grouping)
    params = {path: jnp.ones(shape) for path, shape in TREE.items()}
    state = jax.eval_shape(tx.init, params)
    leaves = jax.tree.leaves(state.threshold)
    counters = [x for x in leaves if x.dtype == jnp.int32]
    histories = [x for x in leaves if x.dtype == jnp.float32]
    assert [x.shape for x in histories] == shapes
    assert [x.shape for x in counters] == [shape[1:] for shape in shapes]
    assert len(counters) + len(histories) == len(leaves)


SCALARS_A_GROUP = {
    "zclip": 3,
    "adagc": 2,
    "quantile_clip": 1,
    "norm_growth_clip": 1,
    "second_moment_clip": 1,
}


@pytest.mark.parametrize("rule", SCALARS_A_GROUP)
@pytest.mark.parametrize("grouping", [groupings.whole(), groupings.per_leaf()])
def test_others_keep_a_few_scalars(rule, grouping):
    tx = getattr(optclip, rule)(grouping=grouping)
    params = {path: jnp.ones(shape) for path, shape in TREE.items()}
    state = jax.eval_shape(tx.init, params)
    groups = 3 if grouping.named else 1
    leaves = jax.tree.leaves(state.threshold)
    assert [x.shape for x in leaves] == SCALARS_A_GROUP[rule] * [(groups,)]


# Idle groups.

LEARNING = {
    "autoclip": lambda **o: optclip.autoclip(50.0, window=20, **o),
    "spike_clip": lambda **o: optclip.spike_clip(**o),
    "zclip": lambda **o: optclip.zclip(**o),
    "zclip-mean": lambda **o: optclip.zclip(mode="mean", **o),
    "zclip-max": lambda **o: optclip.zclip(mode="max", **o),
    "adagc": lambda **o: optclip.adagc(absolute=100.0, **o),
    "quantile_clip": lambda **o: optclip.quantile_clip(**o),
    "norm_growth_clip": lambda **o: optclip.norm_growth_clip(**o),
    "second_moment_clip": lambda **o: optclip.second_moment_clip(**o),
}

# One of each; the modes of zclip learn alike.
ONCE = [rule for rule in LEARNING if "-" not in rule]


@pytest.mark.parametrize("busy", [0, 60], ids=lambda n: f"after {n}")
@pytest.mark.parametrize("rule", LEARNING)
def test_an_idle_leaf_is_never_locked_at_zero(rule, busy):
    """200 steps of zeros, from the start or later; then it moves as before."""
    level = np.ones((busy + 200 + 60, 1), np.float32)
    level[busy : busy + 200] = 0
    stream = {"idle": noisy(len(level)) * level, "other": noisy(len(level), seed=1)}
    tx = LEARNING[rule](grouping=groupings.per_leaf())
    outs, _ = scanned(tx, stream)
    back = slice(busy + 200, None)
    assert not outs["idle"][busy : busy + 200].any()
    assert np.all(outs["idle"][back] > 0.5 * stream["idle"][back])
    assert np.mean(outs["idle"][back] / stream["idle"][back]) > 0.8


def test_an_empty_step_teaches_adagc_nothing():
    """Neither the minimum of the warm-up nor the average after it."""
    norms = [0.7, 0.0, 0.8, 0.7, 0.0, 0.73]
    stream = np.array(norms, np.float32)[:, None]
    outs, state = scanned(optclip.adagc(1.05, warmup_steps=3), stream)
    np.testing.assert_array_equal(outs, stream)
    average = 0.98 * 0.7 + 0.02 * 0.73
    np.testing.assert_allclose(state.threshold.average, [average], rtol=1e-6)


# Non-finite groups.


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
def test_a_bad_leaf_leaves_adagc_s_others_alone(bad, nonfinite):
    """In the warm-up too, whose limit is one for all leaves."""
    tx = optclip.adagc(warmup_steps=3, nonfinite=nonfinite)
    alone, _ = scanned(tx, {"b": noisy(9, noise=0.5)})
    stream = {"a": 0 * noisy(9), "b": noisy(9, noise=0.5)}
    stream["a"][[0, 2, 5]] = bad
    outs, state = scanned(tx, stream)
    np.testing.assert_allclose(outs["b"], alone["b"], rtol=1e-6)
    spoilt = np.isnan(outs["a"]) if nonfinite == "propagate" else outs["a"] == 0
    assert np.all(spoilt[[0, 2, 5]])
    assert np.all(np.isfinite(state.threshold.average))
    assert state.metrics.nonfinite_steps == 3


@pytest.mark.parametrize("rule", ONCE)
def test_goes_on_after_bad_steps(rule):
    """As if they had not been there: from the first step on, and all of them."""
    good = noisy(80, noise=0.5)
    bad = np.insert(good, [0, 0, 1, 30, 30, 60], np.float32(np.nan), axis=0)
    bad[np.isnan(bad)] = [np.nan, np.inf, -np.inf, np.nan, np.inf, np.nan]
    wanted, _ = scanned(LEARNING[rule](), good)
    outs, _ = scanned(LEARNING[rule](nonfinite="zero"), bad)
    if rule == "second_moment_clip":  # whose youth is counted in steps of any kind
        wanted, outs = wanted[30:], outs[33:]
        bad = bad[33:]
    np.testing.assert_allclose(outs[np.isfinite(bad)], wanted.ravel(), rtol=1e-6)


# Groups.


def spiky(seed=3, steps=60):
    """A tree's stream, each leaf with spikes of its own."""
    rng = np.random.default_rng(seed)
    tree = {}
    for path, shape in TREE.items():
        size = np.exp(0.3 * rng.standard_normal(steps))
        size[rng.integers(0, steps, 3)] *= 20
        x = rng.standard_normal((steps, *shape))
        tree[path] = (x * size.reshape(-1, *(1,) * len(shape))).astype(np.float32)
    return tree


GROUP_RULES = {
    **LEARNING,
    # A limit of the whole, which a group alone does not know, out of reach.
    "adagc": lambda **o: optclip.adagc(absolute=1e6, warmup_steps=20, **o),
}


@pytest.mark.parametrize("rule", ONCE)
def test_each_label_and_unit_is_on_its_own(rule):
    """A group's updates are those of the rule on the group alone."""
    stream, build = spiky(), GROUP_RULES[rule]
    outs, _ = scanned(build(grouping=LABELS), stream)
    part = {path: x for path, x in stream.items() if path[0] == "a"}
    alone, _ = scanned(build(grouping=groupings.whole()), part)
    for path in part:
        np.testing.assert_allclose(outs[path], alone[path], rtol=1e-5)

    kernel = {"kernel": stream["a/kernel"]}
    outs, _ = scanned(build(grouping=groupings.per_unit()), kernel)
    column = {"column": kernel["kernel"][..., 1]}
    alone, _ = scanned(build(grouping=groupings.whole()), column)
    np.testing.assert_allclose(outs["kernel"][..., 1], alone["column"], rtol=1e-5)
    assert np.any(np.abs(alone["column"]) < 0.9 * np.abs(kernel["kernel"][..., 1]))


SCALE_FREE = {  # for gradients in any unit
    "autoclip": lambda unit, g: optclip.autoclip(50.0, window=20, grouping=g),
    "spike_clip": lambda unit, g: optclip.spike_clip(grouping=g),
    "zclip": lambda unit, g: optclip.zclip(warmup_steps=2, eps=0.0, grouping=g),
    "adagc": lambda unit, g: optclip.adagc(absolute=unit, warmup_steps=5, grouping=g),
    "quantile_clip": lambda unit, g: optclip.quantile_clip(grouping=g),
    "norm_growth_clip": lambda unit, g: optclip.norm_growth_clip(grouping=g),
    "second_moment_clip": lambda unit, g: optclip.second_moment_clip(
        9.0, 0.9, warmup_steps=2, grouping=g
    ),
    "adaptive_grad_clip": lambda unit, g: optclip.adaptive_grad_clip(
        0.5, 2 * unit, grouping=g
    ),
}
# At 2^-83, about 1e-25, squares vanish; at 2^100 they overflow.
POWERS = (-100, -83, -50, 83, 100)


@pytest.mark.parametrize("grouping", ["whole", "per_leaf", "per_unit"])
@pytest.mark.parametrize("rule", SCALE_FREE)
def test_the_unit_of_gradients_does_not_matter(rule, grouping):
    """From the first limits on, which have to be learned. Powers of two are exact."""
    stream = {path: x for path, x in spiky(steps=40).items() if path[0] == "a"}
    for x in stream.values():
        x[1:3] = [x[0], 1000 * x[0]]  # a spike under a limit that has seen two steps
    params = {path: np.ones_like(x[0]) for path, x in stream.items()}

    @jax.jit
    def run(unit):
        scaled, weights = jax.tree.map(lambda x: x * unit, (stream, params))
        tx = SCALE_FREE[rule](unit, getattr(groupings, grouping)())
        last, outs = step_by_step(tx, scaled, weights)
        return last, jax.tree.map(lambda x: x / unit, outs)

    state, wanted = jax.device_get(run(np.float32(1.0)))
    assert state.metrics.clipped_steps > 0
    for path, x in stream.items():
        assert np.all(np.abs(wanted[path][2]) < 100 * np.abs(x[0]))
    # Parameters whose squares vanish count as zero for AGC: its eps is far above them.
    powers = POWERS[2:] if rule == "adaptive_grad_clip" else POWERS
    for power in powers:
        _, outs = jax.device_get(run(np.float32(2.0**power)))
        for path in stream:
            # The logarithm of 2^100 has fewer digits after its point.
            np.testing.assert_allclose(outs[path], wanted[path], rtol=1e-4)


# Single rules.


def test_a_ceiling_beside_a_rule_is_never_exceeded():
    """And the rule goes on learning as it does without one.

    In float64: a deviation is a difference, and in float32 two programs round its mean
    differently.
    """
    stream = noisy(300, noise=0.4).astype(np.float64)
    stream[[50, 120]] *= 100
    stream[200:] *= 5
    ceiling = 1.2
    with in_x64(stream.dtype):
        tx = optclip.clip_by(
            thresholds.tightest(thresholds.zscore(), thresholds.constant(ceiling))
        )
        outs, state = scanned(tx, stream)
        alone, alone_state = scanned(optclip.zclip(), stream)
        with_argument, _ = scanned(optclip.zclip(max_norm=ceiling), stream)
    assert outs.dtype == np.float64
    assert outs.max() <= ceiling * (1 + 4 * np.finfo(np.float64).eps)
    assert alone.max() > 1.5 * ceiling
    np.testing.assert_allclose(outs, np.minimum(alone, ceiling), rtol=1e-12)
    chex.assert_trees_all_close(state.threshold[0], alone_state.threshold, rtol=1e-12)
    np.testing.assert_array_equal(with_argument, outs)


def test_ceilings_and_ratios_follow_schedules():
    falling = optax.linear_schedule(1.0, 0.0, 4)
    stream = np.ones((5, 1), np.float32)
    outs, _ = scanned(optclip.zclip(max_norm=falling), stream)
    np.testing.assert_allclose(outs.ravel(), [1.0, 0.75, 0.5, 0.25, 0.0], atol=1e-7)
    tx = optclip.adaptive_grad_clip(falling)
    outs, _ = scanned(tx, stream, np.full(1, 0.5, np.float32))
    np.testing.assert_allclose(outs.ravel(), [0.5, 0.375, 0.25, 0.125, 0.0], atol=1e-7)


def test_a_size_at_the_quantile_lies_below_it():
    """So a constant size lowers its estimate: 1[size <= C] in the paper."""
    _, state = scanned(optclip.quantile_clip(0.5, 0.2), np.ones((2, 1), np.float32))
    (estimate,) = jax.tree.leaves(state.threshold)
    np.testing.assert_allclose(estimate, [np.exp(-0.1)], rtol=1e-6)


def test_second_moment_waits_until_it_knows():
    """Young, it clips nothing, and an element without a past never."""
    stream = np.ones((40, 3), np.float32)
    stream[19, 0] = 1e4  # the last young step
    stream[20, 1] = 1e4  # the first one after
    stream[:30, 2] = 0  # no past
    stream[30, 2] = 1e4
    outs, _ = scanned(optclip.second_moment_clip(), stream)
    want = stream.astype(np.float64)
    second = 1 - 0.999**20  # of twenty ones
    want[20, 1] = np.sqrt(5000 * second)
    np.testing.assert_allclose(outs, want, rtol=1e-5)


# Steps until 0.9 of a new level passes on average of ten, of 500; None for never. As in
# the measurements that the documentation cites.
SHIFTS = {
    "spike_clip": (optclip.spike_clip(), 30),
    "zclip": (optclip.zclip(), None),
    "zclip-mean": (optclip.zclip(mode="mean"), None),
    "zclip-max": (optclip.zclip(mode="max"), 100),
    "adagc": (optclip.adagc(), None),
    "autoclip": (optclip.autoclip(50.0, window=100), 100),
    "scaled_adam": (optclip.autoclip(50.0, window=100, multiple=2.0), 101),
    "quantile_clip": (optclip.quantile_clip(), 60),
    "norm_growth_clip": (optclip.norm_growth_clip(), 300),
}


@pytest.mark.parametrize("rule", SHIFTS)
def test_recovery_from_a_permanent_shift(rule):
    """×10 after 1000 steps: which rules lock in, and which follow."""
    tx, within = SHIFTS[rule]
    stream = 1 + 0.1 * np.random.default_rng(0).standard_normal((1500, 1))
    stream[1000:] *= 10
    outs, _ = scanned(tx, stream.astype(np.float32))
    late = outs[-100:].mean() / stream[-100:].mean()
    if within is None:
        assert late < 0.5
        return
    share = outs[1000 + within :].mean() / stream[1000 + within :].mean()
    assert share > 0.85
    assert outs[1000] < 0.5 * stream[1000]  # it was clipped at first


# What holds for every transform, here for those that learn.

FROM = {
    "float32": lambda: mixed(jnp.float32),
    "float16": lambda: mixed(jnp.float16),
    "float64": lambda: mixed(jnp.float64),
    "complex64": lambda: mixed(jnp.complex64),
    "empty": dict,
}
GROUPED = {"joint": groupings.per_leaf(), "within": groupings.per_unit()}


def mixed(dtype):
    """Leaves of two dtypes, and of kinds that nothing measures."""
    return {
        "kernel": jnp.full((4, 3), 0.5, dtype),
        "bias": jnp.full(3, 2.0, jnp.bfloat16),
        "count": jnp.arange(3),
        "none": None,
        "masked": optax.MaskedNode(),
        "empty": jnp.zeros((0, 2)),
    }


def types(state):
    leaves = [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(state)]
    return jax.tree.structure(state), leaves


@pytest.mark.parametrize(
    ("grouping", "kind"),
    [*(("joint", kind) for kind in FROM), ("within", "float32"), ("within", "float64")],
)
@pytest.mark.parametrize("rule", ONCE)
def test_types_are_fixed_at_init(rule, grouping, kind):
    """Of the state and of the updates, without running anything."""
    tx = LEARNING[rule](grouping=GROUPED[grouping])
    with in_x64(np.float64 if kind == "float64" else np.float32):
        updates = FROM[kind]()
        start = jax.eval_shape(tx.init, updates)
        out, after = jax.eval_shape(tx.update, updates, start)
        assert types(start) == types(after)
        assert all(x.size > 0 for x in jax.tree.leaves(start))
        chex.assert_trees_all_equal_shapes_and_dtypes(out, updates)
        wide = {x.dtype for x in jax.tree.leaves(start.threshold)} - {np.dtype("int32")}
        if kind != "empty":
            assert wide == {np.dtype("float64" if kind == "float64" else "float32")}


@pytest.mark.parametrize("rule", ONCE)
def test_leaves_of_all_kinds(rule):
    """One factor a leaf, rounded once; what has no size passes untouched."""
    tx = LEARNING[rule](grouping=groupings.per_leaf())
    small = mixed(jnp.complex64)
    state, update = tx.init(small), jax.jit(tx.update)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)
    for _ in range(30):
        _, state = update(small, state)
    large = {**small, "kernel": small["kernel"] * 1e4, "bias": small["bias"] * 1e4}
    out, state = update(large, state)
    for name in ("kernel", "bias"):
        ratio = np.asarray(out[name]) / np.asarray(large[name])
        assert 0 < ratio.ravel()[0].real < 0.1
        np.testing.assert_allclose(ratio, ratio.ravel()[0], rtol=1e-6)
    chex.assert_trees_all_equal(out["count"], small["count"])
    assert out["none"] is None
    assert state.metrics.clipped_fraction == 1


@pytest.mark.parametrize("rule", ONCE)
def test_derivatives_are_finite(rule):
    """Through four steps and what they taught, at zero gradients too."""
    tx = LEARNING[rule](**{"warmup_steps": 2} if rule == "zclip" else {})

    @jax.jit
    @jax.grad
    def derivative(stream):
        _, outs = step_by_step(tx, stream)
        return jnp.sum(outs * jnp.arange(1.0, 1.0 + outs.size).reshape(outs.shape))

    stream = noisy(8).repeat(2, axis=1)
    factors = ([1] * 8, [0] * 8, [1, 0, 1, 50, 0, 1, 1, 90], [0, 0, 1, 1, 1, 9, 1, 1])
    for factor in factors:
        scaled = stream * np.array(factor, np.float32)[:, None]
        assert np.all(np.isfinite(derivative(scaled))), factor


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize(
    ("rule", "grouping"),
    [
        ("adagc", "whole"),
        ("adagc", "per_leaf"),  # with the size of the whole beside the leaves'
        ("adagc", "per_unit"),
        ("zclip", "whole"),
        ("spike_clip", "per_leaf"),
        ("autoclip", "per_unit"),
    ],
)
def test_shards_learn_what_the_whole_would(rule, grouping):
    """Inside `shard_map`, from sharded and replicated leaves, in every warm-up."""
    rng = np.random.default_rng(0)
    size = np.where(np.arange(12) == 9, 50, 1).astype(np.float32)
    stream = {
        "sharded": rng.standard_normal((12, 4, 16)) * size[:, None, None],
        "replicated": rng.standard_normal((12, 3)) * size[:, None],
    }
    stream = {path: x.astype(np.float32) for path, x in stream.items()}
    build = {
        "autoclip": lambda **o: optclip.autoclip(50.0, window=5, **o),
        "spike_clip": optclip.spike_clip,
        "zclip": lambda **o: optclip.zclip(warmup_steps=4, **o),
        "adagc": lambda **o: optclip.adagc(absolute=3.0, warmup_steps=4, **o),
    }[rule]
    plain = build(grouping=getattr(groupings, grouping)())
    want, state = scanned(plain, stream)
    assert state.metrics.clipped_steps > 0
    # Units lie along the sharded axis, each of them on one device.
    axes = {"axis_name": ()} if grouping == "per_unit" else {}
    tx = build(grouping=getattr(groupings, grouping)(), **axes)
    spec = jax.sharding.PartitionSpec
    specs = {"sharded": spec(None, None, "data"), "replicated": spec()}

    def run(stream):
        return step_by_step(tx, stream)[1]

    auto = (jax.sharding.AxisType.Auto,)
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=auto)):
        mapped = jax.shard_map(run, in_specs=(specs,), out_specs=specs)
        outs = jax.device_get(jax.jit(mapped)(stream))
    chex.assert_trees_all_close(outs, want, rtol=1e-5)


# Optax and Flax around it.

INJECTED = {
    "autoclip": ({"percentile": 50.0, "multiple": 1.5}, {"window": 5}),
    "spike_clip": (
        {"z": 0.5, "prior_spread": 0.4, "prior_steps": 2.0},
        {"window": 5},
    ),
    "zclip": (
        {"z_threshold": 0.5, "decay": 0.9, "eps": 0.3, "max_norm": 1.6},
        {"warmup_steps": 3, "mode": "reciprocal"},
    ),
    "adagc": (
        {"relative": 1.2, "absolute": 0.5, "decay": 0.9},
        {"warmup_steps": 2},
    ),
    "quantile_clip": ({"quantile": 0.6, "learning_rate": 0.1}, {}),
    "norm_growth_clip": ({"gamma": 2.2}, {}),
    "second_moment_clip": ({"theta": 4.0, "decay": 0.5}, {"warmup_steps": 2}),
    "adaptive_grad_clip": ({"clipping": 0.1, "eps": 2.0}, {"axis": None}),
}


@pytest.mark.parametrize("rule", INJECTED)
def test_inject_hyperparams(rule):
    """Every number lives in the state, and another one takes effect."""
    factory = getattr(optclip, rule)
    numbers, structural = INJECTED[rule]
    params = np.full(3, 0.7, np.float32)
    stream = np.random.default_rng(0).standard_normal((12, 3)).astype(np.float32)

    build = optax.inject_hyperparams(factory, static_args=tuple(structural))
    tx = untyped(build(**numbers, **structural))

    @jax.jit
    def run(state):
        step = lambda s, u: tx.update(u, s, params)[::-1]  # noqa: E731
        return jax.lax.scan(step, state, stream)[1]

    def injected(**changed):
        state = tx.init(params)
        assert set(numbers) <= set(state.hyperparams)
        for name, value in changed.items():
            state.hyperparams[name] = jnp.asarray(value, jnp.float32)
        return jax.device_get(run(state))

    halves = {name: value / 2 for name, value in numbers.items()}
    with jax.numpy_dtype_promotion("standard"):  # which Optax's counters need
        out, halved = injected(), injected(**halves)
        others = {name: injected(**{name: value}) for name, value in halves.items()}
    for got, arguments in ((out, numbers), (halved, halves)):
        want, _ = scanned(factory(**arguments, **structural), stream, params)
        np.testing.assert_allclose(got, want, rtol=1e-5)
    for name, other in others.items():
        assert not np.allclose(other, out, rtol=1e-3), name


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(6, name="body")(x))
        return nn.Dense(3, name="head")(x)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.body = nnx.Linear(4, 6, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.body(x)))


# The paper's choice: of the last layer the weights, not the bias, stay unclipped.
BUT_HEAD = r"^(?!head/kernel)"


def check_exclusion(gradient, weight, moved):
    """All leaves by AGC's equation but the head's kernel, with a rate of 1."""
    for layer in ("body", "head"):
        for name in ("kernel", "bias"):
            g, w = (np.asarray(t[layer][name]) for t in (gradient, weight))
            want = g
            if (layer, name) != ("head", "kernel"):
                want = adaptive.agc(g, w, (1,) if name == "kernel" else (), 0.01)
                assert not np.allclose(want, g)
            got = np.asarray(weight[layer][name]) - np.asarray(moved[layer][name])
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def agc_but_head():
    clip = optax.masked(optclip.adaptive_grad_clip(), optclip.mask(BUT_HEAD))
    return optax.chain(clip, optax.sgd(1.0))


def loss_of(out):
    return 100 * jnp.mean(jnp.square(out - 1))


def test_agc_leaves_the_head_of_a_linen_model():
    model, x = Linen(), jax.random.normal(jax.random.key(1), (8, 4))
    params = model.init(jax.random.key(0), x)
    gradient = jax.grad(lambda p: loss_of(model.apply(p, x)))(params)
    tx = agc_but_head()
    updates, _ = jax.jit(tx.update)(gradient, tx.init(params), params)
    moved = untyped(optax.apply_updates(params, updates))
    check_exclusion(gradient["params"], params["params"], moved["params"])


def test_agc_leaves_the_head_of_an_nnx_model():
    model, x = Net(nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (8, 4))
    optimizer = nnx.Optimizer(model, agc_but_head(), wrt=nnx.Param)
    gradient = nnx.grad(lambda m: loss_of(m(x)))(model)
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    nnx.jit(lambda m, o, g: o.update(m, g) and None)(model, optimizer, gradient)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    check_exclusion(nnx.to_pure_dict(gradient), before, after)


@pytest.mark.parametrize(
    "params",
    [
        {"w": jnp.array([3]), "b": jnp.array([4.0])},
        {"w": jnp.array([3]), "b": jnp.array([4])},
        {"w": jnp.array([3.0]), "b": True},
    ],
)
@pytest.mark.parametrize("grouping", [groupings.whole(), groupings.per_unit()])
def test_parameters_without_a_magnitude_are_named(grouping, params):
    updates = {"w": jnp.array([3.0]), "b": jnp.array([4.0])}
    params["b"] = jnp.reshape(jnp.asarray(params["b"]), (1,))
    tx = optclip.clip_by(thresholds.relative_to_params(0.5), grouping=grouping)
    with pytest.raises(ValueError, match="params must be floating-point where"):
        tx.update(updates, tx.init(updates), params)


def test_an_infinite_share_of_zero_limits_nothing():
    share = thresholds.relative_to_params(np.inf, eps=0.0)
    ones = jnp.ones(2)
    out, _ = untyped(optclip.clip_by(share)).update(ones, None, jnp.zeros(2))
    np.testing.assert_array_equal(out, ones)
    later = thresholds.relative_to_params(
        lambda step: jnp.where(jnp.asarray(step) < 1, jnp.inf, 0.5), eps=0.0
    )
    tx = untyped(optclip.clip_by(later))
    out, state = tx.update(ones, None, jnp.zeros(2))
    np.testing.assert_array_equal(out, ones)
    out, _ = tx.update(ones, state, jnp.zeros(2))
    assert not out.any()


def test_adagc_without_a_clip_while_it_warms_up_has_derivatives():
    tx = optclip.adagc(absolute=np.inf)
    grads = jnp.array([3.0, 4.0])
    slope = jax.grad(lambda g: untyped(tx.update(g, tx.init(g))[0]).sum())(grads)
    np.testing.assert_array_equal(slope, [1, 1])


def test_the_warm_up_of_adagc_by_a_norm_of_many_powers():
    tx = untyped(optclip.adagc(measure=measures.lp(150)))
    out, _ = tx.update(jnp.array([4.0]), None)
    np.testing.assert_allclose(out, [1.0], rtol=1e-6)


def test_a_limit_that_overflows_has_derivatives():
    tx = optclip.spike_clip(z=10.0)

    def twice(first):
        _, state = tx.update(first, tx.init(first))
        return untyped(tx.update(first, state)[0]).sum() * 1e-30

    assert np.isfinite(jax.grad(twice)(jnp.array([1e38]))).all()


@pytest.mark.parametrize(
    "tx",
    [
        optclip.zclip(max_norm=1e39),
        optclip.clip_by_norm(lambda step: 1e39),
        optclip.clip_by(thresholds.tightest(thresholds.constant(1e39))),
        optclip.adaptive_grad_clip(1e39),
    ],
    ids=["zclip", "schedule", "tightest", "adaptive_grad_clip"],
)
def test_a_limit_beyond_float32_warns_of_nothing(tx):
    ones = jnp.ones((2, 2))
    out, state = tx.update(ones, tx.init(ones), ones)
    out, _ = tx.update(out, state, ones)
    np.testing.assert_array_equal(out, ones)


def test_no_state_where_some_parameters_have_no_update():
    ones = {"a": jnp.ones(2), "b": jnp.ones(3)}
    for tx in (optclip.zclip(grouping=groupings.per_leaf()), optclip.monitor(record=2)):
        out, _ = untyped(tx.update)({"a": jnp.ones(2), "b": None}, None, ones)
        np.testing.assert_array_equal(out["a"], ones["a"])


@pytest.mark.parametrize(
    ("stacked", "says"), [(-1, "at least 0"), ("[", "regular expression")]
)
def test_stacked_is_checked(stacked, says):
    for name in ("per_unit", "per_matrix"):
        with pytest.raises(ValueError, match=f"{name}: stacked must be .*{says}"):
            getattr(groupings, name)(stacked=stacked)
