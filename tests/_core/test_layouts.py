"""Layouts: a table by hand, real modules of Flax, and what the modules compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from optclip import groupings
from optclip._core import paths as _paths
from optclip._core.layouts import Layout, layout
from tests.untyped import untyped


def spelled(path, shapes, **evidence):
    """The layout as one letter per axis, after checking that it is a layout."""
    found = layout(path, shapes, **evidence)
    rank = len(shapes[path])
    assert sorted(sum(found[:4], ())) == list(range(rank))
    assert all(list(axes) == sorted(axes) for axes in found[:4])
    letters = dict(zip(Layout._fields[:4], "swio", strict=True))
    by_axis = {a: letter for f, letter in letters.items() for a in getattr(found, f)}
    return "".join(by_axis[axis] for axis in range(rank))


def spelled_tree(tree):
    shapes = {path: value.shape for path, value in _paths.leaves(tree)}
    return {path: spelled(path, shapes) for path in shapes}


# Kernel name, its shape and spelling, then the same for its bias ("-": it has none).
PAIRS = """\
fc/kernel         (16,32)           io     (32,)          i
fc/kernel         (256,256)         io     (256,)         i
fc/kernel         (16,32)           io     -
fc/kernel         (6,256,256)       sio    (6,256)        si
fc/kernel         (6,16,32)         sio    (6,32)         si
fc/kernel         (6,16,1)          sio    (6,1)          si
fc/kernel         (6,1,1)           sio    (6,1)          si
fc/kernel         (8,8,8)           sio    (8,8)          si
fc/kernel         (2,6,16,32)       ssio   (2,6,32)       ssi
fc/kernel         (4,4,4,4)         ssio   (4,4,4)        ssi
c/kernel          (6,256,256)       wio    (256,)         i
c/kernel          (256,256,256)     wio    (256,)         i
c/kernel          (3,16,32)         wio    (32,)          i
c/kernel          (3,3,16,32)       wwio   (32,)          i
c/kernel          (3,3,3,16,32)     wwwio  (32,)          i
c/kernel          (3,3,16,32)       wwio   -
c/kernel          (3,3,3,16,32)     wwwio  -
c/kernel          (3,16,32)         wio    -
c/kernel          (3,3,1,32)        wwio   (32,)          i
c/kernel          (3,3,4,32)        wwio   (32,)          i
c/kernel          (6,3,3,16,32)     swwio  (6,32)         si
c/kernel          (3,3,3,16,32)     swwio  (3,32)         si
c/kernel          (6,3,16,32)       swio   (6,32)         si
up/kernel         (3,3,8,4)         wwoi   (8,)           i
up/kernel         (3,3,8,8)         wwio   (8,)           i
local/kernel      (8,8,36,8)        ssio   (8,8,8)        ssi
a/query/kernel    (256,256,256)     ioo    (256,256)      ii
a/query/kernel    (16,4,8)          ioo    (4,8)          ii
a/key/kernel      (16,4,8)          ioo    -
a/value/kernel    (6,16,4,8)        sioo   (6,4,8)        sii
a/value/kernel    (6,16,4,8)        sioo   -
a/query/kernel    (4,4,4,4)         sioo   (4,4,4)        sii
a/query/kernel    (2,6,16,4,8)      ssioo  (2,6,4,8)      ssii
a/query/kernel    (16,32)           io     (32,)          i
a/query/kernel    (6,256,128)       sio    (6,128)        si
a/qkv/kernel      (16,3,4,8)        iooo   (3,4,8)        iii
a/qkv/kernel      (6,16,3,4,8)      siooo  (6,3,4,8)      siii
a/proj/kernel     (16,4,8)          ioo    (4,8)          ii
a/proj/kernel     (6,16,4,8)        sioo   (6,4,8)        sii
a/out/kernel      (4,8,16)          iio    (16,)          i
a/out/kernel      (8,8,8)           iio    (8,)           i
a/out/kernel      (4,8,16)          iio    -
a/out/kernel      (6,4,8,16)        siio   (6,16)         si
a/out/kernel      (4,4,4,4)         siio   (4,4)          si
a/out/kernel      (6,4,8,16)        siio   -
a/out/kernel      (6,32,16)         sio    (6,16)         si
head/out/kernel   (3,3,16,3)        wwio   (3,)           i
head/out/kernel   (16,10)           io     -
many/kernel       (7,16,3,4)        iioo   (3,4)          ii
Dense_0/kernel    (6,16,32)         sio    -
VmapDense_0/kernel (6,16,32)        sio    -
mlp/linear1/kernel (6,16,32)        sio    -
DenseGeneral_0/kernel (16,4,8)      wio    -
Conv_0/kernel     (3,16,32)         wio    -
cell/ii/kernel    (16,32)           io     -
cell/ii/kernel    (6,16,32)         sio    -
cell/if_/kernel   (6,16,32)         sio    -
cell/hf/kernel    (6,32,32)         sio    (6,32)         si
cell/hz/kernel    (6,32,32)         sio    -
cell/dense_h/kernel (6,32,96)       sio    -
cell/ih/kernel    (3,3,4,32)        wwio   (32,)          i
ad/lora_a         (6,16,2)          sio    -
e/embedding       (1000,64)         oi     -
e/embedding       (6,1000,64)       soi    -
pos_embedding     (1,196,768)       soi    -
fc/kernel         (32,)             i      (32,)          i
""".splitlines()


@pytest.mark.parametrize("row", PAIRS)
def test_flax_names(row):
    path, shape, word, *bias = row.split()
    check_pair(path, path.removesuffix("kernel") + "bias", shape, word, bias)


HAIKU = """\
mlp/linear_0/w    (16,32)           io     (32,)          i
mlp/linear_0/w    (6,16,32)         sio    (6,32)         si
mlp/linear_0/w    (6,16,32)         sio    -
conv2_d/w         (3,3,6,5)         wwio   (5,)           i
conv2_d/w         (3,3,6,5)         wwio   (5,1,1)        iii
conv2_d/w         (1,1,6,5)         wwio   (5,1,1)        iii
depthwise_conv2_d/w (3,3,1,4)       wwio   (4,)           i
conv2_d_transpose/w (3,3,8,4)       wwoi   (8,)           i
conv2_d_transpose/w (3,3,8,8)       wwoi   (8,)           i
conv2_d_transpose/w (3,3,8,4)       wwoi   -
embed/embeddings  (1000,64)         oi     -
w                 (16,32)           io     (32,)          i
""".splitlines()


@pytest.mark.parametrize("row", HAIKU)
def test_haiku_names(row):
    path, shape, word, *bias = row.split()
    check_pair(path, path.removesuffix("w") + "b", shape, word, bias)


EQUINOX = """\
layers/0/weight   (32,16)           oi     (32,)          i
layers/0/weight   (256,256)         oi     (256,)         i
layers/0/weight   (32,16)           oi     -
layers/0/weight   (16,32)           io     (32,)          i
layers/0/weight   (6,32,16)         soi    (6,32)         si
layers/0/weight   (2,1,256)         soi    (2,1)          si
conv/weight       (32,16,3)         oiw    (32,1)         ii
conv/weight       (32,16,3,3)       oiww   (32,1,1)       iii
conv/weight       (32,16,1,1)       oiww   (32,1,1)       iii
conv/weight       (32,1,3,3)        oiww   (32,1,1)       iii
conv/weight       (1,16,3,3)        oiww   (1,1,1)        iii
conv/weight       (32,16,3,3)       oiww   -
conv/weight       (6,32,16,3,3)     soiww  (6,32,1,1)     siii
conv/weight       (6,32,16,1,1)     soiww  (6,32,1,1)     siii
conv/weight       (6,32,1,3,3)      soiww  (6,32,1,1)     siii
linear/weight     (6,32,16)         soi    -
embedding/weight  (6,1000,64)       soi    -
patch_embed/weight (32,3,4,4)       oiww   (32,1,1)       iii
query_proj/weight (6,32,16)         soi    -
gru/weight_ih     (96,16)           oi     -
gru/weight_hh     (6,96,32)         soi    -
norm/weight       (32,)             i      (32,)          i
norm/weight       (6,32)            si     (6,32)         si
""".splitlines()


@pytest.mark.parametrize("row", EQUINOX)
def test_equinox_names(row):
    path, shape, word, *bias = row.split()
    check_pair(path, path.removesuffix("weight") + "bias", shape, word, bias)


def check_pair(path, bias_path, shape, word, bias):
    shapes = {"first": (5, 5, 5), path: as_shape(shape)}
    if bias != ["-"]:
        shapes[bias_path] = as_shape(bias[0])
        assert spelled(bias_path, shapes) == bias[1]
    assert spelled(path, shapes) == word


def as_shape(text):
    return tuple(int(size) for size in text.strip("(),").split(",") if size)


@pytest.mark.parametrize(
    ("path", "shapes", "word"),
    [
        ("temperature", {"temperature": ()}, ""),
        ("bias", {"bias": ()}, ""),
        ("bias", {"bias": (), "kernel": (3, 4)}, ""),
        ("anything", {"anything": (7,)}, "i"),
        ("anything", {"anything": (7, 3)}, "io"),
        ("norm/scale", {"norm/scale": (32,), "norm/bias": (32,)}, "i"),
        ("norm/scale", {"norm/scale": (6, 32), "norm/bias": (6, 32)}, "si"),
        ("norm/bias", {"norm/scale": (6, 32), "norm/bias": (6, 32)}, "si"),
        ("norm/bias", {"norm/bias": (6, 32)}, "si"),
        ("norm/scale", {"norm/scale": (2, 6, 32)}, "ssi"),
        ("norm/offset", {"norm/offset": (6, 32), "norm/scale": (6, 32)}, "si"),
        ("norm/gamma", {"norm/gamma": (6, 32), "norm/beta": (6, 32)}, "si"),
        ("norm/beta", {"norm/gamma": (6, 32), "norm/beta": (6, 32)}, "si"),
        ("gru/bias_n", {"gru/bias_n": (6, 32), "gru/bias": (6, 96)}, "si"),
        ("block/layer_scale", {"block/layer_scale": (6, 32)}, "si"),
        # Another module's bias is no evidence.
        ("a/kernel", {"a/kernel": (6, 16, 32), "b/bias": (6, 32)}, "wio"),
        # Neither is a bias that agrees with no layout.
        ("a/kernel", {"a/kernel": (6, 16, 32), "a/bias": (9, 9)}, "wio"),
        ("a/bias", {"a/kernel": (6, 16, 32), "a/bias": (9, 9)}, "ii"),
        ("query/bias", {"query/kernel": (6, 16, 4, 8), "query/bias": (9,)}, "i"),
    ],
)
def test_vectors_and_unknown_names(path, shapes, word):
    assert spelled(path, shapes) == word


@pytest.mark.parametrize(
    ("path", "shape", "stacked", "word"),
    [
        ("c/kernel", (6, 3, 3, 16, 32), True, "swwio"),
        ("c/kernel", (6, 3, 3, 16, 32), False, "wwwio"),
        ("c/kernel", (2, 6, 3, 3, 16, 32), 2, "sswwio"),
        ("fc/kernel", (6, 16, 32), True, "sio"),
        ("Dense_0/kernel", (6, 16, 32), False, "wio"),
        ("a/query/kernel", (6, 16, 32), True, "sio"),
        ("a/query/kernel", (6, 16, 4, 8), True, "sioo"),
        ("a/out/kernel", (6, 4, 8, 16), True, "siio"),
        ("fc/kernel", (6, 16), True, "si"),
        ("fc/weight", (6, 32, 16), True, "soi"),
        ("fc/bias", (6, 32), True, "si"),
        ("fc/bias", (4, 8), False, "ii"),
        ("fc/bias", (6,), True, "s"),
        ("temperature", (), True, ""),
    ],
)
def test_stacked_is_taken_at_its_word(path, shape, stacked, word):
    assert spelled(path, {path: shape}, stacked=stacked) == word


def test_stacked_outranks_the_bias():
    shapes = {"kernel": (6, 256, 256), "bias": (6, 256)}
    assert spelled("kernel", shapes, stacked=True) == "sio"
    assert spelled("kernel", shapes, stacked=False) == "wio"
    assert spelled("bias", shapes, stacked=False) == "ii"


def test_module_type_comes_before_the_name():
    shapes = {"out/kernel": (3, 16, 32)}
    assert spelled("out/kernel", shapes) == "iio"
    assert spelled("out/kernel", shapes, module="Conv") == "wio"
    assert spelled("out/kernel", shapes, module="Linear") == "sio"
    assert spelled("out/kernel", shapes, module="LinearGeneral") == "iio"
    assert spelled("w/weight", {"w/weight": (6, 9, 4)}) == "oiw"
    assert spelled("w/weight", {"w/weight": (6, 9, 4)}, module="Embedding") == "soi"


@pytest.mark.parametrize(
    ("form", "shape", "word"),
    [
        ("w*oi", (3, 3, 8, 4), "wwoi"),
        ("oio", (8, 512, 64), "oio"),
        ("oio", (6, 8, 512, 64), "soio"),
        ("iso", (16, 6, 32), "iso"),
        ("s*io", (2, 6, 16, 32), "ssio"),
        ("i*", (16, 32), "ii"),
    ],
)
def test_forms_decide(form, shape, word):
    forms = {"x/query/kernel": form, "x/query": "o*"}
    assert spelled("x/query/kernel", {"x/query/kernel": shape}, forms=forms) == word


def test_a_form_leaves_the_stack_to_the_bias():
    shapes = {"up/kernel": (6, 3, 3, 8, 8), "up/bias": (6, 8)}
    forms = {"up/kernel": "w*oi"}
    assert spelled("up/kernel", shapes, forms=forms) == "swwoi"
    assert spelled("up/bias", shapes, forms=forms) == "si"


def test_a_form_that_spells_the_stack_needs_no_stacked():
    shapes = {"kernel": (16, 6, 32)}
    assert spelled("kernel", shapes, forms={"kernel": "iso"}, stacked=True) == "iso"
    assert spelled("kernel", shapes, forms={"kernel": "io"}, stacked=True) == "sio"


def test_a_form_for_the_kernel_decides_its_bias():
    shapes = {"x/kernel": (6, 256, 256), "x/bias": (6, 256)}
    assert spelled("x/bias", shapes) == "si"
    assert spelled("x/bias", shapes, forms={"x/kernel": "wio"}) == "ii"


@pytest.mark.parametrize("form", ["io*x", "*io", "", "iooo", "i**o"])
def test_a_form_that_does_not_fit(form):
    with pytest.raises(ValueError, match=r"layouts must.*'up/kernel'.*\(3, 4, 5\)"):
        layout("up/kernel", {"up/kernel": (3, 4, 5)}, forms={"up/kernel": form})


def test_parts_share_the_outputs():
    shape = (3, 3, 16, 32)
    found = layout("c/kernel", {"c/kernel": shape}, forms={"c/kernel": "w*io/8"})
    assert found.parts == 8 and found.fans(shape) == (144, 36)
    with pytest.raises(ValueError, match=r"number of parts.*'io/x'"):
        layout("kernel", {"kernel": (3, 4)}, forms={"kernel": "io/x"})


@pytest.mark.parametrize(
    ("path", "shape", "axes"),
    [
        ("kernel", (16, 32), (0,)),
        ("kernel", (3, 3, 16, 32), (0, 1, 2)),
        ("query/kernel", (16, 4, 8), (0,)),
        ("out/kernel", (4, 8, 16), (0, 1)),
        ("embedding", (1000, 64), (1,)),
        ("Dense_0/kernel", (6, 16, 32), (1,)),
        ("weight", (32, 16), (1,)),
        ("bias", (32,), (0,)),
        ("scale", (6, 32), (1,)),
        ("temperature", (), ()),
        # A vector in disguise is one unit, in each layer of its own.
        ("kernel", (1, 32), (0, 1)),
        ("kernel", (32, 1), (0, 1)),
        ("kernel", (1, 1), (0, 1)),
        ("kernel", (1, 1, 1, 32), (0, 1, 2, 3)),
        ("Dense_0/kernel", (6, 1, 32), (1, 2)),
        ("Dense_0/kernel", (6, 32, 1), (1, 2)),
        ("embedding", (1, 64), (0, 1)),
        ("kernel", (0, 32), (0, 1)),
    ],
)
def test_unit_axes(path, shape, axes):
    assert layout(path, {path: shape}).unit_axes(shape) == axes


@pytest.mark.parametrize(
    ("path", "shape", "fans"),
    [
        ("kernel", (16, 32), (16, 32)),
        ("kernel", (3, 5, 16, 32), (240, 480)),
        ("query/kernel", (16, 4, 8), (16, 32)),
        ("out/kernel", (4, 8, 16), (32, 16)),
        ("Dense_0/kernel", (6, 16, 32), (16, 32)),
        ("weight", (32, 16, 3, 3), (144, 288)),
        ("temperature", (), (1, 1)),
    ],
)
def test_fans(path, shape, fans):
    assert layout(path, {path: shape}).fans(shape) == fans


# Real modules. `linen_params` only traces: no parameter is computed.


def linen_params(module, *inputs):
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)


X, IMAGE = jnp.ones((2, 7, 16)), jnp.ones((1, 9, 9, 4))
DENSE = {"kernel": "io", "bias": "i"}
NORM = {"scale": "i", "bias": "i"}
ATTENTION = {
    **{f"{n}/kernel": "ioo" for n in ("query", "key", "value")},
    **{f"{n}/bias": "ii" for n in ("query", "key", "value")},
    "out/kernel": "iio",
    "out/bias": "i",
}


@pytest.mark.parametrize(
    ("module", "inputs", "words"),
    [
        (nn.Dense(5), X, DENSE),
        (nn.Dense(16), X, DENSE),
        (nn.DenseGeneral((3, 4), axis=(-2, -1)), X, {"kernel": "iioo", "bias": "ii"}),
        (
            nn.DenseGeneral((3, 5), batch_dims=(0,)),
            X,
            {"kernel": "sioo", "bias": "sii"},
        ),
        (nn.Conv(5, (3,)), X, {"kernel": "wio", "bias": "i"}),
        (nn.Conv(5, (3, 3)), IMAGE, {"kernel": "wwio", "bias": "i"}),
        (nn.Conv(5, (3, 3, 3)), IMAGE[None], {"kernel": "wwwio", "bias": "i"}),
        (
            nn.Conv(8, (3, 3), feature_group_count=2),
            IMAGE,
            {"kernel": "wwio", "bias": "i"},
        ),
        (
            nn.Conv(4, (3, 3), feature_group_count=4),
            IMAGE,
            {"kernel": "wwio", "bias": "i"},
        ),
        (nn.Conv(5, (3, 3), use_bias=False), IMAGE, {"kernel": "wwio"}),
        (nn.ConvTranspose(5, (3, 3)), IMAGE, {"kernel": "wwio", "bias": "i"}),
        (
            nn.ConvTranspose(5, (3, 3), transpose_kernel=True),
            IMAGE,
            {"kernel": "wwoi", "bias": "i"},
        ),
        (nn.ConvLocal(5, (3, 3)), IMAGE, {"kernel": "ssio", "bias": "ssi"}),
        (nn.MultiHeadDotProductAttention(2), X, ATTENTION),
        (nn.MultiHeadDotProductAttention(4, qkv_features=16), X, ATTENTION),
        (
            nn.MultiHeadDotProductAttention(2, use_bias=False),
            X,
            {path: word for path, word in ATTENTION.items() if "kernel" in path},
        ),
        (nn.Embed(11, 4), jnp.zeros(3, int), {"embedding": "oi"}),
        (nn.LayerNorm(), X, NORM),
        (nn.BatchNorm(use_running_average=True), X, NORM),
        (nn.RMSNorm(), X, {"scale": "i"}),
        (nn.PReLU(), X, {"negative_slope": ""}),
    ],
)
def test_linen_modules(module, inputs, words):
    params = linen_params(module, inputs)["params"]
    assert spelled_tree(params) == words


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.OptimizedLSTMCell, nn.GRUCell])
def test_linen_recurrent_cells_are_dense(cell):
    for word, vector, module in [
        ("io", "i", nn.RNN(cell(8))),
        ("sio", "si", ensemble(nn.RNN)(cell(8))),
    ]:
        found = spelled_tree(linen_params(module, X)["params"])
        assert len(found) >= 8
        for path, letters in found.items():
            assert letters == (word if path.endswith("kernel") else vector), path


def test_linen_convolutional_lstm():
    images = jnp.ones((1, 2, 9, 9, 4))
    found = spelled_tree(linen_params(nn.RNN(nn.ConvLSTMCell(8, (3, 3))), images))
    kinds = {"kernel": "wwio", "bias": "i"}
    assert found == {
        f"cell/{gate}/{kind}": word
        for gate in ("ih", "hh")
        for kind, word in kinds.items()
    }


class Block(nn.Module):
    """One of everything, scanned over."""

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm(use_bias=self.use_bias)(x)
        y = nn.MultiHeadDotProductAttention(4, use_bias=self.use_bias)(y)
        y = nn.Conv(self.features, (3,), use_bias=True)(y)
        return nn.Dense(self.features, use_bias=self.use_bias)(y), None


STACKED_BLOCK = {
    "LayerNorm_0/scale": "si",
    "LayerNorm_0/bias": "si",
    **{f"MultiHeadDotProductAttention_0/{n}": f"s{w}" for n, w in ATTENTION.items()},
    "Conv_0/kernel": "swio",
    "Conv_0/bias": "si",
    "Dense_0/kernel": "sio",
    "Dense_0/bias": "si",
}


# With 4 layers of 4 features all the sizes of attention are 4 but the head's, 1.
@pytest.mark.parametrize(("layers", "features"), [(6, 16), (16, 16), (4, 4), (1, 8)])
@pytest.mark.parametrize("use_bias", [True, False])
def test_linen_scanned_block(layers, features, use_bias):
    scanned = nn.scan(
        Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=layers
    )
    params = linen_params(
        scanned(features, use_bias), jnp.ones((2, 7, features)), None
    )["params"]
    expected = {
        path: word
        for path, word in STACKED_BLOCK.items()
        if use_bias or "Conv" in path or "bias" not in path
    }
    assert spelled_tree(params) == expected


def ensemble(module, members=3):
    return untyped(nn.vmap)(  # whose in_axes may be None
        module,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=members,
    )


@pytest.mark.parametrize(
    ("module", "inputs", "words"),
    [
        (ensemble(nn.Dense)(5), X, {"kernel": "sio", "bias": "si"}),
        (ensemble(nn.Dense, 2)(1), X, {"kernel": "sio", "bias": "si"}),
        (ensemble(nn.Dense, 16)(16), X, {"kernel": "sio", "bias": "si"}),
        (ensemble(ensemble(nn.Dense), 2)(5), X, {"kernel": "ssio", "bias": "ssi"}),
        (ensemble(nn.Conv)(5, (3, 3)), IMAGE, {"kernel": "swwio", "bias": "si"}),
        (ensemble(nn.Embed)(11, 4), jnp.zeros(3, int), {"embedding": "soi"}),
        (ensemble(nn.LayerNorm)(), X, {"scale": "si", "bias": "si"}),
        (
            ensemble(nn.MultiHeadDotProductAttention)(4),
            X,
            {path: f"s{word}" for path, word in ATTENTION.items()},
        ),
    ],
)
def test_linen_ensembles(module, inputs, words):
    assert spelled_tree(linen_params(module, inputs)) == words


def nnx_params(make):
    return nnx.state(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)


NNX = [
    (lambda rngs: nnx.Linear(16, 5, rngs=rngs), DENSE),
    (
        lambda rngs: nnx.LinearGeneral(16, (3, 4), rngs=rngs),
        {"kernel": "ioo", "bias": "ii"},
    ),
    (lambda rngs: nnx.Conv(4, 5, (3,), rngs=rngs), {"kernel": "wio", "bias": "i"}),
    (lambda rngs: nnx.Conv(4, 5, (3, 3), rngs=rngs), {"kernel": "wwio", "bias": "i"}),
    (
        lambda rngs: nnx.Conv(4, 5, (3, 3, 3), rngs=rngs),
        {"kernel": "wwwio", "bias": "i"},
    ),
    (
        lambda rngs: nnx.Conv(4, 4, (3, 3), feature_group_count=4, rngs=rngs),
        {"kernel": "wwio", "bias": "i"},
    ),
    (
        lambda rngs: nnx.ConvTranspose(4, 5, (3, 3), rngs=rngs),
        {"kernel": "wwio", "bias": "i"},
    ),
    (lambda rngs: nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs), ATTENTION),
    (lambda rngs: nnx.Embed(11, 4, rngs=rngs), {"embedding": "oi"}),
    (lambda rngs: nnx.LayerNorm(16, rngs=rngs), NORM),
    (lambda rngs: nnx.BatchNorm(16, rngs=rngs), NORM),
    (
        lambda rngs: nnx.GRUCell(4, 8, rngs=rngs),
        {"dense_i/kernel": "io", "dense_i/bias": "i", "dense_h/kernel": "io"},
    ),
    (
        lambda rngs: nnx.LSTMCell(4, 8, rngs=rngs),
        {
            **{f"{gate}/kernel": "io" for gate in ("ii", "if_", "ig", "io")},
            **{f"h{gate}/kernel": "io" for gate in "ifgo"},
            **{f"h{gate}/bias": "i" for gate in "ifgo"},
        },
    ),
]


@pytest.mark.parametrize(("make", "words"), NNX)
def test_nnx_modules(make, words):
    assert spelled_tree(nnx_params(make)) == words


@pytest.mark.parametrize("layers", [6, 4])
@pytest.mark.parametrize(("make", "words"), NNX)
def test_nnx_modules_stacked_by_vmap(make, words, layers):
    def make_many(rngs):
        # `Rngs.split` is newer than the oldest release.
        return nnx.split_rngs(splits=layers)(nnx.vmap(make))(rngs)

    expected = {path: f"s{word}" for path, word in words.items()}
    assert spelled_tree(nnx_params(make_many)) == expected


# What a kernel computes says which of its axes are stack or outputs: those whose index
# is an index of the result. All sizes differ, so that the axes can be told apart.


def kept_axes(apply, kernel):
    """The kernel's axes along which each index reaches one index of the result only."""
    reached = np.asarray(jax.jit(jax.jacrev(apply))(kernel)) != 0
    results = reached.ndim - kernel.ndim

    def follows(axis, result):
        others = set(range(reached.ndim)) - {result, results + axis}
        table = reached.any(axis=tuple(others))
        return len(table) > 1 and np.array_equal(table, np.eye(len(table), dtype=bool))

    return {
        axis
        for axis in range(kernel.ndim)
        if any(follows(axis, result) for result in range(results))
    }


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Dense(5), (2, 4)),
        (nn.DenseGeneral((3, 5)), (2, 4)),
        (nn.DenseGeneral(5, axis=(-2, -1)), (2, 3, 4)),
        (nn.Conv(5, (3,)), (1, 7, 4)),
        (nn.Conv(5, (3, 2)), (1, 7, 6, 4)),
        (nn.Conv(10, (3, 2), feature_group_count=2), (1, 7, 6, 4)),
        (nn.Conv(4, (3, 2), feature_group_count=4), (1, 7, 6, 4)),
        (nn.ConvTranspose(5, (3, 2)), (1, 7, 6, 4)),
        (nn.ConvTranspose(5, (3, 2), transpose_kernel=True), (1, 7, 6, 4)),
        (ensemble(nn.Dense, 6)(5), (2, 4)),
        (ensemble(nn.DenseGeneral, 6)((3, 5)), (2, 4)),
        (ensemble(nn.Conv, 8)(5, (3, 2)), (1, 7, 6, 4)),
        (ensemble(ensemble(nn.Dense, 6), 7)(5), (2, 4)),
    ],
)
def test_stack_and_outputs_are_what_is_computed(module, shape):
    x = jnp.ones(shape)
    params = jax.tree.map(
        lambda leaf: jnp.ones(leaf.shape), linen_params(module, x)["params"]
    )
    kept = kept_axes(
        lambda kernel: module.apply({"params": {**params, "kernel": kernel}}, x),
        params["kernel"],
    )
    found = layout("kernel", {name: value.shape for name, value in params.items()})
    assert {*found.stack, *found.outputs} == kept


@pytest.mark.parametrize(
    ("shapes", "axes"),
    [
        ({"w": (4, 5)}, (0, 1)),
        ({"experts/up": (3, 4, 5)}, (1, 2)),
        ({"layers/experts/up": (2, 3, 4, 5)}, (2, 3)),
        ({"conv/kernel": (3, 3, 4, 5)}, (0, 1, 2, 3)),
        ({"any/kernel": (3, 4, 5), "any/bias": (5,)}, (0, 1, 2)),
        ({"any/kernel": (3, 4, 5), "any/bias": (3, 5)}, (1, 2)),
        ({"query/kernel": (8, 2, 4)}, (0, 1, 2)),
        ({"layers/query/kernel": (6, 8, 2, 4)}, (1, 2, 3)),
        ({"out/kernel": (2, 4, 8)}, (0, 1, 2)),
        ({"bias": (3, 5)}, (1,)),
        ({"scale": (5,)}, (0,)),
        ({"temperature": ()}, ()),
    ],
)
def test_a_matrix_is_one_layers_or_experts_kernel(shapes, axes):
    """A stack without names or biases is never joined, as it is in one norm a unit."""
    path, shape = next(iter(shapes.items()))
    assert untyped(groupings.per_matrix()).axes(path, shape, shapes) == axes


def test_what_is_stacked_can_be_said():
    shapes = {"taps": (3, 4, 5), "blocks": (3, 4, 5)}
    for stacked, path, axes in (
        (False, "taps", (0, 1, 2)),
        (2, "taps", (2,)),
        ("blocks", "blocks", (1, 2)),
    ):
        grouping = untyped(groupings.per_matrix(stacked))
        assert grouping.axes(path, shapes[path], shapes) == axes
