"""Law 8: nonsense raises at once, and says who, what, the rule and the value.

    ValueError: clip_by_norm: max_norm must be non-negative, got -1.0.

Traced values pass, because checking them would wait for the device; a schedule may end
slightly below zero.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip as typed
from tests.laws import trees
from tests.laws.table import PROJECTIONS, ROWS, projections, rows
from tests.untyped import untyped

# Called with the wrong types on purpose, which a type checker would find.
optclip = untyped(typed)
actions, groupings, measures = optclip.actions, optclip.groupings, optclip.measures
sets, thresholds = optclip.sets, optclip.thresholds

NAMED = [
    p for p in rows("clip", "elementwise", "matrix", "wrapper") if p.values[0].argument
]
LIMITED = rows("clip", "enlarging", "elementwise", "matrix")


def ones(row=None):
    shapes = trees.BATCHED if row is not None and row.batched else trees.SHAPES
    return {path: jnp.ones(shape, jnp.float32) for path, shape in shapes.items()}


@pytest.mark.parametrize("row", NAMED)
@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (-1.0, "non-negative, got -1.0."),
        (-1, "non-negative, got -1."),
        (float("-inf"), "non-negative, got -inf."),
        (float("nan"), "non-negative, got nan."),
        (np.float32(-0.5), "non-negative, got -0.5."),
        (np.array(np.nan), "non-negative, got nan."),
        (True, "non-negative, got True."),
        (np.bool_(True), f"non-negative, got {np.bool_(True)!r}."),
        (1j, "non-negative, got 1j."),
        ("1.0", "a non-negative number, array or schedule, got '1.0'."),
        ([1.0], "a non-negative number, array or schedule, got [1.0]."),
        (np.array([1.0, 2.0]), "a scalar, got an array of shape (2,)."),
        (jnp.array([1.0]), "a scalar, got an array of shape (1,)."),
        (jnp.array(True), "non-negative, got an array of dtype bool."),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_static_limit(row, bad, says):
    """In the factory, before any gradient is there."""
    message = re.escape(f"{row.public}: {row.argument} must be {says}")
    with pytest.raises(ValueError, match=f"^{message}$"):
        row.build(bad)


@pytest.mark.parametrize("row", LIMITED)
@pytest.mark.parametrize(
    "good", [0, 0.0, 1, 2.5, float("inf"), np.float64(1.0), np.array(3, np.int32)]
)
def test_static_limit_accepted(row, good):
    """Every real number from zero on, whatever its type."""
    assert callable(row.build(good).update)


def test_a_numpy_integer_is_an_integer():
    grads = {"w": jnp.ones((4, 3))}
    tx = optclip.adaptive_grad_clip(axis=np.int64(0))
    assert tx.update(grads, None, grads)[0]["w"].shape == (4, 3)
    assert callable(optclip.spike_clip(window=np.int64(8)).update)


@pytest.mark.parametrize("row", LIMITED)
def test_traced_limit(row):
    """A tracer passes, and so does a JAX array; below zero they count as zero."""
    if row.name == "clip_by_value-interval":
        pytest.skip("its bounds are any two numbers: there is no zero to count as")
    if row.oracle.get("action") == "floor":
        pytest.skip("a floor of zero raises nothing; law 13 has it")
    out, _ = trees.run(row, trees.Case(jax.device_get(ones(row)), np.float32(-1.0)))
    assert all(np.all(x == 0) for x in out.values())
    assert callable(row.build(jnp.float32(-1.0)).update)


@pytest.mark.parametrize("row", LIMITED)
def test_schedule_slightly_negative(row):
    """Where schedules end: it counts as zero, and the metrics show it as it is."""
    if row.name == "clip_by_value-interval":
        pytest.skip("its bounds are any two numbers: there is no zero to count as")
    if row.oracle.get("action") == "floor":
        pytest.skip("a floor of zero raises nothing; law 13 has it")
    tree, end = ones(row), np.float32(-1e-9)
    tx = row.build(lambda step: jnp.where(step == 0, 1.0, end).astype(jnp.float32))
    update = jax.jit(tx.update)
    first, state = update(tree, tx.init(tree))
    assert all(np.all(x > 0) for x in first.values())
    second, state = update(tree, state)
    assert all(np.all(x == 0) for x in second.values())
    if row.has_metrics is True and row.oracle["grouping"] != "element":
        assert state.metrics.limit == end
        assert state.metrics.clipped_fraction == 1


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (np.ones(2, np.float32), "be a scalar, got an array of shape (2,)."),
        (None, "be a real number, got None."),
        ("a", "be a real number, got 'a'."),
        (True, "be a real number, got True."),
        (1j, "be a real number, got 1j."),
    ],
    ids=["vector", "none", "string", "bool", "complex"],
)
@pytest.mark.parametrize("row", LIMITED)
def test_schedule_not_a_number(row, given, says):
    """At init where there is one to do, at the first update otherwise."""
    tx, tree = row.build(lambda step: given), ones(row)
    if row.name == "clip_by_value-interval":  # its row negates what is given
        tx = optclip.clip_by_value(max_value=lambda step: given)
    # A threshold that the user made names itself.
    rule = "scheduled" if row.name.startswith("clip_by-") else row.name.split("-")[0]
    wanted = rf"^{rule}: \S+ must {re.escape(says)}"
    with pytest.raises(ValueError, match=wanted):
        if row.kind != "elementwise":
            tx.init(tree)
        else:
            tx.update(tree, tx.init(tree))


def stateful():
    return thresholds.Threshold(
        limit=lambda state, seen: 1.0, init=lambda seen: seen.size
    )


def step(tx, tree=None):
    tree = ones() if tree is None else tree
    return tx.update(tree, tx.init(tree))


ONE = thresholds.constant(1.0)
FACTORIES = {
    # measures
    "lp-below": (lambda: measures.lp(0.5), "lp: p must be at least 1, got 0.5."),
    "lp-nan": (lambda: measures.lp(float("nan")), "lp: p must be a number and not "),
    "lp-string": (lambda: measures.lp("2"), "lp: p must be a number and not NaN, "),
    "lp-bool": (lambda: measures.lp(True), "lp: p must be a number and not NaN, "),
    # actions
    "rescale": (
        lambda: actions.rescale(-1.0),
        "rescale: div_eps must be non-negative, got -1.0.",
    ),
    "rescale-nan": (
        lambda: actions.rescale(float("nan")),
        "rescale: div_eps must be non-negative, got nan.",
    ),
    # thresholds
    "constant": (
        lambda: thresholds.constant(-1.0),
        "constant: limit must be non-negative, got -1.0.",
    ),
    "constant-schedule": (
        lambda: thresholds.constant(lambda step: 1.0),
        "constant: limit must be a number, got <function",
    ),
    "scheduled": (
        lambda: thresholds.scheduled(1.0),
        "scheduled: schedule must be callable, got 1.0.",
    ),
    "per_path": (
        lambda: thresholds.per_path({"a": {"w": -1.0}}),
        "per_path: limits['a/w'] must be non-negative, got -1.0.",
    ),
    "per_path-default": (
        lambda: thresholds.per_path({}, default=-1.0),
        "per_path: default must be non-negative, got -1.0.",
    ),
    "tightest-none": (
        lambda: thresholds.tightest(),
        "tightest: thresholds must be at least one, got none.",
    ),
    "tightest-number": (
        lambda: thresholds.tightest(ONE, 1.0),
        "tightest: thresholds[1] must be a Threshold of optclip, got 1.0.",
    ),
    # clip_by
    "threshold": (
        lambda: optclip.clip_by("1.0"),
        (
            "clip_by: threshold must be a non-negative number, array or schedule, got "
            "'1.0'."
        ),
    ),
    "measure": (
        lambda: optclip.clip_by(ONE, measure="l2"),
        "clip_by: measure must be a Measure of optclip, got 'l2'.",
    ),
    "grouping": (
        lambda: optclip.clip_by(ONE, grouping=groupings.whole),
        "clip_by: grouping must be a Grouping of optclip, got <function whole",
    ),
    "action": (
        lambda: optclip.clip_by(ONE, action=None),
        "clip_by: action must be a Action of optclip, got None.",
    ),
    "nonfinite": (
        lambda: optclip.clip_by(ONE, nonfinite="ignore"),
        "clip_by: nonfinite must be 'propagate' or 'zero', got 'ignore'.",
    ),
    "per_example-state": (
        lambda: optclip.clip_by(stateful(), grouping=groupings.per_example()),
        "clip_by: threshold must have no state under per_example",
    ),
    # clip_by_value
    "value-nothing": (
        lambda: optclip.clip_by_value(),
        (
            "clip_by_value: max_delta or (min_value, max_value) must be given, and not "
            "both, got max_delta=None, min_value=None, max_value=None."
        ),
    ),
    "value-both": (
        lambda: optclip.clip_by_value(1.0, max_value=2.0),
        (
            "clip_by_value: max_delta or (min_value, max_value) must be given, and not "
            "both, got max_delta=1.0, min_value=None, max_value=2.0."
        ),
    ),
    "value-crossed": (
        lambda: optclip.clip_by_value(min_value=1.0, max_value=-1.0),
        "clip_by_value: min_value must not be above max_value, got 1.0 and -1.0.",
    ),
    "value-nan": (
        lambda: optclip.clip_by_value(min_value=float("nan")),
        "clip_by_value: min_value must be a number and not NaN, got nan.",
    ),
    "value-string": (
        lambda: optclip.clip_by_value(max_value="1"),
        "clip_by_value: max_value must be a number and not NaN, got '1'.",
    ),
    "value-integer": (
        lambda: optclip.clip_by_value(10**400),
        (
            "clip_by_value: max_delta must be a number that a float can hold, got an "
            "integer of 401 digits."
        ),
    ),
    "value-array": (
        lambda: optclip.clip_by_value(max_value=np.ones(2)),
        "clip_by_value: max_value must be a scalar, got an array of shape (2,).",
    ),
    # functions
    "per_example_global": (
        lambda: optclip.per_example_global_norm_clip(jnp.ones((2, 3)), -1.0),
        "per_example_global_norm_clip: l2_norm_clip must be non-negative, got -1.0.",
    ),
    "per_example_layer": (
        lambda: optclip.per_example_layer_norm_clip(jnp.ones((2, 3)), "1"),
        "per_example_layer_norm_clip: global_l2_norm_clip must be a non-negative",
    ),
    "per_example-schedule": (
        lambda: optclip.per_example_global_norm_clip(
            jnp.ones((2, 3)), lambda step: 1.0
        ),
        "per_example_global_norm_clip: l2_norm_clip must be a non-negative number, got",
    ),
    "per_example-keys": (
        lambda: optclip.per_example_layer_norm_clip(
            {"a": jnp.ones((2, 3)), "k": jax.random.split(jax.random.key(0))}, 1.0
        ),
        ("per_example_layer_norm_clip: grads must be numbers, got random keys at 'k'."),
    ),
    "global_norm": (
        lambda: optclip.global_norm(ones(), measure="l2"),
        "global_norm: measure must be a Measure of optclip, got 'l2'.",
    ),
    "top-zero": (
        lambda: optclip.leaf_norms(ones(), top=0),
        "leaf_norms: top must be an integer of at least 1, got 0.",
    ),
    "top-bool": (
        lambda: optclip.leaf_norms(ones(), top=True),
        "leaf_norms: top must be an integer of at least 1, got True.",
    ),
    "top-jit": (
        lambda: jax.jit(lambda tree: optclip.leaf_norms(tree, top=1))(ones()),
        "leaf_norms: top must be None inside jit",
    ),
    # sets and projections
    "box-crossed": (
        lambda: sets.box(1.0, -1.0),
        "box: lower must not be above upper, got 1.0 and -1.0.",
    ),
    "box-array-crossed": (
        lambda: sets.box(np.zeros(2), np.array([1.0, -1.0])),
        "box: lower must not be above upper",
    ),
    "box-nan": (
        lambda: sets.box(float("nan"), 1.0),
        "box: lower must be a number and not NaN, got nan.",
    ),
    "box-none": (
        lambda: sets.box(None, 1.0),
        "box: lower must be a number and not NaN, got None.",
    ),
    "norm_range-crossed": (
        lambda: sets.norm_range(2.0, 1.0),
        "norm_range: min_value must not be above max_value, got 2.0 and 1.0.",
    ),
    "norm_range-negative": (
        lambda: sets.norm_range(-1.0, 1.0),
        "norm_range: min_value must be non-negative, got -1.0.",
    ),
    "norm_range-rate": (
        lambda: sets.norm_range(rate=1.5),
        "norm_range: rate must be in [0, 1], got 1.5.",
    ),
    "spectral_ball-zero": (
        lambda: sets.spectral_ball(0.0),
        "spectral_ball: radius must be positive, got 0.0.",
    ),
    "spectral_ball-iterations": (
        lambda: sets.spectral_ball(iterations=0),
        "spectral_ball: iterations must be an integer of at least 1, got 0.",
    ),
    "orthogonal-iterations": (
        lambda: sets.orthogonal(iterations=True),
        "orthogonal: iterations must be an integer of at least 1, got True.",
    ),
    "simplex-zero": (
        lambda: sets.simplex(0.0),
        "simplex: total must be positive, got 0.0.",
    ),
    "ball-grouping": (
        lambda: sets.l2_ball(grouping=groupings.whole()),
        "l2_ball: grouping must lie within leaves",
    ),
    "simplex-grouping": (
        lambda: sets.simplex(grouping=groupings.per_example()),
        "simplex: grouping must lie within leaves",
    ),
    "intersection": (
        lambda: sets.intersection(sets.nonnegative(), 1.0),
        "intersection: b must be a Set of optclip, got 1.0.",
    ),
    "intersection-iterations": (
        lambda: sets.intersection(sets.nonnegative(), sets.l2_ball(), iterations=0),
        "intersection: iterations must be an integer of at least 1, got 0.",
    ),
    "project-number": (
        lambda: optclip.project(1.0),
        "project: constraint must be a Set of optclip or a tree of them, got 1.0.",
    ),
    "project-function": (
        lambda: optclip.project(sets.nonnegative),
        "project: constraint must be a Set of optclip or a tree of them, got <func",
    ),
    "project-tree": (
        lambda: optclip.project({"a": sets.nonnegative(), "b": 1.0}),
        "project: constraint must be a Set of optclip or a tree of them, got 1.0 at",
    ),
    "project-every": (
        lambda: optclip.project(sets.nonnegative(), every=0),
        "project: every must be an integer of at least 1, got 0.",
    ),
    "clip_weights-negative": (
        lambda: optclip.clip_weights(-0.01),
        "clip_weights: c must be non-negative, got -0.01.",
    ),
    "clip_weights-string": (
        lambda: optclip.clip_weights("0.01"),
        "clip_weights: c must be non-negative, got '0.01'.",
    ),
    "qk_clip-zero": (
        lambda: optclip.qk_clip(0.0),
        "qk_clip: tau must be positive, got 0.0.",
    ),
    "mask": (
        lambda: optclip.mask("kernle$")(ones()),
        "mask: where='kernle$' selects no leaf of 'a/bias', 'a/kernel'",
    ),
    "mask-tree": (
        lambda: optclip.mask({"a": True})({"a": 1.0, "b": 1.0}),
        "mask: where must cover every leaf, got none for 'b' (it has 'a').",
    ),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_parts(name):
    """Parts and functions complain where they are made or called."""
    make, says = FACTORIES[name]
    with pytest.raises(ValueError, match="^" + re.escape(says)):
        make()


def labelled(labels):
    return optclip.clip_by(ONE, grouping=groupings.per_label(labels))


def units(axes):
    return optclip.clip_by(ONE, grouping=groupings.per_unit(axes))


NESTED = {"a": {"w": np.ones(2, np.float32)}, "b": {"w": np.ones((2, 3), np.float32)}}
MISMATCHED = {
    # Parts that meet a tree they do not fit.
    "per_label-leaf": (
        lambda: step(labelled({"a": "one"}), NESTED),
        "per_label: labels must cover every leaf, got none for 'b/w' (it has 'a').",
    ),
    "per_label-none": (
        lambda: step(labelled(lambda path: None), NESTED),
        "per_label: labels must name every leaf, got None for 'a/w'.",
    ),
    "per_unit-axis": (
        lambda: step(units(1), NESTED),
        "per_unit: axes must exist in every leaf, got 1 for 'a/w' of shape (2,).",
    ),
    "per_unit-negative": (
        lambda: step(units({"b/w": (0, -3)}), NESTED),
        "per_unit: axes must exist in every leaf, got -3 for 'b/w' of shape (2, 3).",
    ),
    "per_path-leaf": (
        lambda: step(
            optclip.clip_by(
                thresholds.per_path({"a": 1.0}), grouping=groupings.per_leaf()
            ),
            NESTED,
        ),
        "per_path: limits must cover every leaf, got none for 'b/w' (it has 'a').",
    ),
    "per_path-unnamed": (
        lambda: step(
            optclip.clip_by(thresholds.per_path({"a": 1.0, "b": 1.0})), NESTED
        ),
        "per_path: limits must go with a grouping whose groups have names",
    ),
    "per_path-schedule": (
        lambda: step(
            optclip.clip_by(
                thresholds.per_path({"a": 1.0, "b": lambda step: jnp.ones(2)}),
                grouping=groupings.per_leaf(),
            ),
            NESTED,
        ),
        "per_path: limits['b/w'] must be a scalar, got an array of shape (2,).",
    ),
    "per_path-schedule-none": (
        lambda: step(
            optclip.clip_by(
                thresholds.per_path({"a": 1.0, "b": lambda step: None}),
                grouping=groupings.per_leaf(),
            ),
            NESTED,
        ),
        "per_path: limits['b/w'] must be a real number, got None.",
    ),
    "per_unit-axes": (
        lambda: groupings.per_unit({"w": "x"}),
        "per_unit: axes must be an integer or a tuple of integers, got 'x'.",
    ),
    "agc-axis": (
        lambda: optclip.adaptive_grad_clip(axis=1.5),
        "adaptive_grad_clip: axis must be an integer or a tuple of integers, got 1.5.",
    ),
    "unit_norm-axis": (
        lambda: optclip.sets.unit_norm("x"),
        "unit_norm: axis must be an integer or a tuple of integers, got 'x'.",
    ),
    "agc-shapes": (
        lambda: optclip.adaptive_grad_clip().update(
            {"w": jnp.ones((4, 3))}, None, {"w": jnp.ones((4, 1))}
        ),
        (
            "adaptive_grad_clip: params must have the shapes of updates, got (4, 1) "
            "for (4, 3) at 'w'."
        ),
    ),
    "project-shapes": (
        lambda: optclip.project(optclip.sets.nonnegative()).update(
            {"w": jnp.ones((4, 3))}, None, {"w": jnp.ones((3,))}
        ),
        (
            "project: params must have the shapes of updates, got (3,) for (4, 3) "
            "at 'w'."
        ),
    ),
    "mask-pattern": (
        lambda: optclip.mask("("),
        "mask: where must be a regular expression, got '(' (",
    ),
    "mask-number": (
        lambda: optclip.mask({"w": 3}),
        (
            "mask: where must be a pattern, a predicate or a tree of booleans, got 3 "
            "at 'w'."
        ),
    ),
    "skip_step-inner": (
        lambda: optclip.skip_step(None, 1.0),
        "skip_step: inner must be an optimizer, got None.",
    ),
    "skip_step-value": (
        lambda: optclip.skip_step(optax.sgd(1.0), 1.0, value_threshold=1.0).update(
            NESTED, None
        ),
        "skip_step: value must be given to update beside a value_threshold, got none",
    ),
    "skip_step-value-string": (
        lambda: optclip.skip_step(optax.sgd(1.0), 1.0, value_threshold=1.0).update(
            NESTED, None, value="1.0"
        ),
        "skip_step: value must be a real number, got '1.0'.",
    ),
    "skip_step-value-vector": (
        lambda: optclip.skip_step(optax.sgd(1.0), 1.0, value_threshold=1.0).update(
            NESTED, None, value=jnp.ones(2)
        ),
        "skip_step: value must be a scalar, got an array of shape (2,).",
    ),
    "adopt_state-tx": (
        lambda: optclip.adopt_state(optclip.clip(1.0), ()),
        "adopt_state: new_state must be a state, as tx.init(params) gives, got a ",
    ),
    "adopt_state-old-tx": (
        lambda: optclip.adopt_state((), optclip.clip(1.0)),
        "adopt_state: old_state must be a state, as tx.init(params) gives, got a ",
    ),
    "adopt_state-nothing": (
        lambda: optclip.adopt_state(optax.adam(1.0).init(NESTED), {"a": jnp.ones(1)}),
        (
            "adopt_state: old_state must share a part with new_state, got none that "
            "fits among a."
        ),
    ),
    "metrics-short": (
        lambda: optclip.metrics(
            optax.chain(optclip.monitor(), optclip.monitor()).init(NESTED), short=True
        ),
        (
            "metrics: short must be False where keys of two clips are the same, got "
            "'clipped_fraction' twice"
        ),
    ),
    "per_example-sizes": (
        lambda: step(
            optclip.clip_by(ONE, grouping=groupings.per_example()),
            {"a": np.ones((2, 3), np.float32), "b": np.ones((4,), np.float32)},
        ),
        (
            "per_example: leaves must share a leading batch axis, got shape (2, 3) at "
            "'a' and batch sizes [2, 4]."
        ),
    ),
    "per_example-scalar": (
        lambda: step(
            optclip.clip_by(ONE, grouping=groupings.per_example()),
            {"a": np.float32(1.0)},
        ),
        (
            "per_example: leaves must share a leading batch axis, got shape () at 'a' "
            "and batch sizes []."
        ),
    ),
    "interval-complex": (
        lambda: step(
            optclip.clip_by_value(max_value=1.0), {"a": np.ones(2, np.complex64)}
        ),
        (
            "clip_by_value: min_value and max_value must go with real updates, got "
            "complex ones at 'a'"
        ),
    ),
    "another-rule": (
        lambda: optclip.zclip().update(NESTED, optclip.spike_clip().init(NESTED)),
        (
            "zclip: state must be that of this rule, ZScoreState of [(1,), (1,), (1,)],"
            " got RobustState of [(48, 1), (1,)]."
        ),
    ),
    "no-state": (
        lambda: optclip.zclip().update(NESTED, ()),
        "zclip: state must be a ClipState, got tuple.",
    ),
    "another-window": (
        lambda: optclip.autoclip(window=5).update(
            NESTED, optclip.autoclip(window=12).init(NESTED)
        ),
        (
            "autoclip: state must have the shapes of the groups of updates, "
            "[[(5, 1), (1,)]] in PercentileState, got [[(12, 1), (1,)]]."
        ),
    ),
    "another-shape": (
        lambda: optclip.spike_clip(grouping=groupings.per_unit()).update(
            {"kernel": jnp.ones((4, 4))},
            optclip.spike_clip(grouping=groupings.per_unit()).init(
                {"kernel": jnp.ones((4, 8))}
            ),
        ),
        (
            "spike_clip: state must have the shapes of the groups of updates, "
            "[[(48, 1, 4), (1, 4)]] in RobustState, got [[(48, 1, 8), (1, 8)]]."
        ),
    ),
    "limit-shape": (
        lambda: optclip.clip_by(
            thresholds.Threshold(lambda state, observation: jnp.ones(3))
        ).init(NESTED),
        (
            "clip_by: threshold must give a scalar or an array of shape (1,), got "
            "shape (3,)."
        ),
    ),
    "limit-negative": (
        lambda: optclip.clip_by(
            thresholds.Threshold(lambda state, observation: -1.0)
        ).init(NESTED),
        "clip_by: the limit of threshold must be non-negative, got -1.0.",
    ),
    "per_path-misspelt": (
        lambda: optclip.clip_by(
            thresholds.per_path({"c": 1.0}, default=2.0), grouping=groupings.per_leaf()
        ).init(NESTED),
        "per_path: limits must name groups, got 'c' among the groups ",
    ),
    "axis_name": (
        lambda: optclip.clip_by_global_norm(1.0, axis_name="dta").update(NESTED, None),
        (
            "clip_by_global_norm: axis_name must name axes of the shard_map or pmap "
            "around the update, got 'dta'."
        ),
    ),
    "per_example-integers": (
        lambda: optclip.clip_by(1.0, grouping=groupings.per_example()).update(
            {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 1), jnp.int32)}, None
        ),
        ("clip_by: leaves must be floating-point under per_example, got int32 at 'b'."),
    ),
    "window-traced": (
        lambda: optax.inject_hyperparams(optclip.autoclip)(window=10).init(NESTED),
        (
            "autoclip: window must be a Python integer, got an array; under "
            'optax.inject_hyperparams say static_args=("window",).'
        ),
    ),
    "other-leaves": (
        lambda: optclip.clip_by(stateful(), grouping=groupings.per_unit()).update(
            {"a": NESTED["a"]},
            optclip.clip_by(stateful(), grouping=groupings.per_unit()).init(NESTED),
        ),
        (
            "clip_by: state must have the shapes of the groups of updates, [[(1,)]] in "
            "an array, got [[(1,)], [(1, 3)]]."
        ),
    ),
    "other-groups": (
        lambda: optclip.spike_clip(grouping=groupings.per_leaf()).update(
            {"a": NESTED["a"]},
            optclip.spike_clip(grouping=groupings.per_leaf()).init(NESTED),
        ),
        (
            "spike_clip: state must have the shapes of the groups of updates, "
            "[[(48, 1), (1,)]] in RobustState, got [[(48, 2), (2,)]]."
        ),
    ),
}


def projecting(constraint, where=None, tree=NESTED):
    return optclip.project(constraint, where).init(tree)


COMPLEX = {"a": {"w": np.ones(2, np.complex64)}}
MISMATCHED |= {
    "project-params": (
        lambda: optclip.project(sets.nonnegative()).update(NESTED, None),
        "project: params must be given to update, got None.",
    ),
    "clip_weights-params": (
        lambda: optclip.clip_weights().update(NESTED, None),
        "clip_weights: params must be given to update, got None.",
    ),
    "project-where": (
        lambda: projecting(sets.nonnegative(), "kernle$"),
        "project: where must select a leaf, got none of 'a/w', 'b/w'.",
    ),
    "project_params-where": (
        lambda: optclip.project_params(NESTED, sets.nonnegative(), where=False),
        "project_params: where must select a leaf, got none of 'a/w', 'b/w'.",
    ),
    "project-uncovered": (
        lambda: projecting({"a": sets.nonnegative()}),
        "project: constraint must cover every leaf, got none for 'b/w' (it has 'a'); ",
    ),
    "max_norm-axis": (
        lambda: projecting(sets.max_norm(axis=1)),
        "max_norm: axis must exist in every leaf, got 1 for 'a/w' of shape (2,).",
    ),
    "unit_norm-axis": (
        lambda: projecting(sets.unit_norm(axis=(0, -3)), "^b/"),
        "unit_norm: axis must exist in every leaf, got -3 for 'b/w' of shape (2, 3).",
    ),
    "box-shape": (
        lambda: projecting(sets.box(np.zeros(3), 1.0)),
        "box: lower must broadcast against every leaf, got shape (3,) for 'a/w' of ",
    ),
    "box-empty": (
        lambda: projecting(sets.box(0.1, 0.1)),
        "box: lower and upper must have a float32 between them, got 0.1 and 0.1 for ",
    ),
    **{
        f"complex-{row.name}": (
            lambda row=row: projecting(row.make(1.0), tree=COMPLEX),
            f"{row.public}: parameters must be real, got complex ones at 'a/w'.",
        )
        for row in PROJECTIONS
        if row.complex is not True and row.name not in ("box", "intersection")
    },
    "complex-box": (
        lambda: projecting(sets.box(0.0, 1.0), tree=COMPLEX),
        "box: parameters must be real, got complex ones at 'a/w'.",
    ),
    "qk_clip-argument": (
        lambda: optclip.qk_clip().update(NESTED, None, NESTED),
        "qk_clip: max_logits must be given to update, got None; call update(",
    ),
    "qk_clip-params": (
        lambda: optclip.qk_clip().update(NESTED, None, max_logits={}),
        "qk_clip: params must be given to update, got None.",
    ),
    "qk_clip-module": (
        lambda: optclip.qk_clip().update(
            NESTED, None, NESTED, max_logits={"a": np.ones(2)}
        ),
        "qk_clip: max_logits must name attention modules, got 'a', which has no ",
    ),
}


@pytest.mark.parametrize("row", [p for p in projections() if p.values[0].argument])
@pytest.mark.parametrize("bad", [-1.0, float("nan"), True, "1.0", None, 1j])
def test_sizes_of_sets(row, bad):
    says = re.escape(f"{row.public}: {row.argument} must be ")
    with pytest.raises(ValueError, match=f"^{says}.*got {re.escape(repr(bad)[:3])}"):
        row.transform(bad)


@pytest.mark.parametrize("name", MISMATCHED)
def test_parts_on_a_tree(name):
    """What only the tree can tell comes at init, or at update, and names the leaf."""
    make, says = MISMATCHED[name]
    with pytest.raises(ValueError, match="^" + re.escape(says)):
        make()


def test_inject_hyperparams_is_not_nonsense():
    """Its values are arrays and tracers, which pass."""
    tx = optax.inject_hyperparams(optclip.clip_by_global_norm)(max_norm=1.0)
    out, _ = step(tx)
    np.testing.assert_allclose(optclip.global_norm(out), 1.0, rtol=1e-6)


def test_every_public_transform_is_a_row():
    """So that no law misses one: also those laws that leave variants out."""
    made = {
        name
        for name, value in vars(optclip).items()
        if "GradientTransformation"
        in str(getattr(value, "__annotations__", {}).get("return"))
    }
    assert made >= {"clip_by", "clip_by_norm", "skip_step"}
    # Of `project` and its kin the sets are the rows; the doors have tests of their own.
    doors = {"project", "clip_weights", "qk_clip"}
    around = {row.public for row in PROJECTIONS if row.around is not None}
    assert made == {row.public for row in ROWS if not row.variant} | doors | around
    chosen = {name for name, value in vars(sets).items() if callable(value)} - {"Set"}
    assert chosen == {row.public for row in PROJECTIONS} - around
