"""Law 9: what a rule sends on a mesh.

Under `jit`, where XLA places the collectives, no array is gathered, and the number of
all-reduces does not grow with the leaves. They are counted in branches too: the second
pass holds the sums once more. Inside `shard_map`: one for each set of axes.
"""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

import optclip
from optclip import groupings, measures
from tests import compiling
from tests.laws.collectives import Collectives, collectives, of_update
from tests.laws.meshes import (
    AXIS_TYPES,
    KINDS,
    LIMIT,
    NAMED,
    NAMED_SPECS,
    ON_ALL,
    SPECS,
    assert_equal,
    example_clip,
    given_to,
    last_step,
    manual,
    mesh_of,
    normal,
    on_axes,
    placed_on,
    unit_clip,
)
from tests.laws.table import ROWS, Row, rows
from tests.untyped import untyped

# They are placed before any kernel is made: `test_quick_compiles_send_the_same`.

BY_NAME = {row.name: row for row in ROWS}
# One of each kind of group: of all leaves, inside of a leaf, elements; and a wrapper.
SAMPLE = (
    "clip_by_global_norm",
    "adaptive_grad_clip",
    "second_moment_clip",
    "skip_step",
)
PLACES = [P("data"), P(None, "model"), P(None, ("data", "model")), P()]
WIDTH = 16


@pytest.fixture(autouse=True)
def _on_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@functools.cache
def _optax(units: bool, spec: P) -> int:
    """All-reduces of Optax's rule of the kind; its AGC knows no Explicit mesh."""
    tx = optax.adaptive_grad_clip(0.01) if units else optax.clip_by_global_norm(1.0)
    return len(of_update(tx, 2, spec=spec).everywhere)


def _most(row: Row, spec: P) -> int:
    """How many all-reduces a rule may have."""
    split = [axis for axis in spec if axis is not None]
    match row.oracle["grouping"]:
        # Totals, twice; whether they are good; the furthest over, its numbers, a count.
        case "unit":
            return _optax(True, spec) + 5
        case "example":  # groups of one leading axis, else like units
            return 6
        case "element":  # flags for the counters, where there are some
            return len(split) if row.has_metrics is True else 0
    return row.sums * _optax(False, spec)


def _numbers(row: Row, leaves: int) -> int:
    """How many numbers they may send: a few for each leaf, or for each of its units."""
    each = {"unit": 2 * WIDTH, "example": WIDTH}.get(row.oracle["grouping"], 2)
    return leaves * (2 * each + 8)


def _check(row: Row, found: Collectives, leaves: int, spec: P):
    assert {sent.kind for sent in found.everywhere} <= {"all-reduce"}
    assert len(found.everywhere) <= _most(row, spec)
    assert sum(sent.numbers for sent in found.everywhere) <= _numbers(row, leaves)


@pytest.mark.parametrize("axis_type", AXIS_TYPES)
@pytest.mark.parametrize("name", SAMPLE)
def test_quick_compiles_send_the_same(name, axis_type):
    """As an ordinary compilation."""
    tx = BY_NAME[name].build(0.5)
    ordinary = of_update(tx, 5, axis_type, options=compiling.ordinary())
    assert of_update(tx, 5, axis_type) == ordinary


@pytest.mark.parametrize(("row", "axis_type"), on_axes(rows(*KINDS), SAMPLE))
def test_collectives_do_not_grow_with_the_leaves(row, axis_type):
    spec = P("data", "model")
    few, more = (of_update(row.build(0.5), n, axis_type) for n in (2, 5))
    _check(row, few, 2, spec)
    _check(row, more, 5, spec)
    assert len(more.ordinary) == len(few.ordinary)
    assert len(more.rare) == len(few.rare)


@pytest.mark.parametrize("name", SAMPLE)
def test_nor_with_many_leaves(name):
    row, spec = BY_NAME[name], P("data", "model")
    _check(row, of_update(row.build(0.5), 64), 64, spec)


@pytest.mark.parametrize("spec", PLACES, ids=str)
@pytest.mark.parametrize("name", SAMPLE)
def test_collectives_of_other_specs(name, spec):
    row = BY_NAME[name]
    found = of_update(row.build(0.5), 5, spec=spec)
    _check(row, found, 5, spec)
    assert (spec == P()) == (not found.everywhere)


# Inside `shard_map`, where types say what to sum.


def count(function, *args):
    """How many collectives run outside of conditional branches."""
    text = function.lower(*args).compile().as_text()
    return len(collectives(text).ordinary)


def _many_leaves(specs):
    return {f"{i:02}": spec for i, spec in enumerate(specs)}


WHOLE, EACH = optclip.clip_by_global_norm, optclip.clip_by_norm
LEARNED = {
    "spike_clip": lambda limit: optclip.spike_clip(),
    "adagc": lambda limit: optclip.adagc(),
    "skip_step": lambda limit: optclip.skip_step(optax.identity(), limit),
}
LARGEST = functools.partial(EACH, measure=measures.max_abs)


@pytest.mark.parametrize(
    ("rule", "specs", "number"),
    [
        pytest.param(WHOLE, [P("data")] * 50, 1, id="whole"),
        pytest.param(WHOLE, [P("data"), P("model")] * 10, 2, id="whole-two-axes"),
        pytest.param(WHOLE, [P("data"), P()] * 5, 1, id="whole-and-replicated"),
        pytest.param(WHOLE, [P()] * 5, 0, id="whole-all-replicated"),
        pytest.param(EACH, [P("data")] * 20, 1, id="per_leaf"),
        pytest.param(EACH, [P("data"), P("model")] * 5, 2, id="per_leaf-two-axes"),
        *(
            pytest.param(rule, [P("data"), P()] * 5, 1, id=name)
            for name, rule in LEARNED.items()
        ),
        pytest.param(LARGEST, [P("data"), P("model")] * 5, 2, id="max_abs-two-axes"),
    ],
)
def test_one_collective_for_each_set_of_axes(rule, specs, number):
    """Whatever the number of leaves, metrics included."""
    specs = _many_leaves(specs)
    tree = {name: jnp.ones((8, 2)) for name in specs}
    step = manual(last_step(rule(LIMIT)), (specs, specs), (specs, P()), (4, 2))
    assert count(step, tree, tree) == number


def test_counting_collectives_sees_them():
    """Inside of branches they do not count, outside they do."""

    def sums(x):
        total = jax.lax.psum(x, "data")
        rare = jax.lax.cond(
            total[0] > 0, lambda: jax.lax.psum(jnp.sin(x), "data"), lambda: total
        )
        return rare + jax.lax.pmax(x, "data")

    assert count(manual(sums, P("data"), P()), jnp.ones(8)) == 2


@pytest.mark.parametrize("axis_name", ["data", ON_ALL])
def test_one_collective_with_names(axis_name):
    tx = optclip.clip_by_global_norm(LIMIT, axis_name=axis_name)
    specs = (NAMED_SPECS, P())
    step = manual(last_step(tx), (NAMED_SPECS,) * 2, specs, check_vma=False)
    assert count(step, NAMED, NAMED) == 1


@pytest.mark.parametrize(
    ("axis_name", "spec"),
    [
        pytest.param((), P(None, "data"), id="whole"),
        pytest.param("data", P("data"), id="extending"),
    ],
)
def test_units_need_one_collective(axis_name, spec):
    """Of the units' totals, or of the metrics where units are whole."""
    tree = {name: jnp.ones((8, 8)) for name in "abcd"}
    step = manual(last_step(unit_clip(axis_name)), (spec, spec), (spec, P()))
    assert count(step, tree, tree) == 1


@pytest.mark.parametrize(
    ("axis_name", "spec", "number"),
    [((), P(None, "data"), 3), ("data", P("data"), 1)],
    ids=["whole", "extending"],
)
def test_the_whole_beside_units_needs_two_more(axis_name, spec, number):
    """AdaGC by unit reads the norm of all units: their maximum, and their sum."""
    tree = {name: normal(8, 8) for name in "abcd"}
    tx = optclip.adagc(grouping=groupings.per_unit(axes=0), axis_name=axis_name)
    step = manual(last_step(tx), (spec, spec), (spec, P()))
    assert count(step, tree, tree) == number
    alone = jax.jit(last_step(optclip.adagc(grouping=groupings.per_unit(axes=0))))
    assert_equal(step(tree, tree), alone(tree, tree))


def test_relative_limits_need_one_collective_for_each_tree():
    """Of the updates' totals, and of the parameters'; XLA may join them."""
    tree = {name: normal(8, 8) for name in "abcd"}
    tx = optclip.adaptive_grad_clip(axis=0, axis_name="data")
    step = manual(last_step(tx), (P("data"),) * 2, (P("data"), P()))
    assert count(step, tree, tree) <= 2
    alone = jax.jit(last_step(optclip.adaptive_grad_clip(axis=0)))
    assert_equal(step(tree, tree), alone(tree, tree))


@pytest.mark.parametrize("row", rows("elementwise"))
def test_elementwise_needs_no_collective(row):
    """Nor under `jit`: `test_9_collectives`."""
    step = manual(last_step(row.build(LIMIT)), (SPECS, SPECS), (SPECS, P()), (4, 2))
    assert count(step, *given_to(row)) == 0


def test_auto_axes_send_one_number_for_each_sharded_leaf_at_most():
    """There XLA places the collectives (0.10 all in one); only scalars may travel."""
    tree = {f"{i:02}": jnp.ones((8, 64)) for i in range(20)}
    placed = placed_on(tree, _many_leaves([P("data"), P()] * 10), mesh_of((8,)))
    step = jax.jit(last_step(optclip.clip_by_global_norm(LIMIT)))
    assert 1 <= count(step, placed, placed) <= 10
    text = step.lower(placed, placed).compile().as_text() or ""
    sent = re.findall(r"= (.*) all-reduce(?:-start)?\(", text)
    assert sent and not any(re.search(r"\[\d", kind) for kind in sent)
    assert "all-gather" not in text


@pytest.mark.parametrize(
    ("grouping", "axis_name"),
    [(groupings.per_example(), ()), (groupings.per_element(), None)],
    ids=["example", "element"],
)
def test_elements_and_whole_examples_never_sum(grouping, axis_name):
    """Examples that are said to be whole are clipped part by part; nothing is sent."""
    x = normal(8, 8)
    tx = untyped(optclip.clip_by(LIMIT, grouping=grouping, axis_name=axis_name))
    spec = P(None, "data")
    clip = manual(lambda u: tx.update(u, None)[0], spec, spec)
    parts = x.T[:, :, None]
    expected = jax.jit(jax.vmap(lambda part: tx.update(part, None)[0]))(parts)
    chex.assert_trees_all_close(clip(x), expected[:, :, 0].T, rtol=1e-6)
    assert count(clip, x) == 0


@pytest.mark.parametrize("magnitude", [1.0, 1e25])
def test_examples_with_axis_name(magnitude):
    """The batch lies on one axis, the parameters on the other, and some on none."""
    tree = {"a": {"kernel": normal(8, 4), "bias": normal(8, 3)}, "b": normal(8, 2)}
    tree = jax.tree.map(lambda x: x.at[2:5].multiply(magnitude).at[6:].divide(9), tree)
    split = P("data", "model")
    specs = {"a": {"kernel": split, "bias": P("data")}, "b": split}
    clip = example_clip({"a": {"kernel": "model", "bias": ()}, "b": ("model",)})
    expected = jax.jit(last_step(example_clip()))(tree, tree)
    assert 0 < expected[1]["clipped_fraction"] < 1
    step = manual(last_step(clip), (specs, specs), (specs, P()), (4, 2))
    assert_equal(step(tree, tree), expected)
    # The sums of squares, and the metrics over the batch.
    assert count(step, tree, tree) == 2
