"""`project` and `project_params`: which leaves, when, in which trees."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze

import optclip
from optclip import sets
from tests.laws.table import PROJECTIONS
from tests.projections.steps import after, moved
from tests.untyped import untyped


def model():
    return {
        "dense": {"kernel": jnp.full((2, 3), 5.0), "bias": jnp.full(3, 5.0)},
        "norm": {"scale": jnp.full(3, 5.0), "bias": jnp.full(3, 5.0)},
    }


EVERY = {"dense/kernel", "dense/bias", "norm/scale", "norm/bias"}


@pytest.mark.parametrize(
    ("where", "want"),
    [
        (None, EVERY),
        (optclip.everything, EVERY),
        ("^dense/", {"dense/kernel", "dense/bias"}),
        (lambda path, leaf: leaf.ndim == 2, {"dense/kernel"}),
        ({"dense": True, "norm": False}, {"dense/kernel", "dense/bias"}),
    ],
    ids=["none", "everything", "pattern", "predicate", "tree"],
)  # fmt: skip
def test_where(where, want):
    for tx in (optclip.project(sets.linf_ball(1.0), where),):
        assert moved(after(tx, model())) == want
    assert moved(optclip.project_params(model(), sets.linf_ball(1.0), where)) == want


def test_a_tree_of_sets():
    constraint = {"dense": sets.linf_ball(1.0), "norm": {"scale": sets.box(2.0, 3.0)}}
    params = model()
    got = optclip.project_params(params, constraint, "kernel|scale")
    assert np.all(got["dense"]["kernel"] <= 1) and np.all(got["norm"]["scale"] == 3)
    assert moved(got) == {"dense/kernel", "norm/scale"}


def test_masked_none_and_frozen_leaves_do_not_move():
    params = {"a": jnp.full(2, 5.0), "b": jnp.full(2, 5.0), "none": None}
    tx = untyped(
        optax.masked(
            optclip.project(sets.linf_ball(1.0)), {"a": True, "b": False, "none": None}
        )
    )
    updates, _ = tx.update(
        jax.tree.map(jnp.zeros_like, params), tx.init(params), params
    )
    assert np.all(updates["a"] == -4) and np.all(updates["b"] == 0)
    parts = {
        "free": optclip.project(sets.linf_ball(1.0)),
        "frozen": optax.set_to_zero(),
    }
    split = getattr(optax, "partition", None) or optax.multi_transform
    tx = untyped(split)(parts, {"a": "free", "b": "frozen", "none": "free"})
    updates, _ = tx.update(
        jax.tree.map(jnp.zeros_like, params), tx.init(params), params
    )
    assert np.all(updates["a"] == -4) and np.all(updates["b"] == 0)


def test_every_counts_steps():
    tx = optclip.project(sets.linf_ball(1.0), every=3)
    params = model()
    assert moved(after(tx, params, 2)) == set()
    assert moved(after(tx, params, 3)) == EVERY


def test_every_counts_real_steps_under_multi_steps():
    chain = optax.chain(optax.sgd(1.0), optclip.project(sets.linf_ball(1.0), every=2))
    tx = optax.MultiSteps(chain, every_k_schedule=2)
    params = model()
    with jax.numpy_dtype_promotion("standard"):
        assert moved(after(tx, params, 3)) == set()
        assert moved(after(tx, params, 4)) == EVERY


def test_order_matters():
    """Last it lands; before the optimizer it does not."""
    params, grads = jnp.array([0.9]), jnp.array([-5.0])
    box = untyped(optclip.project(sets.linf_ball(1.0)))
    for tx, lands in (
        (optax.chain(optax.sgd(1.0), box), True),
        (optax.chain(box, optax.sgd(1.0)), False),
    ):
        updates, _ = tx.update(grads, tx.init(params), params)
        assert (untyped(optax.apply_updates(params, updates)) <= 1).all() == lands


def test_init_box_is_kept_in_the_state():
    params = {"kernel": jnp.array([[0.5, -2.0]]), "bias": jnp.zeros(2)}
    tx = untyped(optclip.project(sets.init_box(1.5)))
    state = tx.init(params)
    assert state.memory.tolist() == [np.inf, 2.0]
    up = jax.tree.map(lambda x: jnp.full(x.shape, 100.0), params)
    for _ in range(2):  # from the start, not from where the parameter has gone
        updates, state = tx.update(up, state, params)
        params = untyped(optax.apply_updates(params, updates))
    assert np.all(params["kernel"] == 3.0) and np.all(params["bias"] == 200.0)
    both = untyped(
        optclip.project(sets.intersection(sets.init_box(1.0), sets.init_box(2.0)))
    )
    assert both.init(params).memory.shape == (4,)


# Trees of every library.


def test_frozen_dicts_and_linen_variables():
    frozen = freeze({"params": model()})
    got = optclip.project_params(frozen, sets.linf_ball(1.0), "^dense/kernel$")
    assert type(got) is type(frozen)
    assert moved(got["params"].unfreeze()) == {"dense/kernel"}


def test_nnx_module_in_place_and_state():
    module = untyped(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    state = jax.tree.map(lambda x: x + 10, nnx.state(module, nnx.Param))
    bounded = untyped(optclip.project_params(state, sets.linf_ball(1.0), "kernel$"))
    assert jax.tree.structure(bounded) == jax.tree.structure(state)
    nnx.update(module, state)
    assert optclip.project_params(module, sets.linf_ball(1.0), "kernel$") is module
    assert np.all(module.kernel[...] == 1) and np.all(module.bias[...] == 10)
    np.testing.assert_array_equal(bounded["kernel"][...], module.kernel[...])


def test_equinox_module():
    linear = eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(0))
    got = optclip.project_params(linear, sets.linf_ball(1e-3))
    assert type(got) is type(linear) and got.activation is linear.activation
    arrays = jax.tree.leaves(eqx.filter(got, eqx.is_array))
    assert all(np.all(np.abs(x) <= 1e-3) for x in arrays)


# What goes wrong, and what looks as if it would.


def test_a_tuple_of_sets_is_a_tree_of_sets():
    params = (jnp.array([-1.0, 3.0]), jnp.array([-1.0, 3.0]))
    constraint = (sets.box(0.0, 1.0), sets.box(-1.0, 0.0))
    for found in (
        optclip.project_params(params, constraint),
        after(optclip.project(constraint), params),
    ):
        np.testing.assert_array_equal(untyped(found)[0], [0, 1])
        np.testing.assert_array_equal(untyped(found)[1], [-1, 0])


def test_a_leaf_without_a_set_says_how_to_leave_it_out():
    tree = {"w": sets.nonnegative(), "b": None}
    params = {"w": -jnp.ones(2), "b": -jnp.ones(2)}
    with pytest.raises(ValueError, match=r"none for 'b' .*where= chooses leaves"):
        optclip.project(tree).init(params)
    found = optclip.project_params(params, tree, "^w$")
    assert np.all(found["w"] == 0) and np.all(found["b"] == -1)


@pytest.mark.parametrize("wrong", [1.0, "box", jnp.ones(300), sets.box])
def test_a_wrong_leaf_is_named_without_the_tree(wrong):
    tree = {f"layer_{n}": {"kernel": sets.nonnegative()} for n in range(30)}
    tree["layer_7"]["kernel"] = wrong
    with pytest.raises(ValueError, match=r"at 'layer_7/kernel'\.$") as caught:
        optclip.project(tree)
    assert len(str(caught.value)) < 200


def test_params_that_left_the_set_are_found():
    """What happens when the optimizer follows the projection."""
    params, grads = {"w": jnp.array([0.9])}, {"w": jnp.array([-5.0])}
    box = sets.linf_ball(1.0)
    for order, fine in ((1, True), (-1, False)):
        tx = optax.chain(*(optax.sgd(1.0), optclip.project(box))[::order])
        updates, _ = tx.update(grads, tx.init(params), params)
        stepped = optax.apply_updates(params, updates)
        if fine:
            optclip.project_params(stepped, box, strict=True)
            continue
        says = r"got 'w' outside of linf_ball\(1\.0\)\. .* not the last transform"
        with pytest.raises(ValueError, match=f"^project_params: .*{says}"):
            optclip.project_params(stepped, box, strict=True)


def test_abstract_leaves_are_enough_for_init():
    params = model()
    abstract = jax.eval_shape(lambda: params)
    for tx in (
        optclip.project(sets.linf_ball(1.0), every=2),
        optclip.project({"dense": sets.max_norm(), "norm": sets.l1_ball()}),
        optclip.project(sets.orthogonal(), "kernel"),
        optclip.clip_weights(),
        optclip.qk_clip(),
        *(row.transform(1.0) for row in PROJECTIONS),
    ):
        known, from_shapes = tx.init(params), tx.init(abstract)
        assert jax.tree.structure(known) == jax.tree.structure(from_shapes)
        for one, other in zip(*map(jax.tree.leaves, (known, from_shapes)), strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            assert np.all((one == other) | np.isnan(other)), "never a wrong number"
    module = nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    tx = optclip.project(sets.intersection(sets.init_box(), sets.max_norm()))
    optimizer = nnx.Optimizer(module, tx, wrt=nnx.Param)
    assert jax.tree.leaves(optimizer.opt_state)[0].shape == (2,)


LOWERED = []
jax.monitoring.register_event_duration_secs_listener(
    untyped(lambda name, *_, **__: LOWERED.append(name) if "to_mlir" in name else None)
)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(
    "constraint",
    [
        sets.box(-1, 1),
        sets.max_norm(),
        sets.intersection(sets.l2_ball(), sets.nonnegative(), iterations=2),
        sets.spectral_ball(iterations=2),
    ],
    ids=repr,
)
def test_eager_updates_compile_nothing_new(constraint, every):
    params = model()
    tx = optclip.project(constraint, every=every)
    state = tx.init(params)
    counts = []
    for _ in range(6):
        _, state = tx.update(params, state, params)
        counts.append(len(LOWERED))
    assert counts[-1] == counts[2]
    jax.jit(lambda x: x + counts[-1])(1.0)
    assert len(LOWERED) > counts[-1], "what is counted"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: optclip.project({"a": sets.box(-1, 1), "b": optax.MaskedNode()}),
            "constraint must cover every leaf",
        ),
        (
            lambda: sets.l2_ball(1.0, grouping=untyped(optclip.groupings.per_leaf)),
            "l2_ball: grouping must be a Grouping of optclip",
        ),
        (
            lambda: sets.box(np.zeros(2), np.ones(3)),
            r"box: lower and upper must broadcast, got shapes \(2,\) and \(3,\)",
        ),
        (
            lambda: optclip.project(sets.linf_ball(np.ones(3))),
            "radius must broadcast against every leaf",
        ),
        (
            lambda: optclip.project(sets.spectral_ball(1.0, stacked="(")),
            "stacked must be a regular expression",
        ),
    ],
    ids=["hole", "grouping", "bounds", "radius", "stacked"],
)
def test_what_does_not_fit_is_named(make, says):
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match=says):
        make().init(params)
