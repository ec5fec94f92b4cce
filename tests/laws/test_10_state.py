"""Law 10: the state keeps its type from `init` on, and survives whatever holds it.

Rules without a learned threshold keep metrics only, so the second half brings a
threshold of its own, `peak`, whose state is two arrays: it allows what it has seen.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import optclip
from optclip import groupings, thresholds
from optclip.thresholds import Threshold
from tests.laws.table import ROWS, projections, rows
from tests.untyped import untyped

EVERY = pytest.mark.parametrize(
    "row",
    rows(
        *("clip", "enlarging", "adaptive", "elementwise", "matrix", "measuring"),
        "wrapper",
        variants=False,
    ),
)


def tree(seed=0, scale=1.0, dtype=jnp.float32):
    """Three leaves with a common leading axis, in two parts."""
    rng = np.random.default_rng(seed)

    def leaf(dtype, *shape):
        return jnp.asarray(scale * rng.standard_normal(shape), dtype)

    return {
        "alpha": {"kernel": leaf(dtype, 4, 3), "scale": leaf(dtype, 4)},
        "beta": {"kernel": leaf(jnp.bfloat16, 4, 2)},
    }


TREES = {
    "arrays": tree,
    "empty": dict,
    "holes": lambda: {"a": None, "b": jnp.arange(4), "m": optax.MaskedNode(), **tree()},
    "nothing measured": lambda: [jnp.arange(4), jnp.zeros((4, 0))],
    "float64": lambda: tree(dtype=jnp.float64),
    "float16": lambda: {"kernel": jnp.ones((4, 3), jnp.float16)},
}


@pytest.fixture
def params(request):
    """One of TREES, with 64 bits switched on for float64 only."""
    jax.config.update("jax_enable_x64", request.param == "float64")
    yield TREES[request.param]()
    jax.config.update("jax_enable_x64", False)


def types(state):
    """Everything that a second trace would depend on."""
    leaves = [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(state)]
    return jax.tree.structure(state), leaves


def types_from_init_on(tx, params):
    """The types of the state at init and after one update, without running either."""
    start = jax.eval_shape(tx.init, params)
    return types(start), types(jax.eval_shape(tx.update, params, start, params)[1])


def assert_own_buffers(state, *others):
    # Scalars kept by a Python number could be shared; arrays of JAX have one address.
    arrays = jax.tree.leaves((state, others))
    arrays = [x for x in arrays if isinstance(x, jax.Array) and x.size]
    pointers = [x.unsafe_buffer_pointer() for x in arrays]
    assert len(set(pointers)) == len(pointers)


def test_a_shared_buffer_is_noticed():
    zero = jnp.zeros(())
    with pytest.raises(AssertionError):
        assert_own_buffers((zero, zero))
    with pytest.raises(AssertionError):
        assert_own_buffers((zero,), {"params": zero})


@pytest.mark.parametrize("params", TREES, indirect=True)
@pytest.mark.parametrize(
    "limit", [1.0, optax.linear_schedule(1.0, 0.1, 9)], ids=["number", "schedule"]
)
@EVERY
def test_types_are_fixed_at_init(row, params, limit):
    if row.integers is not True:  # refused, which law 4 tests
        params = jax.tree.map(
            lambda x: x.astype(jnp.float32) if x.dtype == jnp.int32 else x, params
        )
    tx = row.build(limit)
    start, after = types_from_init_on(tx, params)
    assert start == after
    assert start == types(jax.eval_shape(lambda: tx.init(params)))
    # A joint state has the structure that it has without any parameters.
    if row.kind != "adaptive" or row.oracle["grouping"] not in ("element", "unit"):
        assert start[0] == jax.tree.structure(tx.init({}))


@pytest.mark.parametrize("params", ["float64"], indirect=True)
def test_sizes_are_float64_beside_float64_leaves(params):
    start, _ = types_from_init_on(optclip.clip_by_global_norm(1.0), params)
    assert (((), jnp.float64, False)) in start[1]


@pytest.mark.parametrize("params", TREES, indirect=True)
@EVERY
def test_every_leaf_has_its_own_buffer_and_a_size(row, params):
    state = row.build(1.0).init(params)
    assert all(leaf.size > 0 for leaf in jax.tree.leaves(state))
    assert_own_buffers(state, params)


@EVERY
def test_the_initial_state_can_be_donated(row):
    tx = row.build(optax.constant_schedule(1.0))
    updates = tree(1)["alpha"]
    start = tx.init(updates)
    leaves = jax.tree.leaves(start)
    _, state = jax.jit(tx.update, donate_argnums=1)(updates, start, tree()["alpha"])
    # What update does not read (the last size) is not donated, but counters are.
    assert not leaves or any(leaf.is_deleted() for leaf in leaves)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(updates))


def saved_and_restored(path, state):
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(path, state)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(path, jax.tree.map(jnp.zeros_like, state))
    checkpointer.close()
    return restored


def test_orbax_gives_every_state_back_bit_for_bit(tmp_path):
    """All rows in one checkpoint, each beside Adam's state, after a step."""
    states = {}
    adam = optax.scale_by_adam()
    adam_state = adam.init(tree())
    with jax.numpy_dtype_promotion("standard"):  # for Adam's own arithmetic
        adam_state = adam.update(tree(), adam_state)[1]
    for row in ROWS:
        tx = row.build(1.0)
        _, state = jax.jit(tx.update)(tree(1), tx.init(tree()), tree())
        states[row.name] = (state, adam_state)
    restored = saved_and_restored(tmp_path / "states", states)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, states)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(states), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_restored_state_goes_on(tmp_path):
    tx = optax.chain(optclip.clip_by_global_norm(1.0), optax.scale_by_adam())
    with jax.numpy_dtype_promotion("standard"):  # which Adam needs for bfloat16
        _, state = tx.update(tree(1), tx.init(tree()))
        restored = saved_and_restored(tmp_path / "state", state)
        goes_on = tx.update(tree(2), restored)
        chex.assert_trees_all_equal(goes_on, tx.update(tree(2), state))
    assert optclip.metrics(goes_on[1])["0/steps"] == 2


@pytest.mark.parametrize(
    "row", rows("clip", "enlarging", "adaptive", "matrix", "measuring", "wrapper")
)
def test_the_state_of_another_rule_is_refused_by_name(row):
    other = optax.scale_by_adam().init(tree())
    with pytest.raises(
        ValueError, match=f"^{row.public}: state must be a .*State, got "
    ):
        row.build(1.0).update(tree(), other, tree())


@pytest.mark.parametrize("row", projections())
def test_so_is_that_of_another_projection(row):
    params = {"kernel": jnp.ones((4, 3))}
    tx = untyped(row.transform(1.0))
    name = "hyperball" if row.around else "project"
    kind = "Hyperball" if row.around else "Project"
    boxed = optclip.project(optclip.sets.box(-1.0, 1.0), every=2)
    wrapped = optax.chain(boxed).init(params)
    with pytest.raises(ValueError, match=f"^{name}: state must be a {kind}State, got"):
        tx.update(params, wrapped, params)
    with pytest.raises(ValueError, match=f"^{name}: state must be "):
        tx.update(params, boxed.init(params), params)


def test_a_schedule_of_bounds_wants_its_step():
    tx = optclip.clip_by_value(optax.constant_schedule(1.0))
    with pytest.raises(ValueError, match=r"^clip_by_value: state must be a StepState"):
        tx.update(tree(), optax.EmptyState())


# A threshold with state.


class Peak(NamedTuple):
    """What each group has reached, and at how many steps it was seen."""

    largest: jax.Array
    steps: jax.Array


def peak(first=100.0):
    """As much as was seen so far; `first` at the first step."""
    return Threshold(
        limit=lambda state, seen: jnp.where(state.steps > 0, state.largest, first),
        init=lambda seen: Peak(
            jnp.zeros_like(seen.size), jnp.zeros(seen.size.shape, jnp.int32)
        ),
        observe=lambda state, seen, limit: Peak(
            jnp.maximum(state.largest, jnp.minimum(seen.size, limit)), state.steps + 1
        ),
    )


JOINT = {
    "whole": (groupings.whole(), 1),
    "per_leaf": (groupings.per_leaf(), 3),
    "per_label": (groupings.per_label(lambda path: path.split("/")[0]), 2),
}
WITHIN = {
    "per_unit": (groupings.per_unit(), ((1, 3), (1,), (1, 2))),
    "per_element": (groupings.per_element(), ((4, 3), (4,), (4, 2))),
}
GROUPINGS = {name: value[0] for name, value in {**JOINT, **WITHIN}.items()}
EVERY_GROUPING = pytest.mark.parametrize("grouping", GROUPINGS.values(), ids=GROUPINGS)


@pytest.mark.parametrize(("grouping", "count"), JOINT.values(), ids=JOINT)
def test_joint_groups_share_arrays(grouping, count):
    state = untyped(optclip.clip_by(peak(), grouping=grouping).init(tree())).threshold
    assert isinstance(state, Peak)
    chex.assert_shape([state.largest, state.steps], (count,))
    assert (state.largest.dtype, state.steps.dtype) == (jnp.float32, jnp.int32)


@pytest.mark.parametrize(("grouping", "shapes"), WITHIN.values(), ids=WITHIN)
def test_groups_within_leaves_have_trees_like_the_parameters(grouping, shapes):
    """As Adam's moments are: each array of the state is a tree of its own."""
    state = untyped(optclip.clip_by(peak(), grouping=grouping).init(tree())).threshold
    assert isinstance(state, Peak)
    for part, dtype in ((state.largest, jnp.float32), (state.steps, jnp.int32)):
        assert jax.tree.structure(part) == jax.tree.structure(tree())
        assert tuple(x.shape for x in jax.tree.leaves(part)) == shapes
        assert {x.dtype for x in jax.tree.leaves(part)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("params", TREES, indirect=True)
@EVERY_GROUPING
def test_types_of_learned_state_are_fixed_at_init(grouping, params):
    tx = optclip.clip_by(peak(), grouping=grouping)
    start, after = types_from_init_on(tx, params)
    assert start == after
    assert start == types(jax.eval_shape(lambda: tx.init(params)))
    state = tx.init(params)
    assert all(leaf.size > 0 for leaf in jax.tree.leaves(state))
    assert_own_buffers(state, params)


def sizes_by_group(updates, name):
    """The sizes in the order of the state's leaves, in float64."""
    leaves = [np.asarray(x).astype(np.float64) for x in jax.tree.leaves(updates)]
    whole = [np.sqrt(np.sum(x**2)) for x in leaves]
    if name == "whole":
        return [np.sqrt(np.sum(np.square(whole), keepdims=True))]
    if name == "per_leaf":
        return [np.array(whole)]
    if name == "per_label":
        return [np.array([np.hypot(*whole[:2]), whole[2]])]
    if name == "per_element":
        return [abs(x) for x in leaves]
    return [np.sqrt(np.sum(x**2, axis=0, keepdims=True)) for x in leaves]


@pytest.mark.parametrize("name", GROUPINGS)
def test_each_group_learns_from_its_own_sizes(name):
    """Against the recurrence in NumPy, under scan and step by step."""
    tx = untyped(optclip.clip_by(peak(first=3.0), grouping=GROUPINGS[name]))
    stream = [tree(seed, scale) for seed, scale in enumerate((1.0, 2.0, 0.5, 5.0))]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stream)
    scanned = jax.jit(
        lambda s, us: jax.lax.scan(lambda s, u: tx.update(u, s)[::-1], s, us)
    )
    last, outs = scanned(tx.init(tree()), stacked)
    step = jax.jit(tx.update, donate_argnums=1)
    state = tx.init(tree())
    want = None
    for index, updates in enumerate(stream):
        limits = want or [np.full(x.shape, 3.0) for x in sizes_by_group(updates, name)]
        seen = [
            np.minimum(size, limit)
            for size, limit in zip(sizes_by_group(updates, name), limits, strict=True)
        ]
        want = [np.maximum(a, b) for a, b in zip(want or seen, seen, strict=True)]
        out, state = step(updates, state)
        chex.assert_trees_all_close(
            out, jax.tree.map(lambda x, i=index: x[i], outs), rtol=1e-6
        )
        # bfloat16 leaves are rounded once after clipping.
        for got, size in zip(sizes_by_group(out, name), seen, strict=True):
            np.testing.assert_allclose(got, size, rtol=2**-8)
    for part in (last, state):
        largest = jax.tree.leaves(part.threshold.largest)
        for got, size in zip(largest, want or (), strict=True):
            np.testing.assert_allclose(got, size, rtol=1e-6)
        assert all((x == 4).all() for x in jax.tree.leaves(part.threshold.steps))


@pytest.mark.parametrize(
    ("nonfinite", "bad"), [("propagate", np.nan), ("zero", np.inf)]
)
@pytest.mark.parametrize("name", GROUPINGS)
def test_a_group_that_is_not_finite_is_not_observed(name, nonfinite, bad):
    tx = untyped(optclip.clip_by(peak(), grouping=GROUPINGS[name], nonfinite=nonfinite))
    good, start = tree(1), tx.init(tree())
    spoiled = jax.tree.map(lambda x: x, good)
    spoiled["alpha"]["kernel"] = good["alpha"]["kernel"].at[2, 1].set(bad)
    before = tx.update(good, start)[1]
    after = tx.update(spoiled, before)[1]
    was_bad = [~np.isfinite(size) for size in sizes_by_group(spoiled, name)]
    assert sum(b.sum() for b in was_bad) == 1
    for steps, spoilt in zip(
        jax.tree.leaves(after.threshold.steps), was_bad, strict=True
    ):
        np.testing.assert_array_equal(steps, np.where(spoilt, 1, 2))
    chex.assert_trees_all_equal(after.threshold.largest, before.threshold.largest)
    assert after.metrics.nonfinite_steps == 1


def test_per_example_has_nothing_to_remember():
    with pytest.raises(ValueError, match=r"clip_by: threshold must have no state"):
        optclip.clip_by(peak(), grouping=groupings.per_example())
    with pytest.raises(ValueError, match=r"clip_by: threshold must have no state"):
        optclip.clip_by(
            thresholds.tightest(peak(), thresholds.constant(1.0)),
            grouping=groupings.per_example(),
        )


class Decided(NamedTuple):
    """The limit that a threshold was told it had set."""

    limit: jax.Array


def follows(value):
    """A constant limit that keeps what `observe` was given."""
    return Threshold(
        limit=lambda state, seen: jnp.full_like(seen.size, value),
        init=lambda seen: Decided(jnp.zeros_like(seen.size)),
        observe=lambda state, seen, limit: Decided(limit),
    )


@EVERY_GROUPING
def test_tightest_keeps_each_ones_own_state(grouping):
    """Also where one has none, or is nested; and each learns from its own limit."""
    both = thresholds.tightest(
        follows(7.0),
        thresholds.constant(0.5),
        thresholds.tightest(thresholds.constant(2.0), peak()),
        thresholds.tightest(thresholds.constant(3.0), thresholds.unlimited()),
    )
    tx = untyped(optclip.clip_by(both, grouping=grouping))
    alone = untyped(optclip.clip_by(peak(), grouping=grouping))
    state, alone_state = tx.init(tree()), alone.init(tree())
    start, after = types_from_init_on(tx, tree())
    assert start == after
    for seed in (1, 2):
        _, state = tx.update(tree(seed), state)
        _, alone_state = alone.update(tree(seed), alone_state)
    decided, nothing, (no_state, peaks), neither = state.threshold
    assert (nothing, no_state, neither) == ((), (), ())
    assert all((x == 7.0).all() for x in jax.tree.leaves(decided))
    chex.assert_trees_all_close(peaks, alone_state.threshold, rtol=1e-6)
    if grouping.elementwise:  # whose metrics are counters only
        return
    assert state.metrics.limit == 0.5


@EVERY_GROUPING
def test_map_params_finds_the_state(grouping):
    """Trees like the parameters are mapped with them, vectors of groups are not."""
    map_params = getattr(optax.tree, "map_params", None) or optax.tree_map_params
    tx = optax.chain(optclip.clip_by(peak(), grouping=grouping), optax.scale_by_adam())
    state = tx.init(tree())
    mapped = untyped(map_params)(
        tx, lambda x, p: "param", state, tree(), transform_non_params=lambda x: "rest"
    )
    kinds = set(jax.tree.leaves(mapped[0].threshold))
    assert kinds == ({"param"} if grouping.label is None else {"rest"})
    assert set(jax.tree.leaves(mapped[0].metrics)) == {"rest"}


@pytest.mark.parametrize("name", ["per_leaf", "per_unit"])
def test_the_state_goes_through_orbax(name, tmp_path):
    tx = optclip.clip_by(peak(), grouping=GROUPINGS[name])
    _, state = tx.update(tree(1), tx.init(tree()))
    restored = saved_and_restored(tmp_path / "state", state)
    chex.assert_trees_all_equal(restored, state)
    chex.assert_trees_all_equal(tx.update(tree(2), restored), tx.update(tree(2), state))


class Block(nnx.Module):
    def __init__(self, arrays, axes=None):
        for name, array in arrays.items():
            if axes is not None:
                init = nnx.with_partitioning(lambda a=array: a, axes[: array.ndim])
                array = init()
            setattr(self, name, nnx.Param(array))


class Net(nnx.Module):
    def __init__(self, tree, axes=None):
        self.alpha = Block(tree["alpha"], axes)
        self.beta = Block(tree["beta"], axes)


@EVERY_GROUPING
def test_the_state_lives_in_an_nnx_optimizer(grouping):
    """There `init` sees Variables and `update` sees arrays: two tree definitions."""
    tx = optclip.clip_by(peak(), grouping=grouping)
    model = Net(tree())
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, nnx.state(Net(tree(1))))
    update = nnx.jit(lambda m, o, g: o.update(m, g) and None, donate_argnums=(0, 1))
    update(model, optimizer, nnx.state(Net(tree(2))))
    state = tx.init(tree())
    for seed in (1, 2):
        _, state = tx.update(tree(seed), state)
    chex.assert_trees_all_close(
        jax.tree.leaves(optimizer.opt_state), jax.tree.leaves(state), rtol=1e-6
    )


@pytest.mark.skipif(jax.device_count() < 2, reason="needs a mesh of two devices")
@pytest.mark.parametrize(
    ("grouping", "axes"),
    [
        *((grouping, ("data", None)) for grouping in GROUPINGS.values()),
        (GROUPINGS["per_unit"], (None, "data")),
    ],
    ids=[*GROUPINGS, "per_unit, units sharded"],
)
def test_the_state_lives_in_a_sharded_nnx_optimizer(grouping, axes):
    """NNX gives a state the sharding names of the Variable that it stands in.

    So an array of one number a unit must not stand where a kernel's names include the
    axis that was reduced.
    """
    shapes = {"alpha": {"kernel": (4, 2)}, "beta": {"kernel": (2, 4)}}
    is_shape = {"is_leaf": lambda x: isinstance(x, tuple)}
    auto = (jax.sharding.AxisType.Auto,)
    with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=auto)):
        ones = jax.tree.map(jnp.ones, shapes, **is_shape)
        place = jax.sharding.PartitionSpec(*axes)
        model = Net(jax.device_put(ones, place), axes)
        tx = optclip.clip_by(peak(), grouping=grouping)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        update = nnx.jit(lambda m, o, g: o.update(m, g) and None, donate_argnums=(0, 1))
        update(model, optimizer, nnx.state(Net(jax.device_put(ones, place), axes)))
        leaves = jax.device_get(jax.tree.leaves(optimizer.opt_state))
    state = untyped(tx).update(ones, None)[1]
    chex.assert_trees_all_close(leaves, jax.tree.leaves(state), rtol=1e-6)


# Projections.


@pytest.mark.parametrize("params", TREES, indirect=True)
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("row", projections())
def test_types_of_projections_are_fixed_at_init(row, every, params):
    tx = row.transform(1.0)
    if every == 3:
        if row.around is not None or row.name != "init_box":
            pytest.skip("the counter is the same")
        tx = optclip.project(row.make(1.0), every=every)
    start = jax.eval_shape(tx.init, params)
    update = jax.eval_shape(tx.update, params, start, params)
    assert types(start) == types(update[1]) and types(params) == types(update[0])
    assert start == jax.eval_shape(lambda: tx.init(params))
    if not row.apart:
        assert jax.tree.structure(start) == jax.tree.structure(tx.init({}))
    assert_own_buffers(tx.init(params), params)
    assert all(leaf.size for leaf in jax.tree.leaves(tx.init({})))


def test_orbax_gives_the_state_of_projections_back(tmp_path):
    tx = optclip.project(optclip.sets.init_box(2.0), every=2)
    state = tx.update(tree(1), tx.init(tree()), tree())[1]
    restored = saved_and_restored(tmp_path / "state", state)
    chex.assert_trees_all_equal(restored, state)
    assert restored.steps == 1 and restored.memory.shape == (3,)
