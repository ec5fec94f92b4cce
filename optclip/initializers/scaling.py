"""Presets that scale with the fans, and orthogonal ones: they keep the signal's size.

    Var W = scale / n,    n = fan_in, fan_out or their mean

fan_in is how many inputs one output adds up, so that 1/fan_in keeps the forward signal;
fan_out is how many outputs an input reaches, so that 1/fan_out keeps the gradient. All
wrap `jax.nn.initializers`; what is added is the gain, and in `redraw` fans that are
right for every layout. Embeddings, which add up nothing, start as rows of unit length,
biases at 0 and scales at 1.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers as jax_initializers

from optclip import _checks
from optclip.initializers import gains
from optclip.initializers.presets import Preset, by_fans, initializer

_MODES = ("fan_in", "fan_out", "fan_avg")


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
    _checks.non_negative("xavier_uniform", gain=gain)
    return _scaling("xavier_uniform", gain, "fan_avg", "uniform")


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
    _checks.non_negative("xavier_normal", gain=gain)
    return _scaling("xavier_normal", gain, "fan_avg", "normal")


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
    factor = _he_gain("he_uniform", activation, mode, a)
    return _scaling("he_uniform", factor, mode, "uniform")


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
    factor = _he_gain("he_normal", activation, mode, a)
    return _scaling("he_normal", factor, mode, "normal")


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


def orthogonal(gain: float = 1.0) -> Preset:
    """Orthonormal columns, or rows where outputs outnumber inputs; Haar-distributed.

        WᵀW = gain² I  (or W Wᵀ = gain² I),    W of shape (window · inputs, outputs)

    Keeps every singular value, not only their mean: for very deep, recurrent and
    reinforcement-learning networks. Costs a QR decomposition, so not for very wide
    layers; embeddings are drawn otherwise. Half precision is drawn in float32.

    Args:
      gain: a non-negative number, such as `gain("relu")`.

    Raises:
      ValueError: if gain is negative; at the draw, for a shape with fewer than two
        axes.

    >>> import jax
    >>> w = orthogonal(2.0)(jax.random.key(0), (8, 3))
    >>> bool(abs(w.T @ w - 4 * jax.numpy.eye(3)).max() < 1e-5)
    True

    Saxe et al. 2013, arXiv 1312.6120.
    """
    _checks.non_negative("orthogonal", gain=gain)
    return by_fans("orthogonal", jax_initializers.orthogonal(gain))


def delta_orthogonal(gain: float = 1.0) -> Preset:
    """Convolutions that start as an orthogonal map of each pixel.

        W[…centre…] = gain · Q,  QᵀQ = I or QQᵀ = I;  elsewhere 0

    Convolutional networks of thousands of layers train from it. A kernel without a
    window is `orthogonal`. The map must not lose inputs, so outputs may not be fewer.

    Args:
      gain: a non-negative number.

    Raises:
      ValueError: if gain is negative; at the draw, if a convolution has more inputs
        than outputs, more than three window axes, or the shape fewer than two axes.

    >>> import jax
    >>> w = delta_orthogonal()(jax.random.key(0), (3, 2, 4))
    >>> bool(abs(w[1] @ w[1].T - jax.numpy.eye(2)).max() < 1e-6), float(abs(w[0]).max())
    (True, 0.0)

    Xiao et al. 2018, arXiv 1806.05393.
    """
    _checks.non_negative("delta_orthogonal", gain=gain)
    dense = jax_initializers.orthogonal(gain)
    convolution = jax_initializers.delta_orthogonal(gain)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        if len(shape) == 2:
            return dense(key, shape, dtype)
        if shape[-2] > shape[-1] or len(shape) > 5:
            raise ValueError(
                f"delta_orthogonal: shape must have 1 to 3 window axes and no more "
                f"inputs than outputs, got {shape}."
            )
        return convolution(key, shape, dtype)

    return by_fans("delta_orthogonal", init)


def symmetric_uniform(rule: str, bound: float) -> Any:
    """U(-bound, bound), for laws whose bound is not a fan of the shape drawn."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        limit = jnp.asarray(bound, dtype)
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return initializer(rule, init)


def scaled(rule: str, scale: float, mode: str, distribution: str) -> Any:
    """JAX's `variance_scaling`, checked and widened; a scale of 0 gives zeros."""
    if scale == 0:
        return initializer(rule, jax_initializers.zeros, least_rank=2)
    init: Any = jax_initializers.variance_scaling(scale, mode, distribution)  # pyright: ignore
    return initializer(rule, init, least_rank=2)


def _scaling(rule: str, gain: float, mode: str, distribution: str) -> Preset:
    return by_fans(rule, scaled(rule, gain**2, mode, distribution))


def _he_gain(
    rule: str, activation: gains.Activation, mode: str, a: float | None
) -> float:
    _checks.choice(rule, _MODES, mode=mode)
    with _checks.inside(rule):
        if a is None:
            return gains.gain(activation)
        _checks.real(rule, a=a)
        return gains.gain("leaky_relu", negative_slope=a)
