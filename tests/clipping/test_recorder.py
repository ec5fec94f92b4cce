"""The recorder: what it keeps is right, survives whatever holds a state, and is free.

"Free" in bytes accessed and in collectives of the compiled program, beside the rule
without a recorder. The laws' table has rows that record, too.
"""

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optclip
from optclip import ClipState, groupings, measures, thresholds
from optclip._core import numerics
from tests.laws.collectives import collectives, mesh_of
from tests.untyped import untyped

NAMES = ("a/bias", "a/kernel", "b/kernel")


def tree(seed: int = 0, scale: float = 1.0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def leaf(*shape: int) -> jax.Array:
        return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)

    return {
        "a": {"bias": leaf(8), "kernel": leaf(4, 8)},
        "b": {"kernel": leaf(8, 4).astype(jnp.bfloat16)},
    }


STREAM = [tree(seed, scale) for seed, scale in enumerate((1.0, 0.1, 30.0, 2.0, 0.5))]


def size_of(measure: optclip.measures.Measure, *leaves: Any) -> float:
    """In float64."""
    x = np.concatenate([np.asarray(leaf).astype(np.float64).ravel() for leaf in leaves])
    known = {
        "l2": lambda: np.sqrt(np.sum(x**2)),
        "rms": lambda: np.sqrt(np.mean(x**2)),
        "l1": lambda: np.sum(abs(x)),
        "max_abs": lambda: np.max(abs(x)),
        "lp(3)": lambda: np.sum(abs(x) ** 3) ** (1 / 3),
    }
    return float(known[repr(measure)]())


def walked(tx: Any, stream: list[Any] = STREAM, params: Any = None) -> tuple[Any, Any]:
    """The last updates and state."""
    update, state, out = jax.jit(tx.update), tx.init(stream[0]), None
    for updates in stream:
        out, state = update(updates, state, params)
    return out, state


MEASURES = [measures.l2, measures.rms, measures.l1, measures.max_abs, measures.lp(3)]


@pytest.mark.parametrize("measure", MEASURES, ids=repr)
def test_the_leaves_of_one_group(measure):
    """Also after the ring came round, and with the outputs that it has without."""
    tx = optclip.clip_by_global_norm(4.0, measure=measure, record=3)
    alone = optclip.clip_by_global_norm(4.0, measure=measure)
    (out, state), (want, plain) = walked(tx), walked(alone)
    chex.assert_trees_all_equal((out, state[:2]), (want, tuple(plain)))
    past = untyped(optclip.history(state))
    assert (past.names, past.parts, past.measure) == (NAMES, "leaves", repr(measure))
    np.testing.assert_array_equal(past.steps, [3, 4, 5])
    last = [jax.tree.leaves(updates) for updates in STREAM[2:]]
    sizes = [[size_of(measure, leaf) for leaf in leaves] for leaves in last]
    np.testing.assert_allclose(past.sizes, sizes, rtol=1e-6)
    size = [size_of(measure, *leaves) for leaves in last]
    np.testing.assert_allclose(past.size, size, rtol=1e-6)
    np.testing.assert_array_equal(past.limit, [4.0] * 3)
    np.testing.assert_array_equal(past.clipped, np.array(size) > 4.0)
    assert past.clipped.any() and not past.nonfinite.any()


def test_groups_and_units():
    """Named groups keep their sizes, a leaf of units that of its furthest over."""
    first = groupings.per_label(lambda path: path[:1])
    for grouping, names in ((groupings.per_leaf(), NAMES), (first, ("a", "b"))):
        tx = optclip.clip_by_norm(1.0, grouping=grouping, record=9)
        past = untyped(optclip.history(walked(tx)[1]))
        assert (past.names, past.parts) == (names, "groups")
        for row, updates in zip(past.sizes, STREAM, strict=True):
            leaves = jax.tree.leaves(updates)
            if len(names) == 2:
                leaves = [tuple(leaves[:2]), tuple(leaves[2:])]
            leaves = [x if isinstance(x, tuple) else (x,) for x in leaves]
            want = [size_of(measures.l2, *own) for own in leaves]
            np.testing.assert_allclose(row, want, rtol=1e-6)
        np.testing.assert_array_equal(past.size, past.sizes.max(axis=1))
    tx = optclip.adaptive_grad_clip(0.1, record=9)
    past = untyped(optclip.history(walked(tx, params=tree(9))[1]))
    assert (past.names, past.parts) == (NAMES, "units")
    for row, updates in zip(past.sizes, STREAM, strict=True):
        for got, path in zip(row, NAMES, strict=True):
            group, name = path.split("/")
            x = np.asarray(updates[group][name]).astype(np.float64)
            w = np.asarray(tree(9)[group][name]).astype(np.float64)
            size, of_params = (
                np.sqrt(np.sum(y**2, axis=0)) if name == "kernel" else np.linalg.norm(y)
                for y in (x, w)
            )
            ratio = size / np.maximum(of_params, 1e-3)
            want = np.ravel(size)[np.argmax(ratio)]
            np.testing.assert_allclose(got, want, rtol=1e-5)


CASES = {
    "overflow": ({"a": 1e25, "b": 3.0}, (1e25, 3.0)),
    "all overflow": ({"a": 1e25, "b": 3e30}, (1e25, 3e30)),
    "vanish": ({"a": 1e-25, "b": 2e-30}, (1e-25, 2e-30)),
    "a NaN": ({"a": np.nan, "b": 3.0}, (np.nan, 3.0)),
    "infinity": ({"a": 2.0, "b": np.inf}, (2.0, np.inf)),
}


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("measure", [measures.l2, measures.rms, measures.lp(3)])
@pytest.mark.parametrize("name", CASES)
def test_where_plain_sums_left_their_range(name, measure, backend, monkeypatch):
    """By a second pass, or by three sums as on a GPU; beside a leaf that is bad."""
    if (name, backend, measure) == ("overflow", "gpu", measures.lp(3)):
        pytest.skip("the scale there is the group's, at which a cube of 3e-25 vanishes")
    monkeypatch.setattr(numerics, "backend", lambda: backend)
    values, want = CASES[name]
    updates = {key: jnp.asarray([value], jnp.float32) for key, value in values.items()}
    tx = optclip.clip_by_global_norm(1.0, measure=measure, record=2)
    alone = optclip.clip_by_global_norm(1.0, measure=measure)
    out, state = untyped(tx).update(updates, None)
    chex.assert_trees_all_equal(out, untyped(alone).update(updates, None)[0])
    past = untyped(optclip.history(state))
    np.testing.assert_allclose(past.sizes, [want], rtol=1e-5)
    np.testing.assert_array_equal(past.nonfinite, [~np.isfinite(want)])
    np.testing.assert_array_equal(past.size, state.metrics.size[None])


def test_ratios_to_the_parameters():
    params = tree(7)
    params["a"]["bias"] = jnp.zeros(8)
    tx = optax.chain(optax.scale(-0.5), optclip.monitor(record=2, ratios=True))
    past = untyped(optclip.history(walked(tx, params=params)[1]))
    for row, updates in zip(past.ratios, STREAM[3:], strict=True):
        sizes, beside = (
            np.array([size_of(measures.l2, leaf) for leaf in jax.tree.leaves(x)])
            for x in (updates, params)
        )
        np.testing.assert_allclose(row[1:], 0.5 * sizes[1:] / beside[1:], rtol=1e-5)
        assert row[0] == np.inf
    with pytest.raises(ValueError, match="monitor: params must be given to update"):
        untyped(optclip.monitor(record=2, ratios=True)).update(tree(), None)
    labels = groupings.per_label(lambda path: path[:1])
    tx = optclip.monitor(grouping=labels, record=2, ratios=True)
    ratios = untyped(optclip.history(walked(tx, params=tree(7))[1])).ratios
    assert ratios.shape == (2, 2) and np.isfinite(ratios).all()


# What it costs.

RULES = {
    "clip_by_global_norm": optclip.clip_by_global_norm,
    "clip_by_norm": optclip.clip_by_norm,
    "per_unit": lambda limit, **options: optclip.clip_by_norm(
        limit, grouping=groupings.per_unit(axes=0), **options
    ),
    "monitor": lambda limit, **options: optclip.monitor(**options),
    "spike_clip": lambda limit, **options: optclip.spike_clip(window=4, **options),
}
EVERY_RULE = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def nbytes(state: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


@EVERY_RULE
def test_it_reads_nothing_more(rule):
    """Bytes accessed are those of the rule alone, up to the recorder's own."""
    grads = [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 20

    def accessed(tx: Any) -> tuple[float, Any]:
        state = jax.eval_shape(tx.init, grads)
        update = jax.jit(tx.update, donate_argnums=(0, 1))
        found = untyped(update.lower(grads, state).compile().cost_analysis())
        found = found[0] if isinstance(found, list) else found
        return found["bytes accessed"], state

    alone, _ = accessed(rule(1.0))
    recorded, state = accessed(rule(1.0, record=128))
    assert alone >= 2 * nbytes(grads) * (1 if rule is RULES["monitor"] else 2)
    assert alone < recorded <= alone + nbytes(state.recorder)


def test_half_a_megabyte():
    grads = [jax.ShapeDtypeStruct((8,), jnp.float32)] * 1000
    state = jax.eval_shape(optclip.clip_by_global_norm(1.0, record=128).init, grads)
    assert 128 * 1000 * 4 <= nbytes(state.recorder) <= 128 * 1000 * 4 + 128 * 16


needs_mesh = pytest.mark.skipif(
    len(jax.devices("cpu")) < 8, reason="needs eight host devices"
)


def kinds_of(text: str | None) -> list[str]:
    return sorted(sent.kind for sent in collectives(text or "").everywhere)


@needs_mesh
@EVERY_RULE
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_it_sends_nothing_more_under_jit(rule, kind):
    mesh = mesh_of(kind)
    place = NamedSharding(mesh, P("data", "model"))
    grads = [jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=place)] * 4

    def sent(tx: Any) -> list[str]:
        with jax.set_mesh(mesh):
            state = jax.eval_shape(tx.init, grads)
            text = jax.jit(tx.update).lower(grads, state).compile().as_text()
        return kinds_of(text)

    assert sent(rule(1.0)) and sent(rule(1.0, record=4)) == sent(rule(1.0))


MIXED = [P("data"), P(("data", "model")), P(), P("model")]


@needs_mesh
@pytest.mark.parametrize("name", ["clip_by_global_norm", "clip_by_norm", "per_unit"])
def test_it_sends_nothing_more_in_shard_map(name):
    """And records on each device what one device alone would."""
    specs = [P(None, "model")] * 4 if name == "per_unit" else MIXED
    grads = [jnp.arange(64.0).reshape(8, 8) * by for by in (1, 3, 0.1, 2)]

    def step(record: int) -> Any:
        axis_name = () if name == "per_unit" else None
        tx = RULES[name](1.0, record=record, axis_name=axis_name)
        return lambda updates: tx.update(updates, tx.init(updates))

    def mapped(record: int) -> Any:
        out = specs, P()
        mesh = mesh_of(AxisType.Auto)
        return jax.jit(
            jax.shard_map(step(record), mesh=mesh, in_specs=(specs,), out_specs=out)
        )

    alone, recorded = (
        kinds_of(mapped(record).lower(grads).compile().as_text()) for record in (0, 4)
    )
    assert alone and recorded == alone
    past, want = (
        untyped(optclip.history(run(grads)[1])) for run in (mapped(4), step(4))
    )
    np.testing.assert_allclose(past.sizes, want.sizes, rtol=1e-6)
    np.testing.assert_allclose(past.size, want.size, rtol=1e-6)
    assert past.names == want.names and past.sizes.shape == (1, 4)


# What holds a state.


def test_without_it_the_state_is_what_it_was():
    rule = optclip.clip_by_global_norm
    for tx in (rule(1.0), rule(1.0, record=0), rule(1.0, record=None)):
        state = untyped(tx.init(tree()))
        assert type(state) is ClipState and state._fields == ("threshold", "metrics")
        assert len(jax.tree.leaves(state)) == 6


def recorded_by(state: Any) -> tuple[tuple[str, ...], list[int]]:
    past = untyped(optclip.history(state))
    return past.names, past.steps.tolist()


def test_in_a_scan():
    tx = untyped(optclip.spike_clip(record=3))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *STREAM)
    scanned = jax.jit(
        lambda s, us: jax.lax.scan(lambda s, u: tx.update(u, s)[::-1], s, us)
    )
    state, _ = scanned(tx.init(tree()), stacked)
    chex.assert_trees_all_close(state, walked(tx)[1], rtol=1e-6)
    assert recorded_by(state) == (NAMES, [3, 4, 5])


def test_in_many_runs_at_once():
    tx = untyped(optclip.clip_by_global_norm(1.0, record=3))
    runs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *STREAM)
    states = jax.vmap(tx.init)(runs)
    _, states = jax.jit(jax.vmap(tx.update))(runs, states)
    with pytest.raises(ValueError, match=r"must be of one run, got .*\(5, 3, 3\)"):
        optclip.history(states)
    sizes = optclip.metrics(states, sizes=True)["size/a/bias"]
    own = jax.tree.map(lambda x: x[2], states)
    assert sizes.shape == (5,) and recorded_by(own) == (NAMES, [1])
    assert sizes[2] == untyped(optclip.history(own)).sizes[0, 0]


def test_multi_steps_record_once_an_update():
    tx = optax.MultiSteps(optclip.clip_by_global_norm(1.0, record=4), 2)
    with jax.numpy_dtype_promotion("standard"):  # which Optax needs
        _, state = walked(tx)
    assert recorded_by(state) == (NAMES, [1, 2])


def test_a_step_that_a_wrapper_drops_is_not_recorded():
    tx = optax.apply_if_finite(optclip.clip_by_global_norm(1.0, record=4), 9)
    bad = jax.tree.map(lambda x: x * jnp.asarray(jnp.nan, x.dtype), tree())
    assert recorded_by(walked(tx, [tree(), bad, tree()])[1]) == (NAMES, [1, 2])


def test_one_function_for_other_trees():
    """Names belong to a state, and are not those of the tree that was traced first."""
    tx = untyped(optclip.monitor(record=2))
    first, second = {"a": jnp.ones(2), "b": jnp.ones(2)}, {"c": jnp.ones(2)}
    second["d"] = jnp.ones(2)
    passed = jax.jit(lambda state: state)
    states = [passed(tx.update(x, None)[1]) for x in (first, second, first)]
    names = [untyped(optclip.history(state)).names for state in states]
    assert names == [("a", "b"), ("c", "d"), ("a", "b")]


def test_map_params_passes_it_by():
    map_params = getattr(optax.tree, "map_params", None) or optax.tree_map_params
    tx = optax.chain(optclip.adagc(record=2), optax.trace(0.9))
    mapped = untyped(map_params)(
        tx,
        lambda x, p: "param",
        tx.init(tree()),
        tree(),
        transform_non_params=lambda x: "rest",
    )
    assert set(jax.tree.leaves(mapped[0])) == {"rest"}
    # It gives back the structure of a state made from no leaves, without their names.
    state = untyped(map_params)(tx, lambda x, p: x, walked(tx)[1], tree())
    with pytest.raises(ValueError, match="history: params must be given where a state"):
        optclip.history(state)
    past = untyped(optclip.history(state, tree()))
    assert (past.names, past.parts) == (NAMES, "groups")
    np.testing.assert_array_equal(past.steps, [4, 5])


def test_checkpoints(tmp_path):
    """Orbax's, and Flax's bytes; with the names, and without a target for them."""
    tx = optax.chain(optclip.clip_by_global_norm(1.0, record=3), optax.scale(-1.0))
    _, state = walked(tx)
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(tmp_path / "state", state)
    checkpointer.wait_until_finished()
    target = jax.tree.map(jnp.zeros_like, state)
    restored = checkpointer.restore(tmp_path / "state", target)
    plain = checkpointer.restore(tmp_path / "state")
    checkpointer.close()
    again = serialization.from_bytes(tx.init(tree()), serialization.to_bytes(state))
    adopted = optclip.adopt_state(tx.init(tree()), plain)
    assert not adopted.fresh and not adopted.unused
    for own in (restored, again, adopted.state):
        chex.assert_trees_all_equal(own, state)
        assert recorded_by(own) == (NAMES, [3, 4, 5])
        chex.assert_trees_all_equal(tx.update(tree(), own), tx.update(tree(), state))


class Net(nnx.Module):
    def __init__(self, values: dict[str, Any]):
        self.a, self.b = nnx.Module(), nnx.Module()
        for group, leaves in values.items():
            for name, value in leaves.items():
                setattr(getattr(self, group), name, nnx.Param(value))


def test_in_an_nnx_optimizer():
    tx = optclip.clip_by_global_norm(1.0, record=3)
    model = Net(tree(9))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    update = nnx.jit(lambda m, o, g: o.update(m, g) and None, donate_argnums=(0, 1))
    for updates in STREAM:
        update(model, optimizer, nnx.state(Net(updates)))
    past = untyped(optclip.history(optimizer.opt_state))
    want = untyped(optclip.history(walked(tx)[1]))
    assert past.names == want.names
    np.testing.assert_allclose(past.sizes, want.sizes, rtol=1e-6)
    with pytest.raises(ValueError, match=r"call history\(optimizer.opt_state\)"):
        optclip.history(nnx.state(optimizer))


def test_switched_on_by_injection():
    inject = optax.inject_hyperparams
    tx = inject(optclip.clip_by_global_norm, static_args="record")(1.0, record=2)
    with jax.numpy_dtype_promotion("standard"):  # which Optax needs
        assert recorded_by(walked(tx, params=tree())[1]) == (NAMES, [4, 5])
    with pytest.raises(ValueError, match=r'say static_args=\("record",\)'):
        inject(optclip.clip_by_global_norm)(1.0, record=2).init(jnp.ones(2))


def test_a_tree_without_leaves():
    tx = untyped(optclip.clip_by_global_norm(1.0, record=2))
    _, state = tx.update({}, tx.init({}))
    past = untyped(optclip.history(state))
    assert past.names == () and past.sizes.shape == (1, 0)


def test_leaves_that_spell_alike_have_two_names():
    updates = {"a/b": jnp.array([3.0]), "a": {"b": jnp.array([4.0])}, "n": None}
    for grouping in (groupings.whole(), groupings.per_leaf(), groupings.per_unit()):
        tx = untyped(optclip.monitor(grouping=grouping, record=1))
        past = untyped(optclip.history(tx.update(updates, None)[1]))
        assert past.names == ("['a']['b']", "['a/b']")
        np.testing.assert_array_equal(past.sizes, [[4.0, 3.0]])


# What it refuses.


@pytest.mark.parametrize("record", [-1, True, 2.0, "all"])
def test_how_many(record):
    with pytest.raises(ValueError, match="spike_clip: record must be an integer of at"):
        optclip.spike_clip(record=record)


@pytest.mark.parametrize("grouping", [groupings.per_example(), groupings.per_element()])
def test_groupings_without_parts(grouping):
    tx = untyped(optclip.clip_by)
    with pytest.raises(
        ValueError, match=r"clip_by: record must be 0 under per_e.*\(\)"
    ):
        tx(thresholds.constant(1.0), grouping=grouping, record=3)
    with pytest.raises(ValueError, match="second_moment_clip: record must be 0 under"):
        optclip.second_moment_clip(record=3)


def test_ratios_without_a_recorder():
    with pytest.raises(ValueError, match="monitor: ratios must be False where nothing"):
        optclip.monitor(ratios=True)
    with pytest.raises(ValueError, match=r"ratios must be False under per_unit\(\)"):
        optclip.monitor(grouping=groupings.per_unit(), record=3, ratios=True)


def test_states_of_others():
    tx, longer = (untyped(optclip.monitor(record=record)) for record in (3, 4))
    for state, message in (
        (longer.init(tree()), r"recorded 3 steps of 3 leaves, got .*\(4, 3\)"),
        (tx.init({"w": jnp.ones(2)}), r"recorded 3 steps of 3 leaves, got .*\(3, 1\)"),
        (optclip.monitor().init(tree()), "a RecordedClipState, got ClipState"),
    ):
        with pytest.raises(ValueError, match=f"monitor: state must .*{message}"):
            tx.update(tree(), state)
    with pytest.raises(ValueError, match="a ClipState, got RecordedClipState"):
        untyped(optclip.monitor()).update(tree(), tx.init(tree()))


def test_derivatives_pass_it_by():
    """Finite at zero too, and the same as without."""

    def loss(record: int) -> Any:
        tx = untyped(optclip.clip_by_global_norm(1.0, record=record))

        def of(x: jax.Array) -> jax.Array:
            updates, state = tx.update({"w": x}, None)
            total = jnp.sum(updates["w"] * jnp.arange(3.0))
            return total + (jnp.sum(state.recorder.sizes) if record else 0)

        return jax.grad(of)

    for x in (jnp.zeros(3), jnp.array([1.0, 2.0, 3.0])):
        chex.assert_trees_all_equal(loss(2)(x), loss(0)(x))
    assert math.isfinite(jnp.sum(loss(2)(jnp.zeros(3))))


def test_names_are_not_those_of_another_state():
    """A state without names, as one read from bytes is, equals others in a cache."""
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    tx = optclip.clip_by_norm(1.0, grouping=groupings.per_leaf(), record=3)
    nameless = untyped(tx.init(params))
    labels = type(nameless.recorder.labels)()
    nameless = nameless._replace(recorder=nameless.recorder._replace(labels=labels))
    for state, names in ((nameless, ()), (untyped(tx.init(params)), ("a", "b"))):
        _, after = untyped(tx).update(params, state)
        assert after.recorder.labels.names == names
