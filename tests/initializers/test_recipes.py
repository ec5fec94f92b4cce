"""Whole-model presets, measured layer by layer against their formulas."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from optclip._core import paths as _paths
from optclip.initializers import (
    Preset,
    dcgan,
    gpt2,
    he_normal,
    mup,
    ppo,
    redraw,
    resnet,
    torch_default,
    vit,
    zero_last,
)

from .models import LAYERS, TEXT, WIDTH, NnxTransformer, Transformer

KEY = jax.random.key(0)


def leaves(tree):
    return {str(path): np.asarray(value) for path, value in _paths.leaves(tree)}


@pytest.fixture(scope="module")
def linen():
    shapes = jax.eval_shape(Transformer().init, KEY, TEXT)
    return leaves(redraw(shapes, gpt2(LAYERS), KEY))


@pytest.fixture(scope="module")
def in_nnx():
    model = NnxTransformer(nnx.Rngs(0))
    redraw(model, gpt2(LAYERS), KEY)
    return leaves(nnx.state(model, nnx.Param))


def expected(path):
    """GPT-2's deviation, by hand; None for a constant."""
    if path.endswith(("out/kernel", "c_proj/kernel")):
        return 0.02 / math.sqrt(2 * LAYERS)
    return 0.02 if path.endswith(("kernel", "embedding")) else None


@pytest.mark.parametrize("model", ["linen", "in_nnx"])
def test_gpt2_layer_by_layer(model, request):
    new = request.getfixturevalue(model)
    kernels = 0
    for path, value in new.items():
        stddev = expected(path)
        if stddev is None:
            np.testing.assert_array_equal(value, float(path.endswith("scale")), path)
            continue
        # Each layer of a stack by itself: its deviation, and its own numbers.
        layers = value if path.startswith("blocks") else value[None]
        assert len(layers) == (LAYERS if path.startswith("blocks") else 1)
        for layer in layers:
            error = 5 * stddev / math.sqrt(2 * layer.size)
            assert abs(layer.std() - stddev) < error, path
            assert abs(layer.mean()) < 5 * stddev / math.sqrt(layer.size), path
            kernels += 1
        assert len(np.unique(layers)) > 0.99 * layers.size
    assert kernels == 6 * LAYERS + 2


def test_gpt2_draws_the_same_in_both_apis(linen, in_nnx):
    assert linen.keys() == in_nnx.keys()
    for path in linen:
        np.testing.assert_array_equal(linen[path], in_nnx[path], path)


def test_the_redrawn_transformer_runs(linen):
    model = NnxTransformer(nnx.Rngs(0))
    redraw(model, gpt2(LAYERS), KEY)
    logits = model(TEXT)
    # Tied logits of a normalized stream: deviation 0.02 √width.
    assert float(logits.std()) == pytest.approx(0.02 * math.sqrt(WIDTH), rel=0.2)


def kernel(path, *shape, bias=True):
    holder = path.removesuffix("kernel")
    out = {path: jnp.ones(shape)}
    return out | ({f"{holder}bias": jnp.ones(shape[-1])} if bias else {})


def drawn(preset, tree, **said):
    return leaves(redraw(tree, preset, KEY, **said))


def test_vit():
    tree = kernel("patch/kernel", 4, 4, 3, 64) | kernel("head/kernel", 64, 10)
    tree |= kernel("fc1/kernel", 64, 256) | {"query/kernel": jnp.ones((64, 4, 16))}
    tree |= {"query/bias": jnp.ones((4, 16)), "cls": jnp.ones((1, 1, 64))}
    tree |= {"pos_embedding": jnp.ones((1, 17, 64))}
    new = drawn(vit(), tree)
    assert not new["head/kernel"].any() and not new["head/bias"].any()
    assert not new["cls"].any() and not new["query/bias"].any()
    assert new["pos_embedding"].std() == pytest.approx(0.02, rel=0.1)
    assert new["patch/kernel"].std() == pytest.approx(48**-0.5, rel=0.05)
    bound = math.sqrt(6 / (64 + 256))
    assert 0.95 * bound < abs(new["fc1/kernel"]).max() <= bound
    assert 0.95 < abs(new["query/kernel"]).max() / math.sqrt(6 / 128) <= 1
    assert 3e-7 < new["fc1/bias"].std() < 3e-6


RESNET = (
    kernel("stem/kernel", 7, 7, 3, 64, bias=False)
    | {"bn_init/scale": jnp.ones(64), "bn_init/bias": jnp.ones(64)}
    | {f"block/BatchNorm_{i}/{n}": jnp.zeros(64) for i in "012"
       for n in ("scale", "bias")}
    | kernel("block/Conv_0/kernel", 3, 3, 64, 64, bias=False)
    | kernel("Dense_0/kernel", 64, 10)
)  # fmt: skip


@pytest.mark.parametrize("zero", [False, True])
def test_resnet(zero):
    new = drawn(resnet(zero_init_last=zero), RESNET)
    assert new["stem/kernel"].std() == pytest.approx((2 / 3136) ** 0.5, rel=0.05)
    fan_out = 9 * 64
    assert new["block/Conv_0/kernel"].std() == pytest.approx(
        (2 / fan_out) ** 0.5, rel=0.05
    )
    assert 0 < abs(new["Dense_0/bias"]).max() <= 1 / 8
    scales = [new[f"block/BatchNorm_{i}/scale"].max() for i in range(3)]
    assert scales == [1, 1, 0 if zero else 1]
    assert new["bn_init/scale"].min() == 1 and not new["bn_init/bias"].any()


def test_dcgan():
    tree = kernel("up/kernel", 4, 4, 64, 32) | {"norm/scale": jnp.zeros(4096)}
    new = drawn(dcgan(), tree)
    assert new["up/kernel"].std() == pytest.approx(0.02, rel=0.05)
    assert new["norm/scale"].mean() == pytest.approx(1, abs=0.002)
    assert new["norm/scale"].std() == pytest.approx(0.02, rel=0.1)


def test_ppo():
    tree = kernel("torso/kernel", 8, 64) | kernel("actor/Dense_2/kernel", 64, 4)
    tree |= kernel("critic/kernel", 64, 1)
    new = drawn(ppo(), tree, rules={"actor/Dense_2/kernel": "policy_head"})
    gains = {"torso": math.sqrt(2), "actor/Dense_2": 0.01, "critic": 1.0}
    for layer, gain in gains.items():
        values = np.linalg.svd(new[f"{layer}/kernel"], compute_uv=False)
        np.testing.assert_allclose(values, gain, rtol=1e-5)
        assert not new[f"{layer}/bias"].any()


@pytest.mark.parametrize("width", [64, 256])
def test_mup(width):
    tree = kernel("fc/kernel", width, width) | kernel("head/kernel", width, 50)
    tree |= {"wte/embedding": jnp.ones((300, width))}
    new = drawn(mup(64), tree)
    assert new["fc/kernel"].std() == pytest.approx(width**-0.5, rel=0.05)
    # At the base width a kernel like the others, and from there 1/width.
    assert new["head/kernel"].std() == pytest.approx(8 / width, rel=0.06)
    assert new["wte/embedding"].std() == pytest.approx(1 / 8, rel=0.05)


def test_zero_last():
    tree = kernel("fc1/kernel", 64, 64) | kernel("fc2/kernel", 64, 64)
    tree |= kernel("head/kernel", 64, 10)
    new = drawn(zero_last(torch_default()), tree)
    assert not any(new[p].any() for p in new if not p.startswith("fc1"))
    assert new["fc1/kernel"].any() and new["fc1/bias"].any()
    model = NnxTransformer(nnx.Rngs(0))
    redraw(model, zero_last(), KEY)
    # Blocks are the identity: what goes in comes out.
    x = model.token(TEXT) + model.position(jnp.arange(TEXT.shape[1]))[None]
    chex.assert_trees_all_equal(model(TEXT), model.token.attend(model.norm(x)))


def test_presets_are_joined():
    joined = he_normal() | zero_last()
    assert isinstance(joined, Preset) and repr(joined) == "he_normal() | zero_last()"
    assert not joined["policy_head"](KEY, (3, 3), jnp.float32).any()


@pytest.mark.parametrize("preset", [zero_last(), mup(8)], ids=repr)
def test_the_heads_of_an_actor_critic_are_heads(preset):
    tree = kernel("torso/kernel", 8, 64) | kernel("actor/kernel", 64, 4)
    tree |= kernel("critic/kernel", 64, 1)
    new = drawn(preset, tree)
    assert new["torso/kernel"].any()
    heads = np.concatenate([new["actor/kernel"], new["critic/kernel"]], axis=1)
    # Of mup √8 / 64, and of zero_last 0.
    most = 0.06 if preset == mup(8) else 0.0
    assert heads.std() <= most and (most == 0 or heads.std() > most / 2)
