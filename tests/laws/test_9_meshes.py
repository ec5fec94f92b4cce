"""Law 9: the result on any mesh equals the unsharded result.

What only some rows can do: units, named axes, `pmap`, the second pass, metrics,
state. Every row on one mesh: `test_9_rows`.
"""

import functools
from contextlib import nullcontext
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optclip
from optclip import groupings, measures, sets, thresholds
from optclip.thresholds import Threshold
from tests.laws.meshes import (
    AXES,
    AXIS_TYPES,
    LIMIT,
    NAMED,
    NAMED_SPECS,
    ON_ALL,
    SPECS,
    assert_equal,
    exact_dtype,
    example_clip,
    last_step,
    manual,
    mesh_of,
    mixed_leaves,
    normal,
    placed_on,
    projected,
    unit_clip,
)
from tests.untyped import untyped


@pytest.fixture(autouse=True)
def _on_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def test_each_leaf_is_summed_over_its_own_axes():
    """Against NumPy, so that no sum is missing or counted twice on both sides."""
    tree = mixed_leaves()
    squares = {
        path: np.sum(np.abs(np.asarray(x.astype(exact_dtype(x))).astype(complex)) ** 2)
        for path, x in (
            ("a/bias", tree["a"]["bias"]),
            ("a/kernel", tree["a"]["kernel"]),
            ("b/kernel", tree["b"]["kernel"]),
            ("b/scale", tree["b"]["scale"]),
            ("c/half", tree["c"]["half"]),
            ("c/modulus", tree["c"]["modulus"]),
        )
    }

    def norms(updates):
        rms = optclip.leaf_norms(updates, measure=measures.rms)
        return optclip.global_norm(updates), optclip.leaf_norms(updates), rms

    whole, leaves, rms = manual(norms, (SPECS,), P(), (4, 2))(tree)
    chex.assert_trees_all_close(whole, np.sqrt(sum(squares.values())), rtol=1e-6)
    assert list(leaves) == list(squares)
    sizes = {"a/bias": 8, "b/scale": 8, "c/half": 16, "c/modulus": 8}
    for path, square in squares.items():
        np.testing.assert_allclose(leaves[path], np.sqrt(square), rtol=1e-6)
        mean = square / sizes.get(path, 64)
        np.testing.assert_allclose(rms[path], np.sqrt(mean), rtol=1e-6)


# Units.


def test_units_on_a_mesh_need_axis_name():
    step = manual(last_step(unit_clip()), (P("data"),) * 2, (P("data"), P()))
    with pytest.raises(ValueError, match=r"clip_by: axis_name must say .*'data'"):
        step(normal(8, 8), normal(8, 8))


def test_replicated_units_need_no_axis_name():
    x = normal(8, 8)
    step = manual(last_step(unit_clip()), P(), P())
    assert_equal(step(x, x), last_step(unit_clip())(x, x))


@pytest.mark.parametrize(
    ("axis_name", "spec"),
    [
        pytest.param("model", P("model"), id="units extend over the mesh"),
        pytest.param((), P(None, "model"), id="units are whole"),
        pytest.param("model", P("model", "data"), id="one axis of each"),
        pytest.param((), P(None, AXES), id="whole on two axes"),
    ],
)
def test_units_with_axis_name(axis_name, spec):
    x = normal(8, 8) * jnp.arange(8.0)[None] / 4  # one unit is zero, some are within
    expected = jax.jit(last_step(unit_clip()))(x, x)
    assert 0 < expected[1]["clipped_fraction"] < 1
    step = manual(last_step(unit_clip(axis_name)), (spec, spec), (spec, P()), (4, 2))
    assert_equal(step(x, x), expected)


def test_a_row_on_each_device_is_no_vector():
    """The layout reads shapes, which are those of one device here."""
    tree = {"kernel": normal(8, 4), "bias": normal(4)}
    specs = {"kernel": P("data"), "bias": P()}

    def clip(axis_name):
        grouping = groupings.per_unit()
        threshold = thresholds.constant(LIMIT)
        return optclip.clip_by(threshold, grouping=grouping, axis_name=axis_name)

    axis_name = {"kernel": "data", "bias": ()}
    step = manual(last_step(clip(axis_name)), (specs, specs), (specs, P()))
    assert_equal(step(tree, tree), jax.jit(last_step(clip(None)))(tree, tree))


# Examples.


@pytest.mark.parametrize("spec", [P("data"), P(None, "data")])
def test_examples_on_a_mesh_need_axis_name(spec):
    """A type does not say whether the batch or the examples are split."""
    step = manual(last_step(example_clip()), (spec, spec), (spec, P()))
    message = r"^clip_by: axis_name must say which mesh axes one example .* \('data',\)"
    with pytest.raises(ValueError, match=message):
        step(normal(8, 8), normal(8, 8))


# Named axes.


def _named_step(rule, axis_name=None):
    tx = rule(LIMIT, axis_name=axis_name)
    return jax.jit(lambda updates: tx.update(updates, tx.init(updates)))


def _named_clip(axis_name, check_vma):
    step = _named_step(optclip.clip_by_global_norm, axis_name)

    specs = (NAMED_SPECS, P())
    return manual(step, (NAMED_SPECS,), specs, check_vma=check_vma)(NAMED)


@pytest.mark.parametrize(
    ("axis_name", "check_vma"),
    [
        pytest.param(None, True, id="None"),
        pytest.param(ON_ALL, True, id="prefix"),
        pytest.param(ON_ALL, False, id="prefix-unchecked"),
        pytest.param({"r": None, "w": ("data",)}, True, id="prefix-none"),
        pytest.param({"r": None, "w": None}, True, id="all-none"),
        pytest.param(
            {"r": (), "w": {"u": "data", "v": ("data",)}}, False, id="full-unchecked"
        ),
        pytest.param({"r": (), "w": ["data"]}, False, id="list-unchecked"),
    ],
)
def test_axis_name_forms(axis_name, check_vma):
    expected = _named_step(optclip.clip_by_global_norm)(NAMED)
    assert_equal(_named_clip(axis_name, check_vma), expected)


@pytest.mark.parametrize("axis_name", ["data", ("data",)])
@pytest.mark.parametrize("check_vma", [True, False])
def test_one_name_replaces_reading_types(axis_name, check_vma):
    """It counts every leaf as spread, a replicated one eight times."""
    counted = jnp.sqrt(8 * jnp.sum(NAMED["r"] ** 2) + _square(NAMED["w"]))
    _, state = _named_clip(axis_name, check_vma)
    np.testing.assert_allclose(state.metrics.size, counted, rtol=1e-6)


def test_no_axes_means_every_device_for_itself():
    tx = optclip.clip_by_global_norm(LIMIT, axis_name=())
    step = manual(last_step(tx), (P("data"),) * 2, (P("data"), P()))
    x = normal(8, 4)
    clipped, numbers = step(x, x)
    chex.assert_trees_all_close(
        jnp.linalg.norm(clipped, axis=1), jnp.full(8, LIMIT), rtol=1e-6
    )
    # The metrics are those of the worst device, on all of them.
    largest = jnp.max(jnp.linalg.norm(x, axis=1))
    np.testing.assert_allclose(numbers["size"], largest, rtol=1e-6)


def test_axis_name_must_cover_every_leaf():
    with pytest.raises(ValueError, match="axis_name must cover every leaf"):
        _named_clip({"w": "data"}, True)


def test_unbound_names_are_an_error_in_update_only():
    """`init` runs outside of `pmap`, where the name means nothing; `update` cannot."""
    tx = optclip.clip_by_global_norm(LIMIT, axis_name="data")
    state = tx.init(NAMED)
    message = "^clip_by_global_norm: axis_name must name axes .* got 'data'"
    with pytest.raises(ValueError, match=message):
        tx.update(NAMED, state)


def _square(tree):
    return sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree))


def _pmapped(function: Any, *args: Any, in_axes: Any = 0) -> Any:
    return jax.pmap(
        function, axis_name="data", devices=jax.devices("cpu")[:8], in_axes=in_axes
    )(*args)


@pytest.mark.parametrize("init_inside", [True, False])
def test_pmap(init_inside):
    tx = optclip.clip_by_norm(LIMIT, axis_name=ON_ALL)
    outside = tx.init(NAMED)

    def step(updates):
        return tx.update(updates, tx.init(updates) if init_inside else outside)

    split = {"r": NAMED["r"], "w": jax.tree.map(lambda x: x[:, None], NAMED["w"])}
    clipped, state = _pmapped(step, split, in_axes=({"r": None, "w": 0},))
    expected, state_expected = _named_step(optclip.clip_by_norm)(NAMED)

    def on_each(x):
        return jnp.stack([x] * 8)

    assert_equal(clipped["r"], on_each(expected["r"]))
    assert_equal(state, jax.tree.map(on_each, state_expected))
    joined = jax.tree.map(lambda x: x[:, 0], clipped["w"])
    assert_equal(joined, expected["w"])


# Documented sharp edges.


def test_all_gathered_leaves_still_count_as_varying():
    """The same on all devices, but typed as varying: eight times too many squares."""

    def norms(x):
        whole = jax.lax.all_gather(x, "data", tiled=True)
        by_name = optclip.global_norm({"x": whole}, axis_name={"x": ()})
        return optclip.global_norm(whole), jax.lax.pmax(by_name, "data")

    x = normal(8)
    by_type, by_name = manual(norms, P("data"), P())(x)
    np.testing.assert_allclose(by_type, np.sqrt(8) * np.linalg.norm(x), rtol=1e-6)
    np.testing.assert_allclose(by_name, np.linalg.norm(x), rtol=1e-6)


def test_gradients_before_their_reduction_vary_over_data():
    """Each device's own gradient counts as part of one array, until it is averaged."""

    def norms(weights, batch):
        # Marked as varying: otherwise differentiation sums over the devices itself.
        mine = weights + 0 * batch[0]
        own = jax.grad(lambda w: jnp.sum(jnp.square(batch @ w)))(mine)
        averaged = jax.lax.pmean(own, "data")
        return optclip.global_norm(own), optclip.global_norm(averaged)

    weights, batch = normal(4), normal(8, 4, seed=2)
    each = jnp.stack([2 * (row @ weights) * row for row in batch])
    before, after = manual(norms, (P(), P("data")), P())(weights, batch)
    np.testing.assert_allclose(before, np.linalg.norm(each), rtol=1e-5)
    np.testing.assert_allclose(after, np.linalg.norm(each.mean(0)), rtol=1e-5)


SAYS_NOTHING = r"^clip_by_global_norm: axis_name must say .*\('data',\)"


def test_pmap_shows_no_axes():
    """Without a name every device clips its own shard."""
    x = normal(8, 4)
    tx = untyped(optclip.clip_by_global_norm(LIMIT))
    with pytest.warns(UserWarning, match=SAYS_NOTHING):
        clipped, _ = _pmapped(lambda u: tx.update(u, None), x)
    chex.assert_trees_all_close(
        jnp.linalg.norm(clipped, axis=1), jnp.full(8, LIMIT), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("axis_name", "size"), [(None, None), ((), None), ("data", 1.0)], ids=str
)
def test_unchecked_types_say_nothing(axis_name, size):
    """A replicated leaf and a shard look the same there: somebody has to say it."""
    tx = untyped(optclip.clip_by_global_norm(LIMIT, axis_name=axis_name))
    clip = manual(
        lambda u: tx.update(u, None)[0], P("data"), P("data"), check_vma=False
    )
    warned = pytest.warns(UserWarning, match=SAYS_NOTHING)
    with warned if axis_name is None else nullcontext():
        clipped = clip(normal(8, 4))
    norm = jnp.linalg.norm(clipped, axis=None if size else 1)
    chex.assert_trees_all_close(norm, jnp.full(norm.shape, LIMIT), rtol=1e-6)


def test_where_types_say_enough_nothing_warns():
    """Names of `vmap` are no mesh axes, and elements extend over none."""
    x, tx = normal(8, 4), untyped(optclip.clip_by_global_norm(LIMIT))
    jax.vmap(lambda u: tx.update(u, None)[0], axis_name="data")(x)
    tx = untyped(optclip.clip_by(LIMIT, grouping=groupings.per_element()))
    spec = P("data")
    manual(lambda u: tx.update(u, None)[0], spec, spec, check_vma=False)(x)


# The second pass: collectives inside a `lax.cond`.


MEASURES = {"l2": measures.l2, "lp3": measures.lp(3), "max_abs": measures.max_abs}
CONTEXTS = ["auto", "explicit", "shard_map", "pmap"]


@functools.cache
def _clip_in(context, measure):
    """(x, limit) to the whole of x clipped, and the metrics."""

    def step(x, limit, axis_name=None):
        tx = optclip.clip_by_global_norm(
            limit, measure=MEASURES[measure], axis_name=axis_name
        )
        return untyped(last_step(tx)(x, x))

    if context == "shard_map":
        return manual(step, (P("data"), P()), (P("data"), P()))
    if context == "pmap":
        named = functools.partial(step, axis_name="data")
        return lambda x, limit: _pmapped(named, x, limit, in_axes=(0, None))
    mesh = mesh_of((8,), AxisType.Auto if context == "auto" else AxisType.Explicit)
    step = jax.jit(step)

    def run(x, limit):
        with jax.set_mesh(mesh):
            return step(jax.device_put(x, NamedSharding(mesh, P("data"))), limit)

    return run


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("measure", ["l2", "lp3"])
@pytest.mark.parametrize("magnitude", [1e25, 1e-30])
def test_second_pass(magnitude, measure, context):
    """Squares of these overflow, or vanish under a limit that is smaller still."""
    x = normal(8, 4) * np.float32(magnitude)
    exact = np.asarray(x, np.float64)
    power = {"l2": 2, "lp3": 3}[measure]
    size = np.sum(np.abs(exact) ** power) ** (1 / power)
    limit = 1e-3 * size
    clipped, numbers = _clip_in(context, measure)(x, jnp.float32(limit))
    np.testing.assert_allclose(clipped, exact * (limit / size), rtol=3e-6)
    np.testing.assert_allclose(
        numbers["size"], np.full_like(numbers["size"], size), 3e-6
    )


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_shard_spoils_its_group_everywhere(bad, measure, context):
    """Maxima, too: XLA:CPU's all-reduce of floats forgets a NaN."""
    x = normal(8, 4).at[5, 1].set(bad)
    clipped, numbers = _clip_in(context, measure)(x, jnp.float32(LIMIT))
    assert jnp.isnan(clipped).all()
    np.testing.assert_array_equal(numbers["size"], jnp.full_like(numbers["size"], bad))
    assert jnp.all(numbers["nonfinite_steps"] == 1)


@functools.cache
def _beside_params(learns):
    """AGC, which measures parameters too, and a rule that also learns its limit."""
    threshold = thresholds.relative_to_params(0.1)
    if learns:
        threshold = thresholds.tightest(threshold, thresholds.ema_multiple())
    tx = optclip.clip_by(threshold, grouping=groupings.per_unit(axes=0))
    step = untyped(last_step(tx, (1, 1)))
    return jax.jit(step)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("axis_type", AXIS_TYPES)
def test_parameters_and_updates_share_a_second_pass(axis_type, learns):
    """Whichever is out of range; on a mesh, where that is one collective less."""
    x, y = {"a": normal(8, 8), "b": normal(8, 4)}, {"a": normal(8, 8, seed=2)}
    y["b"] = normal(8, 4, seed=3)
    mesh, specs = mesh_of(axis_type=axis_type), {"a": P("data", "model"), "b": P()}
    step = _beside_params(learns)
    for own, of_params in ((1, 1), (1e25, 1e25), (1, 1e25), (1e25, 1), (1e-30, 1e25)):
        updates = x | {"a": x["a"].at[:, 3:5].multiply(own)}
        params = y | {"a": y["a"].at[:, 4:6].multiply(of_params)}
        expected = step(updates, params)
        with jax.set_mesh(mesh):
            placed = (placed_on(tree, specs, mesh) for tree in (updates, params))
            result = step(*placed)
        assert_equal(result, expected)


@pytest.mark.parametrize("check_vma", [True, False])
def test_devices_agree_on_the_second_pass(check_vma):
    """Whole units of one device overflow, while units of another leaf need a sum.

    Without a common answer the first device would wait in its branch for the others.
    """
    tree = {"split": jnp.ones((8, 2)), "whole": jnp.ones((2, 8)).at[0, 3].set(1e25)}
    specs = {"split": P("data"), "whole": P(None, "data")}
    tx = unit_clip({"split": "data", "whole": ()})
    clip = manual(lambda u: tx.update(u, None)[0], (specs,), specs, check_vma=check_vma)
    assert_equal(clip(tree), jax.jit(lambda u: unit_clip().update(u, None)[0])(tree))


@pytest.mark.parametrize("context", ["auto", "explicit", "shard_map"])
@pytest.mark.parametrize("grouping", ["unit", "example", "element"])
def test_a_bad_shard_is_counted_everywhere(grouping, context):
    """Groups of one shard spoil only themselves, and the metrics see them."""
    chosen = {
        "unit": groupings.per_unit(axes=1),
        "example": groupings.per_example(),
        "element": groupings.per_element(),
    }[grouping]
    tx = optclip.clip_by(thresholds.constant(LIMIT), grouping=chosen, axis_name=())
    x = normal(8, 4).at[5, 1].set(np.nan)
    expected = jax.jit(last_step(tx))(x, x)
    assert expected[1]["nonfinite_steps"] == 1
    if context == "shard_map":
        result = manual(last_step(tx), (P("data"),) * 2, (P("data"), P()))(x, x)
    else:
        mesh = mesh_of((8,), AxisType.Auto if context == "auto" else AxisType.Explicit)
        placed = jax.device_put(x, NamedSharding(mesh, P("data")))
        with jax.set_mesh(mesh):
            result = jax.jit(last_step(tx))(placed, placed)
    assert_equal(result, expected)


# Metrics.


@pytest.mark.parametrize("context", ["auto", "explicit", "shard_map"])
def test_groups_equally_far_over_show_as_one_number(context):
    """Whichever ratio is the largest by an ulp on this mesh: the largest size."""
    tree = {f"{n}": (1 + n) * normal(8, 8, seed=n) for n in range(8)}
    specs = {name: P("data", "model") for name in tree}
    step = last_step(optclip.adagc(warmup_steps=2), (1, 1, 1, 9))
    expected = jax.jit(step)(tree, tree)
    if context == "shard_map":
        result = manual(step, (specs, specs), (specs, P()), (4, 2))(tree, tree)
    else:
        kind = AxisType.Auto if context == "auto" else AxisType.Explicit
        mesh = mesh_of(axis_type=kind)
        with jax.set_mesh(mesh):
            placed = placed_on(tree, specs, mesh)
            result = jax.jit(step)(placed, placed)
    assert_equal(result, expected)
    sizes = [9 * jnp.linalg.norm(x) for x in tree.values()]
    np.testing.assert_allclose(result[1]["size"], max(sizes), rtol=1e-6)


# Meta-gradients.


@functools.cache
def _gradients(measure):
    """Of one loss, inside `shard_map` and without a mesh."""
    tx = untyped(optclip.clip_by_global_norm(LIMIT, measure=MEASURES[measure]))
    specs = {"r": P(), "w": P("data")}

    def loss(tree, total):
        clipped, _ = tx.update(tree, None)
        return jnp.sum(jnp.sin(clipped["r"])) + total(jnp.sum(jnp.exp(clipped["w"])))

    def over_devices(x):
        return jax.lax.psum(x, "data")

    inside = manual(lambda t: jax.grad(loss)(t, over_devices), (specs,), specs)
    return inside, jax.jit(lambda t: jax.grad(loss)(t, lambda x: x))


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 0.0], ids=["clipped", "within", "zero"])
def test_meta_gradients(measure, scale):
    """Inside `shard_map`, through the collectives, as without a mesh."""
    inside, outside = _gradients(measure)
    # No two elements are the largest, except at zero, where no measure has a gradient.
    tree = {"r": scale * normal(3, seed=4), "w": scale * normal(8, 2)}
    chex.assert_tree_all_finite(inside(tree))
    chex.assert_trees_all_close(inside(tree), outside(tree), rtol=1e-5, atol=1e-6)


def test_meta_gradients_of_a_maximum_that_devices_share():
    """Each device has its part of the derivative, and not all of it."""
    inside, outside = _gradients("max_abs")
    tree = {"r": 0.1 * normal(3, seed=4), "w": jnp.ones((8, 2))}
    chex.assert_trees_all_close(inside(tree), outside(tree), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("grouping", "axis_name"),
    [(groupings.per_element(), None), (groupings.per_example(), ())],
    ids=["element", "example"],
)
def test_meta_gradients_of_metrics_that_cross_devices(grouping, axis_name):
    """The metrics need a collective here, and it has a derivative."""
    tx = untyped(optclip.clip_by(LIMIT, grouping=grouping, axis_name=axis_name))
    x = normal(8, 2)

    def gradient(x):
        def loss(x):
            clipped, state = tx.update(x, None)
            return jnp.sum(clipped**2), state.metrics.clipped_steps

        return jax.grad(loss, has_aux=True)(x)

    inside = manual(gradient, P("data"), (P("data"), P()))
    chex.assert_trees_all_close(inside(x), jax.jit(gradient)(x), rtol=1e-5, atol=1e-6)


# State.


def _running_maximum():
    """A threshold with state: half of the largest size seen, and some more."""
    return Threshold(
        limit=lambda state, seen: 0.5 * state + LIMIT,
        init=lambda seen: seen.size,
        observe=lambda state, seen, limit: jnp.maximum(state, seen.size),
    )


def _scanned(tx, state=None):
    """Three steps; the carry must keep its type."""

    def steps(updates, state=state):
        def body(state, factor):
            scaled = jax.tree.map(lambda x: factor * x, updates)
            clipped, state = tx.update(scaled, state)
            return state, clipped

        state = tx.init(updates) if state is None else state
        state, clipped = jax.lax.scan(body, state, jnp.array([1.0, 3.0, 2.0]))
        return jax.tree.map(lambda x: x[-1], clipped), state

    return steps


STATEFUL = {
    "whole": (groupings.whole(), None, P("data"), P()),
    "per_leaf": (groupings.per_leaf(), None, P("data"), P()),
    "units-whole": (groupings.per_unit(axes=0), (), P(None, "data"), P(None, "data")),
    "units-split": (groupings.per_unit(axes=0), "data", P("data"), P()),
    "elements": (groupings.per_element(), None, P("data"), P("data")),
}


@functools.cache
def _stateful(case):
    """A tree, and what three steps without a mesh make of it."""
    tree = {"a": normal(8, 8), "b": 2 * normal(8, 16, seed=3)}
    tx = optclip.clip_by(_running_maximum(), grouping=STATEFUL[case][0])
    return tree, jax.jit(_scanned(tx))(tree)


@pytest.mark.parametrize("init_inside", [True, False])
@pytest.mark.parametrize("case", STATEFUL)
def test_state_inside_shard_map(case, init_inside):
    grouping, axis_name, spec, state_spec = STATEFUL[case]
    tx = optclip.clip_by(_running_maximum(), grouping=grouping, axis_name=axis_name)
    tree, expected = _stateful(case)
    specs = optclip.ClipState(threshold=state_spec, metrics=untyped(P()))
    if init_inside:
        result = manual(_scanned(tx), (spec,), (spec, specs))(tree)
    else:
        step = manual(lambda u, s: _scanned(tx, s)(u), (spec, specs), (spec, specs))
        result = step(tree, tx.init(tree))
    assert_equal(result, expected)


@pytest.mark.parametrize(
    ("case", "axis_type"),
    # With Auto axes no type can change, so one grouping of each kind is enough.
    [(case, AxisType.Explicit) for case in STATEFUL]
    + [("per_leaf", AxisType.Auto), ("elements", AxisType.Auto)],
)
def test_state_on_a_mesh(case, axis_type):
    grouping, _, spec, _ = STATEFUL[case]
    tx = optclip.clip_by(_running_maximum(), grouping=grouping)
    tree, expected = _stateful(case)
    mesh = mesh_of((8,), axis_type)
    placed = placed_on(tree, {"a": spec, "b": spec}, mesh)
    with jax.set_mesh(mesh):
        state = tx.init(placed)
        result = jax.jit(lambda u, s: _scanned(tx, s)(u))(placed, state)
    assert_equal(result, expected)


def test_state_without_sums_in_a_joint_grouping():
    """Every device keeps its own: the state varies, and is typed so from `init` on."""
    tx = optclip.clip_by(_running_maximum(), axis_name=())
    x = normal(8, 4)
    state_specs = optclip.ClipState(threshold=P("data"), metrics=untyped(P()))
    clipped, state = manual(_scanned(tx), P("data"), (P("data"), state_specs))(x)
    plain = optclip.clip_by(_running_maximum())
    expected, kept = jax.jit(jax.vmap(_scanned(plain)))(x)
    chex.assert_trees_all_close(clipped, expected, rtol=1e-6)
    chex.assert_trees_all_close(state.threshold, kept.threshold[:, 0], rtol=1e-6)


# Projections.


@pytest.mark.parametrize("make", [sets.max_norm, sets.norm_range, sets.unit_norm])
def test_units_in_shard_map_extend_over_the_axes_that_the_user_names(make):
    """Rows split over `data`: a column's norm is summed over it; and without a name?"""
    # Two rows a device: of one row, a unit would be all of it.
    params, updates = {"kernel": normal(16, 8)}, {"kernel": -normal(16, 8)[::-1]}
    want = jax.jit(projected(optclip.project(make())))(params, updates)
    for spec, name in ((P("data"), "data"), (P(None, "data"), ())):
        step = projected(optclip.project(make(axis_name=name)))
        shape = (4,) if name == () else (8,)
        out = manual(step, (spec, spec), spec, shape)(params, updates)
        chex.assert_trees_all_close(out, want, rtol=1e-5, atol=1e-6)
    with pytest.raises(
        ValueError, match=r"axis_name must say .* got None for 'kernel'"
    ):
        manual(projected(optclip.project(make())), (P("data"), P("data")), P("data"))(
            params, updates
        )
