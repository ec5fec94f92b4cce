"""Law 9: state within leaves lies on the mesh as Adam's moments do.

Parameters in Flax's boxes (Linen's `Partitioned`, NNX's Variables) name the mesh axes
that they lie on. State of their shape names the same, state of numbers a unit those of
the axes that are left, at `init` and after ten steps, with Auto and Explicit axes.
"""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optclip
from optclip import groupings, thresholds
from tests.laws.collectives import collectives, mesh_of
from tests.untyped import untyped

SHAPES = {"kernel": (8, 16), "bias": (16,), "table": (8, 4)}
NAMES = {"kernel": ("data", "model"), "bias": ("model",), "table": ("data", None)}
# What is left where axis 0 is reduced.
OF_UNITS = {"kernel": (None, "model"), "bias": (None,), "table": (None, None)}
UNITS = groupings.per_unit(axes=0)
ELEMENTS = groupings.per_element()

RULES = {
    "second_moment_clip": (optclip.second_moment_clip(2.0, warmup_steps=1), NAMES),
    "zclip, per_unit": (optclip.zclip(warmup_steps=2, grouping=UNITS), OF_UNITS),
    "autoclip, per_element": (optclip.autoclip(window=5, grouping=ELEMENTS), NAMES),
}
EVERY_RULE = pytest.mark.parametrize("name", RULES)
EVERY_MESH = pytest.mark.parametrize(
    "axis_type",
    [
        pytest.param(AxisType.Auto, id="auto"),
        pytest.param(AxisType.Explicit, id="explicit"),
    ],
)


@pytest.fixture(autouse=True)
def _on_cpu():
    cpu = jax.default_device(jax.devices("cpu")[0])
    with cpu, jax.numpy_dtype_promotion("standard"):  # for Adam's own arithmetic
        yield


def _chain(name):
    return optax.chain(RULES[name][0], optax.scale_by_adam(), optax.scale(-0.1))


@functools.cache
def _values():
    rng = np.random.default_rng(0)
    return {k: np.asarray(rng.normal(size=s), np.float32) for k, s in SHAPES.items()}


def _placed(mesh, name):
    spec = NamedSharding(mesh, P(*NAMES[name]))
    return jax.device_put(jnp.asarray(_values()[name]), spec)


def _linen(mesh):
    return {
        name: nn.Partitioned(_placed(mesh, name), names)
        for name, names in NAMES.items()
    }


class Net(nnx.Module):
    """The same parameters, in the mesh that is in scope."""

    def __init__(self):
        for name, names in NAMES.items():
            value = jnp.asarray(_values()[name])
            setattr(self, name, nnx.Param(value, out_sharding=names))


def _gradients(params):
    """They shrink and grow with the parameters' own elements."""
    return jax.tree.map(lambda x: 3 * jnp.sin(7 * x), params)


@functools.cache
def _unsharded(name):
    """State of the rule after ten steps, without boxes, on one device."""
    tx, params = _chain(name), jax.tree.map(jnp.asarray, _values())
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    step = jax.jit(lambda s: s.apply_gradients(grads=_gradients(s.params)))
    for _ in range(10):
        state = step(state)
    return untyped(state.opt_state)[0].threshold


def _assert_placed(state, name, mesh):
    """Every array of the rule's state, and Adam's beside it, lies where it should."""
    rule, adam = state[0].threshold, state[1]
    for tree, names in ((rule, RULES[name][1]), (adam.mu, NAMES), (adam.nu, NAMES)):
        flat, _ = jax.tree_util.tree_flatten_with_path(tree)
        assert len(flat) % len(SHAPES) == 0
        for keys, leaf in flat:
            (own,) = (own for k, own in names.items() if k in str(keys))
            spec = P(*[None] * (leaf.ndim - len(own)), *own)
            wanted = NamedSharding(mesh, spec)
            assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), (keys, spec)


def _assert_as_adams(state):
    """The tree is that of Adam's moments, box by box and array by array."""
    moment = state[0].threshold.root_mean_square
    assert jax.tree.structure(moment) == jax.tree.structure(state[1].nu)

    def placed(tree):
        return jax.tree.map(lambda x: x.sharding, tree)

    assert placed(moment) == placed(state[1].nu)


def _assert_learned(state, name):
    chex.assert_trees_all_close(
        jax.device_get(jax.tree.leaves(state[0].threshold)),
        jax.device_get(jax.tree.leaves(_unsharded(name))),
        rtol=1e-4,  # ten steps of sums in another order, through Adam's division
    )


@EVERY_MESH
@EVERY_RULE
def test_linen(name, axis_type):
    mesh, tx = mesh_of(axis_type), _chain(name)

    def create(params):
        return TrainState.create(apply_fn=None, params=params, tx=tx)

    with jax.set_mesh(mesh):
        params = _linen(mesh)
        places = nn.get_sharding(jax.eval_shape(create, params), mesh)
        state = jax.jit(create, out_shardings=places)(params)
        eager = untyped(tx).init(params)
        step = jax.jit(lambda s: s.apply_gradients(grads=_gradients(s.params)))
        step = step.lower(state).compile()
        sent = collectives(step.as_text() or "").everywhere
        assert {one.kind for one in sent} <= {"all-reduce"}
        last = state
        for _ in range(10):
            last = step(last)
    for opt_state in (state.opt_state, eager, last.opt_state):
        _assert_placed(opt_state, name, mesh)
        if name == "second_moment_clip":
            _assert_as_adams(opt_state)
    _assert_learned(last.opt_state, name)


@pytest.mark.skipif(
    not hasattr(nnx, "as_pure"),
    reason="before flax 0.12.7 a Param with out_sharding lies whole on one device",
)
@EVERY_MESH
@EVERY_RULE
def test_nnx(name, axis_type):
    mesh, tx = mesh_of(axis_type), _chain(name)

    def create():
        model = Net()
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    def values_of(optimizer):
        return nnx.as_pure(optimizer.opt_state)

    with jax.set_mesh(mesh):
        abstract = nnx.state(nnx.eval_shape(create))
        places = nnx.get_named_sharding(abstract, mesh)
        jitted = jax.jit(lambda: nnx.state(create()), out_shardings=places)()
        model, optimizer = create()
        start = values_of(optimizer)
        boxes = optimizer.opt_state
        nnx.update((model, optimizer), jitted)
        jitted = values_of(optimizer)

        @nnx.jit
        def step(model, optimizer):
            params = nnx.state(model, nnx.Param)
            optimizer.update(model, _gradients(params))

        for _ in range(10):
            step(model, optimizer)
        last = values_of(optimizer)
    for opt_state in (start, jitted, last):
        _assert_placed(opt_state, name, mesh)
        if name == "second_moment_clip":
            _assert_as_adams(opt_state)
    if name == "second_moment_clip":
        _assert_as_adams(boxes)
    _assert_learned(last, name)


# Boxes, by hand.


def _zclip(params):
    """The mean of zclip for each unit: the leading axis of a leaf is reduced."""
    return untyped(optclip.zclip(grouping=UNITS)).init(params).threshold.mean


def test_plain_parameters_have_plain_state():
    """Which is the structure that older checkpoints have."""
    params = jax.tree.map(jnp.asarray, _values())
    mean = _zclip(params)
    assert jax.tree.structure(mean) == jax.tree.structure(params)
    chex.assert_shape([mean["kernel"], mean["bias"]], [(1, 16), (1,)])


def test_a_window_of_units_has_no_name_of_its_own():
    box = nn.Partitioned(jnp.ones((8, 4)), ("data", "model"))
    state = untyped(optclip.autoclip(window=5, grouping=UNITS)).init({"kernel": box})
    sizes = state.threshold.sizes["kernel"]
    assert sizes.names == (None, None, "model") and sizes.value.shape == (5, 1, 4)


def test_names_may_be_logical_or_few():
    kernel = nn.LogicallyPartitioned(jnp.ones((8, 4)), ("embed", "mlp"), None, ())
    table = nn.Partitioned(jnp.ones((8, 4)), ("data",))
    mean = _zclip({"kernel": kernel, "table": table})
    assert isinstance(mean["kernel"], nn.LogicallyPartitioned)
    assert mean["kernel"].names == (None, "mlp") and mean["kernel"].rules == ()
    assert mean["table"].names == (None, None)


@pytest.mark.parametrize(
    "key", ["out_sharding", "optimizer_sharding", "sharding", "sharding_names"]
)
def test_names_of_variables_take_every_form(key):
    mesh = mesh_of(AxisType.Auto)
    names = ("data", "model")
    placed = NamedSharding(mesh, P(*names))
    forms = [names, P(*names), placed, Format(Layout((0, 1)), placed)]
    left = P(None, "model")
    wants = [tuple(left), left, NamedSharding(mesh, left), NamedSharding(mesh, left)]
    for given, wanted in zip(forms, wants, strict=True):
        param = nnx.Param(jnp.ones((8, 4)), note="kept").replace(**{key: given})
        kept = _zclip({"kernel": param})["kernel"]
        assert isinstance(kept, nnx.Param)
        assert kept.get_metadata(key) == wanted and kept.get_metadata("note") == "kept"
        assert param.get_metadata(key) == given


def test_variables_without_names_keep_their_box():
    for names in ({}, {"out_sharding": None}):
        kept = _zclip({"kernel": nnx.Param(jnp.ones((8, 4)), **names)})["kernel"]
        assert isinstance(kept, nnx.Param) and kept[...].shape == (1, 4)
        assert kept.get_metadata("out_sharding", None) is None


def test_boxes_of_what_is_not_measured_are_empty():
    """As plain integers and masked nodes are; the optimizer goes on with them."""
    masked = nn.Partitioned(optax.MaskedNode(), ("data",))
    steps = nn.Partitioned(jnp.arange(8), ("data",))
    params = {"m": masked, "n": steps, "w": nn.Partitioned(jnp.ones(8), ("data",))}
    mean = _zclip(params)
    assert len(jax.tree.leaves(mean)) == 1 and mean["w"].names == (None,)
    tx = untyped(optclip.second_moment_clip())
    start = tx.init(params)
    _, after = tx.update(params, start)
    assert jax.tree.structure(start) == jax.tree.structure(after)

    class Counting(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones(8))
            self.steps = nnx.Param(jnp.arange(8))

    model = Counting()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, nnx.state(Counting(), nnx.Param))
    assert optclip.metrics(optimizer.opt_state)["steps"] == 1


def test_a_box_of_several_arrays_is_opened_where_one_name_would_not_fit():
    pair = nnx.Param({"a": jnp.ones((8, 4)), "b": jnp.ones((8, 2))})
    kept = _zclip({"pair": pair})["pair"]
    assert jax.tree.map(jnp.shape, kept) == {"a": (1, 4), "b": (1, 2)}
    moment = untyped(optclip.second_moment_clip()).init({"pair": pair}).threshold
    assert isinstance(moment.root_mean_square["pair"], nnx.Param)


def test_tightest_boxes_the_state_of_each():
    tx = untyped(optclip.clip_by)(
        thresholds.tightest(thresholds.second_moment(), thresholds.constant(1.0)),
        grouping=ELEMENTS,
    )
    box = nn.Partitioned(jnp.ones((8, 4)), ("data", "model"))
    state = tx.init({"kernel": box})
    assert state.threshold[0].root_mean_square["kernel"].names == box.names
    _, state = tx.update({"kernel": box}, state)
    assert state.threshold[0].root_mean_square["kernel"].names == box.names


def test_boxed_state_takes_what_plain_state_kept():
    """As `adopt_state` resumes a run of a release that kept no boxes."""
    tx = untyped(optclip.second_moment_clip())
    plain = {"kernel": jnp.ones((8, 4))}
    old = tx.update(plain, tx.init(plain))[1]
    boxed = {"kernel": nn.Partitioned(plain["kernel"], ("data", "model"))}
    new = untyped(optclip.adopt_state)(tx.init(boxed), old).state
    assert jax.tree.structure(new) == jax.tree.structure(tx.init(boxed))
    chex.assert_trees_all_equal(jax.tree.leaves(new), jax.tree.leaves(old))
