"""Whole-model presets that draw what a framework draws.

Each gives roles what that framework's layers have by default, with the fans that a
layer's definition gives: to compare with a model from there, or to go back to a start.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers as jax_initializers

from optclip._core.public import public
from optclip.initializers.isometries import orthogonal
from optclip.initializers.presets import (
    FromFanIn,
    Preset,
    constant,
    initializer,
    renamed,
)
from optclip.initializers.scaling import lecun_normal, scaled, xavier_uniform


@public
def flax_default() -> Preset:
    """What Flax draws: LeCun's normal, with fans that are right where Flax's are not.

        kernel ~ N(0, 1/fan_in) truncated,  recurrent orthogonal,  bias 0,  scale 1,
        embedding ~ N(0, 1/features)

    To put a model back to its start. Differs from Flax where Flax hands an initializer
    a raw shape: an Einsum, stacked layers, fused recurrent gates.

    >>> import jax
    >>> round(float(flax_default()(jax.random.key(0), (256, 512)).std()), 2)
    0.06
    """
    return renamed("flax_default", lecun_normal(), recurrent=orthogonal())


@public
def keras_default() -> Preset:
    """What Keras draws: Glorot's uniform.

        kernel ~ U(±√(6 / (fan_in + fan_out))),  recurrent orthogonal,  bias 0,
        scale 1,  embedding ~ U(±0.05),  an LSTM's forget bias 1

    To compare with a Keras model. The forget bias is found in cells that keep their
    gates apart. Keras counts a depthwise convolution's fans over all channels, and
    here they are one channel's, of a kernel (3, 3, 1, channels).

    >>> import jax
    >>> w = keras_default()["embedding"](jax.random.key(0), (100, 64))
    >>> round(float(abs(w).max()), 2)
    0.05
    """
    embedding = _symmetric_uniform("keras_default", 0.05)
    roles = {"recurrent": orthogonal(), "embedding": embedding}
    return renamed(
        "keras_default", xavier_uniform(), forget_bias=constant(1.0), **roles
    )


def _symmetric_uniform(rule: str, bound: float) -> Any:
    """U(-bound, bound), for laws whose bound is not a fan of the shape drawn."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        limit = jnp.asarray(bound, dtype)
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return initializer(rule, init)


@public
def torch_default() -> Preset:
    """What PyTorch's layers draw, biases by their kernel's fan-in.

        kernel, bias ~ U(±1/√fan_in)                    Linear, Conv
        recurrent cells: all ~ U(±1/√hidden),   embedding ~ N(0, 1)
        query, key, value ~ U(±√(6 / (fan_in + 3 fan_in))),  attention's biases 0
        scale 1,  shift 0

    To compare with a PyTorch model. It is Kaiming's uniform with a = √5, the square
    root that surprises everyone: a gain of 1/√3. Not a good start for deep networks.
    PyTorch counts a transposed convolution's outputs as its fan-in:
    `redraw(…, layouts={"ConvTranspose_0": "w*oi"})` does so too. A cell has two biases
    a gate there, and one in Flax.

    Raises:
      ValueError: when a bias is drawn without its kernel: as `bias_init` without
        `layer(..., fan_in=…)`, or by `redraw` where no kernel is beside it.

    >>> import jax
    >>> w = torch_default()(jax.random.key(0), (256, 512))
    >>> round(float(abs(w).max()), 4)
    0.0625
    """
    name = "torch_default"
    by_fan_in = FromFanIn(name, lambda n: _symmetric_uniform(name, 1 / math.sqrt(n)))
    kernel = scaled(name, 1 / 3, "fan_in", "uniform")
    # The three are drawn as one matrix with three times as many outputs.
    third = scaled(name, 0.5, "fan_avg", "uniform")
    zero = constant(0.0)
    draws: dict[str, Any] = {
        "kernel": kernel,
        "bias": by_fan_in,
        "recurrent": by_fan_in,
        "recurrent_input": by_fan_in,
        "embedding": initializer(name, jax_initializers.normal(1.0)),
        "scale": constant(1.0),
        "shift": zero,
        "qkv": scaled(name, 1.0, "fan_avg", "uniform"),
        "qkv_bias": zero,
        "attention_out_bias": zero,
    }
    for part in ("query", "key", "value"):
        draws |= {part: third, f"{part}_bias": zero}
    return Preset(name, draws)
