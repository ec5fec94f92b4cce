"""`skip_step` drops a bad step whole: no update, and an inner optimizer that slept."""

import functools
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec

import optclip
from optclip import thresholds
from tests.untyped import untyped

PARAMS = {"w": jnp.array([1.0, -2.0]), "b": jnp.array([0.5])}
DIRECTION = {"w": jnp.array([0.6, 0.0]), "b": jnp.array([0.8])}  # of norm 1
SPIKE = 100.0


@pytest.fixture
def promoting():
    """Optax's Adam promotes its counters to float."""
    with jax.numpy_dtype_promotion("standard"):
        yield


FOR_ADAM = pytest.mark.usefixtures("promoting")


def gradients(size):
    """A tree of that norm; a NaN or an infinity spoils one leaf only."""
    if np.isfinite(size):
        return jax.tree.map(lambda x: x * jnp.float32(size), DIRECTION)
    return {**DIRECTION, "b": jnp.array([size], jnp.float32)}


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@functools.cache
def adam(max_consecutive=10):
    """Around Adam with a schedule, and its jitted update."""
    inner = optax.adam(optax.linear_schedule(1e-2, 0.0, 50))
    tx = untyped(optclip.skip_step(inner, 10.0, max_consecutive=max_consecutive))
    return tx, jax.jit(tx.update)


def after(sizes, max_consecutive=10):
    """The updates at each step, and the last state."""
    tx, update = adam(max_consecutive)
    state, outs = tx.init(PARAMS), []
    for size in sizes:
        out, state = update(gradients(size), state, PARAMS)
        outs.append(out)
    return outs, state


def is_zero(tree):
    return not any(np.any(leaf) for leaf in jax.tree.leaves(tree))


def skipped(tx, sizes, **update_args):
    """Which of the steps were skipped, by one scan."""

    @jax.jit
    def run(state, stream):
        def step(state, updates):
            out, state = tx.update(updates, state, PARAMS, **update_args)
            return state, (out, state.metrics.skipped_steps)

        return jax.lax.scan(step, state, stream)

    stream = jax.tree.map(lambda *x: jnp.stack(x), *[gradients(s) for s in sizes])
    state, (outs, counts) = run(tx.init(PARAMS), stream)
    zero = ~np.stack([np.any(x, axis=1) for x in jax.tree.leaves(outs)]).any(axis=0)
    np.testing.assert_array_equal(zero, np.diff(counts, prepend=0) > 0)
    return zero.tolist(), state


# A bad step.


@FOR_ADAM
@pytest.mark.parametrize("bad", [SPIKE, np.nan, np.inf, -np.inf, 3e38])
def test_a_bad_step_did_not_happen(bad):
    """Zero updates, and every bit of the inner state as it was: no count moves."""
    _, before = after([1.0, 2.0])
    _, update = adam()
    out, state = update(gradients(bad), before, PARAMS)
    assert is_zero(out)
    chex.assert_trees_all_equal_shapes_and_dtypes(out, DIRECTION)
    assert bits(state.inner_state) == bits(before.inner_state)
    assert state.inner_state[0].count == 2
    assert (state.metrics.skipped_steps, state.metrics.consecutive_skips) == (1, 1)


@FOR_ADAM
@pytest.mark.parametrize("bad", [SPIKE, np.nan, np.inf])
def test_the_next_step_goes_on(bad):
    """At once, as if the bad steps had not been there."""
    outs, state = after([1.0, bad, 2.0, bad, bad, 3.0])
    wanted, clean = after([1.0, 2.0, 3.0])
    assert [is_zero(out) for out in outs] == [False, True, False, True, True, False]
    for got, want in zip([outs[0], outs[2], outs[5]], wanted, strict=True):
        assert bits(got) == bits(want)
    assert bits(state.inner_state) == bits(clean.inner_state)
    assert (state.metrics.skipped_steps, state.metrics.consecutive_skips) == (3, 0)


@FOR_ADAM
def test_good_steps_are_the_inner_optimizer_s():
    """Bit for bit."""
    inner = optax.adam(optax.linear_schedule(1e-2, 0.0, 50))
    state, update = inner.init(PARAMS), jax.jit(inner.update)
    outs, skipping = after([1.0, 5.0, 10.0])
    for size, out in zip([1.0, 5.0, 10.0], outs, strict=True):
        want, state = update(gradients(size), state, PARAMS)
        chex.assert_trees_all_close(out, want, rtol=1e-6)
    chex.assert_trees_all_close(skipping.inner_state, state, rtol=1e-6)
    assert skipping.metrics.skipped_steps == 0


@FOR_ADAM
def test_a_spike_passes_when_patience_ends():
    """The count starts again then; a step that is not finite never passes."""
    outs, state = after([SPIKE] * 7, max_consecutive=2)
    assert [is_zero(out) for out in outs] == [True, True, False] * 2 + [True]
    assert state.metrics.skipped_steps == 5
    outs, state = after([np.nan, SPIKE, np.inf, np.nan, SPIKE], max_consecutive=2)
    assert [is_zero(out) for out in outs] == [True, True, True, True, False]
    assert (state.metrics.skipped_steps, state.metrics.consecutive_skips) == (4, 0)


def test_inner_state_that_a_product_would_spoil():
    """Infinity is a value like any other where states are selected, not multiplied."""
    holder = optax.GradientTransformation(
        lambda params: jnp.full(2, jnp.inf),
        lambda updates, state, params=None: (updates, state + jnp.nan),
    )
    tx = optclip.skip_step(holder, 1.0)
    _, state = jax.jit(tx.update)(gradients(SPIKE), tx.init(PARAMS), PARAMS)
    assert np.all(np.isposinf(state.inner_state))


def test_a_size_at_the_limit_is_within_it():
    sizes = [1.0, np.nextafter(np.float32(1.0), np.float32(2.0)), 0.0, 0.99]
    tx = untyped(optclip.skip_step(optax.identity(), 1.0))
    updates = [{"w": jnp.array([s], jnp.float32)} for s in sizes]
    state = tx.init(updates[0])
    for u in updates:
        _, state = tx.update(u, state)
    assert state.metrics.skipped_steps == 1


# Limits.


def test_a_schedule_counts_all_steps():
    """The dropped ones too: it belongs to the training, not to the optimizer."""
    limit = lambda step: 1.5 * 2.0 ** (step // 2).astype(jnp.float32)  # noqa: E731
    tx = optclip.skip_step(optax.sgd(1.0), limit)
    which, _ = skipped(tx, [2.0, 1.0, 2.0, 4.0, 4.0, 7.0])
    assert which == [True, False, False, True, False, True]


def test_a_limit_that_is_not_a_number_lets_nothing_pass():
    tx = optclip.skip_step(optax.sgd(1.0), lambda step: jnp.nan, max_consecutive=2)
    assert skipped(tx, [1.0, 1.0, 1.0])[0] == [True, True, False]  # but for patience


def test_a_learned_limit_learns_from_dropped_steps():
    """A percentile follows a permanent shift; from NaN it learns nothing."""
    tx = optclip.skip_step(
        optax.sgd(1.0), thresholds.percentile(50.0, window=5, multiple=2.0)
    )
    sizes = [1.0, 1.1, np.nan, 0.9, np.inf, SPIKE, 1.0, *[5.0] * 5]
    which, state = skipped(tx, sizes)
    bad = [s == SPIKE or not np.isfinite(s) for s in sizes[:7]]
    # Of the window 1, 0.9, 100, 1, 5 the median is 1; soon it holds three fives.
    assert which == [*bad, True, False, False, False, False]
    assert np.all(np.isfinite(jax.tree.leaves(state.watch.threshold)[0]))


def test_zscore_as_a_limit():
    rng = np.random.default_rng(0)
    sizes = 1 + 0.1 * rng.standard_normal(80)
    sizes[[40, 60]] = (3.0, np.nan)
    tx = optclip.skip_step(optax.sgd(1.0), thresholds.zscore(z_threshold=5.0))
    which, _ = skipped(tx, sizes.tolist())
    assert np.flatnonzero(which).tolist() == [40, 60]


def test_another_measure():
    """The largest element of DIRECTION is 0.8 of its norm."""
    tx = optclip.skip_step(optax.sgd(1.0), 1.0, measure=optclip.measures.max_abs)
    assert skipped(tx, [1.2, 1.3])[0] == [False, True]


def test_a_traced_limit_and_hyperparameters():
    tx = untyped(
        optax.inject_hyperparams(
            lambda threshold: optclip.skip_step(optax.sgd(1.0), threshold)
        )(threshold=1.0)
    )
    with jax.numpy_dtype_promotion("standard"):  # which Optax's counters need
        state = tx.init(PARAMS)
        update = jax.jit(tx.update)
        assert is_zero(update(gradients(2.0), state, PARAMS)[0])
        state.hyperparams["threshold"] = jnp.asarray(3.0)
        assert not is_zero(update(gradients(2.0), state, PARAMS)[0])


# The loss.


def watching(limit: Any = 2.0, **options: Any) -> Any:
    tx = optclip.skip_step(optax.sgd(1.0), 10.0, value_threshold=limit, **options)
    return untyped(tx)


@pytest.mark.parametrize(
    ("value", "skips"),
    [(1.0, 0), (2.0, 0), (2.5, 1), (-2.5, 1), (np.nan, 1), (np.inf, 1), (3, 1)],
)
def test_the_loss_is_watched_too(value, skips):
    tx = watching()
    update = jax.jit(tx.update)
    out, state = update(gradients(1.0), tx.init(PARAMS), PARAMS, value=value)
    assert is_zero(out) == bool(skips)
    assert state.metrics.skipped_steps == skips
    _, state = update(gradients(SPIKE), state, PARAMS, value=1.0)
    assert state.metrics.skipped_steps == skips + 1


def test_a_loss_in_bfloat16():
    tx = watching()
    value = jnp.asarray(5.0, jnp.bfloat16)
    assert is_zero(tx.update(gradients(1.0), tx.init(PARAMS), PARAMS, value=value)[0])


def test_a_spike_of_the_loss_passes_in_the_end_and_a_nan_never():
    tx = watching(max_consecutive=2)
    state, update, zeros = tx.init(PARAMS), jax.jit(tx.update), []
    for value in [9.0, 9.0, 9.0, np.nan, np.nan, np.nan, 9.0, 1.0]:
        out, state = update(gradients(1.0), state, PARAMS, value=value)
        zeros.append(is_zero(out))
    assert zeros == [True, True, False, True, True, True, False, False]


def test_a_learned_limit_of_the_loss():
    tx = watching(thresholds.percentile(50.0, window=9, multiple=3.0))
    state, update, zeros = tx.init(PARAMS), jax.jit(tx.update), []
    for value in [2.0, 1.9, np.nan, 1.8, 50.0, 1.7]:
        out, state = update(gradients(1.0), state, PARAMS, value=value)
        zeros.append(is_zero(out))
    assert zeros == [False, False, True, False, True, False]


def test_the_loss_must_be_there():
    tx = watching()
    with pytest.raises(ValueError, match=r"^skip_step: value must be given to update"):
        tx.update(gradients(1.0), tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (jnp.ones(2), "a scalar, got an array of shape (2,)"),
        (np.ones((1, 1)), "a scalar, got an array of shape (1, 1)"),
        (None, "a real number, got None"),
        ("1.0", "a real number, got '1.0'"),
        ({"loss": 1.0}, "a real number, got {'loss': 1.0}"),
        ([1.0], "a real number, got [1.0]"),
        (True, "a real number, got True"),
        (1j, "a real number, got 1j"),
        (jnp.complex64(1), "a real number, got an array of dtype complex64"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_the_loss_must_be_a_real_scalar(value, got):
    tx = watching()
    message = f"^skip_step: value must be {re.escape(got)}"
    with pytest.raises(ValueError, match=message):
        tx.update(gradients(1.0), tx.init(PARAMS), PARAMS, value=value)


@pytest.mark.parametrize(
    "value", [9, np.uint8(9), np.int64(2**40), 10**40, np.float64(9), jnp.bfloat16(9),
              jnp.int32(9), np.array(9.0)],
    ids=repr,
)  # fmt: skip
def test_a_loss_of_any_numeric_type(value):
    tx = watching(8.5)
    assert is_zero(tx.update(gradients(1.0), tx.init(PARAMS), PARAMS, value=value)[0])
    tx = watching(jnp.inf)
    out, _ = tx.update(gradients(1.0), tx.init(PARAMS), PARAMS, value=value)
    assert is_zero(out) == (str(value) == str(10**40))  # which is no finite float32


def test_no_limit_drops_only_what_is_not_finite():
    for limit in (jnp.inf, thresholds.unlimited()):
        tx = optclip.skip_step(optax.sgd(1.0), limit, max_consecutive=1)
        zeros, _ = skipped(tx, [1.0, 3e38, np.nan, np.inf, np.nan, 1.0])
        assert zeros == [False, False, True, True, True, False]


def test_the_inner_optimizer_gets_the_extra_arguments():
    """Such as the loss that a line search reads."""
    inner = untyped(optax.GradientTransformationExtraArgs)(
        lambda params: (),
        lambda updates, state, params=None, *, value, **_: (
            jax.tree.map(lambda u: u * value, updates),
            state,
        ),
    )
    tx = untyped(optclip.skip_step(inner, 10.0))
    out, _ = tx.update(gradients(1.0), tx.init(PARAMS), PARAMS, value=3.0)
    chex.assert_trees_all_close(out, gradients(3.0), rtol=1e-6)


# Bad input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -1.0}, "threshold must be non-negative, got -1.0"),
        ({"threshold": float("nan")}, "threshold must be non-negative, got nan"),
        ({"threshold": "big"}, "threshold must be a non-negative number.*'big'"),
        ({"threshold": True}, "threshold must be non-negative, got True"),
        ({"threshold": jnp.ones(2)}, "threshold must be a scalar, got .*\\(2,\\)"),
        ({"value_threshold": -2.0}, "value_threshold must be non-negative, got -2.0"),
        ({"max_consecutive": 0}, "max_consecutive must be an integer of at least 1"),
        ({"max_consecutive": 2.0}, "max_consecutive must be an integer.*got 2.0"),
        ({"max_consecutive": True}, "max_consecutive must be an integer.*got True"),
    ],
)
def test_nonsense_is_named(options, message):
    with pytest.raises(ValueError, match=f"^skip_step: {message}"):
        optclip.skip_step(optax.sgd(1.0), **{"threshold": 1.0, **options})


# Around it and inside it.


@FOR_ADAM
def test_state_is_optional_and_keeps_its_type():
    tx, _ = adam()
    fresh = tx.update(gradients(1.0), None, PARAMS)
    chex.assert_trees_all_equal(
        fresh, tx.update(gradients(1.0), tx.init(PARAMS), PARAMS)
    )
    made = jax.eval_shape(lambda: tx.init(PARAMS))
    later = jax.eval_shape(lambda: fresh[1])
    chex.assert_trees_all_equal_shapes_and_dtypes(made, later)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(tx.init(PARAMS))]
    assert len(set(pointers)) == len(pointers)


@FOR_ADAM
def test_one_trace_and_a_scan():
    """Spikes and NaN compile nothing anew, and scan gives what a loop gives."""
    tx, _ = adam()
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(lambda *args: tx.update(*args), n=1))
    sizes = [1.0, SPIKE, np.nan, 2.0]
    state = tx.init(PARAMS)
    for size in sizes:
        _, state = update(gradients(size), state, PARAMS)
    which, scanned = skipped(tx, sizes)
    assert which == [False, True, True, False]
    chex.assert_trees_all_close(state, scanned, rtol=1e-6)


@pytest.mark.parametrize("outside", [True, False])
def test_multi_steps(outside):
    """Around it a step is the mean of two; inside it, a dropped one is not counted."""
    with jax.numpy_dtype_promotion("standard"):  # which Optax needs
        if outside:
            tx = optax.MultiSteps(optclip.skip_step(optax.sgd(1.0), 10.0), 2)
        else:
            accumulated = optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation()
            tx = optclip.skip_step(accumulated, 10.0)
        state, update, outs = tx.init(PARAMS), jax.jit(tx.update), []
        for size in [SPIKE, 1.0, 3.0, 5.0]:
            out, state = update(gradients(size), state, PARAMS)
            outs.append(out)
    zeros = [is_zero(out) for out in outs]
    if outside:
        assert zeros == [True, True, True, False]  # the mean of 100 and 1 is too big
        chex.assert_trees_all_close(outs[3], gradients(-4.0), rtol=1e-6)
    else:
        assert zeros == [True, True, False, True]
        chex.assert_trees_all_close(outs[2], gradients(-2.0), rtol=1e-6)
    (count,) = (v for k, v in optclip.metrics(state).items() if "skipped_steps" in k)
    assert count == 1


@FOR_ADAM
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("shape", [(), (2,), (3,)], ids=str)
def test_half_precision(shape, dtype):
    """Parameters in bfloat16: Adam's moments take the gradients' dtype as they come."""
    params, grads = jnp.ones(shape, jnp.bfloat16), jnp.ones(shape, dtype)
    inner = optax.scale_by_adam()
    tx = untyped(optclip.skip_step(inner, 10.0))
    updates, state = tx.update(grads, tx.init(params), params)
    expected, alone = inner.update(grads, inner.init(params), params)
    chex.assert_trees_all_equal((updates, state.inner_state), (expected, alone))
    chex.assert_trees_all_equal_dtypes(updates, expected)
    dropped, after = tx.update(grads * jnp.nan, state, params)
    np.testing.assert_array_equal(dropped, np.zeros(shape))
    chex.assert_trees_all_equal(after.inner_state, alone)


def test_an_inner_state_of_python_numbers():
    def update(updates, state, params=None):
        return updates, {"count": state["count"] + 1, "on": not state["on"]}

    holder = untyped(optax.GradientTransformation)(
        lambda _: {"count": 0, "on": True}, update
    )
    tx = untyped(optclip.skip_step(holder, 10.0))
    _, state = tx.update(jnp.ones(()), tx.init(jnp.ones(())))
    assert (state.inner_state["count"], state.inner_state["on"]) == (1, False)
    _, state = tx.update(jnp.full((), jnp.nan), state)
    assert (state.inner_state["count"], state.inner_state["on"]) == (1, False)


@FOR_ADAM
def test_linen_train_state():
    tx = optclip.skip_step(optax.adam(0.1), 10.0)
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    step = jax.jit(lambda s, g: s.apply_gradients(grads=g))
    moved = step(state, gradients(1.0))
    still = step(moved, gradients(np.nan))
    assert not np.array_equal(moved.params["w"], PARAMS["w"])
    assert bits(still.params) == bits(moved.params)
    assert still.opt_state.metrics.skipped_steps == 1
    assert still.step == 2  # which counts what it was given


class Net(nnx.Module):
    def __init__(self):
        self.w, self.b = nnx.Param(PARAMS["w"]), nnx.Param(PARAMS["b"])


@FOR_ADAM
def test_nnx_optimizer_passes_the_loss_on():
    model = Net()
    tx = optclip.skip_step(optax.adam(0.1), 10.0, value_threshold=2.0)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def train(model, optimizer, grads, loss):
        optimizer.update(model, grads, value=loss)

    grads = nnx.state(Net(), nnx.Param)
    start = np.asarray(model.w[...])
    train(model, optimizer, grads, jnp.float32(5.0))
    np.testing.assert_array_equal(model.w[...], start)
    train(model, optimizer, grads, jnp.float32(1.0))
    moved = np.asarray(model.w[...])
    assert not np.array_equal(moved, start)
    train(model, optimizer, jax.tree.map(lambda x: x * 100, grads), jnp.float32(1.0))
    np.testing.assert_array_equal(model.w[...], moved)
    assert optclip.metrics(optimizer.opt_state)["skipped_steps"] == 2
    with pytest.raises(ValueError, match=r"skip_step: value must be given"):
        optimizer.update(model, grads)


def test_metrics_find_the_watch_and_the_counters():
    tx = optax.chain(
        optclip.skip_step(
            optax.chain(optclip.clip_by_global_norm(0.5), optax.sgd(1.0)),
            10.0,
            value_threshold=2.0,
        )
    )
    _, state = tx.update(gradients(SPIKE), tx.init(PARAMS), PARAMS, value=1.0)
    found = optclip.metrics(state)
    assert found["0/skipped_steps"] == found["0/consecutive_skips"] == 1
    np.testing.assert_allclose(found["0/watch/size"], SPIKE, rtol=1e-6)
    assert (found["0/watch/limit"], found["0/watch/clipped_steps"]) == (10.0, 1)
    assert (found["0/value_watch/size"], found["0/value_watch/limit"]) == (1.0, 2.0)
    # The clip inside slept with the optimizer.
    assert found["0/inner_state/0/steps"] == 0
    assert len(found) == 3 * 6 + 2


needs_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs a mesh")


@FOR_ADAM
@needs_devices
@pytest.mark.parametrize("bad", [None, "spike", "nan", "value"])
def test_shards_decide_together(bad):
    """Inside `shard_map`, about the whole norm, wherever the spike or the NaN is."""
    spec = PartitionSpec("data")
    tx = untyped(optclip.skip_step(optax.adam(0.1), 10.0, value_threshold=2.0))
    grads = {"sharded": np.ones(16, np.float32), "replicated": np.ones(3, np.float32)}
    if bad == "spike":
        grads["sharded"][5] = 50.0
    if bad == "nan":
        grads["sharded"][13] = np.nan
    params = jax.tree.map(np.ones_like, grads)
    specs = {"sharded": spec, "replicated": PartitionSpec()}
    loss = np.float32(9.0 if bad == "value" else 1.0)

    def two_steps(grads, params, loss):
        out, state = tx.update(grads, tx.init(params), params, value=loss)
        skips = state.metrics.skipped_steps
        good, state = tx.update(params, state, params, value=jnp.float32(1.0))
        return out, good, skips, state.inner_state[0].count

    auto = (jax.sharding.AxisType.Auto,)
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=auto)):
        out, good, skips, count = jax.jit(
            jax.shard_map(
                two_steps,
                in_specs=(specs, specs, PartitionSpec()),
                out_specs=(specs, specs, PartitionSpec(), PartitionSpec()),
            )
        )(grads, params, loss)
        out, good = jax.device_get((out, good))
    want, want_good, want_skips, want_count = jax.jit(two_steps)(grads, params, loss)
    assert skips == want_skips == int(bad is not None)
    assert count == want_count == 2 - skips
    chex.assert_trees_all_close(out, jax.device_get(want), rtol=1e-6)
    chex.assert_trees_all_close(good, jax.device_get(want_good), rtol=1e-6)
    assert is_zero(out) == (bad is not None)
    assert not is_zero(good)


@FOR_ADAM
@needs_devices
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_under_jit_on_a_mesh(kind):
    """Shardings of the inner state stay, on dropped steps too."""
    types = (getattr(jax.sharding.AxisType, kind),)
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=types)):
        params = {"w": jax.device_put(jnp.ones(16), PartitionSpec("data"))}
        tx = untyped(optclip.skip_step(optax.adam(0.1), 10.0))
        state = tx.init(params)
        before = jax.tree.map(lambda x: x.sharding.spec, state.inner_state[0].mu)
        update = jax.jit(tx.update)
        for size in (1.0, np.nan, SPIKE):
            updates = jax.tree.map(lambda x, s=size: x * jnp.float32(s), params)
            out, state = update(updates, state, params)
            assert is_zero(jax.device_get(out)) == (size != 1.0)
        mu = jax.tree.map(lambda x: x.sharding.spec, state.inner_state[0].mu)
        assert mu == before == {"w": PartitionSpec("data")}
        assert state.metrics.skipped_steps == 2
