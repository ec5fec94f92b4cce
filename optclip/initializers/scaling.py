"""Presets that scale with the fans, so that layers keep the signal's size.

    Var W = scale / n,    n = fan_in, fan_out or their mean

fan_in is how many inputs one output adds up, so that 1/fan_in keeps the forward signal;
fan_out is how many outputs an input reaches, so that 1/fan_out keeps the gradient. All
wrap `jax.nn.initializers`; what is added is the gain, and in `redraw` fans that are
right for every layout. Embeddings, which add up nothing, start as rows of unit length,
biases at 0 and scales at 1.
"""

from typing import Any

from jax.nn import initializers as jax_initializers

from optclip._core import checks
from optclip._core.public import public
from optclip.initializers import gains
from optclip.initializers.presets import Preset, by_fans, initializer

_MODES = ("fan_in", "fan_out", "fan_avg")


@public
def xavier_uniform(gain: float = 1.0) -> Preset:
    """Glorot and Bengio's initialization, uniform. Keras' and TensorFlow's default.

        W ~ U(-b, b),    b = gain · √(6 / (fan_in + fan_out))

    For tanh, sigmoid and linear layers, and attention. Not for deep ReLU networks:
    each layer halves the mean square.

    Args:
      gain: a non-negative number, such as `gain("tanh")`.

    Raises:
      ValueError: if gain is negative; at the draw, for a shape with fewer than two
        axes.

    >>> import jax
    >>> w = xavier_uniform()(jax.random.key(0), (256, 512))
    >>> round(float(abs(w).max()), 3)
    0.088

    Glorot & Bengio 2010, "Understanding the difficulty of training deep feedforward
    neural networks".
    """
    checks.non_negative(gain=gain)
    return _scaling("xavier_uniform", gain, "fan_avg", "uniform")


@public
def xavier_normal(gain: float = 1.0) -> Preset:
    """Glorot and Bengio's initialization, normal, as in PyTorch: without truncation.

        W ~ N(0, gain² · 2 / (fan_in + fan_out))

    Where to use it: as `xavier_uniform`.

    Args:
      gain: a non-negative number, such as `gain("tanh")`.

    Raises:
      ValueError: as `xavier_uniform`.

    >>> import jax
    >>> w = xavier_normal()(jax.random.key(0), (256, 512))
    >>> round(float(w.std()), 3)
    0.051

    Glorot & Bengio 2010.
    """
    checks.non_negative(gain=gain)
    return _scaling("xavier_normal", gain, "fan_avg", "normal")


@public
def he_uniform(
    activation: gains.Activation = "relu", mode: str = "fan_in", a: float | None = None
) -> Preset:
    """He et al.'s initialization, uniform; PyTorch's `kaiming_uniform_`.

        W ~ U(-b, b),    b = gain(activation) · √(3 / n),    n = fan_in or fan_out

    Where to use it: as `he_normal`.

    Args:
      activation: what follows the layer: a name or a function, see `gain`.
      mode: "fan_in" keeps the forward signal, "fan_out" the gradient, "fan_avg" is in
        between.
      a: the negative slope of a leaky ReLU, instead of `activation`; √5 gives
        PyTorch's default for a linear layer.

    Raises:
      ValueError: for an unknown activation or mode, or a slope that is no number; at
        the draw, for a shape with fewer than two axes.

    >>> import jax
    >>> w = he_uniform()(jax.random.key(0), (256, 512))
    >>> round(float(abs(w).max()), 3)
    0.153

    He et al. 2015, arXiv 1502.01852.
    """
    factor = _he_gain(activation, mode, a)
    return _scaling("he_uniform", factor, mode, "uniform")


@public
def he_normal(
    activation: gains.Activation = "relu", mode: str = "fan_in", a: float | None = None
) -> Preset:
    """He et al.'s initialization, normal; PyTorch's `kaiming_normal_`.

        W ~ N(0, gain(activation)² / n),    n = fan_in or fan_out

    For layers followed by ReLU and its kin, at any depth. Not for the last layer, which
    nothing follows, nor for attention. The law has its tails; JAX's and Keras'
    `he_normal` cut them at two deviations and correct for it.

    Args:
      activation: what follows the layer: a name or a function, see `gain`.
      mode: "fan_in" keeps the forward signal, "fan_out" the gradient, "fan_avg" is in
        between.
      a: the negative slope of a leaky ReLU, instead of `activation`.

    Raises:
      ValueError: for an unknown activation or mode, or a slope that is no number; at
        the draw, for a shape with fewer than two axes.

    >>> import jax
    >>> w = he_normal()(jax.random.key(0), (256, 512))
    >>> round(float(w.std()), 3)
    0.088

    He et al. 2015, arXiv 1502.01852.
    """
    factor = _he_gain(activation, mode, a)
    return _scaling("he_normal", factor, mode, "normal")


@public
def lecun_uniform() -> Preset:
    """LeCun's initialization, uniform: unit variance through a linear layer.

        W ~ U(-b, b),    b = √(3 / fan_in)

    Where to use it: as `lecun_normal`.

    Raises:
      ValueError: at the draw, for a shape with fewer than two axes.

    >>> import jax
    >>> w = lecun_uniform()(jax.random.key(0), (256, 512))
    >>> round(float(abs(w).max()), 3)
    0.108

    LeCun et al. 1998, "Efficient BackProp".
    """
    return _scaling("lecun_uniform", 1.0, "fan_in", "uniform")


@public
def lecun_normal() -> Preset:
    """LeCun's initialization, normal within two deviations. Flax's and JAX's default.

        W ~ N(0, 1 / fan_in), truncated at 2.27 / √fan_in, the variance corrected

    For linear layers, SELU networks and attention. Not for deep ReLU networks: each
    layer halves the mean square.

    Raises:
      ValueError: at the draw, for a shape with fewer than two axes.

    >>> import jax
    >>> w = lecun_normal()(jax.random.key(0), (256, 512))
    >>> round(float(w.std()), 2)
    0.06

    LeCun et al. 1998, "Efficient BackProp"; Klambauer et al. 2017, arXiv 1706.02515.
    """
    return _scaling("lecun_normal", 1.0, "fan_in", "truncated_normal")


def scaled(rule: str, scale: float, mode: str, distribution: str) -> Any:
    """JAX's `variance_scaling`, checked and widened; a scale of 0 gives zeros."""
    if scale == 0:
        return initializer(rule, jax_initializers.zeros, least_rank=2)
    init: Any = jax_initializers.variance_scaling(scale, mode, distribution)  # pyright: ignore
    return initializer(rule, init, least_rank=2)


def _scaling(rule: str, gain: float, mode: str, distribution: str) -> Preset:
    return by_fans(rule, scaled(rule, gain**2, mode, distribution))


def _he_gain(activation: gains.Activation, mode: str, a: float | None) -> float:
    checks.choice(_MODES, mode=mode)
    if a is None:
        return gains.gain(activation)
    checks.real(a=a)
    return gains.gain("leaky_relu", negative_slope=a)
