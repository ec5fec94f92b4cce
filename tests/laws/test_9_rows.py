"""Law 9: every row and set on a mesh gives what it gives without one.

Under `jit` with Auto and Explicit axes and inside `shard_map`; what only some of them
can do (units, named axes, `pmap`, the second pass, state) is in `test_9_meshes`.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.laws import trees
from tests.laws.meshes import (
    EXAMPLE_SPECS,
    KINDS,
    LIMIT,
    SPECS,
    assert_equal,
    given_to,
    last_step,
    last_step_of,
    manual,
    mesh_of,
    mixed_leaves,
    on_axes,
    placed_on,
    projected,
)
from tests.laws.table import projections, rows

ROWS = rows(*KINDS)


@pytest.fixture(autouse=True)
def _on_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@functools.cache
def _unsharded(name):
    (row,) = [param.values[0] for param in ROWS if param.values[0].name == name]
    return jax.jit(last_step_of(row))(*given_to(row))


# What differs under Explicit axes are types: those of every row are looked at, and one
# row of each kind of group and of state is run.
SAMPLE = (
    *trees.SAMPLE,
    "clip_by-per_example",
    "clip_by-per_label",
    "adagc",
    "second_moment_clip",
    "adaptive_grad_clip",
    "skip_step",
)
SAMPLE_SETS = ("box", "max_norm", "init_sphere", "simplex", "spectral_ball")


def assert_types_stay(function, *arguments):
    """The first result of a function of sharded arrays lies as the first argument."""
    mesh = mesh_of(axis_type=AxisType.Explicit)

    def traced(*arguments):
        types = (jax.tree.map(jax.typeof, x) for x in (function(*arguments), arguments))
        after, before = (jax.tree.leaves(x) for x in types)
        for one, other in zip(after, before, strict=False):
            assert one.sharding == other.sharding, (one, other)

    with jax.set_mesh(mesh):
        jax.eval_shape(
            traced, *(placed_on(tree, specs, mesh) for tree, specs in arguments)
        )


@pytest.mark.parametrize("row", rows(*KINDS, variants=False))
def test_types_on_an_explicit_mesh(row):
    specs = EXAMPLE_SPECS if row.batched else SPECS
    updates, params = given_to(row)
    step = last_step_of(row)
    assert_types_stay(lambda u, p: step(u, p)[0], (updates, specs), (params, specs))


@pytest.mark.parametrize(
    ("row", "axis_type"), on_axes(rows(*KINDS, variants=False), SAMPLE)
)
def test_jit_on_a_mesh(row, axis_type):
    """Law 9 under `jit`; law 4 for shardings."""
    mesh = mesh_of(axis_type=axis_type)
    specs = EXAMPLE_SPECS if row.batched else SPECS
    updates, params = (placed_on(tree, specs, mesh) for tree in given_to(row))
    with jax.set_mesh(mesh):
        clipped, numbers = jax.jit(last_step_of(row))(updates, params)
    assert_equal((clipped, numbers), _unsharded(row.name))

    def same_sharding(path, one, other):
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim), path

    jax.tree_util.tree_map_with_path(same_sharding, clipped, updates)


@pytest.mark.parametrize(
    "row",
    [p for p in ROWS if p.values[0].oracle["grouping"] not in ("unit", "matrix")],
)
def test_shard_map(row):
    """Types alone say what to sum over, and metrics come out replicated.

    Of examples a type does not say whether they are whole, as they are here.
    """
    specs = EXAMPLE_SPECS if row.batched else SPECS
    step = (
        last_step(row.build(LIMIT, axis_name=())) if row.batched else last_step_of(row)
    )
    mapped = manual(step, (specs, specs), (specs, P()), (4, 2))
    assert_equal(mapped(*given_to(row)), _unsharded(row.name))


# Projections.

SET_SPECS = {"a": {"bias": P("model"), "kernel": P("data", "model")},
             "b": {"kernel": P(None, "data"), "scale": P()}}  # fmt: skip


def _parameters():
    params = {part: mixed_leaves()[part] for part in SET_SPECS}
    return params, jax.tree.map(lambda x: -0.3 * x[::-1], params)


@functools.cache
def _unsharded_set(name):
    (row,) = (param.values[0] for param in projections(name=name))
    return jax.jit(projected(row.transform(LIMIT)))(*_parameters())


@pytest.mark.parametrize("row", projections())
def test_types_of_projections_on_an_explicit_mesh(row):
    step = projected(row.transform(LIMIT))
    assert_types_stay(step, *((tree, SET_SPECS) for tree in _parameters()))


@pytest.mark.parametrize(("row", "axis_type"), on_axes(projections(), SAMPLE_SETS))
def test_projections_jitted_on_a_mesh(row, axis_type):
    """Also of sets that sort and factorise; what they send: `tests.projections`."""
    mesh = mesh_of(axis_type=axis_type)
    arguments = (placed_on(tree, SET_SPECS, mesh) for tree in _parameters())
    with jax.set_mesh(mesh):
        out = jax.jit(projected(row.transform(LIMIT)))(*arguments)
    chex.assert_trees_all_close(out, _unsharded_set(row.name), rtol=1e-5, atol=1e-6)

    def same_sharding(path, one, spec):
        assert one.sharding.is_equivalent_to(NamedSharding(mesh, spec), one.ndim), path

    if row.fuses is True or axis_type == AxisType.Explicit:
        jax.tree_util.tree_map_with_path(same_sharding, out, SET_SPECS)


@pytest.mark.parametrize(
    "row", [p for p in projections(mapped=True) if p.values[0].points != "unit"]
)
def test_projections_in_shard_map(row):
    """Norms of leaves are summed over the axes that each leaf varies over."""
    step = projected(row.transform(LIMIT))
    mapped = manual(step, (SET_SPECS, SET_SPECS), SET_SPECS, (4, 2))
    out = mapped(*_parameters())
    chex.assert_trees_all_close(out, _unsharded_set(row.name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "row", projections(mapped="points in parts cannot be joined by a sum")
)
def test_sets_that_need_whole_leaves_say_so_in_shard_map(row):
    step = projected(row.transform(LIMIT))
    with pytest.raises(ValueError, match=r"must be whole on each device, got 'kernel'"):
        params = {"kernel": jnp.ones((8, 8))}
        manual(step, (P("data"), P("data")), P("data"))(params, params)
