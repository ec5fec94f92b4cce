"""A finished model drawn anew: keys, both Flax APIs, what stays, and bad input."""

import hashlib
import pickle
import re
import subprocess
import sys
from typing import NamedTuple

import chex
import flax.core
import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from optclip._core import paths as _paths
from optclip.initializers import (
    delta_orthogonal,
    dirac,
    gain,
    gpt2,
    he_normal,
    he_uniform,
    identity,
    lecun_normal,
    linen,
    mup,
    normal,
    orthogonal,
    ppo,
    redraw,
    resnet,
    roles_of,
    sparse,
    torch_default,
    truncated_normal,
    uniform,
    xavier_normal,
    xavier_uniform,
    zero_last,
    zeros,
)
from optclip.initializers import nnx as nnx_door
from tests.untyped import untyped

KEY = jax.random.key(3)


def leaves(tree):
    return {str(path): value for path, value in _paths.leaves(tree)}


class Linen(nn.Module):
    """The same paths and shapes as `Nnx`."""

    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(16, name="fc", kernel_init=self.kernel_init)(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.MultiHeadDotProductAttention(4, name="attention")(x)


class Nnx(nnx.Module):
    def __init__(self, rngs, dtype=jnp.float32):
        self.fc = nnx.Linear(8, 16, param_dtype=dtype, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            4, 16, decode=False, dropout_rate=0.1, rngs=rngs
        )
        self.adapter = nnx.LoRA(8, 2, 8, rngs=rngs)


X = jnp.ones((2, 3, 8))


@pytest.fixture(scope="module")
def variables():
    return Linen().init(KEY, X)


def test_linen_and_nnx_draw_the_same_numbers(variables):
    new = leaves(redraw(variables, torch_default(), KEY)["params"])
    model = Nnx(nnx.Rngs(0))
    assert redraw(model, torch_default(), KEY) is None
    own = leaves(nnx.state(model, nnx.Param))
    for path, value in new.items():
        np.testing.assert_array_equal(own[path], value, err_msg=path)
    assert own["fc/kernel"].std() > 0.1


def test_another_layer_changes_no_other(variables):
    new = redraw(variables["params"], he_normal(), KEY)
    more = {**variables["params"], "extra": {"kernel": jnp.ones((3, 3))}}
    more = redraw(more, he_normal(), KEY)
    chex.assert_trees_all_equal({n: more[n] for n in new}, new)


def test_paths_and_keys_draw_apart():
    tree = {name: {"kernel": jnp.ones((8, 8))} for name in "ab"}
    one, two = (redraw(tree, he_normal(), jax.random.key(k)) for k in (0, 1))
    drawn = [t[name]["kernel"] for t in (one, two) for name in "ab"]
    assert len({leaf.tobytes() for leaf in map(np.asarray, drawn)}) == 4
    chex.assert_trees_all_equal(one, redraw(tree, he_normal(), jax.random.PRNGKey(0)))


def test_the_numbers_of_a_path_do_not_change_between_releases():
    # Whoever resumes from a seed relies on them.
    (value,) = redraw({"fc/kernel": jnp.ones((1, 1))}, normal(1.0), KEY).values()
    assert float(value[0, 0]) == pytest.approx(-0.63500, abs=1e-4)


def test_each_layer_of_a_stack_draws_by_its_number():
    tree = {"kernel": jnp.ones((3, 8, 6)), "bias": jnp.ones((3, 6))}
    new = redraw(tree, he_normal(), KEY)["kernel"]
    digest, key = hashlib.blake2b(b"kernel", digest_size=8).digest(), KEY
    for half in (digest[:4], digest[4:]):
        key = jax.random.fold_in(key, int.from_bytes(half, "big"))
    for i, layer in enumerate(new):
        expected = he_normal()(jax.random.fold_in(key, i), (8, 6))
        np.testing.assert_allclose(layer, expected, rtol=1e-6)


def test_what_is_no_parameter_stays(variables):
    moved = jax.tree.map(lambda x: x + 1, variables)
    new = redraw(moved, he_normal(), KEY)
    assert new.keys() == moved.keys()
    chex.assert_trees_all_equal(new["batch_stats"], moved["batch_stats"])
    assert float(new["params"]["norm"]["scale"][0]) == 1

    model = Nnx(nnx.Rngs(0))
    before = leaves(nnx.state(model, nnx.Not(nnx.Param)))
    adapter = np.asarray(model.adapter.lora_a[...])
    count = np.asarray(before["attention/rngs/count"])
    redraw(model, he_normal(), KEY)
    after = leaves(nnx.state(model, nnx.Not(nnx.Param)))
    assert after.keys() == before.keys()
    np.testing.assert_array_equal(after["norm/mean"], before["norm/mean"])
    np.testing.assert_array_equal(after["attention/rngs/count"], count)
    np.testing.assert_array_equal(model.adapter.lora_a[...], adapter)


def test_a_whole_nnx_state_is_a_tree():
    model = Nnx(nnx.Rngs(0))
    state = nnx.state(model)
    new = redraw(state, zeros(), KEY)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert not leaves(new)["fc/kernel"].any()
    np.testing.assert_array_equal(leaves(new)["norm/var"], np.ones(16))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes_are_kept_and_half_precision_is_rounded(dtype):
    tree = {"kernel": jnp.ones((16, 8), dtype), "steps": jnp.ones((3, 3), int)}
    new = redraw(tree, orthogonal(), KEY)
    exact = redraw({"kernel": jnp.ones((16, 8))}, orthogonal(), KEY)["kernel"]
    assert new["kernel"].dtype == dtype
    np.testing.assert_array_equal(new["kernel"], exact.astype(dtype))
    assert new["steps"] is tree["steps"]
    model = Nnx(nnx.Rngs(0), dtype)
    redraw(model, he_normal(), KEY)
    assert model.fc.kernel[...].dtype == dtype


def test_float64_is_drawn_in_float64():
    with jax.enable_x64(True):
        new = redraw({"kernel": jnp.ones((4, 4), jnp.float64)}, normal(1.0), KEY)
        assert new["kernel"].dtype == jnp.float64
        values = np.asarray(new["kernel"])
        assert (values != values.astype(np.float32)).any()


def test_containers_and_boxes_are_kept(variables):
    frozen = flax.core.freeze(variables)
    new = redraw(frozen, he_normal(), KEY)
    assert isinstance(new, flax.core.FrozenDict)
    chex.assert_trees_all_equal(
        flax.core.unfreeze(new), redraw(variables, he_normal(), KEY)
    )
    boxed = nn.with_partitioning(nn.initializers.ones, ("in", "out"))
    params = Linen(boxed).init(KEY, X)["params"]
    drawn = redraw(params, he_normal(), KEY)["fc"]["kernel"]
    assert isinstance(drawn, nn.Partitioned) and drawn.names == ("in", "out")
    bare = redraw(nn.meta.unbox(params), he_normal(), KEY)["fc"]["kernel"]
    np.testing.assert_array_equal(drawn.value, bare)


def test_metadata_of_variables_is_kept():
    model = nnx.Linear(8, 16, rngs=nnx.Rngs(0))
    model.kernel = nnx.Param(jnp.ones((8, 16)), note="mine")
    redraw(model, he_normal(), KEY)
    assert model.kernel.note == "mine"
    assert model.kernel[...].std() > 0.1


@pytest.fixture(scope="module")
def mesh():
    if len(jax.devices("cpu")) < 8:
        pytest.skip("needs eight host devices")
    return jax.sharding.Mesh(np.array(jax.devices("cpu")).reshape(8), ("model",))


def test_shardings_are_kept(mesh):
    split = NamedSharding(mesh, PartitionSpec(None, "model"))
    tree = {"kernel": jax.device_put(jnp.ones((16, 32)), split)}
    new = redraw(tree, he_normal(), KEY)["kernel"]
    assert new.sharding == split
    alone = redraw({"kernel": jnp.ones((16, 32))}, he_normal(), KEY)["kernel"]
    np.testing.assert_allclose(new, alone, rtol=1e-6)
    # A tree of shapes, for a model too large to draw before it is placed.
    shape = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=split)
    assert redraw({"kernel": shape}, he_normal(), KEY)["kernel"].sharding == split
    one = jax.device_put(jnp.ones((4, 4)), jax.devices("cpu")[3])
    assert redraw({"kernel": one}, zeros(), KEY)["kernel"].devices() == one.devices()


def test_explicit_shardings_are_kept_under_jit(mesh):
    explicit = jax.sharding.Mesh(
        mesh.devices, ("model",), axis_types=(jax.sharding.AxisType.Explicit,)
    )
    split = NamedSharding(explicit, PartitionSpec(None, "model"))
    tree = {"kernel": jax.device_put(jnp.ones((16, 32)), split)}
    with jax.set_mesh(explicit):
        new = jax.jit(lambda t: redraw(t, normal(1.0), KEY))(tree)["kernel"]
    assert new.sharding.spec == split.spec


def test_under_jit_and_eval_shape(variables):
    eager = redraw(variables, torch_default(), KEY)
    jitted = jax.jit(lambda v, k: redraw(v, torch_default(), k))(variables, KEY)
    chex.assert_trees_all_close(jitted, eager, rtol=1e-6)
    shapes = jax.eval_shape(lambda k: redraw(variables, he_normal(), k), KEY)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, variables)
    chex.assert_trees_all_equal(
        redraw(jax.eval_shape(lambda: variables["params"]), torch_default(), KEY),
        eager["params"],
    )

    @nnx.jit
    def again(model):
        redraw(model, torch_default(), KEY)

    model = Nnx(nnx.Rngs(0))
    again(model)
    kernel = eager["params"]["fc"]["kernel"]
    np.testing.assert_allclose(model.fc.kernel[...], kernel, rtol=1e-6)


def test_equinox_and_plain_trees():
    eqx = pytest.importorskip("equinox")
    mlp = eqx.nn.MLP(4, 3, 64, 1, key=KEY)
    new = redraw(mlp, torch_default(), KEY)
    assert new.activation is mlp.activation
    weight, bias = new.layers[1].weight, new.layers[1].bias
    assert weight.shape == (3, 64) and 0.1 < abs(weight).max() <= 1 / 8
    assert 0 < abs(bias).max() <= 1 / 8
    plain = redraw({"w1": jnp.ones((4, 9)), "b1": jnp.ones(9)}, torch_default(), KEY)
    assert 0.3 < abs(plain["b1"]).max() <= 1 / 2
    assert jax.tree.structure(new) == jax.tree.structure(mlp)


def test_rules():
    tree = {n: {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)} for n in "abcd"}
    half = jax.nn.initializers.constant(0.5)
    # The first that is found counts.
    rules = {"a/": None, "b/kernel": "head", "c/": zeros(), "d/": half, "": half}
    preset = he_normal() | {"head": normal(3.0)["kernel"]}
    new = redraw(tree, preset, KEY, rules=rules)
    chex.assert_trees_all_equal(new["a"], tree["a"])
    assert new["b"]["kernel"].std() == pytest.approx(3, rel=0.1)
    assert (new["b"]["bias"] == 0.5).all()
    assert not new["c"]["kernel"].any()
    assert (new["d"]["kernel"] == 0.5).all() and (new["d"]["bias"] == 0.5).all()


def test_a_jax_initializer_alone_is_for_kernels():
    tree = {"query/kernel": jnp.ones((64, 4, 16)), "query/bias": jnp.ones((4, 16))}
    new = redraw(tree, jax.nn.initializers.he_normal(), KEY)
    assert new["query/kernel"].std() == pytest.approx((2 / 64) ** 0.5, rel=0.1)
    assert not new["query/bias"].any()


def test_empty_parameters_are_left_empty():
    tree = {"a/kernel": jnp.ones((0, 3)), "b/kernel": jnp.ones((2, 3))}
    assert redraw(tree, orthogonal(), KEY)["a/kernel"].shape == (0, 3)


def test_importing_optclip_imports_no_flax():
    program = "import sys, optclip; sys.exit('flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_parameters_that_spell_alike_are_told_apart_by_their_place():
    def layer(size):
        return {"kernel": jnp.ones((size, 8)), "bias": jnp.ones(8)}

    flat = {f"a/{name}": value for name, value in layer(4).items()}
    tree = {**flat, "a": layer(25), "b": layer(4)}
    new = redraw(tree, torch_default(), KEY)
    # Each bias has its own kernel's fan-in.
    assert 0.25 < abs(new["a/bias"]).max() <= 0.5 and abs(new["a"]["bias"]).max() <= 0.2
    key = "['a']['kernel']"
    found = roles_of(tree)
    assert found[key].fan_in == 25 and found["['a/kernel']"].fan_in == 4
    assert len(found) == 6
    # Another layer, whose name is its own, draws as before.
    np.testing.assert_array_equal(
        new["b"]["kernel"], redraw({"b": layer(4)}, torch_default(), KEY)["b"]["kernel"]
    )
    ranks = {"a/kernel": jnp.ones((4, 8)), "a": {"kernel": jnp.ones((3, 3, 5, 8))}}
    assert {role.fan_in for role in roles_of(ranks).values()} == {4, 45}
    # Rules match the spelled path.
    kept = redraw(tree, torch_default(), KEY, rules={"^a/kernel": None})
    assert (kept["a/kernel"] == 1).all() and (kept["a"]["kernel"] == 1).all()


def test_equal_parameters_that_spell_alike_draw_different_numbers():
    kernel = jnp.ones((8, 8))
    for tree in (
        {"a/kernel": kernel, "a": {"kernel": kernel}},
        {"params": {"w": kernel}, "w": kernel},
    ):
        drawn = [
            np.asarray(leaf) for leaf in jax.tree.leaves(redraw(tree, normal(), KEY))
        ]
        assert len({leaf.tobytes() for leaf in drawn} | {kernel.tobytes()}) > len(drawn)


def test_a_field_named_value_keeps_its_name():
    class Attention(NamedTuple):
        query: jax.Array
        value: jax.Array

    found = roles_of({"kernel": Attention(*(jnp.ones((4, 4)) for _ in range(2)))},
                     rules={"query$|value$": "kernel"})  # fmt: skip
    assert set(found) == {"kernel/query", "kernel/value"}


# Layers that are being built.


def test_linen_layers():
    layer = linen.layer
    dense = untyped(nn.Dense(4, **layer(xavier_uniform(), "head")))
    assert abs(dense.init(KEY, X)["params"]["kernel"]).max() <= (6 / 12) ** 0.5
    attention = nn.MultiHeadDotProductAttention(2, **layer(gpt2(8), "attention"))
    params = untyped(attention).init(KEY, X, X)["params"]
    assert params["out"]["kernel"].std() == pytest.approx(0.005, rel=0.3)
    assert params["query"]["kernel"].std() == pytest.approx(0.02, rel=0.3)
    embedding = nn.Embed(200, 64, **layer(he_normal(), "embedding"))
    table = untyped(embedding).init(KEY, jnp.zeros(1, int))["params"]["embedding"]
    assert table.std() == pytest.approx(1 / 8, rel=0.05)
    norm = untyped(nn.LayerNorm(**layer(zero_last(), "norm")))
    norm = norm.init(KEY, X)["params"]
    assert (norm["scale"] == 1).all()
    cell = nn.RNN(nn.LSTMCell(8, **layer(torch_default(), "cell", fan_in=8)))
    for value in jax.tree.leaves(cell.init(KEY, X)):
        assert 0 < abs(value).max() <= 8**-0.5


def test_nnx_layers():
    layer, rngs = nnx_door.layer, nnx.Rngs(0)
    linear = untyped(nnx.Linear(64, 4, **layer(torch_default(), fan_in=64), rngs=rngs))
    assert 0.01 < abs(linear.bias[...]).max() <= 1 / 8
    words = "btd,ndh->btnh"
    einsum = nnx.Einsum(
        words, (4, 64, 32), **layer(he_normal(), layout="oio"), rngs=rngs
    )
    assert einsum.kernel[...].std() == pytest.approx((2 / 64) ** 0.5, rel=0.1)
    assert nnx.Conv(3, 8, (3,), kernel_init=he_normal(), rngs=rngs).kernel[...].any()


def test_the_kernel_of_a_preset_is_a_jax_initializer():
    assert isinstance(hash(nn.Dense(3, kernel_init=he_normal())), int)
    dense = untyped(nn.Dense(64, kernel_init=he_normal()))
    kernel = dense.init(KEY, X)["params"]["kernel"]
    np.testing.assert_array_equal(
        nnx.Linear(8, 64, kernel_init=he_normal(), rngs=nnx.Rngs(0)).kernel.shape,
        kernel.shape,
    )


def test_presets_are_parts():
    assert repr(he_normal()) == "he_normal()"
    assert repr(gpt2(12, stddev=0.1)) == "gpt2(12, stddev=0.1)"
    assert he_normal() == he_normal() != he_normal("tanh")
    assert hash(he_normal()) == hash(he_normal())
    joined = he_normal() | {"head": zeros()}
    assert repr(joined) == "he_normal() | {'head': zeros()}"
    assert joined == he_normal() | {"head": zeros()} != he_normal() | {"bias": zeros()}
    assert joined != he_normal() and hash(joined) == hash(joined | {})
    for preset in (joined, zero_last(torch_default()), ppo(0.1) | zero_last()):
        again = pickle.loads(pickle.dumps(preset))
        assert again == preset and repr(again) == repr(preset)
        drawn = [p["head"](KEY, (4, 3), jnp.float32) for p in (preset, again)]
        np.testing.assert_array_equal(drawn[0], drawn[1])


# Bad input.

DENSE = {"fc/kernel": jnp.ones((4, 3)), "fc/bias": jnp.ones(3)}


def bad(call, *words):
    with pytest.raises(ValueError) as error:
        call()
    for word in words:
        assert word in str(error.value), error.value


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: xavier_uniform(-1.0), ["xavier_uniform: gain", "-1.0"]),
        (lambda: xavier_normal(float("nan")), ["xavier_normal: gain", "nan"]),
        (lambda: orthogonal(True), ["orthogonal: gain", "True"]),
        (
            lambda: untyped(delta_orthogonal)("relu"),
            ["delta_orthogonal: gain", "'relu'"],
        ),
        (lambda: ppo(value_gain=-2.0), ["ppo: value_gain", "-2.0"]),
        (lambda: normal(-0.02), ["normal: stddev", "-0.02"]),
        (lambda: uniform(-1), ["uniform: scale", "-1"]),
        (lambda: truncated_normal(-1.0), ["truncated_normal: stddev", "-1.0"]),
        (lambda: sparse(1.5), ["sparse: sparsity", "[0, 1]", "1.5"]),
        (lambda: sparse(0.5, -1.0), ["sparse: stddev", "-1.0"]),
        (lambda: gpt2(0), ["gpt2: num_layers", "0"]),
        (lambda: untyped(gpt2)(2.0), ["gpt2: num_layers", "2.0"]),
        (lambda: mup(-1), ["mup: base_width", "-1"]),
        (lambda: untyped(resnet)("yes"), ["resnet: zero_init_last", "'yes'"]),
        (lambda: untyped(zero_last)(3), ["zero_last: preset", "3"]),
        (
            lambda: untyped(he_uniform)(mode="fan"),
            ["he_uniform: mode", "'fan_in'", "'fan'"],
        ),
        (lambda: he_normal("rellu"), ["activation", "'relu'", "'rellu'"]),
        (lambda: untyped(he_normal)(a="0.1"), ["he_normal: a", "'0.1'"]),
        (lambda: gain("tahn"), ["gain: activation", "'tanh'", "'tahn'"]),
        (lambda: gain(jnp.sum), ["gain: activation", "elementwise", "()"]),
        (lambda: gain(jnp.zeros_like), ["gain: activation", "0.0"]),
        (lambda: gain("relu", negative_slope=0.1), ["gain: negative_slope", "relu"]),
        (lambda: he_normal()["kernl"], ["he_normal(): role", "'kernel'", "'kernl'"]),
        (lambda: he_normal() | {"haed": zeros()}, ["role", "'head'", "'haed'"]),
        (lambda: he_normal()(KEY, (3,)), ["he_normal: shape", "(3,)", "fans"]),
        (lambda: sparse(0.5)(KEY, (3,)), ["sparse: shape", "(3,)"]),
        (
            lambda: delta_orthogonal()(KEY, (3, 8, 4)),
            ["delta_orthogonal: shape", "inputs than outputs", "(3, 8, 4)"],
        ),
        (
            lambda: torch_default()["bias"](KEY, (3,), jnp.float32),
            ["torch_default: fan_in", "(3,)", "redraw"],
        ),
        (
            lambda: nn.Dense(3, **linen.layer(torch_default())).init(KEY, X),
            ["torch_default: fan_in", "redraw"],
        ),
        (
            lambda: nnx_door.layer(he_normal(), "attenton"),
            ["layer: role", "'attention'", "'attenton'"],
        ),
        (
            lambda: nnx_door.layer(he_normal(), fan_in=0),
            ["layer: fan_in", "0"],
        ),
        (
            lambda: linen.layer(he_normal(), layout="io/x"),
            ["layer: layouts", "'io/x'"],
        ),
    ],
)  # fmt: skip
def test_bad_presets(call, words):
    bad(call, *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("he_norml",), ["redraw: preset", "'he_normal'", "'he_norml'"]),
        ((he_normal,), ["redraw: preset", "call", "'he_normal'"]),
        ((3,), ["redraw: preset", "3"]),
        ((he_normal(), 0), ["redraw: key", "0"]),
        ((he_normal(), KEY, {"x": None}), ["rules", "'x'", "fc/kernel"]),
        ((he_normal(), KEY, {"fc": "kernl"}), ["role", "'kernel'", "'kernl'"]),
        ((he_normal(), KEY, {"fc": 3}), ["redraw: rules", "3"]),
        ((he_normal(), KEY, {"": None}), ["redraw: some parameter must have a role"]),
        (
            (he_normal(), KEY, {"bias": "kernel"}),
            ["redraw: cannot draw 'fc/bias'", "rules['bias']", "he_normal: shape"],
        ),
        ((he_normal(), KEY, {}, {"y": "io"}), ["layouts", "'y'", "fc/kernel"]),
        ((he_normal(), KEY, {}, {"fc": "iox"}), ["'iox'", "fc/kernel", "(4, 3)"]),
        ((he_normal(), KEY, {}, {"fc": "io/2"}), ["parts", "2", "(4, 3)"]),
        ((he_normal(), KEY, {}, {"fc": "io/-2"}), ["layouts", "'io/-2'"]),
        ((he_normal(), KEY, {}, {}, "z"), ["stacked", "'z'", "fc/kernel"]),
        ((gpt2(2),), ["redraw: the model", "gpt2(2)", "residual_out", "rules"]),
        ((ppo(),), ["redraw: the model", "ppo()", "policy_head", "rules"]),
        ((mup(64),), ["redraw: the model", "mup(64)", "head", "rules"]),
        ((resnet(True),), ["redraw: the model", "resnet(True)", "residual_scale"]),
        ((zero_last(),), ["redraw: the model", "zero_last()", "head or residual_out"]),
    ],
)
def test_bad_redraws(arguments, words):
    preset, key, *more = (*arguments, KEY)[: max(2, len(arguments))]
    names = dict(zip(("rules", "layouts", "stacked"), more, strict=False))
    bad(lambda: untyped(redraw)(DENSE, preset, key, **names), *words)


def test_explain_says_what_each_parameter_got(capsys):
    tree = {
        "bias": jnp.ones(64),
        "embedding": {"embedding": jnp.ones((50, 16), jnp.bfloat16)},
        "frozen": {"kernel": jnp.array([[3.0, 5.0]])},
        "head": {"kernel": jax.ShapeDtypeStruct((64, 4), jnp.float32)},
        "kernel": jnp.ones((64, 64)),
        "lora_a": jnp.ones(()),
        "mine": {"kernel": jnp.ones((64, 2))},
        "theirs": {"kernel": jnp.ones((64, 2))},
    }
    rules = {
        "frozen": None,
        "theirs": jax.nn.initializers.he_normal(),
        "mine": lambda key, shape, dtype: jnp.full(shape, 2, dtype),
    }
    preset = torch_default() | {"head": zeros()}
    quiet = redraw(tree, preset, KEY, rules=rules)
    assert capsys.readouterr().out == ""
    new = redraw(tree, preset, KEY, rules=rules, explain=True)
    chex.assert_trees_all_equal(quiet, new)
    lines = [re.split(r" {2,}", line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["path", "role", "shape", "law", "std"]
    found = {path: tuple(rest) for path, *rest in lines[1:]}

    def std(path):
        return f"{np.std(np.asarray(new[path], np.float32)):.3g}"

    assert found == {
        "bias": ("bias", "64", "uniform", std("bias")),
        "embedding/embedding": ("embedding", "50 × 16", "normal", found[EMBED][3]),
        "frozen/kernel": ("kernel", "1 × 2", "kept", "1"),
        "head/kernel": ("head", "64 × 4", "zeros", "0"),
        "kernel": ("kernel", "64 × 64", "uniform", std("kernel")),
        "lora_a": ("–", "scalar", "kept", "0"),
        "mine/kernel": ("kernel", "64 × 2", "<lambda>", "0"),
        "theirs/kernel": ("kernel", "64 × 2", "variance_scaling", found[THEIRS][3]),
    }
    assert float(found[EMBED][3]) == pytest.approx(1, rel=0.1)
    assert float(found[THEIRS][3]) == pytest.approx((2 / 64) ** 0.5, rel=0.3)


EMBED, THEIRS = "embedding/embedding", "theirs/kernel"


def test_laws_are_those_of_the_presets(capsys):
    laws = {
        "normal": he_normal(),
        "truncated normal": lecun_normal(),
        "uniform": xavier_uniform(),
        "orthogonal": orthogonal(),
        "delta orthogonal": delta_orthogonal(),
        "identity": identity(),
        "sparse normal": sparse(0.5),
        "ones": jax.nn.initializers.ones,
    }
    tree = {"kernel": jnp.ones((8, 8)), "scale": jnp.ones(8)}
    for law, preset in laws.items():
        redraw(tree, preset, KEY, explain=True)
        kernel, scale = capsys.readouterr().out.splitlines()[1:]
        assert re.split(r" {2,}", kernel)[3] == law
        assert re.split(r" {2,}", scale)[3:] == ["ones", "0"]


def test_explain_has_a_dash_where_no_values_are(capsys):
    abstract = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    tree = {"a": {"kernel": abstract}, "b": {"kernel": jnp.ones((0, 4))}}
    redraw(tree, he_normal(), KEY, rules={"a": None}, explain=True)
    kept, empty = capsys.readouterr().out.splitlines()[1:]
    assert kept.split()[-2:] == ["kept", "–"] and empty.split()[-2:] == ["normal", "–"]


def test_explain_is_a_bool_and_not_for_jit():
    tree = {"kernel": jnp.ones((8, 8))}
    for nonsense in (1, "yes", None):
        bad(
            lambda value=nonsense: untyped(redraw)(
                tree, he_normal(), KEY, explain=value
            ),
            "redraw: explain must be True or False",
            repr(nonsense),
        )
    explained = jax.jit(lambda key: redraw(tree, he_normal(), key, explain=True))
    bad(lambda: explained(KEY), "redraw: explain must be False under jit")


def test_errors_name_the_parameter_and_the_rule():
    # The rule is meant for the kernel, and matches the bias too.
    tree = {"actor": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}}
    rules = {"actor": "policy_head"}
    words = "redraw", "'actor/bias'", "'policy_head'", "rules['actor']", "(2,)"
    bad(lambda: redraw(tree, ppo(), KEY, rules=rules), *words)
    # An initializer of the user's, and a dtype that a distribution lacks.
    he = jax.nn.initializers.he_normal()
    bad(lambda: redraw(tree, ppo(), KEY, rules={"s$": he}), "'actor/bias'", "['s$']")
    wavy = {"kernel": jnp.ones((4, 2), jnp.complex64)}
    bad(lambda: redraw(wavy, uniform(), KEY), "'kernel'", "uniform: ", "complex64")


def test_bad_models():
    bad(lambda: redraw({}, he_normal(), KEY), "params_or_module", "none")
    bad(lambda: redraw({"lora_a": jnp.ones((2, 2))}, he_normal(), KEY), "lora_a")
    bad(lambda: roles_of({"lora_a": jnp.ones((2, 2))}), "roles_of", "lora_a")
    lone = {"bias": jnp.ones(3)}
    bad(lambda: redraw(lone, torch_default(), KEY), "torch_default", "'bias'", "kernel")
    einsum = {"Einsum_0/kernel": jnp.ones((4, 8, 2))}
    bad(lambda: redraw(einsum, he_normal(), KEY), "layouts", "Einsum_0/kernel", "oio")
    narrow = {"conv/kernel": jnp.ones((3, 8, 4)), "conv/bias": jnp.ones(4)}
    bad(
        lambda: redraw(narrow, delta_orthogonal(), KEY), "delta_orthogonal", "(3, 8, 4)"
    )


def test_a_table_is_drawn_by_rows_whatever_it_is_called():
    """In the module's type or in its own name; rows have unit length."""

    class Embedder(nnx.Module):
        def __init__(self) -> None:
            self.table = nnx.Param(jnp.ones((400, 64)))
            self.wpe = nnx.Param(jnp.ones((400, 64)))

    model = Embedder()
    redraw(model, he_normal(), KEY)
    for table in (model.table, model.wpe):
        assert np.std(table[...]) == pytest.approx(1 / 8, rel=0.03)


def test_a_critic_of_equinox_has_its_outputs_first():
    shapes = {"critic": (1, 64), "actor": (4, 64)}
    tree = {name: {"weight": jnp.ones(shape)} for name, shape in shapes.items()}
    assert roles_of(tree)["critic/weight"].role == "value_head"
    wide = {"critic": {"weight": jnp.ones((64, 1))}}
    assert roles_of(wide)["critic/weight"].role == "kernel"


def test_stacked_convolutions_without_a_bias_are_layers_apart():
    """What an NNX convolution has as its window is no guess."""

    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(key):
        return nnx.Conv(16, 16, (3, 3), use_bias=False, rngs=nnx.Rngs(key))

    model = stack(jax.random.split(KEY, 6))
    redraw(model, he_normal(), KEY)
    assert np.std(model.kernel[...]) == pytest.approx((2 / 144) ** 0.5, rel=0.05)


@pytest.mark.parametrize("preset", [identity(), dirac()], ids=repr)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64], ids=str)
def test_ones_in_every_dtype_beside_64_bits(preset, dtype):
    with jax.enable_x64(True):
        out = preset(KEY, (3, 2, 2), dtype)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out[1].astype(np.float32), np.eye(2))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rules": {"fc[": None}}, "rules must be a regular expression"),
        ({"layouts": {"fc[": "io"}}, "layouts must be a regular expression"),
        ({"stacked": "("}, "stacked must be a regular expression"),
        ({"layouts": {"kernel": 3}}, "layouts must be strings"),
    ],
)
def test_what_is_no_pattern_or_form_is_named(options, says):
    with pytest.raises(ValueError, match=f"redraw: {says}"):
        redraw({"fc/kernel": jnp.ones((2, 2))}, he_normal(), KEY, **options)


@pytest.mark.parametrize("door", [linen, nnx_door])
def test_a_layer_asks_for_a_preset(door):
    with pytest.raises(ValueError, match="preset must be a Preset of optclip"):
        door.layer(untyped(he_normal))
