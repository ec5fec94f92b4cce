"""Whole-model presets from papers, each named after its model or method.

Several roles get their own law. Where the recipe is about a role (the residual
projections of GPT-2), `redraw` refuses a model in which it finds none: name them in
`rules`, or the recipe would be lost without a word.
"""

import math
from typing import Any

import jax

from optclip._core import checks
from optclip._core.public import public
from optclip.initializers.defaults import flax_default, torch_default
from optclip.initializers.distributions import normal, zeros
from optclip.initializers.isometries import orthogonal
from optclip.initializers.presets import Preset, constant, initializer, renamed
from optclip.initializers.scaling import lecun_normal, scaled, xavier_uniform


@public
def gpt2(num_layers: int, stddev: float = 0.02) -> Preset:
    """GPT-2's: normal, and the projections back into the residual stream smaller.

        kernel, embedding ~ N(0, stddev²),  bias 0,  scale 1
        residual_out ~ N(0, stddev² / (2 num_layers))

    For pre-norm transformers of any depth: 2 num_layers branches add up, and the stream
    keeps its size. Where it finds no such projection, `redraw` raises: name them, as in
    `rules={"mlp/out/kernel": "residual_out"}`; those of attention it knows.

    Args:
      num_layers: the number of blocks, each with two branches.
      stddev: of all the others.

    Raises:
      ValueError: if num_layers is no positive integer or stddev is negative.

    >>> import jax
    >>> w = gpt2(8)["residual_out"](jax.random.key(0), (512, 512))
    >>> round(float(w.std()), 4)
    0.005

    Radford et al. 2019, "Language models are unsupervised multitask learners".
    """
    checks.at_least(1, num_layers=num_layers)
    checks.non_negative(stddev=stddev)
    residual = normal(stddev / math.sqrt(2 * num_layers))
    return renamed("gpt2", normal(stddev), ("residual_out",), residual_out=residual)


@public
def vit() -> Preset:
    """The vision transformer's, as its authors' program draws it.

        kernel ~ xavier_uniform,  bias ~ N(0, 1e-6²),  attention's biases 0,  head 0
        patches (a convolution) ~ lecun_normal,  position ~ N(0, 0.02²),  token 0

    For vision transformers trained from scratch or fine-tuned with a new head.

    >>> import jax
    >>> float(abs(vit()["head"](jax.random.key(0), (64, 10))).max())
    0.0

    Dosovitskiy et al. 2020, arXiv 2010.11929.
    """
    attention = {
        f"{role}_bias": constant(0.0)
        for role in ("query", "key", "value", "qkv", "attention_out", "head", "conv")
    }
    return renamed(
        "vit",
        xavier_uniform(),
        bias=normal(1e-6),
        shift=constant(0.0),
        conv=lecun_normal(),
        head=zeros(),
        position=normal(0.02),
        token=zeros(),
        **attention,
    )


@public
def resnet(zero_init_last: bool = False) -> Preset:
    """The residual convolutional network's, as torchvision draws it.

        convolution ~ N(0, 2 / fan_out),  scale 1, shift 0
        Dense kernel and bias ~ U(±1/√fan_in)
        zero_init_last: the scale of the last norm in each residual block is 0

    For residual networks of convolutions, ReLU and normalization. With
    `zero_init_last` every block starts as the identity, which helps large batches; the
    last norm is found by its number beside convolutions (`BatchNorm_2`, `bn3`), else
    say `rules={"block/norm": "residual_scale"}`.

    Args:
      zero_init_last: whether blocks start as the identity; `redraw` then refuses a
        model in which it finds no such norm.

    Raises:
      ValueError: if zero_init_last is no bool.

    >>> import jax
    >>> resnet(True)["residual_scale"](jax.random.key(0), (2,)).tolist()
    [0.0, 0.0]

    He et al. 2015, arXiv 1512.03385; Goyal et al. 2017, arXiv 1706.02677.
    """
    checks.choice((True, False), zero_init_last=zero_init_last)  # pyright: ignore
    conv = scaled("resnet", 2.0, "fan_out", "normal")
    preset = torch_default() | {"conv": conv, "conv_bias": constant(0.0)}
    if not zero_init_last:
        return renamed("resnet", preset)
    last = constant(0.0)
    return renamed("resnet", preset, ("residual_scale",), residual_scale=last)


@public
def dcgan(stddev: float = 0.02) -> Preset:
    """The convolutional GAN's: everything small and normal, norms around one.

        kernel ~ N(0, stddev²),  scale ~ N(1, stddev²),  bias 0

    For generators and discriminators of convolutions with batch normalization.

    Args:
      stddev: a non-negative number.

    Raises:
      ValueError: if stddev is negative or not a number.

    >>> import jax
    >>> round(float(dcgan()["scale"](jax.random.key(0), (10000,)).mean()), 2)
    1.0

    Radford et al. 2015, arXiv 1511.06434.
    """
    checks.non_negative(stddev=stddev)

    def around_one(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return 1 + stddev * jax.random.normal(key, shape, dtype)

    return renamed("dcgan", normal(stddev), scale=initializer("dcgan", around_one))


@public
def ppo(policy_gain: float = 0.01, value_gain: float = 1.0) -> Preset:
    """Proximal policy optimization's, as its careful programs draw it.

        hidden kernels orthogonal with gain √2,  bias 0
        policy_head orthogonal with gain 0.01,  value_head with gain 1

    For actor-critic networks: the policy starts nearly uniform over actions. Heads are
    found by name (policy, actor, pi; value, critic), else `redraw` raises: name them,
    as in `rules={"actor/Dense_2/kernel": "policy_head"}`.

    Args:
      policy_gain: a non-negative number.
      value_gain: a non-negative number.

    Raises:
      ValueError: if a gain is negative or not a number.

    >>> import jax
    >>> w = ppo()["policy_head"](jax.random.key(0), (64, 4))
    >>> round(float((w**2).sum() / 4) ** 0.5, 4)
    0.01

    Engstrom et al. 2020, arXiv 2005.12729; Andrychowicz et al. 2020, arXiv 2006.05990.
    """
    checks.non_negative(policy_gain=policy_gain, value_gain=value_gain)
    heads = {"policy_head": orthogonal(policy_gain)}
    heads["value_head"] = orthogonal(value_gain)
    return renamed("ppo", orthogonal(math.sqrt(2)), tuple(heads), **heads)


@public
def mup(base_width: int) -> Preset:
    """Maximal update parametrization's initial values: what suits one width, suits all.

        kernel ~ N(0, 1 / fan_in),   head ~ N(0, base_width / fan_in²)
        embedding ~ N(0, 1 / base_width),  bias 0,  scale 1

    At fan_in = base_width the head is a kernel like the others; wider, its output
    shrinks by 1/√width, and embeddings keep their size. Only the first values: the
    learning rates per layer (for Adam, base_width / fan_in for kernels and heads) are
    the optimizer's. The head is found by name, else `redraw` raises.

    Args:
      base_width: the width for which the hyperparameters were tuned.

    Raises:
      ValueError: if base_width is no positive integer.

    >>> import jax
    >>> w = mup(256)["head"](jax.random.key(0), (1024, 512))
    >>> round(float(w.std()) * 1024 / 16, 2)
    1.0

    Yang et al. 2022, arXiv 2203.03466, table 8.
    """
    checks.at_least(1, base_width=base_width)

    def readout(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        fan_in = math.prod(shape[:-1])
        return jax.random.normal(key, shape, dtype) * (math.sqrt(base_width) / fan_in)

    head = initializer("mup", readout, least_rank=2)
    embedding = normal(1 / math.sqrt(base_width))
    kernel = scaled("mup", 1.0, "fan_in", "normal")
    hidden = Preset("mup", {**lecun_normal().draws, "kernel": kernel})
    return renamed("mup", hidden, ("head",), head=head, embedding=embedding)


@public
def zero_last(preset: Preset | None = None) -> Preset:
    """A preset whose last layers start at zero: heads and ends of residual branches.

        head = 0,  residual_out = 0,  their biases 0;  the rest as `preset`

    A residual network starts as the identity and its loss at chance, at any depth.
    Layers before a zero one get no gradient in the first step, and all do after it.
    Where it finds neither, `redraw` raises: name them in rules.

    Args:
      preset: for all the others; `flax_default()` if not said.

    Raises:
      ValueError: if preset is no preset.

    >>> import jax
    >>> float(abs(zero_last()["attention_out"](jax.random.key(0), (8, 8))).max())
    0.0

    Goyal et al. 2017, arXiv 1706.02677; Peebles & Xie 2022, arXiv 2212.09748.
    """
    preset = flax_default() if preset is None else preset
    checks.instance(Preset, preset=preset)
    zero = constant(0.0)
    last = ("head", "policy_head", "value_head", "residual_out", "attention_out")
    draws = {role: zero for role in (*last, *(f"{role}_bias" for role in last))}
    return renamed("zero_last", preset, ("head", "residual_out"), **draws)
