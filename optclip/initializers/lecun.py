"""LeCun initialization: a linear layer keeps the variance of its input.

    Var W = 1 / fan_in

fan_in is how many inputs one output sums. Embeddings start as rows of length 1, biases
at 0 and scales at 1.
"""

from __future__ import annotations

from optclip._core.public import public
from optclip.initializers.presets import Preset, by_fans, scaled


@public
def lecun_uniform() -> Preset:
    """LeCun's initialization, uniform: unit variance through a linear layer.

        W ~ U(-b, b),    b = √(3 / fan_in)

    For linear layers, SELU networks and attention, like `lecun_normal`.

    Returns:
      A `Preset`.

    Raises:
      ValueError: at the draw, for a shape with fewer than two axes.

    >>> import jax
    >>> w = lecun_uniform()(jax.random.key(0), (256, 512))
    >>> round(float(abs(w).max()), 3)
    0.108

    LeCun et al. 1998, "Efficient BackProp", https://doi.org/10.1007/3-540-49430-8_2.
    """
    return by_fans(scaled(1.0, "fan_in", "uniform"))


@public
def lecun_normal() -> Preset:
    """LeCun's initialization, normal within two deviations. Flax's and JAX's default.

        W ~ N(0, 1 / fan_in), truncated at 2.27 / √fan_in, the variance corrected

    For linear layers, SELU networks and attention. Not for deep ReLU networks, where
    each layer halves the mean square.

    Returns:
      A `Preset`.

    Raises:
      ValueError: at the draw, for a shape with fewer than two axes.

    >>> import jax
    >>> w = lecun_normal()(jax.random.key(0), (256, 512))
    >>> round(float(w.std()), 2)
    0.06

    LeCun et al. 1998, "Efficient BackProp", https://doi.org/10.1007/3-540-49430-8_2;
    Klambauer et al. 2017, https://arxiv.org/abs/1706.02515, for SELU.
    """
    return by_fans(scaled(1.0, "fan_in", "truncated_normal"))
