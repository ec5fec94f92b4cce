"""He initialization, and the gain of an activation, from which it starts.

    Var W = gain(activation)² / n,    n = fan_in, fan_out or their mean

A layer z = W x with Var W = 1 / fan_in keeps the mean square of its input. The
activation that follows then changes it by E f(z)², z ~ N(0, 1), which the gain undoes:

    gain(f) = 1 / √(E f(z)²)

PyTorch's table, which most papers and programs use, agrees for ReLU and leaky ReLU; it
has 5/3 for tanh and 3/4 for SELU, which are chosen and not computed. So a name gives
the table's value where the table has one, and a function always the computed one.
Embeddings start as rows of length 1, biases at 0 and scales at 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np

from optclip._core import checks
from optclip._core.public import error, public
from optclip.initializers.presets import Mode, Preset, by_fans, scaled

# A name, or an elementwise function.
Activation: TypeAlias = str | Callable[[jax.Array], jax.Array]


@public
def he_normal(
    activation: Activation = "relu", mode: Mode = "fan_in", a: float | None = None
) -> Preset:
    """He et al.'s initialization, normal; PyTorch's `kaiming_normal_`.

        W ~ N(0, gain(activation)² / n),    n = fan_in or fan_out

    For layers followed by ReLU and similar activations, at any depth. Not for the last
    layer, which no activation follows, nor for attention. Values are not truncated;
    JAX's and Keras' `he_normal` truncate at two deviations and correct for it.

    Args:
      activation: what follows the layer: a name or a function, see `gain`.
      mode: "fan_in" keeps the size of the forward signal, "fan_out" that of the
        gradient, "fan_avg" is in between.
      a: the negative slope of a leaky ReLU, instead of `activation`.

    Returns:
      A `Preset`.

    Raises:
      ValueError: for an unknown activation or mode, or a slope that is not a number; at
        the draw, for a shape with fewer than two axes.

    >>> import jax
    >>> w = he_normal()(jax.random.key(0), (256, 512))
    >>> round(float(w.std()), 3)
    0.088

    He et al. 2015, https://arxiv.org/abs/1502.01852.
    """
    return by_fans(scaled(_he_scale(activation, mode, a), mode, "normal"))


@public
def he_uniform(
    activation: Activation = "relu", mode: Mode = "fan_in", a: float | None = None
) -> Preset:
    """He et al.'s initialization, uniform; PyTorch's `kaiming_uniform_`.

        W ~ U(-b, b),    b = gain(activation) · √(3 / n),    n = fan_in or fan_out

    For layers followed by ReLU and similar activations, like `he_normal`.

    Args:
      activation: what follows the layer: a name or a function, see `gain`.
      mode: "fan_in" keeps the size of the forward signal, "fan_out" that of the
        gradient, "fan_avg" is in between.
      a: the negative slope of a leaky ReLU, instead of `activation`; √5 gives
        PyTorch's default for a linear layer.

    Returns:
      A `Preset`.

    Raises:
      ValueError: for an unknown activation or mode, or a slope that is not a number; at
        the draw, for a shape with fewer than two axes.

    >>> import jax
    >>> w = he_uniform()(jax.random.key(0), (256, 512))
    >>> round(float(abs(w).max()), 3)
    0.153

    He et al. 2015, https://arxiv.org/abs/1502.01852.
    """
    return by_fans(scaled(_he_scale(activation, mode, a), mode, "uniform"))


@public
def gain(activation: Activation, negative_slope: float | None = None) -> float:
    """The factor for the spread of a layer's kernel that undoes its activation.

        name       PyTorch's value, if it has one; else as for the function
        function   1 / √(E f(z)²),  z ~ N(0, 1)

    Args:
      activation: a name ("relu", "leaky_relu", "tanh", "gelu", "conv2d", …) or an
        elementwise function of a real float32 array. `gain("tanh")` is PyTorch's 5/3
        and `gain(jnp.tanh)` the variance-preserving 1.5925; for SELU 3/4 and 1.
      negative_slope: of "leaky_relu", 0.01 by default; not for other activations.

    Returns:
      A Python float, so that it can be used in any initializer, inside `jit` too. The
      integral is a sum over 16385 points of [-10, 10] and good to 5 digits.

    Raises:
      ValueError: for an unknown name (with the nearest ones), a slope for another
        activation, or a function that is zero, not finite or not elementwise.

    >>> import jax
    >>> round(gain("selu"), 4), round(gain(jax.nn.selu), 4), round(gain("gelu"), 4)
    (0.75, 1.0, 1.5335)

    He et al. 2015, https://arxiv.org/abs/1502.01852, for ReLU; Klambauer et al. 2017,
    https://arxiv.org/abs/1706.02515, for keeping mean and variance.
    """
    if negative_slope is not None and activation != "leaky_relu":
        raise error(f"negative_slope must go with 'leaky_relu', got {activation!r}.")
    if callable(activation):
        return _by_quadrature(activation)
    if activation == "leaky_relu":
        slope = 0.01 if negative_slope is None else negative_slope
        checks.real(negative_slope=slope)
        return math.sqrt(2 / (1 + slope**2))
    if activation in _TABLE:
        return _TABLE[activation]
    checks.known(["leaky_relu", *_TABLE, *_FUNCTIONS], activation=activation)
    return _by_quadrature(_FUNCTIONS[activation])


# `torch.nn.init.calculate_gain`; the slope of "leaky_relu" is an argument.
_TABLE = {
    **dict.fromkeys(("linear", "identity", "sigmoid"), 1.0),
    **{f"conv{of}{axes}d": 1.0 for of in ("", "_transpose") for axes in (1, 2, 3)},
    "tanh": 5 / 3,
    "relu": math.sqrt(2),
    "selu": 0.75,
}
# Names without a value in the table, which stand for their function.
_NAMES = (
    *("celu", "elu", "hard_sigmoid", "hard_swish", "hard_tanh", "mish", "relu6"),
    *("silu", "soft_sign", "softplus", "squareplus", "swish"),
)
_FUNCTIONS = {name: getattr(jax.nn, name) for name in _NAMES} | {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
# Even, with 0 on the grid, where kinks are; the normal density vanishes beyond.
_GRID = np.linspace(-10.0, 10.0, 2**14 + 1)


def _he_scale(activation: Activation, mode: Mode, a: float | None) -> float:
    """gain², after a check of the mode."""
    if mode not in get_args(Mode):
        raise error(f"mode must be one of {get_args(Mode)}, got {mode!r}.")
    if a is None:
        return gain(activation) ** 2
    checks.real(a=a)
    return gain("leaky_relu", negative_slope=a) ** 2


def _by_quadrature(function: Callable[[jax.Array], jax.Array]) -> float:
    with jax.ensure_compile_time_eval():
        values = np.asarray(function(jnp.asarray(_GRID, jnp.float32)))
    if values.shape != _GRID.shape:
        raise error(
            f"activation must be elementwise, got shape {values.shape} from "
            f"{_GRID.shape}."
        )
    density = np.exp(-(_GRID**2) / 2)
    mean_square = np.sum(density * np.square(values, dtype=float)) / np.sum(density)
    if not 0 < mean_square < np.inf:
        raise error(
            f"activation must have a positive finite mean square, got {mean_square}."
        )
    return float(1 / math.sqrt(mean_square))
