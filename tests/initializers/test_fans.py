"""Roles and fans of real layers, against a table by hand from what the layers compute.

fan_in is how many numbers one output adds up, fan_out how many outputs one input
reaches (at stride one), for one layer of a stack, one group and one gate.
"""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

from optclip.initializers import roles_of
from tests.untyped import untyped

X, IMAGE = jnp.ones((2, 7, 16)), jnp.ones((1, 9, 9, 4))


def linen(module, *inputs, **said):
    """Roles and fans; the module is only traced."""
    return roles_of(jax.eval_shape(module.init, jax.random.key(0), *inputs), **said)


def of_nnx(make, **said):
    return roles_of(nnx.eval_shape(lambda: make(nnx.Rngs(0))), **said)


def ensemble(module, members=3):
    return untyped(nn.vmap)(  # whose in_axes may be None
        module,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=members,
    )


ATTENTION = {
    "query/kernel": ("query", 16, 16),
    "key/kernel": ("key", 16, 16),
    "value/kernel": ("value", 16, 16),
    "out/kernel": ("attention_out", 16, 16),
    "query/bias": ("query_bias", None, None),
    "out/bias": ("attention_out_bias", None, None),
}
LSTM = {
    **{f"cell/i{gate}/kernel": ("recurrent_input", 16, 8) for gate in "igo"},
    **{f"cell/h{gate}/kernel": ("recurrent", 8, 8) for gate in "ifgo"},
    "cell/hf/bias": ("forget_bias", None, None),
    "cell/hg/bias": ("recurrent_bias", None, None),
}
LINEN = [
    (nn.Dense(5), X, {"kernel": ("kernel", 16, 5), "bias": ("bias", None, None)}),
    (nn.DenseGeneral((3, 4), axis=(-2, -1)), X, {"kernel": ("kernel", 112, 12)}),
    (nn.Conv(5, (3,)), X, {"kernel": ("conv", 48, 15)}),
    (nn.Conv(5, (3, 3)), IMAGE, {"kernel": ("conv", 36, 45)}),
    (nn.Conv(5, (2, 3)), IMAGE, {"kernel": ("conv", 24, 30)}),
    (nn.ConvTranspose(5, (3, 3)), IMAGE, {"kernel": ("conv", 36, 45)}),
    (
        nn.ConvTranspose(5, (3, 3), transpose_kernel=True),
        IMAGE,
        {"kernel": ("conv", 36, 45)},
    ),
    (nn.MultiHeadDotProductAttention(4), X, ATTENTION),
    (nn.Embed(11, 5), jnp.zeros(3, int), {"embedding": ("embedding", 5, 11)}),
    (
        nn.LayerNorm(),
        X,
        {"scale": ("scale", None, None), "bias": ("shift", None, None)},
    ),
    (nn.RNN(nn.LSTMCell(8)), X, LSTM),
    (nn.RNN(nn.OptimizedLSTMCell(8)), X, LSTM),
    (
        nn.RNN(nn.GRUCell(8)),
        X,
        {
            "cell/ir/kernel": ("recurrent_input", 16, 8),
            "cell/hn/kernel": ("recurrent", 8, 8),
            "cell/hn/bias": ("recurrent_bias", None, None),
        },
    ),
    (
        nn.RNN(nn.SimpleCell(8)),
        X,
        {
            "cell/i/kernel": ("recurrent_input", 16, 8),
            "cell/h/kernel": ("recurrent", 8, 8),
        },
    ),
    (
        nn.RNN(nn.ConvLSTMCell(8, (3, 3))),
        jnp.ones((1, 2, 9, 9, 4)),
        {
            "cell/ih/kernel": ("recurrent_input", 36, 72),
            "cell/hh/kernel": ("recurrent", 72, 72),
        },
    ),
    (ensemble(nn.Dense)(5), X, {"kernel": ("kernel", 16, 5)}),
    (ensemble(ensemble(nn.Dense))(5), X, {"kernel": ("kernel", 16, 5)}),
    (ensemble(nn.Conv)(5, (3, 3)), IMAGE, {"kernel": ("conv", 36, 45)}),
    (ensemble(nn.MultiHeadDotProductAttention)(4), X, ATTENTION),
    (
        ensemble(nn.Embed)(11, 5),
        jnp.zeros(3, int),
        {"embedding": ("embedding", 5, 11)},
    ),
    (nn.PReLU(), X, {}),
]


@pytest.mark.parametrize(("module", "inputs", "expected"), LINEN)
def test_linen(module, inputs, expected):
    rules = {} if expected else {"": "scale"}
    found = linen(module, inputs, rules=rules)
    for path, role in expected.items():
        assert found[path] == role, path


NNX = [
    (lambda rngs: nnx.Linear(16, 5, rngs=rngs), {"kernel": ("kernel", 16, 5)}),
    (
        lambda rngs: nnx.LinearGeneral((3, 4), (5, 6), axis=(-2, -1), rngs=rngs),
        {"kernel": ("kernel", 12, 30)},
    ),
    (lambda rngs: nnx.Conv(4, 5, (3, 3), rngs=rngs), {"kernel": ("conv", 36, 45)}),
    # Groups are known here: an input reaches the outputs of its own group.
    (
        lambda rngs: nnx.Conv(8, 16, (3, 3), feature_group_count=4, rngs=rngs),
        {"kernel": ("conv", 18, 36)},
    ),
    (
        lambda rngs: nnx.Conv(8, 16, (3, 3), feature_group_count=8, rngs=rngs),
        {"kernel": ("conv", 9, 18)},
    ),
    # A kernel with equal sizes, whose bias tells nothing.
    (
        lambda rngs: nnx.ConvTranspose(
            5, 5, (5, 3), transpose_kernel=True, use_bias=False, rngs=rngs
        ),
        {"kernel": ("conv", 75, 75)},
    ),
    (
        lambda rngs: nnx.ConvTranspose(4, 6, (3,), transpose_kernel=True, rngs=rngs),
        {"kernel": ("conv", 12, 18)},
    ),
    (
        lambda rngs: nnx.Einsum("btd,ndh->btnh", (4, 16, 5), rngs=rngs),
        {"kernel": ("kernel", 16, 20)},
    ),
    (
        lambda rngs: nnx.Einsum("btnh,nhd->btd", (4, 5, 16), (16,), rngs=rngs),
        {"kernel": ("kernel", 20, 16), "bias": ("bias", None, None)},
    ),
    (
        lambda rngs: nnx.Einsum("bnd,ndh->bnh", (4, 16, 5), rngs=rngs),
        {"kernel": ("kernel", 16, 5)},
    ),
    (
        lambda rngs: nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs),
        ATTENTION,
    ),
    (
        lambda rngs: nnx.Embed(11, 5, rngs=rngs),
        {"embedding": ("embedding", 5, 11)},
    ),
    (
        lambda rngs: nnx.LSTMCell(16, 8, rngs=rngs),
        {path.removeprefix("cell/"): role for path, role in LSTM.items()},
    ),
    # Four gates side by side in one kernel.
    (
        lambda rngs: nnx.OptimizedLSTMCell(16, 8, rngs=rngs),
        {
            "dense_i/kernel": ("recurrent_input", 16, 8),
            "dense_h/kernel": ("recurrent", 8, 8),
            "dense_h/bias": ("recurrent_bias", None, None),
        },
    ),
    (
        lambda rngs: nnx.GRUCell(16, 8, rngs=rngs),
        {
            "dense_i/kernel": ("recurrent_input", 16, 8),
            "dense_h/kernel": ("recurrent", 8, 8),
        },
    ),
    (
        lambda rngs: nnx.LoRALinear(16, 5, lora_rank=2, rngs=rngs),
        {"kernel": ("kernel", 16, 5), "lora/lora_a": (None, 16, 2)},
    ),
]


@pytest.mark.parametrize(("make", "expected"), NNX)
def test_nnx(make, expected):
    found = of_nnx(make)
    for path, role in expected.items():
        assert found[path] == role, path


def test_nnx_stacked_blocks():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs)
            self.mlp = nnx.Linear(16, 5, use_bias=False, rngs=rngs)

    @nnx.split_rngs(splits=6)
    @nnx.vmap
    def stack(rngs):
        return Block(rngs)

    found = of_nnx(stack)
    for path, role in ATTENTION.items():
        assert found[f"attention/{path}"] == role, path
    assert found["mlp/kernel"] == ("kernel", 16, 5)


class TwoNorms(nn.Module):
    """A residual branch of convolutions and norms."""

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.Conv(4, (3, 3))(x)
            x = nn.BatchNorm(use_running_average=True)(x)
        return x


class Small(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3))(x))
        return nn.Dense(3, name="head")(TwoNorms()(x).mean((1, 2)))


def test_the_last_norm_of_a_block_is_told_apart():
    found = {path: role.role for path, role in linen(Small(), IMAGE).items()}
    assert found["TwoNorms_0/BatchNorm_1/scale"] == "residual_scale"
    assert found["TwoNorms_0/BatchNorm_0/scale"] == "scale"
    assert found["BatchNorm_0/scale"] == "scale"
    assert found["head/kernel"] == "head"
    assert found["head/bias"] == "head_bias"


# Path, shapes of its kin by name, role.
NAMES = """\
head/kernel            (16,10)                                head
lm_head/kernel         (16,10)                                head
layer/c_proj/kernel    (16,10)                                residual_out
mlp/down_proj/kernel   (16,10)                                residual_out
mlp/fc1/kernel         (16,10)                                kernel
actor/kernel           (16,4)                                 policy_head
pi/kernel              (16,4)                                 policy_head
critic/kernel          (16,1)                                 value_head
value/kernel           (16,1)                                 value_head
value/kernel           (16,4)                                 kernel
out/kernel             (16,4)                                 kernel
embed/pos_embedding    (1,9,16)                               position
wpe/embedding          (9,16)                                 position
wte/embedding          (90,16)                                embedding
cls_token              (1,1,16)                               token
linear/w               (16,10)                                kernel
linear/b               (10,)                                  bias
norm/gamma             (16,)                                  scale
layers/0/weight        (10,16)                                kernel
norm/weight            (16,)                                  scale
w1                     (16,10)                                kernel
temperature            ()                                     None
lora_b                 (2,10)                                 None
layer_scale            (16,)                                  None
""".splitlines()


@pytest.mark.parametrize("row", NAMES)
def test_names(row):
    path, shape, role = row.split()
    sizes = tuple(int(size) for size in shape.strip("(),").split(",") if size)
    tree = {path: jnp.ones(sizes), "other/kernel": jnp.ones((3, 3))}
    assert str(roles_of(tree)[path].role) == role


def test_attention_is_known_by_its_query():
    tree = {"query/kernel": jnp.ones((16, 4, 4)), "proj/kernel": jnp.ones((16, 16))}
    assert roles_of(tree)["proj/kernel"].role == "attention_out"
    tree = {"qkv/kernel": jnp.ones((16, 48)), "proj/bias": jnp.ones(16)}
    tree["proj/kernel"] = jnp.ones((16, 16))
    found = roles_of(tree)
    assert found["qkv/kernel"].role == "qkv"
    assert found["proj/bias"].role == "attention_out_bias"


def test_rules_and_layouts_decide():
    tree = {"up/kernel": jnp.ones((3, 3, 8, 8)), "up/bias": jnp.ones(8)}
    found = roles_of(tree, rules={"up/kernel": "head"}, layouts={"up": "w*io/4"})
    assert found["up/kernel"] == ("head", 72, 18)
    assert roles_of(tree, rules={"bias": None})["up/bias"].role is None
    found = roles_of({"a/kernel": jnp.ones((6, 8, 4))}, stacked="^a/")
    assert found["a/kernel"] == ("kernel", 8, 4)
    found = roles_of({"Einsum_0/kernel": jnp.ones((6, 8, 4))})
    assert found["Einsum_0/kernel"] == ("kernel", None, None)


@pytest.mark.parametrize(
    ("kernel", "bias", "fans"),
    [
        ((4, 16, 5), (4, 5), (16, 20)),  # btd,ndh->btnh
        ((4, 5, 16), (16,), (20, 16)),  # btnh,nhd->btd
        ((16, 4, 5), (4, 5), (16, 20)),  # btd,dnh->btnh
        ((16, 5), (5,), (16, 5)),
        ((3, 4, 5), (7,), (None, None)),
    ],
)
def test_an_einsum_without_its_equation_is_told_by_its_bias(kernel, bias, fans):
    tree = {"Einsum_0/kernel": jnp.ones(kernel), "Einsum_0/bias": jnp.ones(bias)}
    assert roles_of(tree)["Einsum_0/kernel"] == ("kernel", *fans)
