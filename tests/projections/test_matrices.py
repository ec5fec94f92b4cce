"""Sets of matrices: which matrices, how near their sets, and what is not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optclip
from optclip import sets

EPS = 2.0**-23


@pytest.mark.parametrize("iterations", [None, 40])
def test_convolutions_and_stacked_layers_are_matrices(iterations):
    rng = np.random.default_rng(0)
    params = {
        "conv": {"kernel": 5 * rng.standard_normal((3, 3, 2, 4)), "bias": np.ones(4)},
        "stack": {"kernel": 5 * rng.normal(size=(2, 3, 6)), "bias": np.ones((2, 6))},
        "small": {"kernel": 0.01 * rng.standard_normal((2, 3)), "bias": np.zeros(3)},
    }  # fmt: skip
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    got = optclip.project_params(params, sets.spectral_ball(1.0, iterations=iterations))
    matrices = (got["conv"]["kernel"].reshape(18, 4), *got["stack"]["kernel"])
    for matrix in matrices:
        np.testing.assert_allclose(np.linalg.norm(matrix, 2), 1, atol=1e-4)
    assert np.linalg.norm(got["stack"]["bias"][1]) == pytest.approx(1, abs=1e-5)
    if iterations is None:
        assert np.all(got["small"]["kernel"] == params["small"]["kernel"])
    assert np.all(got["small"]["bias"] == 0)


@pytest.mark.parametrize("steps", [8, 12, 16, 24])
@pytest.mark.parametrize("largest", [1.05, 2.0, 10.0])
def test_the_stated_error_of_newton_schulz(largest, steps):
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.standard_normal((48, 32)))
    v, _ = np.linalg.qr(rng.standard_normal((32, 32)))
    w = jnp.asarray((u * np.geomspace(0.01, largest, 32)) @ v.T, jnp.float32)
    tree = {"kernel": w}
    products = optclip.project_params(tree, sets.spectral_ball(1.0, iterations=steps))
    exact = optclip.project_params(tree, sets.spectral_ball(1.0))
    s = np.linalg.svd(np.asarray(w, np.float64), compute_uv=False)
    stated = np.sqrt(np.sum((s**2 - 1) ** 2)) * 1.875**-steps / 4
    off = np.asarray(products["kernel"] - exact["kernel"], np.float64)
    assert np.linalg.norm(off, 2) <= stated + 1e-5 * largest


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def project(matrix, constraint):
    return optclip.project_params({"kernel": matrix}, constraint)["kernel"]


def singular_values(matrix):
    return np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)


@pytest.mark.parametrize(
    ("shape", "radius"),
    [
        ((8, 8), 0.3),
        ((8, 3), 1.0),
        ((64, 64), 1.0),
        ((16, 64), 0.7),
        ((256, 256), 1.0),
        ((1024, 1024), 1.0),
    ],
)
def test_never_outside_a_spectral_ball(shape, radius):
    """By the exact norm; at most 12 + 6√n ulp inside; projected again, it stays."""
    constraint = sets.spectral_ball(radius)
    found = project(normal(shape), constraint)
    over = (singular_values(found)[0] / float(np.float32(radius)) - 1) / EPS
    assert -(12 + 6 * np.sqrt(max(shape))) <= over <= 0
    np.testing.assert_array_equal(project(found, constraint), found)


@pytest.mark.parametrize(
    ("shape", "ulp"), [((8, 8), 4), ((64, 64), 4), ((256, 256), 4), ((512, 128), 5)]
)
def test_orthogonal_to_a_few_ulp(shape, ulp):
    found = project(normal(shape), sets.orthogonal())
    assert np.max(np.abs(singular_values(found) - 1)) <= ulp * EPS


def test_orthogonal_of_a_rank_deficient_matrix():
    found = project(jnp.ones((4, 4)), sets.orthogonal())
    np.testing.assert_allclose(singular_values(found), [1, 0, 0, 0], atol=4 * EPS)


MATRICES = pytest.mark.parametrize("iterations", [None, 24], ids=["svd", "products"])
MAKERS = pytest.mark.parametrize("make", [sets.spectral_ball, sets.orthogonal])


@MATRICES
@MAKERS
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_matrix_that_is_not_finite_is_nan_and_others_are_not(make, iterations, bad):
    """An infinity in a decomposition never returns."""
    params = {"kernel": normal((2, 5, 3)), "bias": normal((2, 3))}
    params["kernel"] = params["kernel"].at[0, 1, 1].set(bad)
    found = optclip.project_params(params, make(iterations=iterations))
    assert np.all(np.isnan(found["kernel"][0]))
    assert np.all(np.isfinite(found["kernel"][1])) and np.any(found["kernel"][1] != 0)
    column = project(jnp.array([[bad], [1.0], [0.0], [2.0]]), make())
    assert np.all(np.isnan(column))


@MATRICES
@pytest.mark.parametrize("size", [1e20, 1e30, 3e38])
def test_matrices_of_huge_numbers(iterations, size):
    """Finite in, finite and bounded out."""
    for make in (sets.spectral_ball, sets.orthogonal):
        found = project(size * jnp.eye(3), make(iterations=iterations))
        np.testing.assert_allclose(found, np.eye(3), atol=3e-6)
    small = project(size * jnp.eye(3), sets.spectral_ball(1e-20, iterations=iterations))
    np.testing.assert_allclose(small, 1e-20 * np.eye(3), rtol=3e-6)
    w = size / 100 * normal((16, 16))
    found = project(w, sets.spectral_ball(iterations=iterations))
    np.testing.assert_allclose(singular_values(found)[0], 1, atol=1e-5)
    u, _, vt = np.linalg.svd(np.asarray(w, np.float64))
    np.testing.assert_allclose(found, u @ vt, atol=1e-3)


def test_the_derivative_beside_a_matrix_that_is_not_finite():
    params = {"kernel": normal((2, 3, 3)).at[0, 0, 0].set(jnp.inf)}
    params["bias"] = jnp.zeros((2, 3))

    def loss(params):
        found = optclip.project_params(params, sets.spectral_ball(1.0))
        return jnp.sum(found["kernel"][1] ** 2)

    assert np.all(np.isfinite(jax.grad(loss)(params)["kernel"]))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("side", [1, 2, 8, 32])
def test_half_precision_leaves_room_for_its_rounding(side, dtype):
    """Rounding the elements moves the largest singular value as well."""
    for seed in range(5):
        matrix = normal((side, side), seed).astype(dtype) * 2
        largest = singular_values(project(matrix, sets.spectral_ball(1.0)))[0]
        assert largest <= 1


def test_orthogonal_contains_what_it_gives():
    """A bias of zeros has no direction and stays; so does a matrix of rank one."""
    params = {"kernel": jnp.eye(2), "bias": jnp.zeros(2), "ones": jnp.ones((3, 3))}
    params = optclip.project_params(params, sets.orthogonal())
    optclip.project_params(params, sets.orthogonal(), strict=True)
    with pytest.raises(ValueError, match="must lie in their set"):
        optclip.project_params({"k": jnp.eye(2) / 2}, sets.orthogonal(), strict=True)
