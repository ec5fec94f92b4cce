"""Whole-model presets from papers, each named after its model or method.

Several roles get their own initializer. Where the recipe is about a role (the residual
projections of GPT-2), `redraw` refuses a model in which it finds none, because the
recipe would have no effect: name them in `rules`.
"""

from __future__ import annotations

import math

import jax
from jax.typing import DTypeLike

from optclip._core import checks
from optclip._core.public import error, public
from optclip._core.types import Shape
from optclip.initializers.distributions import normal, zeros
from optclip.initializers.framework_defaults import flax_default, torch_default
from optclip.initializers.lecun import lecun_normal
from optclip.initializers.orthogonal import orthogonal
from optclip.initializers.presets import ZERO, Preset, initializer, scaled
from optclip.initializers.xavier import xavier_uniform


@public
def gpt2(num_layers: int, stddev: float = 0.02) -> Preset:
    """GPT-2's: normal, and the projections back into the residual stream smaller.

        kernel, embedding ~ N(0, stddev²),  bias 0,  scale 1
        residual_out ~ N(0, stddev² / (2 num_layers))

    For pre-norm transformers of any depth: the residual stream sums 2 num_layers
    branches, and keeps its size. Where it finds no such projection, `redraw` raises:
    name them, as in `rules={"mlp/out/kernel": "residual_out"}`; those of attention are
    found.

    Args:
      num_layers: the number of blocks, each with two branches.
      stddev: the standard deviation of all other kernels and of embeddings.

    Returns:
      A `Preset`.

    Raises:
      ValueError: if num_layers is not a positive integer or stddev is negative.

    >>> import jax
    >>> w = gpt2(8)["residual_out"](jax.random.key(0), (512, 512))
    >>> round(float(w.std()), 4)
    0.005

    Radford et al. 2019, "Language models are unsupervised multitask learners",
    https://github.com/openai/gpt-2.
    """
    checks.at_least(1, num_layers=num_layers)
    checks.non_negative(stddev=stddev)
    residual = normal(stddev / math.sqrt(2 * num_layers))
    draws = {**normal(stddev).draws, "residual_out": residual}
    return Preset(draws, needs=("residual_out",))


@public
def vit() -> Preset:
    """The vision transformer's, as its authors' program draws it.

        kernel ~ xavier_uniform,  bias ~ N(0, 1e-6²),  attention's biases 0,  head 0
        patches (a convolution) ~ lecun_normal,  position ~ N(0, 0.02²),  token 0

    For vision transformers trained from scratch or fine-tuned with a new head.

    Returns:
      A `Preset`.

    >>> import jax
    >>> float(abs(vit()["head"](jax.random.key(0), (64, 10))).max())
    0.0

    Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929.
    """
    zero = ("query", "key", "value", "qkv", "attention_out", "head", "conv")
    return Preset(
        {
            **xavier_uniform().draws,
            **{f"{role}_bias": ZERO for role in zero},
            "bias": normal(1e-6),
            "shift": ZERO,
            "conv": lecun_normal(),
            "head": zeros(),
            "position": normal(0.02),
            "token": zeros(),
        }
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

    Returns:
      A `Preset`.

    Raises:
      ValueError: if zero_init_last is not a bool.

    >>> import jax
    >>> resnet(True)["residual_scale"](jax.random.key(0), (2,)).tolist()
    [0.0, 0.0]

    He et al. 2015, https://arxiv.org/abs/1512.03385; Goyal et al. 2017, https://arxiv.org/abs/1706.02677.
    """
    if not isinstance(zero_init_last, bool):
        raise error(f"zero_init_last must be True or False, got {zero_init_last!r}.")
    conv = scaled(2.0, "fan_out", "normal")
    draws = {**torch_default().draws, "conv": conv, "conv_bias": ZERO}
    if not zero_init_last:
        return Preset(draws)
    return Preset({**draws, "residual_scale": ZERO}, needs=("residual_scale",))


@public
def dcgan(stddev: float = 0.02) -> Preset:
    """The convolutional GAN's: small normal kernels, scales around one.

        kernel ~ N(0, stddev²),  scale ~ N(1, stddev²),  bias 0

    For generators and discriminators of convolutions with batch normalization.

    Args:
      stddev: a non-negative number.

    Returns:
      A `Preset`.

    Raises:
      ValueError: if stddev is negative or not a number.

    >>> import jax
    >>> round(float(dcgan()["scale"](jax.random.key(0), (10000,)).mean()), 2)
    1.0

    Radford et al. 2015, https://arxiv.org/abs/1511.06434.
    """
    checks.non_negative(stddev=stddev)

    def around_one(key: jax.Array, shape: Shape, dtype: DTypeLike) -> jax.Array:
        return 1 + stddev * jax.random.normal(key, shape, dtype)

    return Preset({**normal(stddev).draws, "scale": initializer(around_one, "normal")})


@public
def ppo(policy_gain: float = 0.01, value_gain: float = 1.0) -> Preset:
    """Proximal policy optimization's, as its reference implementations draw it.

        hidden kernels orthogonal with gain √2,  bias 0
        policy_head orthogonal with gain 0.01,  value_head with gain 1

    For actor-critic networks: the policy starts nearly uniform over actions. Heads are
    found by name (policy, actor, pi; value, critic), else `redraw` raises: name them,
    as in `rules={"actor/Dense_2/kernel": "policy_head"}`.

    Args:
      policy_gain: a non-negative number.
      value_gain: a non-negative number.

    Returns:
      A `Preset`.

    Raises:
      ValueError: if a gain is negative or not a number.

    >>> import jax
    >>> w = ppo()["policy_head"](jax.random.key(0), (64, 4))
    >>> round(float((w**2).sum() / 4) ** 0.5, 4)
    0.01

    Engstrom et al. 2020, https://arxiv.org/abs/2005.12729; Andrychowicz et al. 2020, https://arxiv.org/abs/2006.05990.
    """
    checks.non_negative(policy_gain=policy_gain, value_gain=value_gain)
    heads = {
        "policy_head": orthogonal(policy_gain),
        "value_head": orthogonal(value_gain),
    }
    return Preset({**orthogonal(math.sqrt(2)).draws, **heads}, needs=tuple(heads))


@public
def mup(base_width: int) -> Preset:
    """Maximal update parametrization: initial values that transfer between widths.

        kernel ~ N(0, 1 / fan_in),   head ~ N(0, base_width / fan_in²)
        embedding ~ N(0, 1 / base_width),  bias 0,  scale 1

    At fan_in = base_width the head is a kernel like the others; wider, its output
    shrinks by 1/√width, and embeddings keep their size. These are the initial values
    only: set the learning rates per layer (for Adam, base_width / fan_in for kernels
    and heads) in the optimizer. The head is found by name, else `redraw` raises.

    Args:
      base_width: the width for which the hyperparameters were tuned.

    Returns:
      A `Preset`.

    Raises:
      ValueError: if base_width is not a positive integer.

    >>> import jax
    >>> w = mup(256)["head"](jax.random.key(0), (1024, 512))
    >>> round(float(w.std()) * 1024 / 16, 2)
    1.0

    Yang et al. 2022, https://arxiv.org/abs/2203.03466, table 8.
    """
    checks.at_least(1, base_width=base_width)

    def readout(key: jax.Array, shape: Shape, dtype: DTypeLike) -> jax.Array:
        fan_in = math.prod(shape[:-1])
        return jax.random.normal(key, shape, dtype) * (math.sqrt(base_width) / fan_in)

    return Preset(
        {
            **lecun_normal().draws,
            "kernel": scaled(1.0, "fan_in", "normal"),
            "head": initializer(readout, "normal", least_rank=2),
            "embedding": normal(1 / math.sqrt(base_width)),
        },
        needs=("head", "policy_head", "value_head"),
    )


@public
def zero_last(preset: Preset | None = None) -> Preset:
    """A preset whose last layers start at zero: heads and ends of residual branches.

        head = 0,  residual_out = 0,  their biases 0;  the rest as `preset`

    A residual network starts as the identity and its loss at chance, at any depth.
    Layers before a zero one get no gradient in the first step, and all do after it.
    Where it finds neither, `redraw` raises: name them in `rules`.

    Args:
      preset: for all other roles; `flax_default()` by default.

    Returns:
      A `Preset`.

    Raises:
      ValueError: if preset is not a `Preset`.

    >>> import jax
    >>> float(abs(zero_last()["attention_out"](jax.random.key(0), (8, 8))).max())
    0.0

    Goyal et al. 2017, https://arxiv.org/abs/1706.02677; Peebles & Xie 2022, https://arxiv.org/abs/2212.09748.
    """
    preset = flax_default() if preset is None else preset
    checks.instance(Preset, preset=preset)
    last = ("head", "policy_head", "value_head", "residual_out", "attention_out")
    draws = {role: ZERO for role in (*last, *(f"{role}_bias" for role in last))}
    return Preset({**preset.draws, **draws}, needs=last[:-1])
