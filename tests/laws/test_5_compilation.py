"""Law 5: every transform compiles, and works inside what Optax and Flax put round it.

What a wrapper gives is compared with `clipped`, the bare transform with its limit
traced, compiled once a row. Every row goes through wrappers around wrappers, and one
row of each kind of state through each of them alone.
"""

import contextlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import optclip
from tests.laws.steps import (
    ALPHA,
    EVERY,
    PARAMS,
    SETS,
    STACKED,
    STREAM,
    assert_within_ulps,
    clipped,
    projected,
    run,
    step,
    updating,
    walk,
)
from tests.laws.table import rows
from tests.untyped import untyped

LIMITED = rows("clip", "enlarging", "elementwise", "matrix")
# A wrapper sees a state, and what it is given beside updates: no state, counters,
# numbers of groups, of units and of elements, names, parameters.
KINDS_OF_STATE = (
    "clip_by_global_norm",
    "clip_by_global_norm-record",
    "clip_by_norm-per_unit",
    "clip_by_value",
    "spike_clip",
    "adagc",
    "second_moment_clip",
    "adaptive_grad_clip",
    "skip_step",
    "monitor",
)
# Points that are elements, units, leaves and matrices, with state and without.
KINDS_OF_SETS = (
    *("box", "init_box", "max_norm", "l2_ball", "l1_ball", "hyperball"),
    *("init_sphere-per_unit", "spectral_ball", "intersection"),
)
LEARNED = [p.id for p in rows("adaptive")]
SAMPLE = pytest.mark.parametrize(
    "row", [p for p in EVERY.args[1] if p.id in KINDS_OF_STATE]
)


def injectable(row):
    """`row.build` with the one argument that these tests inject."""
    return lambda limit: row.build(limit)


def negative(updates):
    return jax.tree.map(jnp.negative, updates)


def optax_needs_promotion():
    """Optax itself promotes float32 with bfloat16, and both with its int counters."""
    return jax.numpy_dtype_promotion("standard")


@EVERY
def test_the_rows_are_put_to_work(row):
    """The stream is clipped at its end and (but for `smooth`) not at its start.

    With a floor, or a fixed target, it is raised at its start.
    """
    first, last = run(row.name)[0][0], run(row.name)[-1][0]
    if row.kind == "measuring":
        chex.assert_trees_all_equal(last, STREAM[-1])
        return
    if row.kind == "enlarging":
        chex.assert_trees_all_equal(
            jax.tree.map(
                lambda out, updates: abs(out) > abs(updates), first, STREAM[0]
            ),
            jax.tree.map(lambda x: jnp.ones(x.shape, bool), first),
        )
        return
    for out, updates in zip(
        jax.tree.leaves(last), jax.tree.leaves(STREAM[-1]), strict=True
    ):
        assert np.all(abs(out) < abs(updates))
    if row.identity is True:
        chex.assert_trees_all_equal(first, STREAM[0])


@EVERY
def test_one_trace_over_many_steps(row):
    tx = row.build(1.0)
    chex.clear_trace_counter()
    traced = chex.assert_max_traces(lambda u, s: tx.update(u, s, PARAMS), n=1)
    # Tracing alone tells; `trace` is jit without the price of what follows.
    update, state = jax.jit(traced), tx.init(PARAMS)
    update.trace(STREAM[0], state)
    for updates, (_, state) in zip(STREAM, run(row.name), strict=True):
        update.trace(updates, state)


def test_a_second_trace_is_noticed():
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(lambda x: x, n=1))
    update.trace(jnp.ones(()))
    with pytest.raises(AssertionError):
        update.trace(1.0)  # a weak type


@EVERY
def test_is_a_scan_carry(row):
    """Every step is what the jitted update makes of the state before it."""
    tx, update = updating(row.name)

    def scanned(state, updates):
        out, state = tx.update(updates, state, PARAMS)
        return state, (out, state)

    before = tx.init(PARAMS)
    last, (outs, states) = jax.jit(
        lambda state, stream: jax.lax.scan(scanned, state, stream)
    )(before, STACKED)
    for index, updates in enumerate(STREAM):
        out, after = step(outs, index), step(states, index)
        assert_within_ulps((out, after), update(updates, before, PARAMS))
        before = after
    chex.assert_trees_all_equal(last, before)


@EVERY
def test_vmaps_over_updates_states_and_thresholds(row):
    limits = jnp.array([0.0, 0.25, 1.0, jnp.inf])
    states = jax.vmap(lambda limit, u: row.build(limit).init(u))(limits, STACKED)
    batched = jax.vmap(
        lambda limit, u, state: row.build(limit).update(u, state, PARAMS)
    )
    outs, states = jax.jit(batched)(limits, STACKED, states)
    for index, limit in enumerate(limits):
        want = clipped(row.name)(limit, STREAM[index])
        assert_within_ulps(step(outs, index), want)
    if row.has_metrics is True:
        np.testing.assert_array_equal(optclip.metrics(states)["steps"], [1, 1, 1, 1])


@EVERY
def test_wrappers_around_each_other(row):
    """named_chain in MultiSteps in apply_if_finite in a Linen TrainState."""
    tx = optax.named_chain(("clip", row.build(1.0)), ("sign", optax.scale(-1.0)))
    tx = optax.MultiSteps(tx, every_k_schedule=2).gradient_transformation()
    tx = untyped(optax.apply_if_finite(tx, max_consecutive_errors=3))
    start = jax.tree.map(jnp.zeros_like, PARAMS)
    apply = jax.jit(lambda s, g: s.apply_gradients(grads=g))
    bad = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), STREAM[1])
    with optax_needs_promotion():
        state = TrainState.create(apply_fn=None, params=start, tx=tx)
        for updates in (STREAM[2], bad):  # the first waits, the second does not count
            state = apply(state, updates)
            chex.assert_trees_all_equal(state.params, start)
        state = apply(state, STREAM[2])
    ((want, _),) = walk(row.name, STREAM[2:3], start)
    assert_within_ulps(state.params, negative(want))
    if row.has_metrics is True:
        found = optclip.metrics(state.opt_state)
        assert [v for k, v in found.items() if k.endswith("/steps")] == [1]


@SAMPLE
def test_masked(row):
    tx = optax.masked(row.build(1.0), {"alpha": True, "beta": False})
    out, _ = untyped(tx).update(STREAM[2], tx.init(PARAMS), PARAMS)
    alone, _ = row.build(1.0).update(ALPHA, None, {"alpha": PARAMS["alpha"]})
    assert_within_ulps({"alpha": out["alpha"]}, alone)
    chex.assert_trees_all_equal(out["beta"], STREAM[2]["beta"])


@SAMPLE
def test_partition(row):
    parts = {"clip": row.build(1.0), "rest": optax.set_to_zero()}
    tx = untyped(optax.partition)(parts, {"alpha": "clip", "beta": "rest"})
    out, _ = tx.update(STREAM[2], tx.init(PARAMS), PARAMS)
    alone, _ = row.build(1.0).update(ALPHA, None, {"alpha": PARAMS["alpha"]})
    assert_within_ulps({"alpha": out["alpha"]}, alone)
    assert not np.any(out["beta"]["kernel"])


@pytest.mark.parametrize("row", LIMITED + rows("measuring", "wrapper"))
def test_inject_hyperparams(row):
    """A limit in the state is read from it, and schedules are followed."""
    with optax_needs_promotion():
        tx = untyped(optax.inject_hyperparams(injectable(row))(limit=1.0))
        update, state = jax.jit(tx.update), tx.init(PARAMS)
        for updates, limit in zip(STREAM[1:3], (1.0, 0.25), strict=True):
            state.hyperparams["limit"] = jnp.asarray(limit, jnp.float32)
            out, state = update(updates, state, PARAMS)
            assert_within_ulps(out, clipped(row.name)(limit, updates))


@pytest.mark.parametrize("row", [p for p in SAMPLE.args[1] if p.id not in LEARNED])
def test_inject_hyperparams_with_a_schedule(row):
    falling = optax.linear_schedule(1.0, 0.25, 3)
    with optax_needs_promotion():
        tx = optax.inject_hyperparams(injectable(row))(limit=falling)
        update, state = jax.jit(tx.update), tx.init(PARAMS)
        for updates, limit in zip(STREAM[1:], (1.0, 0.75, 0.5), strict=True):
            out, state = update(updates, state, PARAMS)
            assert_within_ulps(out, clipped(row.name)(limit, updates))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("public", "argument"),
    sorted(
        {
            (r.values[0].public, r.values[0].argument)
            for r in LIMITED
            if r.values[0].argument
        }
    ),
)
def test_inject_hyperparams_on_the_public_rule(public, argument, dtype):
    """The rules' own signatures: parts as defaults are not taken for schedules.

    Optax casts the limit to the parameters' dtype, so it may arrive as bfloat16.
    """
    rule = getattr(optclip, public)
    updates = jax.tree.map(lambda x: x.astype(dtype), STREAM[2])
    tx = untyped(optax.inject_hyperparams(rule)(**{argument: 1.0}))
    state = tx.init(updates)
    assert set(state.hyperparams) == {argument}
    out, _ = jax.jit(tx.update)(updates, state, updates)
    want, _ = rule(1.0).update(updates, None)
    assert_within_ulps(out, want)


@SAMPLE
def test_multi_steps(row):
    """The clip sees the mean of the micro-steps, here of two equal ones."""
    tx = optax.MultiSteps(row.build(1.0), every_k_schedule=2)
    with optax_needs_promotion():
        update, state = jax.jit(tx.update), tx.init(PARAMS)
        waiting, state = update(STREAM[2], state, PARAMS)
        out, state = update(STREAM[2], state, PARAMS)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(waiting))
    assert_within_ulps(out, clipped(row.name)(1.0, STREAM[2]))
    if row.has_metrics is True:
        (steps,) = (v for k, v in optclip.metrics(state).items() if "/steps" in k)
        assert steps == 1


@SAMPLE
def test_apply_if_finite(row):
    """A bad step gives zeros and leaves the state alone; the next one goes on."""
    tx = optax.apply_if_finite(row.build(1.0), max_consecutive_errors=3)
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    out, state = update(STREAM[0], state, PARAMS)
    assert_within_ulps(out, run(row.name)[0][0])
    bad = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), STREAM[1])
    out, after_bad = update(bad, state, PARAMS)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(out))
    chex.assert_trees_all_equal(after_bad.inner_state, state.inner_state)
    out, _ = update(STREAM[1], after_bad, PARAMS)
    assert_within_ulps(out, run(row.name)[1][0])


@SAMPLE
def test_named_chain(row):
    tx = optax.named_chain(("clip", row.build(1.0)), ("sign", optax.scale(-1.0)))
    out, state = untyped(tx).update(STREAM[2], tx.init(PARAMS), PARAMS)
    assert_within_ulps(out, negative(clipped(row.name)(1.0, STREAM[2])))
    assert set(state) == {"clip", "sign"}


@EVERY
def test_map_params(row):
    """Adam's moments are mapped with the parameters; of joint groups nothing is."""
    tx = optax.chain(row.build(1.0), optax.scale_by_adam())
    state = tx.init(PARAMS)
    mapped = untyped(optax.tree.map_params)(
        tx, lambda x, p: "moment", state, PARAMS, transform_non_params=lambda x: "rest"
    )
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    # One number an element is a tree like the parameters, as a moment is.
    kept = {"rest", "moment"} if row.oracle["grouping"] == "element" else {"rest"}
    assert set(jax.tree.leaves(mapped[0])) <= kept
    assert set(jax.tree.leaves(mapped[1].mu)) == {"moment"}


@EVERY
def test_the_state_has_its_shape_before_it_exists(row):
    tx = row.build(1.0)
    promised, made = jax.eval_shape(tx.init, PARAMS), tx.init(PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(promised, made)
    for leaf in jax.tree.leaves((promised, jax.eval_shape(lambda: made))):
        assert not leaf.weak_type


@EVERY
def test_state_and_params_are_optional(row):
    tx = row.build(1.0)
    want, state = run(row.name)[0]
    needed = [PARAMS] if row.needs_params else []
    fresh = tx.update(STREAM[0], None, *needed)
    given = tx.update(STREAM[0], tx.init(PARAMS), *needed)
    with_all = tx.update(
        STREAM[0], tx.init(PARAMS), PARAMS, value=jnp.ones(()), grad=PARAMS, anything=1
    )
    for got in (fresh, given, with_all):
        assert_within_ulps(got, (want, state))


@SAMPLE
def test_linen_train_state(row):
    tx = optax.chain(row.build(1.0), optax.scale(-1.0))
    start = jax.tree.map(jnp.zeros_like, PARAMS)
    state = TrainState.create(apply_fn=None, params=start, tx=tx)
    state = jax.jit(lambda s, g: s.apply_gradients(grads=g))(state, STREAM[2])
    ((want, _),) = walk(row.name, STREAM[2:3], start)
    assert_within_ulps(state.params, negative(want))


class Block(nnx.Module):
    """Parameters from arrays, their leading axis along `axis` of the mesh in scope."""

    def __init__(self, arrays, axis):
        for name, array in arrays.items():
            setattr(self, name, nnx.Param(sharded_along(array, axis)))


def sharded_along(array, axis):
    if axis is None:
        return array
    names = (axis,) + (None,) * (array.ndim - 1)
    placed = jax.device_put(array, jax.sharding.PartitionSpec(*names))
    return nnx.with_partitioning(lambda: placed, names)()


class Net(nnx.Module):
    def __init__(self, tree, axis=None):
        self.alpha = Block(tree["alpha"], axis)
        self.beta = Block(tree["beta"], axis)

    def values(self):
        def arrays(block):
            found = vars(block).items()
            return {k: v[...] for k, v in found if isinstance(v, nnx.Param)}

        return {"alpha": arrays(self.alpha), "beta": arrays(self.beta)}


@pytest.mark.parametrize(
    ("row", "sharded"),
    [
        pytest.param(p.values[0], sharded, id=f"{p.id}-{name}")
        for p in SAMPLE.args[1]
        for name, sharded in (("sharded", True), ("alone", False))
    ],
)
def test_nnx_optimizer(row, sharded):
    """Jitted with model and optimizer donated, on a mesh; alone, eager before that."""
    axis = "data" if sharded else None
    if sharded and jax.device_count() < 2:
        pytest.skip("one device only")
    mesh = contextlib.nullcontext()
    if sharded:
        auto = (jax.sharding.AxisType.Auto,)
        mesh = jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=auto))
    with mesh:
        start = jax.tree.map(jnp.zeros_like, PARAMS)
        model = untyped(Net(start, axis))
        again = jax.tree.map(jnp.copy, start)  # the model's own buffers are donated
        if sharded:
            assert "data" in model.alpha.kernel[...].sharding.spec
        tx = optax.chain(row.build(1.0), optax.scale(-1.0))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        if not sharded:
            optimizer.update(model, nnx.state(Net(STREAM[1])))
            ((want, _),) = walk(row.name, STREAM[1:2], start)
            assert_within_ulps(model.values(), negative(want))

        update = nnx.jit(lambda m, o, g: o.update(m, g) and None, donate_argnums=(0, 1))
        nnx.update(model, nnx.state(Net(again, axis)))
        before = jax.tree.map(lambda x: x.sharding, model.values())
        update(model, optimizer, nnx.state(Net(STREAM[2], axis)))
        assert jax.tree.map(lambda x: x.sharding, model.values()) == before
        values = jax.device_get(model.values())
    # The optimizer keeps its state, while the model started again.
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    *_, (want, _) = walk(row.name, STREAM[2:3] if sharded else STREAM[1:3], zeros)
    assert_within_ulps(values, negative(want))
    if row.has_metrics is True:
        assert optclip.metrics(optimizer.opt_state)["0/steps"] == 2 - sharded


@SETS
def test_one_trace_of_projections(row):
    tx, _ = projected(row.name)
    chex.clear_trace_counter()
    traced = jax.jit(chex.assert_max_traces(lambda u, s: tx.update(u, s, PARAMS), n=1))
    state = tx.init(PARAMS)
    for updates in STREAM:
        traced.trace(updates, state)


@pytest.mark.parametrize("row", [p for p in SETS.args[1] if p.id in KINDS_OF_SETS])
def test_projections_scan_and_vmap(row):
    """A scan's carry, and a radius that is traced and mapped over."""
    tx, want = projected(row.name)
    state = tx.init(PARAMS)
    scanned = jax.jit(
        lambda: jax.lax.scan(
            lambda s, u: tx.update(u, s, PARAMS)[::-1], state, STACKED
        )[1]
    )()
    assert_within_ulps(step(scanned, 2), want, of_largest=row.digits is not True)

    def sized(size):
        own = row.transform(size)
        return own.update(STREAM[2], own.init(PARAMS), PARAMS)[0]

    outs = jax.jit(jax.vmap(sized))(jnp.array([0.25, 0.75]))
    # Half precision that comes from other last digits of a matrix differs by its ulp.
    ulps = 64 if row.points == "matrix" else 2
    assert_within_ulps(step(outs, 1), want, ulps, of_largest=row.digits is not True)


@SETS
def test_projections_in_wrappers(row):
    """masked, and a named_chain in MultiSteps."""
    tx, want = projected(row.name)
    masked = untyped(optax.masked(tx, {"alpha": True, "beta": False}))
    out, _ = jax.jit(masked.update)(STREAM[2], masked.init(PARAMS), PARAMS)
    assert_within_ulps(out["alpha"], want["alpha"])
    chex.assert_trees_all_equal(out["beta"], STREAM[2]["beta"])
    chained = optax.named_chain(("sign", optax.scale(-1.0)), ("set", tx))
    with optax_needs_promotion():
        multi = optax.MultiSteps(chained, every_k_schedule=2)
        micro = jax.jit(multi.update)
        waiting, state = micro(negative(STREAM[2]), multi.init(PARAMS), PARAMS)
        out, _ = micro(negative(STREAM[2]), state, PARAMS)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(waiting))
    assert_within_ulps(out, want)


@pytest.mark.parametrize("sharded", [False, True], ids=["one device", "sharded"])
def test_projections_in_nnx_and_linen(sharded):
    axis = "data" if sharded else None
    if sharded and jax.device_count() < 2:
        pytest.skip("one device only")
    mesh = contextlib.nullcontext()
    if sharded:
        auto = (jax.sharding.AxisType.Auto,)
        mesh = jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=auto))
    tx = optax.chain(optax.scale(-1.0), optclip.project(optclip.sets.max_norm(0.5)))
    with mesh:
        model = Net(jax.tree.map(jnp.copy, PARAMS), axis)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        update = nnx.jit(lambda m, o, g: o.update(m, g) and None, donate_argnums=(0, 1))
        update(model, optimizer, nnx.state(Net(STREAM[2], axis)))
        values = jax.device_get(model.values())
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    state = jax.jit(lambda s, g: s.apply_gradients(grads=g))(state, STREAM[2])
    assert_within_ulps(values, state.params)
    for leaf in jax.tree.leaves(values):
        norms = np.sqrt(np.sum(leaf.astype(np.float64) ** 2, axis=0))
        assert np.all(norms <= 0.5) and np.all(norms > 0.45)
