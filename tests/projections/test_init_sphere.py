"""Spheres of first norms: which groups, what is remembered, and for how long."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import optclip as typed
from tests.oracles import projections as oracle
from tests.untyped import untyped

# States and updates have the type of any tree, in which nothing could be read.
optclip = untyped(typed)
groupings, sets = optclip.groupings, optclip.sets
apply = untyped(optax.apply_updates)
ULP = 2.0**-23


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def stack():
    """Experts of different sizes, one of them zero, and a bias at zero."""
    sizes = jnp.array([0.1, 3.0, 0.0]).reshape(3, 1, 1)
    return {"bias": jnp.zeros(4), "up": sizes * normal(3, 4, 5)}


def step(constraint, params, updates):
    tx = optclip.project(constraint)
    moved, state = jax.jit(tx.update)(updates, tx.init(params), params)
    return apply(params, moved), state


HEADS = groupings.per_unit(axes={"query": (0, 2)})


@pytest.mark.parametrize(
    ("grouping", "shape", "axes"),
    [
        (groupings.per_leaf(), (3, 4, 5), (0, 1, 2)),
        (groupings.per_matrix(), (3, 4, 5), (1, 2)),
        (HEADS, (8, 2, 3), (0, 2)),
        (groupings.per_unit(), (4, 5), (0,)),
        (groupings.per_element(), (4, 5), ()),
    ],
    ids=["leaf", "expert", "head", "unit", "element"],
)
def test_each_group_keeps_its_first_norm_over_hundreds_of_steps(grouping, shape, axes):
    """As NumPy does in float64, flat; what is remembered has one number a group."""
    name = "query" if grouping == HEADS else "up"
    sizes = jnp.linspace(1.0, 5.0, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    x = sizes * normal(*shape)
    ups = 0.1 * normal(300, *shape, seed=1)
    tx = optclip.project(sets.init_sphere(grouping))
    state = tx.init({name: x})

    def one(params, u):
        moved, _ = tx.update({name: u}, state, params)
        return apply(params, moved), ()

    after, _ = jax.jit(lambda: jax.lax.scan(one, {name: x}, ups))()
    wide = np.asarray(x, np.float64)
    first = np.sqrt(np.sum(wide**2, axis=axes, keepdims=True))
    for u in np.asarray(ups, np.float64):
        wide = wide + u
        wide = wide * first / np.sqrt(np.sum(wide**2, axis=axes, keepdims=True))
    np.testing.assert_allclose(untyped(after)[name], wide, rtol=0, atol=2e-4)
    last = np.asarray(untyped(after)[name], np.float64)
    norms = np.sqrt(np.sum(last**2, axis=axes, keepdims=True))
    np.testing.assert_allclose(norms, first, rtol=4 * ULP)
    (radii,) = jax.tree.leaves(state._replace(memory=()) if state.apart else state)
    np.testing.assert_allclose(radii.ravel(), first.ravel(), rtol=2 * ULP)


def test_what_starts_at_zero_is_free_and_what_becomes_zero_stays():
    params = stack()
    ones = jax.tree.map(jnp.ones_like, params)
    after, _ = step(sets.init_sphere(groupings.per_matrix()), params, ones)
    np.testing.assert_array_equal(after["bias"], 1)
    np.testing.assert_array_equal(after["up"][2], 1)
    for n in (0, 1):
        want = oracle.norm_sphere(
            np.asarray(params["up"][n], "d") + 1, float(np.linalg.norm(params["up"][n]))
        )
        np.testing.assert_allclose(after["up"][n], want, rtol=0, atol=1e-6)
    gone = jax.tree.map(jnp.negative, params)
    after, _ = step(sets.init_sphere(groupings.per_matrix()), params, gone)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(after))


@pytest.mark.parametrize("size", [1e-35, 1e-20, 1e18, 1e37])
def test_every_first_norm_is_ordinary(size):
    x = jnp.asarray(size * np.array([0.6, -0.8]), jnp.float32)
    after, _ = step(sets.init_sphere(), {"w": x}, {"w": x[::-1]})
    got = np.sqrt(np.sum(np.asarray(after["w"], "d") ** 2))
    np.testing.assert_allclose(got, size, rtol=6 * ULP)


def test_a_first_norm_that_is_not_finite_is_nan_and_not_free():
    x = jnp.array([[jnp.inf, jnp.nan, 3e38, 3.0], [1.0, 1.0, 3e38, 4.0]])
    constraint = sets.init_sphere(groupings.per_unit())
    after, state = step(constraint, {"w": x}, {"w": jnp.ones_like(x)})
    assert np.all(np.isnan(after["w"][:, :3])) and np.all(np.isfinite(after["w"][:, 3]))
    np.testing.assert_array_equal(np.isnan(state.apart[0][0]), [1, 1, 1, 0])


def test_abstract_leaves_have_the_radius_nan():
    params = stack()
    abstract = jax.eval_shape(lambda: params)
    both = sets.intersection(sets.init_sphere(groupings.per_matrix()), sets.init_box())
    for constraint in (sets.init_sphere(groupings.per_matrix()), both):
        tx = optclip.project(constraint)
        known, unknown = tx.init(params), tx.init(abstract)
        chex.assert_trees_all_equal_shapes_and_dtypes(known, unknown)
        assert all(np.all(np.isnan(leaf)) for leaf in jax.tree.leaves(unknown))
        assert not any(np.any(np.isnan(leaf)) for leaf in jax.tree.leaves(known))
        updates, _ = tx.update(params, unknown, params)
        assert all(np.all(np.isnan(leaf)) for leaf in jax.tree.leaves(updates))


def test_float64_leaves_keep_float64_norms_beside_float32_ones():
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    try:
        exact = np.random.default_rng(0).standard_normal((2, 4, 3))
        params = {"a": jnp.asarray(exact), "b": jnp.asarray(exact[0], jnp.float32)}
        after, state = step(sets.init_sphere(), params, params)
        assert state.memory.dtype == jnp.float64 and after["b"].dtype == jnp.float32
        got = np.sqrt(np.sum(np.asarray(after["a"]) ** 2))
        np.testing.assert_allclose(got, np.linalg.norm(exact), rtol=4 * 2.0**-52)
        mixed = sets.intersection(sets.init_box(2.0), sets.init_sphere())
        after, _ = step(mixed, params, params)
        np.testing.assert_allclose(after["a"], params["a"], rtol=1e-12)
    finally:
        jax.config.update("jax_enable_x64", before)


def test_its_own_values_are_the_start_of_project_params():
    params = stack()
    for grouping in (groupings.per_leaf(), groupings.per_matrix()):
        got = optclip.project_params(params, sets.init_sphere(grouping), strict=True)
        chex.assert_trees_all_equal(got, params)


def test_it_goes_through_orbax_and_beside_other_sets(tmp_path):
    """Radii apart and in the vector, and another set's memory between them."""
    params = {"a": normal(3), "box": normal(4), "up": normal(3, 4, 5), "z": normal(2)}
    sphere = sets.init_sphere(groupings.per_matrix())
    constraint = {"a": sphere, "box": sets.init_box(2.0), "up": sphere, "z": sphere}
    tx = optclip.project(constraint)
    state = tx.init(params)
    assert state.memory.shape == (3,) and state.apart[0].shape == (3, 1, 1)
    with ocp.StandardCheckpointer() as checkpoints:
        checkpoints.save(tmp_path / "state", state)
        checkpoints.wait_until_finished()
        restored = checkpoints.restore(tmp_path / "state", state)
    chex.assert_trees_all_equal(restored, state)
    ones = jax.tree.map(lambda x: 9 * jnp.ones_like(x), params)
    updates, _ = jax.jit(tx.update)(ones, restored, params)
    after = apply(params, updates)
    for name in ("a", "z"):
        np.testing.assert_allclose(
            np.linalg.norm(after[name]), np.linalg.norm(params[name]), rtol=1e-6
        )
    assert np.max(after["box"]) == 2 * np.max(np.abs(params["box"]))


def test_rare_projections_remember_too():
    params = {"up": normal(2, 4, 5)}
    tx = optclip.project(sets.init_sphere(groupings.per_matrix()), every=2)
    state, update = tx.init(params), jax.jit(tx.update)
    norms = []
    for _ in range(2):
        updates, state = update(params, state, params)
        params = apply(params, updates)
        norms.append(np.linalg.norm(params["up"][0]))
    first = np.linalg.norm(normal(2, 4, 5)[0])
    np.testing.assert_allclose(norms, [2 * first, first], rtol=1e-6)
