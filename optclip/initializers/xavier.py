"""Xavier initialization, also called Glorot's: the mean of both fans.

    Var W = gain² · 2 / (fan_in + fan_out)

fan_in is how many inputs one output sums, so that 1/fan_in keeps the size of the
forward signal; fan_out is how many outputs one input reaches, so that 1/fan_out keeps
the size of the gradient. Embeddings start as rows of length 1, biases at 0 and scales
at 1.
"""

from __future__ import annotations

from optclip._core import checks
from optclip._core.public import public
from optclip.initializers.presets import Preset, by_fans, scaled


@public
def xavier_uniform(gain: float = 1.0) -> Preset:
    """Glorot and Bengio's initialization, uniform. Keras' and TensorFlow's default.

        W ~ U(-b, b),    b = gain · √(6 / (fan_in + fan_out))

    For tanh, sigmoid and linear layers, and attention. Not for deep ReLU networks,
    where each layer halves the mean square.

    Args:
      gain: a non-negative number, such as `gain("tanh")`.

    Returns:
      A `Preset`.

    Raises:
      ValueError: if gain is negative; at the draw, for a shape with fewer than two
        axes.

    >>> import jax
    >>> w = xavier_uniform()(jax.random.key(0), (256, 512))
    >>> round(float(abs(w).max()), 3)
    0.088

    Glorot & Bengio 2010, https://proceedings.mlr.press/v9/glorot10a.html.
    """
    checks.non_negative(gain=gain)
    return by_fans(scaled(gain**2, "fan_avg", "uniform"))


@public
def xavier_normal(gain: float = 1.0) -> Preset:
    """Glorot and Bengio's initialization, normal, as in PyTorch: without truncation.

        W ~ N(0, gain² · 2 / (fan_in + fan_out))

    For tanh, sigmoid and linear layers, and attention, like `xavier_uniform`.

    Args:
      gain: a non-negative number, such as `gain("tanh")`.

    Returns:
      A `Preset`.

    Raises:
      ValueError: if gain is negative; at the draw, for a shape with fewer than two
        axes.

    >>> import jax
    >>> w = xavier_normal()(jax.random.key(0), (256, 512))
    >>> round(float(w.std()), 3)
    0.051

    Glorot & Bengio 2010, https://proceedings.mlr.press/v9/glorot10a.html.
    """
    checks.non_negative(gain=gain)
    return by_fans(scaled(gain**2, "fan_avg", "normal"))
