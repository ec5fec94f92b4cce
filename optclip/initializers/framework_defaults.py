"""Whole-model presets that draw what a framework draws: Flax, Keras, PyTorch.

Each gives every role what that framework's layers use by default, with the fans that
the layer's definition gives: to compare with a model from there, or to reset a model.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.nn import initializers as jax_initializers
from jax.typing import DTypeLike

from optclip._core.public import caller, public
from optclip._core.types import Shape
from optclip.initializers import presets
from optclip.initializers.kernel_shapes import Initializer
from optclip.initializers.lecun import lecun_normal
from optclip.initializers.orthogonal import orthogonal
from optclip.initializers.presets import Preset
from optclip.initializers.xavier import xavier_uniform


@public
def flax_default() -> Preset:
    """What Flax draws: LeCun's normal, also where Flax passes wrong fans.

        kernel ~ N(0, 1/fan_in) truncated,  recurrent orthogonal,  bias 0,  scale 1,
        embedding ~ N(0, 1/features)

    To reset a model. Differs from Flax where Flax passes an initializer a raw shape:
    an Einsum, stacked layers, fused recurrent gates.

    Returns:
      A `Preset`.

    >>> import jax
    >>> round(float(flax_default()(jax.random.key(0), (256, 512)).std()), 2)
    0.06

    Flax's defaults: https://flax.readthedocs.io/en/latest/api_reference/flax.nnx/nn/.
    """
    return Preset({**lecun_normal().draws, "recurrent": orthogonal()})


@public
def keras_default() -> Preset:
    """What Keras draws: Glorot's uniform.

        kernel ~ U(±√(6 / (fan_in + fan_out))),  recurrent orthogonal,  bias 0,
        scale 1,  embedding ~ U(±0.05),  an LSTM's forget bias 1

    To compare with a Keras model. The forget bias is found in cells with one parameter
    a gate. Keras counts a depthwise convolution's fans over all channels; here they are
    those of one channel, of a kernel (3, 3, 1, channels).

    Returns:
      A `Preset`.

    >>> import jax
    >>> w = keras_default()["embedding"](jax.random.key(0), (100, 64))
    >>> round(float(abs(w).max()), 2)
    0.05

    Keras' defaults: https://keras.io/api/layers/initializers/.
    """
    return Preset(
        {
            **xavier_uniform().draws,
            "recurrent": orthogonal(),
            "embedding": _symmetric_uniform(0.05),
            "forget_bias": presets.ONE,
        }
    )


@public
def torch_default() -> Preset:
    """What PyTorch's layers draw; biases depend on their kernel's fan-in.

        kernel, bias ~ U(±1/√fan_in)                    Linear, Conv
        recurrent cells: all ~ U(±1/√hidden),   embedding ~ N(0, 1)
        query, key, value ~ U(±√(6 / (fan_in + 3 fan_in))),  attention's biases 0
        scale 1,  shift 0

    To compare with a PyTorch model. Kernels are `he_uniform(a=√5)`, a gain of 1/√3: not
    a good initialization for deep networks. PyTorch counts a transposed convolution's
    outputs as its fan-in: `redraw(…, layouts={"ConvTranspose_0": "w*oi"})` does so too.
    A cell has two biases a gate there, and one in Flax.

    Returns:
      A `Preset`.

    Raises:
      ValueError: when a bias is drawn without its kernel: as `bias_init` without
        `layer(..., fan_in=…)`, or by `redraw` where no kernel is beside it.

    >>> import jax
    >>> w = torch_default()(jax.random.key(0), (256, 512))
    >>> round(float(abs(w).max()), 4)
    0.0625

    PyTorch's defaults: https://docs.pytorch.org/docs/stable/nn.html.
    """
    by_fan_in = presets.FromFanIn(
        caller(), lambda fan_in: _symmetric_uniform(1 / math.sqrt(max(fan_in, 1)))
    )
    # The three are drawn as one matrix with three times as many outputs.
    third = presets.scaled(0.5, "fan_avg", "uniform")
    draws: dict[str, Initializer] = {
        "kernel": presets.scaled(1 / 3, "fan_in", "uniform"),
        "bias": by_fan_in,
        "recurrent": by_fan_in,
        "recurrent_input": by_fan_in,
        "embedding": presets.initializer(jax_initializers.normal(1.0), "normal"),
        "scale": presets.ONE,
        "shift": presets.ZERO,
        "qkv": presets.scaled(1.0, "fan_avg", "uniform"),
        "qkv_bias": presets.ZERO,
        "attention_out_bias": presets.ZERO,
    }
    for part in ("query", "key", "value"):
        draws |= {part: third, f"{part}_bias": presets.ZERO}
    return Preset(draws)


def _symmetric_uniform(bound: float) -> Initializer:
    """U(-bound, bound), where the bound does not depend on the shape drawn."""

    def init(key: jax.Array, shape: Shape, dtype: DTypeLike) -> jax.Array:
        limit = jnp.asarray(bound, dtype)
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return presets.initializer(init, "uniform")
