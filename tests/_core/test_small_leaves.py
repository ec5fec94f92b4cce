"""Small leaves as one vector, as a GPU gets them, on the platform that is here."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import optclip
from optclip import actions, groupings, measures
from optclip._core import numerics, small_leaves
from tests.untyped import untyped

SHAPES = [(3, 4), (5,), (), (2, 3, 300), (small_leaves.SMALL + 1,), (64, 64)] * 2


@pytest.fixture(autouse=True)
def _for_one_gpu(monkeypatch):
    monkeypatch.setattr(numerics, "backend", lambda: "gpu")
    monkeypatch.setattr(numerics, "devices", lambda: 1)


def tree_of(magnitude=1.0):
    """Leaves of two dtypes, and one that nothing touches."""
    rng = np.random.default_rng(0)
    tree = [
        jnp.asarray(rng.normal(size=shape) * magnitude, dtype)
        for shape in SHAPES
        for dtype in ("float32", "bfloat16")
    ]
    return [*tree, jnp.arange(3)]


def norm_of(tree):
    wide = [np.asarray(x, np.float64) for x in tree[:-1]]
    return np.sqrt(sum(np.sum(np.square(x)) for x in wide))


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e25])
def test_bounds_and_bits(magnitude):
    """The tree comes to its limit, and keeps its bits, shapes and dtypes within it."""
    tree = tree_of(magnitude)
    norm = norm_of(tree)
    for limit in (norm / 3, 2 * norm):
        tx = untyped(optclip.clip_by_global_norm(limit))
        out, state = jax.jit(tx.update)(tree, tx.init(tree))
        np.testing.assert_allclose(state.metrics.size, norm, rtol=2e-6)
        np.testing.assert_allclose(norm_of(out), min(limit, norm), rtol=1e-3)
        for x, y in zip(tree, out, strict=True):
            assert x.shape == y.shape and x.dtype == y.dtype
            if limit > norm:
                np.testing.assert_array_equal(x, y)


def test_groups_stay_apart():
    """Only the group over its limit changes; one that is not finite stays so."""
    tree = {name: jnp.full(3, 2.0) for name in ("a/x", "a/y", "b/x", "b/y")}
    tree["b/x"] = jnp.zeros(3).at[1].set(jnp.nan)
    by_letter = groupings.per_label(lambda path: path[0])
    tx = untyped(optclip.clip_by(1.0, grouping=by_letter))
    out, state = tx.update(tree, tx.init(tree))
    np.testing.assert_allclose(out["a/y"], 1 / np.sqrt(6), rtol=1e-6)
    assert np.all(np.isnan(out["b/x"])) and np.all(np.isnan(out["b/y"]))
    assert state.metrics.nonfinite_steps == 1 and state.metrics.clipped_steps == 1


def test_derivatives():
    """The squared norm of what was clipped to 1 does not change; at 0 all are 0."""
    tx = untyped(optclip.clip_by_global_norm(1.0))

    def squares(tree):
        out, _ = tx.update(tree, tx.init(tree))
        return sum(jnp.sum(jnp.square(x)) for x in out)

    tree = [x for x in tree_of() if x.dtype == jnp.float32]
    for x in jax.grad(squares)(tree):
        np.testing.assert_allclose(x, 0, atol=1e-5)
    for x in jax.grad(squares)(jax.tree.map(jnp.zeros_like, tree)):
        np.testing.assert_array_equal(x, 0)


RULES = {
    "leaves": lambda: optclip.clip_by_block_rms(0.5),
    "units": lambda: optclip.adaptive_grad_clip(0.5),
    "elements": lambda: optclip.second_moment_clip(1.0, warmup_steps=1),
    "learning": lambda: optclip.zclip(grouping=groupings.per_leaf(), warmup_steps=1),
    "raising": lambda: optclip.clip_by(
        1.0, grouping=groupings.per_unit(), action=actions.normalize()
    ),
    "recording": lambda: optclip.clip_by(1.0, grouping=groupings.per_unit(), record=2),
}


@pytest.mark.parametrize(
    ("rule", "shapes"),
    [*((rule, "all") for rule in RULES), ("units", "vectors"), ("raising", "vectors")],
)
def test_many_blocks(rule, shapes, monkeypatch):
    """Updates, metrics and what is learned are those of blocks that stay apart."""
    tree = tree_of()[:-1]
    tree += [x.astype(jnp.complex64) * (1 + 2j) for x in tree[::5]] * 2
    if shapes == "vectors":
        tree = [x for x in tree if x.ndim == 1]
    steps = [[x * scale for x in tree] for scale in (1, 3, 0, 1e25)]
    for scale in (1e25, jnp.nan):
        steps.append([*tree[:2], tree[2] * scale, *tree[3:]])

    def run(backend):
        monkeypatch.setattr(numerics, "backend", lambda: backend)
        jax.clear_caches()  # of what was traced for the other one
        tx = untyped(RULES[rule]())
        update, state, found = jax.jit(lambda *a: tx.update(*a)), tx.init(tree), []
        for updates in steps:
            out, state = update(updates, state, tree)
            found.append((out, state))
        return jax.tree.leaves(found)

    for x, y in zip(run("gpu"), run("cpu"), strict=True):
        rough = 1e-2 if x.dtype == jnp.bfloat16 else 3e-6
        x, y = (np.asarray(z, np.promote_types(z.dtype, np.float32)) for z in (x, y))
        np.testing.assert_allclose(x, y, rtol=rough, atol=1e-6)


def test_a_measure_that_counts():
    """`finalize` is given how many elements a group has, whatever it does with it."""
    root = dataclasses.replace(measures.l2, finalize=lambda total, count: total / count)
    tree = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4)), "c": 2 * jnp.ones(2)}
    tx = untyped(optclip.clip_by(3.0, measure=root, grouping=groupings.per_leaf()))
    _, state = tx.update(tree, tx.init(tree))
    np.testing.assert_allclose(state.metrics.size, 4)


def test_examples_of_scalars_stay_apart():
    """A tree of one number an example: each example is a group."""
    grads = {"a": jnp.array([3.0, 0.0, 0.3]), "b": jnp.array([4.0, 2.0, 0.4])}
    total, clipped = untyped(optclip.per_example_global_norm_clip(grads, 1.0))
    np.testing.assert_allclose(total["a"], 0.6 + 0.3, rtol=1e-6)
    np.testing.assert_allclose(total["b"], 0.8 + 1.0 + 0.4, rtol=1e-6)
    assert clipped == 2


def test_leaves_that_are_split_over_different_axes_stay_apart():
    """One that all devices share stays so; units of another mesh axis are no stack."""
    mesh = Mesh(np.array(jax.devices("cpu")[:2]), ("i",))
    tree = {"a": jnp.arange(8.0), "b": jnp.ones(4), "c": jnp.ones(4)}
    specs = {"a": P("i"), "b": P(), "c": P()}
    tx = untyped(optclip.clip_by(1.0, grouping=groupings.per_leaf(), axis_name=()))
    step = jax.shard_map(
        lambda tree: tx.update(tree, None)[0],
        mesh=mesh,
        in_specs=(specs,),
        out_specs=specs,
    )
    np.testing.assert_allclose(jax.jit(step)(tree)["b"], 0.5, rtol=1e-6)

    axes = {"a": "i", "b": ()}
    units = untyped(optclip.clip_by(1.0, grouping=groupings.per_unit(), axis_name=axes))
    kernels = {name: {"kernel": jnp.ones((2, 3, 4))} for name in "ab"}
    step = jax.vmap(lambda tree: units.update(tree, None)[0], axis_name="i")
    out = untyped(step(kernels))
    np.testing.assert_allclose(out["a"]["kernel"], 1 / np.sqrt(6), rtol=1e-6)
    np.testing.assert_allclose(out["b"]["kernel"], 1 / np.sqrt(3), rtol=1e-6)


@pytest.mark.parametrize(("devices", "reductions"), [(1, 11), (8, 302)])
def test_reductions(devices, reductions, monkeypatch):
    """Three for 45 small leaves, three on eight devices for each leaf, the joint one
    and that of the metrics."""
    monkeypatch.setattr(numerics, "devices", lambda: devices)
    tx = optclip.clip_by_global_norm(1.0)
    assert counted(tx, "reduce_sum", "reduce") == reductions


@pytest.mark.parametrize(
    ("rule", "kinds", "count"),
    [
        ("leaves", ["sqrt"], 3),
        ("learning", ["sqrt"], 7),
        ("leaves", ["reduce_sum", "reduce"], 301),
        ("units", ["reduce_sum", "reduce"], 9),
        ("elements", ["reduce_sum", "reduce"], 1),
    ],
)
def test_operations_of_many_groups(rule, kinds, count):
    """Three sums of each leaf, and for all groups three roots and one reduction; what
    a rule learns has four roots more.

    Units are summed in three stacks of leaves, of at most 45, for the gradients and for
    the parameters; of each of the two trees one reduction says whether it is in doubt.
    """
    assert counted(RULES[rule](), *kinds) == count


def counted(tx, *kinds) -> int:
    """How many operations of these kinds a step of 100 small leaves holds."""
    jax.clear_caches()  # of what was traced for another number of devices
    tree = [jax.ShapeDtypeStruct((8, 8), "float32")] * 100
    state = jax.eval_shape(tx.init, tree)
    program = jax.make_jaxpr(lambda *a: tx.update(*a))(tree, state, tree)
    return inside(program.jaxpr, kinds)


def inside(jaxpr, kinds) -> int:
    """The same of a program, in functions but not in branches."""
    found = 0
    for equation in jaxpr.eqns:
        found += equation.primitive.name in kinds
        if equation.primitive.name == "cond":
            continue
        for inner in equation.params.values():
            inner = getattr(inner, "jaxpr", inner)
            found += inside(inner, kinds) if hasattr(inner, "eqns") else 0
    return found


def test_stacks_keep_what_is_not_scaled():
    """Leaves that are measured only, beside leaves alike that are scaled."""
    units = dataclasses.replace(
        groupings.per_unit(), applied=lambda path, leaf: path not in "bc"
    )
    tx = untyped(optclip.clip_by(1.0, grouping=units))
    tree = {name: jnp.full((2, 3), 2.0) for name in "abcd"}
    out, _ = tx.update(tree, tx.init(tree))
    for name in "bc":
        np.testing.assert_array_equal(out[name], tree[name])
    for name in "ad":
        np.testing.assert_allclose(out[name], np.sqrt(0.5), rtol=1e-6)
