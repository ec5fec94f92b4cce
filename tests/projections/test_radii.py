"""Radii that are arrays or trees: one for each group, leaf by leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optclip
from optclip import groupings, sets
from tests.oracles import projections as oracle

MATRICES = groupings.per_matrix()


def tree():
    rng = np.random.default_rng(0)
    up = 5 * rng.standard_normal((3, 4, 2))
    return {"up": jnp.asarray(up, "f"), "head": {"w": jnp.asarray(up[0], "f")}}


SETS = {
    "l2_ball": (lambda r: sets.l2_ball(r, grouping=MATRICES), oracle.l2_ball),
    "norm_sphere": (
        lambda r: sets.norm_sphere(r, grouping=MATRICES),
        oracle.norm_sphere,
    ),
    "l1_ball": (lambda r: sets.l1_ball(r, grouping=MATRICES), oracle.l1_ball),
    "spectral_ball": (
        lambda r: sets.spectral_ball(r, stacked="up"),
        oracle.spectral_ball,
    ),
    "linf_ball": (sets.linf_ball, lambda x, r: oracle.box(x, -r, r)),
}  # fmt: skip
RADII = np.array([0.5, 2.0, 100.0])
SHAPES = {
    "shape of the groups": lambda: RADII,
    "with ones": lambda: RADII.reshape(3, 1, 1),
    "JAX": lambda: jnp.asarray(RADII, jnp.float32),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SETS)
def test_an_array_has_a_radius_for_each_matrix(name, shape):
    make, nearest = SETS[name]
    radii = SHAPES[shape]()
    if name == "linf_ball":  # elements: broadcasts against the leaf, as ever
        radii = radii.reshape(3, 1, 1)
    params = tree()
    constraint = make({"up": radii, "head": 1.5})
    got = jax.jit(lambda p: optclip.project_params(p, constraint))(params)
    for x, radius, y in zip(params["up"], RADII, got["up"], strict=True):
        want = nearest(np.asarray(x, "d"), radius)
        np.testing.assert_allclose(y, want, rtol=2e-5, atol=5e-6)
    want = nearest(np.asarray(params["head"]["w"], "d"), 1.5)
    np.testing.assert_allclose(got["head"]["w"], want, rtol=2e-5, atol=5e-6)


def test_units_by_max_norm_and_jitted_in_half_precision():
    """Never outside, whatever the array's dtype."""
    x = jnp.asarray(tree()["up"][0], jnp.bfloat16)
    limits = np.array([0.3, 7.7])
    before = np.linalg.norm(np.asarray(x).astype("d"), axis=0)
    for radii in (limits, jnp.asarray(limits, jnp.float32)):
        project = jax.jit(
            lambda x, r=radii: optclip.project_params({"w": x}, sets.max_norm(r))["w"]
        )
        got = np.linalg.norm(np.asarray(project(x)).astype("d"), axis=0)
        assert np.all(got <= limits)
        np.testing.assert_allclose(got, np.minimum(before, limits), rtol=4 * 2.0**-7)


def test_traced_radii_are_differentiated_and_intersected():
    x = tree()["up"][0]
    both = sets.intersection(sets.l2_ball({"w": 2.0}), sets.max_norm(np.ones(2)))
    got = jax.jit(lambda x: optclip.project_params({"w": x}, both)["w"])(x)
    assert np.all(np.linalg.norm(got, axis=0) <= 1)

    def norm(radii):
        ball = sets.max_norm({"w": radii})
        onto = optclip.project_params({"w": x}, ball)["w"]
        return jnp.sum(jnp.sqrt(jnp.sum(jnp.square(onto), axis=0)))

    slope = jax.jit(jax.grad(norm))(jnp.array([0.5, 100.0]))
    np.testing.assert_allclose(slope, [1, 0], atol=1e-5)


MISFIT = "radius must have one number a group, got shape"
NONSENSE = {
    "radius at 'up' must be non-negative, got -1.0.": {"up": -1.0, "head": 1.0},
    "radius at 'up/1' must be non-negative, got None.": {"up": [1.0, None]},
    "radius must cover every leaf, got none for 'head/w'": {"up": 1.0},
    f"{MISFIT} (4,) for 'up', whose groups have shape (3, 1, 1).": {
        "up": np.ones(4),
        "head": 1.0,
    },
    f"{MISFIT} (3,) for 'head/w'": np.ones(3),
    "radius must be non-negative, got [ 1. nan].": np.array([1.0, np.nan]),
}


@pytest.mark.parametrize(("says", "radius"), NONSENSE.items())
def test_nonsense(says, radius):
    with pytest.raises(ValueError) as caught:
        optclip.project(sets.l2_ball(radius, grouping=MATRICES)).init(tree())
    assert str(caught.value).startswith(f"l2_ball: {says}")
