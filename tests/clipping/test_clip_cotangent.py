"""`clip_cotangent`: laws 1, 2, 4 and 6 for its cotangents, and what holds it."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

import optclip
from optclip import clip_cotangent, groupings, measures
from tests.laws import trees
from tests.laws.table import Row
from tests.oracles import fixed
from tests.test_house import LOWERED


def row(name: str, **oracle: Any) -> Row:
    options: dict[str, Any] = {}
    if oracle["grouping"] == "leaf":
        options["grouping"] = groupings.per_leaf()
    if oracle["grouping"] == "example":
        options["grouping"] = groupings.per_example()
    if "measure" in oracle:
        options["measure"] = measures.l1
    batched = oracle["grouping"] == "example"
    by = "max_delta" if oracle["grouping"] == "element" else "max_norm"

    def build(limit: Any, **more: Any) -> Any:
        return functools.partial(clip_cotangent, **{by: limit}, **options, **more)

    return Row(name, "clip", build, oracle, "clip_cotangent", batched=batched)


ROWS = [
    row("whole", grouping="whole"),
    row("leaf-l1", grouping="leaf", measure="l1"),
    row("example", grouping="example"),
    row("value", grouping="element"),
]


@functools.cache
def jitted(name: str, options: tuple[tuple[str, Any], ...]) -> Any:
    (own,) = [own for own in ROWS if own.name == name]

    @jax.jit
    def back(tree: Any, limit: Any) -> Any:
        _, pull = jax.vjp(own.build(limit, **dict(options)), tree)
        return pull(tree)[0]

    return back


def pulled(own: Row, tree: Any, limit: Any, **options: Any) -> Any:
    """A tree as a cotangent, on its way back through a value of its own shape."""
    return jax.device_get(jitted(own.name, tuple(options.items()))(tree, limit))


EVERY = pytest.mark.parametrize("own", ROWS, ids=lambda own: own.name)
DTYPE = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])


@EVERY
@DTYPE
@trees.at_most(10)
@given(data=st.data())
def test_bound_and_identity(own: Row, dtype: str, data: Any):
    """Laws 1, 2 and 4: the oracle's numbers, and the same bits within the limit."""
    tree, limit = data.draw(trees.cases(own, dtype))
    out = pulled(own, tree, limit)
    eps, tiny = float(trees.info(dtype).eps), float(trees.info(dtype).smallest_normal)
    expected, _ = fixed.clip(tree, float(limit), **own.oracle)
    for path, value in out.items():
        assert (value.dtype, value.shape) == (tree[path].dtype, tree[path].shape)
        off = np.abs(trees.wide(value) - expected[path])
        assert np.all(off <= 5 * eps * np.abs(expected[path]) + 1.5 * tiny), path
    for group, size in zip(
        trees.groups_of(own, tree), trees.sizes_of(own, tree), strict=True
    ):
        if size * (1 + 8 * np.finfo(np.float32).eps) <= float(limit):
            assert trees.bits(out, group) == trees.bits(tree, group)


@EVERY
@pytest.mark.parametrize("limit", [0.0, np.inf])
def test_infinity_and_zero(own: Row, limit: float):
    shapes = trees.BATCHED if own.batched else trees.SHAPES
    tree = {path: np.full(shape, 1e30, np.float32) for path, shape in shapes.items()}
    out = pulled(own, tree, np.float32(limit))
    chex.assert_trees_all_equal(
        out, tree if limit else jax.tree.map(np.zeros_like, out)
    )
    zero = jax.tree.map(np.zeros_like, tree)
    chex.assert_trees_all_equal(pulled(own, zero, np.float32(limit)), zero)


@EVERY
@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite(own: Row, nonfinite: str, bad: float):
    """Law 6: in its group, and in no other."""
    if (own.name, nonfinite) == ("value", "zero"):
        pytest.skip("elements have no group that could be zeroed")
    shapes = trees.BATCHED if own.batched else trees.SHAPES
    tree = {path: np.full(shape, 3.0, np.float32) for path, shape in shapes.items()}
    spoilt = {path: x.copy() for path, x in tree.items()}
    spoilt["b/kernel"].reshape(-1)[0] = bad
    limit = np.float32(0.5)
    clean = pulled(own, tree, limit, nonfinite=nonfinite)
    out = pulled(own, spoilt, limit, nonfinite=nonfinite)
    for group in trees.groups_of(own, spoilt):
        if np.all(np.isfinite(trees.values(spoilt, group))):
            assert trees.bits(out, group) == trees.bits(clean, group)
        elif own.name == "value":
            expected = 0.5 if bad == np.inf else np.nan
            np.testing.assert_array_equal(trees.values(out, group), expected)
        else:
            expected = np.nan if nonfinite == "propagate" else 0.0
            np.testing.assert_array_equal(trees.values(out, group), expected)


def test_other_leaves_pass():
    """Law 4: without a cotangent of their own."""
    tree = {
        "w": jnp.array([3.0, 4.0]),
        "half": jnp.zeros((2,), jnp.bfloat16),
        "step": jnp.arange(3),
        "key": jax.random.key(0),
        "none": None,
        "empty": jnp.zeros((0, 2)),
        "float": 1.5,
    }
    out = clip_cotangent(tree, 1.0)
    assert jax.tree.structure(out) == jax.tree.structure(tree)
    assert out["step"] is tree["step"]
    assert out["key"] is tree["key"]
    np.testing.assert_array_equal(out["w"], tree["w"])

    def loss(tree: Any) -> jax.Array:
        same = clip_cotangent(tree, 1.0)
        return jnp.sum(same["w"] * jnp.array([3.0, 4.0])) + jnp.sum(same["step"]) * 0.0

    with jax.numpy_dtype_promotion("standard"):
        found = jax.grad(loss, allow_int=True)(tree | {"key": None})
    np.testing.assert_allclose(found["w"], [0.6, 0.8], rtol=1e-6)
    assert found["half"].dtype == jnp.bfloat16


def last_state(h: jax.Array, length: int, **clip: Any) -> jax.Array:
    """A recurrence whose gradient grows fourfold a step."""

    def step(h: jax.Array, _: None) -> tuple[jax.Array, None]:
        return 4.0 * (clip_cotangent(h, **clip) if clip else h), None

    return jax.lax.scan(step, h, length=length)[0]


def test_jit_vmap_and_traced_limits():
    grad = jax.grad(lambda h, c: jnp.sum(last_state(h, 5, max_norm=c)))
    h = jnp.ones((3, 2))
    alone = jnp.stack([grad(x, 1.0) for x in h])
    np.testing.assert_allclose(jnp.linalg.norm(alone, axis=1), 1.0, rtol=1e-6)
    chex.assert_trees_all_equal(jax.vmap(grad, (0, None))(h, 1.0), alone)
    limits = jnp.array([0.5, 1.0, jnp.inf])
    several = jax.jit(jax.vmap(grad))(h, limits)
    norms = jnp.linalg.norm(several, axis=1)
    np.testing.assert_allclose(norms, [0.5, 1.0, 1024 * 2**0.5], rtol=1e-6)


def test_the_limit_itself_has_no_gradient_and_the_cotangent_has():
    """The second derivative is that of the clip."""
    first, second = jax.grad(lambda h, c: clip_cotangent(h, c), (0, 1))(2.0, 0.5)
    assert (first, second) == (0.5, 0.0)

    def squared(h: jax.Array, c: jax.Array) -> jax.Array:
        return jax.grad(lambda h: clip_cotangent(h, c) ** 2)(h)

    by_h, by_c = jax.grad(squared, (0, 1))(2.0, 0.5)
    assert (by_h, by_c) == (0.0, 1.0)  # clipped: 2h no longer counts, the limit does
    by_h, by_c = jax.grad(squared, (0, 1))(2.0, 9.0)
    assert (by_h, by_c) == (2.0, 0.0)


def test_no_forward_mode():
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda h: clip_cotangent(h, 1.0), (1.0,), (1.0,))


def test_more_eager_backward_passes_lower_nothing():
    def once(limit: float) -> None:
        _, pull = jax.vjp(lambda h: clip_cotangent(h, limit), jnp.array([3.0, 4.0]))
        pull(jnp.array([3.0, 4.0]))

    once(1.0)
    once(2.0)
    before = len(LOWERED)
    for limit in (1.0, 2.0, 3.0):
        once(limit)
    assert len(LOWERED) == before


def shard_map(function: Any, mesh: Mesh, specs: Any) -> Any:
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs[0])


@pytest.mark.parametrize("sharded", [True, False])
def test_shard_map(sharded: bool):
    """Over all devices of a sharded value, whole on each of a replicated one."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    spec = PartitionSpec("data") if sharded else PartitionSpec()
    x = jnp.arange(1.0, 9.0)

    def back(x: jax.Array, g: jax.Array) -> jax.Array:
        return jax.vjp(lambda x: clip_cotangent(x, 1.0), x)[1](g)[0]

    out = jax.jit(shard_map(back, mesh, (spec, spec)))(x, 3 * x)
    np.testing.assert_allclose(out, x / jnp.linalg.norm(x), rtol=1e-6)


def test_shard_map_scan():
    """Each device bounds its own part of a batch, example by example."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    spec = PartitionSpec("data")
    own = {"grouping": groupings.per_example(), "axis_name": ()}

    def back(h: jax.Array) -> jax.Array:
        return jax.grad(lambda h: jnp.sum(last_state(h, 4, max_norm=1.0, **own)))(h)

    out = jax.jit(shard_map(back, mesh, (spec,)))(jnp.ones((8, 3)))
    np.testing.assert_allclose(jnp.linalg.norm(out, axis=1), 1.0, rtol=1e-6)


STEPS, WIDTH = 60, 8


def rnn_gradient(scale: float, **clip: Any) -> tuple[Any, jax.Array]:
    """The gradient of a vanilla RNN's loss by its kernel, and by its first state."""
    rng = np.random.default_rng(0)
    orthogonal, _ = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))
    kernel = jnp.asarray(scale * orthogonal, jnp.float32)
    start = jnp.full((WIDTH,), 1e-6)

    def loss(kernel: jax.Array, start: jax.Array) -> jax.Array:
        def step(h: jax.Array, _: None) -> tuple[jax.Array, None]:
            h = clip_cotangent(h, **clip) if clip else h
            return jnp.tanh(kernel @ h), None

        return jnp.sum(jax.lax.scan(step, start, length=STEPS)[0])

    return jax.jit(jax.grad(loss, (0, 1)))(kernel, start)


@pytest.mark.parametrize(
    ("clip", "bound"),
    [({"max_norm": 0.1}, 0.1), ({"max_delta": 0.1}, 0.1 * WIDTH**0.5)],
)
def test_it_bounds_the_gradient_of_a_recurrence(clip: dict[str, float], bound: float):
    """Of the first state by the limit, of the kernel by the limit times the steps."""
    scale = 1.25
    free, first = rnn_gradient(scale)
    assert optclip.global_norm(first) > 1e4 * bound  # 1.25^60 = 650,000
    kernel, first = rnn_gradient(scale, **clip)
    assert optclip.global_norm(first) <= bound * (1 + 1e-5)
    # ‖∂h_t‖ ≤ bound at every step but the last, whose loss has a cotangent of ones.
    most = (STEPS - 1) * bound * WIDTH**0.5 + WIDTH
    assert optclip.global_norm(kernel) <= most
    assert optclip.global_norm(free) > optclip.global_norm(kernel)


def test_a_recurrence_within_its_limit_is_unchanged():
    chex.assert_trees_all_equal(rnn_gradient(0.9), rnn_gradient(0.9, max_norm=100.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "one of max_norm and max_delta must be given, got max_norm=None"),
        ({"max_norm": 1.0, "max_delta": 1.0}, "one of max_norm and max_delta must"),
        ({"max_norm": -1.0}, "max_norm must be non-negative, got -1.0"),
        ({"max_delta": np.nan}, "max_delta must be non-negative, got nan"),
        ({"max_norm": True}, "max_norm must be non-negative, got True"),
        ({"max_norm": jnp.ones(2)}, "max_norm must be a scalar, got an array of"),
        ({"max_norm": 1.0, "measure": 2}, "measure must be a Measure of optclip"),
        ({"max_norm": 1.0, "grouping": "leaf"}, "grouping must be a Grouping of"),
        ({"max_norm": 1.0, "nonfinite": "skip"}, "nonfinite must be 'propagate' or"),
        ({"max_delta": 1.0, "measure": measures.l1}, "max_delta must go without meas"),
        ({"max_delta": 1.0, "nonfinite": "zero"}, "max_delta must go without measure"),
    ],
)
def test_nonsense(arguments: Any, message: str):
    with pytest.raises(ValueError, match=f"clip_cotangent: {message}"):
        clip_cotangent(jnp.ones(2), **arguments)


def test_what_the_backward_pass_refuses_is_named_too():
    with pytest.raises(ValueError, match="clip_cotangent: axis_name must name"):
        jax.grad(lambda x: clip_cotangent(x, 1.0, axis_name="date"))(1.0)
