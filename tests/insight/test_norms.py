"""`global_norm` and `leaf_norms` against NumPy in float64, over the whole range."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optclip
from optclip import global_norm, leaf_norms, measures
from tests.untyped import untyped

MEASURES = {
    "l2": (measures.l2, lambda x: math.sqrt(np.sum(x**2))),
    "rms": (measures.rms, lambda x: math.sqrt(np.mean(x**2))),
    "l1": (measures.l1, np.sum),
    "max_abs": (measures.max_abs, np.max),
    "lp3": (measures.lp(3), lambda x: np.sum(x**3) ** (1 / 3)),
    "lp1.5": (measures.lp(1.5), lambda x: np.sum(x**1.5) ** (1 / 1.5)),
}
EVERY_MEASURE = pytest.mark.parametrize(
    ("measure", "truth"), MEASURES.values(), ids=MEASURES
)
# Shapes are the same everywhere, so that each measure and dtype compiles once. The
# magnitude leaves a factor of 30 to the largest float32 for the sum of 26 elements.
MAGNITUDES = (1e-30, 1e-20, 1e-3, 1.0, 1e19, 1e36)
HALF = (1e-4, 1.0, 1e3)


def tree(dtype, magnitude, seed=0):
    rng = np.random.default_rng(seed)

    def leaf(*shape):
        x = rng.standard_normal(shape)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            x = x + 1j * rng.standard_normal(shape)
        return jnp.asarray(np.asarray(magnitude * x).astype(dtype))

    return {"a": {"w": leaf(4, 3), "b": leaf(3)}, "c": [leaf(2, 5), leaf()]}


def in_float64(tree):
    """The magnitudes of all elements, as rounded to the leaves' dtypes."""
    return np.concatenate(
        [np.abs(np.asarray(x).astype(np.complex128)).ravel()
         for x in jax.tree.leaves(tree)]
    )  # fmt: skip


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@functools.partial(jax.jit, static_argnums=1)
def norms(leaves, measure):
    return global_norm(leaves, measure), leaf_norms(leaves, measure=measure)


@EVERY_MEASURE
@pytest.mark.parametrize(
    ("dtype", "magnitudes"),
    [
        (jnp.float32, MAGNITUDES),
        (jnp.bfloat16, MAGNITUDES),
        (jnp.float16, HALF),
        (jnp.complex64, MAGNITUDES),
    ],
    ids=["float32", "bfloat16", "float16", "complex64"],
)
def test_norms_at_every_magnitude(measure, truth, dtype, magnitudes):
    for magnitude in magnitudes:
        leaves = tree(dtype, magnitude)
        whole, by_leaf = norms(leaves, measure)
        assert whole.dtype == jnp.float32
        # A dozen roundings of float32; powers round worse by their exponent.
        np.testing.assert_allclose(whole, truth(in_float64(leaves)), rtol=3e-6, atol=0)
        assert list(by_leaf) == ["a/b", "a/w", "c/0", "c/1"]
        for path, leaf in zip(by_leaf, jax.tree.leaves(leaves), strict=True):
            want = truth(in_float64(leaf))
            np.testing.assert_allclose(by_leaf[path], want, rtol=3e-6, atol=0)


@EVERY_MEASURE
@pytest.mark.parametrize("magnitude", [1e-300, 1e-160, 1.0, 1e155, 1e305])
def test_norms_of_float64(measure, truth, magnitude, x64):
    leaves = tree(jnp.float64, magnitude)
    whole, _ = norms(leaves, measure)
    assert whole.dtype == jnp.float64
    unit = in_float64(leaves) / magnitude  # NumPy's squares would overflow
    np.testing.assert_allclose(whole / magnitude, truth(unit), rtol=1e-14)


def test_mixed_dtypes_are_measured_in_the_widest():
    leaves = {"a": jnp.full(4, 3.0), "b": jnp.full(4, 4.0, jnp.bfloat16),
              "c": jnp.zeros(2, jnp.complex64)}  # fmt: skip
    assert global_norm(leaves) == 10.0
    assert {x.dtype for x in leaf_norms(leaves).values()} == {jnp.dtype(jnp.float32)}


def test_a_thousand_bfloat16_leaves():
    """√1000 = 31.62; summed in bfloat16 the total would stop at 256 and give 16."""
    unit = jnp.asarray(np.full(4, 0.5), jnp.bfloat16)
    norm = jax.jit(global_norm)([unit] * 1000)
    np.testing.assert_allclose(norm, np.sqrt(1000), rtol=1e-6)


@EVERY_MEASURE
@pytest.mark.parametrize(
    "empty",
    [{}, [], None, {"a": None}, {"n": jnp.arange(3)}, {"z": jnp.zeros((0, 3))},
     {"key": jax.random.key(0)}, {"yes": jnp.array([True])}],
    ids=["dict", "list", "None", "hole", "int", "zero-size", "key", "bool"],
)  # fmt: skip
def test_what_has_no_magnitude_does_not_count(measure, truth, empty):
    whole = global_norm(empty, measure)
    assert (whole, whole.dtype, whole.shape) == (0, jnp.float32, ())
    assert leaf_norms(empty, measure=measure) == {}
    beside = {"x": empty, "y": jnp.array([2.0])}
    assert global_norm(beside, measure) == pytest.approx(2.0)
    assert list(leaf_norms(beside, measure=measure)) == ["y"]


@EVERY_MEASURE
def test_not_finite_shows(measure, truth):
    for bad in (np.nan, np.inf, -np.inf):
        leaves = tree(jnp.float32, 1.0)
        leaves["a"]["w"] = leaves["a"]["w"].at[1, 2].set(bad)
        whole, by_leaf = norms(leaves, measure)
        assert not np.isfinite(whole)
        assert {path for path in by_leaf if not np.isfinite(by_leaf[path])} == {"a/w"}


@EVERY_MEASURE
def test_the_gradient_is_finite_at_zero(measure, truth):
    zeros = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(())}
    for name in ("global", "leaf"):

        def size(t, name=name):
            if name == "global":
                return global_norm(t, measure)
            return sum(leaf_norms(t, measure=measure).values())

        value, gradient = jax.value_and_grad(size)(zeros)
        assert value == 0
        chex.assert_tree_all_finite(gradient)
        if measure.power is not None:  # |x| alone has subgradients of its own at 0
            chex.assert_trees_all_equal(gradient, zeros)


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_the_gradient_is_the_direction(magnitude):
    leaves = tree(jnp.float32, magnitude)
    norm = np.linalg.norm(in_float64(leaves))
    gradient = jax.jit(jax.grad(global_norm))(leaves)
    want = jax.tree.map(lambda x: np.float32(np.float64(x) / norm), leaves)
    chex.assert_trees_all_close(gradient, want, rtol=1e-5)


def test_paths_and_separator():
    leaves = {"params": {"Dense_0": {"kernel": jnp.ones((2, 2))}, "x": [jnp.ones(1)]}}
    assert list(leaf_norms(leaves)) == ["Dense_0/kernel", "x/0"]
    assert list(leaf_norms(leaves, ".")) == ["Dense_0.kernel", "x.0"]
    assert list(jax.jit(leaf_norms)(leaves)) == ["Dense_0/kernel", "x/0"]


@pytest.mark.parametrize(
    ("tree", "wanted"),
    [
        ({"a/b": 3.0, "a": {"b": 4.0}}, {"['a/b']": 3.0, "['a']['b']": 4.0}),
        (
            {"params": {"w": 3.0}, "w": 4.0, "v": 5.0},
            {"['params']['w']": 3.0, "['w']": 4.0, "v": 5.0},
        ),
        ({"a.b": 3.0, "a": {"b": 4.0}}, {"a.b": 3.0, "a/b": 4.0}),
    ],
)
def test_leaves_that_spell_alike_are_two(tree, wanted):
    leaves = jax.tree.map(lambda x: jnp.array([x]), tree)
    for function in (leaf_norms, jax.jit(leaf_norms)):
        assert {k: float(v) for k, v in function(leaves).items()} == wanted
    assert set(leaf_norms(leaves, top=9)) == set(wanted)


def test_a_separator_that_is_in_a_name():
    leaves = {"a.b": jnp.array([3.0]), "a": {"b": jnp.array([4.0])}}
    norms = leaf_norms(leaves, separator=".")
    assert norms == {"['a.b']": 3.0, "['a']['b']": 4.0}
    assert leaf_norms({"a/b": {"c": jnp.array([3.0])}}, separator=".") == {"a/b.c": 3.0}


needs_devices = pytest.mark.skipif(jax.device_count() < 4, reason="needs a mesh")


@needs_devices
@pytest.mark.parametrize(
    ("averaged", "axis_name", "norm"),
    [(True, (), 3.0), (True, "batch", 6.0), (False, "batch", 6.0)],
)
def test_under_pmap_a_name_is_what_leaves_extend_over(averaged, axis_name, norm):
    """Averaged gradients are whole on each of four: a name makes the norm √4 times."""

    def size(gradient):
        if averaged:
            gradient = jax.lax.pmean(gradient, "batch")
        return global_norm(gradient, axis_name=axis_name)

    found = jax.pmap(size, axis_name="batch", devices=jax.devices()[:4])
    np.testing.assert_array_equal(found(jnp.full((4, 1), 3.0)), [norm] * 4)


def test_top_takes_the_largest_first():
    leaves = {"a": jnp.array([2.0]), "b": jnp.array([9.0]), "c": jnp.array([4.0])}
    assert list(leaf_norms(leaves, top=2)) == ["b", "c"]
    assert list(leaf_norms(leaves, top=10)) == ["b", "c", "a"]
    assert list(leaf_norms(leaves)) == ["a", "b", "c"]
    spoiled = {**leaves, "d": jnp.array([np.nan]), "e": jnp.array([np.inf])}
    assert list(leaf_norms(spoiled, top=3)) == ["d", "e", "b"]
    assert leaf_norms({}, top=1) == {}


@pytest.mark.parametrize("top", [0, -1, 1.0, True, "2"])
def test_a_senseless_top_raises(top):
    with pytest.raises(ValueError, match=r"leaf_norms: top must be an integer of at"):
        leaf_norms({"a": jnp.ones(1)}, top=top)


def test_top_needs_values():
    with pytest.raises(ValueError, match=r"leaf_norms: top must be None inside jit"):
        jax.jit(lambda t: leaf_norms(t, top=1))({"a": jnp.ones(1)})


@pytest.mark.parametrize("function", [global_norm, leaf_norms])
def test_a_measure_must_be_one(function):
    with pytest.raises(ValueError, match=f"{function.__name__}: measure must be"):
        function({"a": jnp.ones(1)}, measure="l2")


def test_the_norm_is_the_one_that_clipping_uses():
    leaves = tree(jnp.bfloat16, 1e30)
    _, state = untyped(optclip.clip_by_global_norm(1.0)).update(leaves, None)
    np.testing.assert_allclose(global_norm(leaves), state.metrics.size, rtol=3e-7)
