"""Every preset's law on every layout: mean, variance, whole distribution, bounds."""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from optclip import initializers
from optclip.initializers import (
    Preset,
    delta_orthogonal,
    dirac,
    flax_default,
    gain,
    he_normal,
    he_uniform,
    identity,
    keras_default,
    lecun_normal,
    lecun_uniform,
    normal,
    orthogonal,
    redraw,
    sparse,
    torch_default,
    truncated_normal,
    uniform,
    xavier_normal,
    xavier_uniform,
    zeros,
)

# Kernel, its shape, its bias's; then by hand what one output adds up and one input
# reaches, in one layer of a stack, one group, one gate. Many are the same kernels in
# another arrangement, which compile once.
LAYERS = {
    "dense/kernel": ((96, 160), (160,), 96, 160),
    "a/query/kernel": ((96, 4, 40), (4, 40), 96, 160),
    "a/out/kernel": ((4, 24, 160), (160,), 96, 160),
    "Einsum_0/kernel": ((4, 96, 40), None, 96, 160),
    "stacked/kernel": ((4, 96, 160), (4, 160), 96, 160),
    "stack/a/query/kernel": ((4, 96, 5, 32), (4, 5, 32), 96, 160),
    "dense_i/kernel": ((96, 640), None, 96, 160),
    "dense_h/kernel": ((160, 640), (640,), 160, 160),
    "conv/kernel": ((3, 3, 32, 48), (48,), 288, 432),
    "up/kernel": ((3, 3, 48, 32), (48,), 288, 432),
    "convs/kernel": ((4, 3, 3, 32, 48), (4, 48), 288, 432),
    "grouped/kernel": ((3, 3, 32, 192), (192,), 288, 432),
    "depthwise/kernel": ((3, 3, 1, 1024), (1024,), 9, 9),
}
LAYOUTS = {
    "Einsum": "oio",
    "grouped": "w*io/4",
    "depthwise": "w*io/1024",
}
EMBEDDINGS = {
    "e/embedding": (300, 64),
    "pos_embedding": (1, 300, 64),
    "wte": (300, 64),
    "wpe": (300, 64),
    "cls_token": (1, 1, 64),
}
TREE = {
    **{path: shape for path, (shape, *_) in LAYERS.items()},
    **{
        path.replace("kernel", "bias"): bias
        for path, (_, bias, *_) in LAYERS.items()
        if bias
    },
    **EMBEDDINGS,
}


@functools.cache
def drawn(preset, path):
    """One parameter of the tree, drawn once for all tests of a preset."""
    tree = {p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in TREE.items()}
    others = {f"^(?!{path}$)": None}
    key = jax.random.key(7)
    new = redraw(tree, preset, key, rules=others, layouts=LAYOUTS)
    return np.asarray(new[path], np.float64)


def check_law(values, law):
    """Mean and variance within five standard errors, and the whole distribution."""
    values, count = values.ravel(), values.size
    mean, variance, kurtosis = (float(x) for x in law.stats("mvk"))
    assert abs(values.mean() - mean) < 5 * math.sqrt(variance / count)
    spread = variance * math.sqrt((kurtosis + 2) / count)
    assert abs(values.var() - variance) < 5 * spread
    low, high = law.support()
    rounding = 1e-6 * math.sqrt(variance)
    assert low - rounding <= values.min() and values.max() <= high + rounding
    assert stats.kstest(values, law.cdf).pvalue > 1e-4


def of_normal(variance):
    return stats.norm(scale=math.sqrt(variance))


def of_uniform(variance):
    bound = math.sqrt(3 * variance)
    return stats.uniform(-bound, 2 * bound)


def of_truncated(variance):
    parent = math.sqrt(variance / stats.truncnorm(-2, 2).var())
    return stats.truncnorm(-2, 2, scale=parent)


# Preset -> its kernels' law from the fans.
SCALING = {
    xavier_uniform(): lambda i, o: of_uniform(2 / (i + o)),
    xavier_uniform(gain("tanh")): lambda i, o: of_uniform((5 / 3) ** 2 * 2 / (i + o)),
    xavier_normal(): lambda i, o: of_normal(2 / (i + o)),
    he_uniform(): lambda i, o: of_uniform(2 / i),
    he_uniform(a=math.sqrt(5)): lambda i, o: of_uniform(1 / (3 * i)),
    he_normal(): lambda i, o: of_normal(2 / i),
    he_normal(jnp.tanh, "fan_out"): lambda i, o: of_normal(1.59253742**2 / o),
    he_normal("linear", mode="fan_avg"): lambda i, o: of_normal(2 / (i + o)),
    lecun_uniform(): lambda i, o: of_uniform(1 / i),
    lecun_normal(): lambda i, o: of_truncated(1 / i),
}


@pytest.mark.parametrize("path", LAYERS)
@pytest.mark.parametrize("preset", SCALING, ids=repr)
def test_scaling_presets_are_right_on_every_layout(preset, path):
    _, _, fan_in, fan_out = LAYERS[path]
    check_law(drawn(preset, path), SCALING[preset](fan_in, fan_out))


@pytest.mark.parametrize("preset", SCALING, ids=repr)
def test_embeddings_have_rows_of_unit_length_and_biases_are_zero(preset):
    for path in EMBEDDINGS:
        check_law(drawn(preset, path), of_normal(1 / 64))
    for path in TREE:
        assert not path.endswith("bias") or not drawn(preset, path).any()


ANY_SHAPE = {
    normal(0.02): of_normal(0.02**2),
    uniform(0.5): stats.uniform(0, 0.5),
    truncated_normal(0.02): of_truncated(0.02**2),
    truncated_normal(0.02, corrected=False): stats.truncnorm(-2, 2, scale=0.02),
}


@pytest.mark.parametrize("path", ["dense/kernel", "a/query/kernel", "e/embedding"])
@pytest.mark.parametrize("preset", ANY_SHAPE, ids=repr)
def test_laws_that_read_no_fans(preset, path):
    check_law(drawn(preset, path), ANY_SHAPE[preset])


def test_truncation_is_corrected_and_bounded():
    values = drawn(truncated_normal(0.02), "dense/kernel")
    assert values.std() == pytest.approx(0.02, rel=0.02)
    assert 0.0440 < abs(values).max() <= 0.02 * 2.2739
    raw = drawn(truncated_normal(0.02, corrected=False), "dense/kernel")
    assert raw.std() == pytest.approx(0.02 * 0.8796, rel=0.02)
    assert 0.0388 < abs(raw).max() <= 0.04


# The letter of each axis, by hand; a window counts as inputs.
MATRICES = {
    "dense/kernel": "io",
    "a/query/kernel": "ioo",
    "a/out/kernel": "iio",
    "Einsum_0/kernel": "oio",
    "stacked/kernel": "sio",
    "stack/a/query/kernel": "sioo",
    "conv/kernel": "iiio",
    "up/kernel": "iioi",
    "convs/kernel": "siiio",
}


def plain(path, values):
    """A parameter's kernels as matrices (inputs, outputs), one by one."""
    letters = MATRICES[path]
    axes = sorted(range(values.ndim), key=lambda axis: "sio".index(letters[axis]))
    sizes = dict.fromkeys("sio", 1)
    for letter, size in zip(letters, values.shape, strict=True):
        sizes[letter] *= size
    return values.transpose(axes).reshape(*sizes.values())


ORTHOGONAL = orthogonal(2.0)


@pytest.mark.parametrize("path", MATRICES)
def test_orthogonal_on_every_layout(path):
    for matrix in plain(path, drawn(ORTHOGONAL, path)):
        wide = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
        product = wide.T @ wide
        np.testing.assert_allclose(product, 4 * np.eye(len(product)), atol=2e-5)


def test_orthogonal_gates_are_orthogonal_each():
    for gate in np.split(drawn(ORTHOGONAL, "dense_h/kernel"), 4, axis=1):
        np.testing.assert_allclose(gate.T @ gate, 4 * np.eye(160), atol=2e-5)


def test_orthogonal_is_uniform_over_orthogonal_matrices():
    # Without the signs of R half of the matrices would be missing.
    keys = jax.random.split(jax.random.key(0), 4000)
    small = jax.vmap(lambda key: orthogonal()(key, (2, 2)))(keys)
    angle = np.arctan2(small[:, 1, 0], small[:, 0, 0])
    assert stats.kstest(angle, stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue > 1e-4
    determinant = np.linalg.det(small)
    assert abs((determinant > 0).mean() - 0.5) < 5 * 0.5 / math.sqrt(4000)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_orthogonal_in_half_precision_is_drawn_in_float32(dtype):
    key = jax.random.key(0)
    half = orthogonal()(key, (32, 16), dtype)
    assert half.dtype == dtype
    np.testing.assert_array_equal(half, orthogonal()(key, (32, 16)).astype(dtype))


def test_delta_orthogonal():
    kernel = np.asarray(delta_orthogonal(2.0)(jax.random.key(0), (3, 5, 16, 24))).copy()
    centre = kernel[1, 2]
    np.testing.assert_allclose(centre @ centre.T, 4 * np.eye(16), atol=2e-5)
    kernel[1, 2] = 0
    assert not kernel.any()
    dense = np.asarray(delta_orthogonal()(jax.random.key(0), (24, 16)))
    np.testing.assert_allclose(dense.T @ dense, np.eye(16), atol=2e-5)


def test_identity_hands_inputs_on():
    x = jnp.arange(12.0).reshape(1, 4, 3)
    kernel = dirac()(jax.random.key(0), (3, 3, 3))
    same = jax.lax.conv_general_dilated(
        x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    np.testing.assert_array_equal(same, x)
    np.testing.assert_array_equal(
        identity(2.0)(jax.random.key(0), (2, 2)), 2 * np.eye(2)
    )
    query = {"query/kernel": jnp.ones((6, 2, 3)), "query/bias": jnp.ones((2, 3))}
    query = redraw(query, identity(), jax.random.key(0))
    np.testing.assert_array_equal(
        jnp.einsum("i,ihd->hd", jnp.arange(6.0), query["query/kernel"]),
        np.arange(6.0).reshape(2, 3),
    )


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5])
def test_dirac_has_its_ones_where_pytorch_has_them(window):
    kernel = dirac()(jax.random.key(0), (window, 2, 2))
    assert np.argwhere(kernel).tolist() == [[window // 2, 0, 0], [window // 2, 1, 1]]


def test_dirac_hands_on_each_group():
    kernel = {"c/kernel": jnp.ones((3, 2, 4)), "c/bias": jnp.ones(4)}
    kernel = redraw(kernel, dirac(), jax.random.key(0), layouts={"c/": "wio/2"})
    x = jnp.arange(20.0).reshape(1, 5, 4)
    same = jax.lax.conv_general_dilated(
        x,
        kernel["c/kernel"],
        (1,),
        "SAME",
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=2,
    )
    np.testing.assert_array_equal(same, x)


SPARSE = sparse(0.9, 0.1)


@pytest.mark.parametrize("path", ["dense/kernel", "conv/kernel", "a/query/kernel"])
def test_sparse_silences_the_same_number_of_inputs_of_every_output(path):
    values = plain(path, drawn(SPARSE, path))[0]
    silent = (values == 0).sum(0)
    assert (silent == math.ceil(0.9 * len(values))).all()
    check_law(values[values != 0], of_normal(0.01))
    # Which of them differs from output to output.
    assert len({tuple(np.flatnonzero(column)) for column in values.T}) > 1


def test_complex_truncated_normal():
    for corrected in (True, False):
        preset = truncated_normal(0.02, corrected)
        values = np.asarray(preset(jax.random.key(0), (200, 200), jnp.complex64))
        assert values.dtype == np.complex64
        within = 0.02 / np.sqrt(1 - 4 * np.exp(-4) / (1 - np.exp(-4)))
        scale = within if corrected else 0.02
        assert abs(values).max() <= 2 * scale * (1 + 1e-6)
        # Squared, a modulus is exponential until it is cut; every angle is as likely.
        cut = stats.truncexpon(4, scale=scale**2)
        assert stats.kstest(abs(values.ravel()) ** 2, cut.cdf).pvalue > 1e-4
        uniform = stats.uniform(-np.pi, 2 * np.pi)
        assert stats.kstest(np.angle(values.ravel()), uniform.cdf).pvalue > 1e-4
        if corrected:
            assert np.sqrt((abs(values) ** 2).mean()) == pytest.approx(0.02, rel=0.01)


def test_sparse_at_its_ends():
    key = jax.random.key(0)
    assert not sparse(1.0)(key, (8, 4)).any()
    assert sparse(0.0)(key, (8, 4)).all()
    # 0.9 · 10 is 9.000000000000002 in floating point, and nine it is.
    assert ((sparse(0.9)(key, (10, 4)) == 0).sum(0) == 9).all()
    # 0.07 times 100 is 7.000000000000001.
    assert ((sparse(0.07)(key, (100, 4)) == 0).sum(0) == 7).all()


def test_zeros():
    for path in ("dense/kernel", "e/embedding", "dense/bias"):
        assert not drawn(zeros(), path).any()


def test_torch_default_draws_biases_by_their_kernels_fan_in():
    preset = torch_default()
    for path, bound in {
        "dense/bias": 1 / math.sqrt(96),
        "stacked/bias": 1 / math.sqrt(96),
        "conv/bias": 1 / math.sqrt(288),
        "depthwise/bias": 1 / 3,
        "dense_h/bias": 1 / math.sqrt(160),
        "dense_i/kernel": 1 / math.sqrt(160),
    }.items():
        check_law(drawn(preset, path), of_uniform(bound**2 / 3))
    for path in ("a/query/bias", "a/out/bias", "stack/a/query/bias"):
        assert not drawn(preset, path).any()
    check_law(drawn(preset, "e/embedding"), of_normal(1.0))


def test_framework_defaults():
    flax, keras = flax_default(), keras_default()
    check_law(drawn(flax, "a/query/kernel"), of_truncated(1 / 96))
    check_law(drawn(keras, "a/query/kernel"), of_uniform(2 / (96 + 160)))
    check_law(drawn(keras, "e/embedding"), stats.uniform(-0.05, 0.1))
    for preset in (flax, keras):
        gate = drawn(preset, "dense_h/kernel")[:, :160]
        np.testing.assert_allclose(gate.T @ gate, np.eye(160), atol=1e-5)


def test_every_preset_of_the_namespace_is_drawn_here_or_in_the_recipes():
    public = {getattr(initializers, name): name for name in initializers.__all__}
    factories = {
        name
        for value, name in public.items()
        if inspect.isfunction(value)
        and inspect.signature(value, eval_str=True).return_annotation is Preset
    }
    here = {repr(preset).partition("(")[0] for preset in (*SCALING, *ANY_SHAPE)}
    here |= {"zeros", "sparse", "identity", "dirac", "orthogonal", "delta_orthogonal"}
    here |= {"torch_default", "flax_default", "keras_default"}
    recipes = {"gpt2", "vit", "resnet", "dcgan", "ppo", "mup", "zero_last"}
    assert factories == here | recipes


def test_a_wrong_law_is_found():
    with pytest.raises(AssertionError):
        check_law(drawn(he_normal(), "dense/kernel"), of_normal(2.2 / 96))
    with pytest.raises(AssertionError):
        check_law(drawn(he_normal(), "dense/kernel"), of_uniform(2 / 96))
