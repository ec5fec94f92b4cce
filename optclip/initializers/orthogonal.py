"""Presets whose kernels keep lengths: orthogonal maps, and the identity.

    ‖W x‖ = gain · ‖x‖    for every x, where outputs are no fewer than inputs

Gradients keep their length too, so such a network passes signals through any depth,
where its activations allow it. Embeddings start as rows of length 1, biases at 0 and
scales at 1.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.nn import initializers as jax_initializers
from jax.typing import DTypeLike

from optclip._core import checks
from optclip._core.public import public
from optclip._core.types import Shape
from optclip.initializers.presets import Preset, by_fans, initializer


@public
def orthogonal(gain: float = 1.0) -> Preset:
    """Orthonormal columns, or rows where outputs outnumber inputs, drawn uniformly.

        WᵀW = gain² I  (or W Wᵀ = gain² I),    W of shape (window · inputs, outputs)

    Keeps every singular value, not only their mean: for very deep, recurrent and
    reinforcement-learning networks. Costs a QR decomposition, so not for very wide
    layers; embeddings are not drawn orthogonal. Half precision is drawn in float32.

    Args:
      gain: a non-negative number, such as `gain("relu")`.

    Returns:
      A `Preset`.

    Raises:
      ValueError: if gain is negative; at the draw, for a shape with fewer than two
        axes.

    >>> import jax
    >>> w = orthogonal(2.0)(jax.random.key(0), (8, 3))
    >>> bool(abs(w.T @ w - 4 * jax.numpy.eye(3)).max() < 1e-5)
    True

    Saxe et al. 2013, https://arxiv.org/abs/1312.6120.
    """
    checks.non_negative(gain=gain)
    return by_fans(
        initializer(jax_initializers.orthogonal(gain), "orthogonal", least_rank=2)
    )


@public
def delta_orthogonal(gain: float = 1.0) -> Preset:
    """Convolutions that start as an orthogonal map of each pixel.

        W[…centre…] = gain · Q,  QᵀQ = I or QQᵀ = I;  elsewhere 0

    Convolutional networks of thousands of layers train from it. A kernel without a
    window is `orthogonal`. The map must not lose inputs, so outputs may not be fewer.

    Args:
      gain: a non-negative number.

    Returns:
      A `Preset`.

    Raises:
      ValueError: if gain is negative; at the draw, if a convolution has more inputs
        than outputs, more than three window axes, or the shape fewer than two axes.

    >>> import jax
    >>> w = delta_orthogonal()(jax.random.key(0), (3, 2, 4))
    >>> bool(abs(w[1] @ w[1].T - jax.numpy.eye(2)).max() < 1e-6), float(abs(w[0]).max())
    (True, 0.0)

    Xiao et al. 2018, https://arxiv.org/abs/1806.05393.
    """
    checks.non_negative(gain=gain)
    dense = jax_initializers.orthogonal(gain)
    convolution = jax_initializers.delta_orthogonal(gain)

    def init(key: jax.Array, shape: Shape, dtype: DTypeLike) -> jax.Array:
        if len(shape) == 2:
            return dense(key, shape, dtype)
        if shape[-2] > shape[-1] or len(shape) > 5:
            raise ValueError(
                f"shape must have 1 to 3 window axes and no more "
                f"inputs than outputs, got {shape}."
            )
        return convolution(key, shape, dtype)

    return by_fans(initializer(init, "delta orthogonal", least_rank=2))


@public
def identity(gain: float = 1.0) -> Preset:
    """The layer returns its inputs: ones on the diagonal, at a window's centre.

        W[i, o] = gain · [i = o]        W[…centre…, i, o] = gain · [i = o]

    For linear layers that should start without any effect, and for recurrent kernels of
    ReLU networks. Where the layer is not square, the excess outputs are zero, or the
    excess inputs ignored.

    Args:
      gain: a non-negative number.

    Returns:
      A `Preset`.

    Raises:
      ValueError: if gain is negative; at the draw, for a shape with fewer than two
        axes.

    >>> import jax
    >>> identity()(jax.random.key(0), (2, 3)).tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]

    Le et al. 2015, https://arxiv.org/abs/1504.00941.
    """
    return _identity(gain)


@public
def dirac(gain: float = 1.0) -> Preset:
    """`identity` under the name that PyTorch gives it for convolutions.

        W[…centre…, i, o] = gain · [i = o]

    A grouped convolution returns each group's inputs where its groups are known: see
    the argument `layouts` of `redraw`. PyTorch's `dirac_(groups=g)` is this with a
    layout of g groups.

    Args:
      gain: a non-negative number.

    Returns:
      A `Preset`.

    Raises:
      ValueError: if gain is negative; at the draw, for a shape with fewer than two
        axes.

    >>> import jax
    >>> dirac()(jax.random.key(0), (3, 1, 1))[:, 0, 0].tolist()
    [0.0, 1.0, 0.0]

    PyTorch: https://docs.pytorch.org/docs/stable/nn.init.html.
    """
    return _identity(gain)


def _identity(gain: float) -> Preset:
    checks.non_negative(gain=gain)

    def init(key: jax.Array, shape: Shape, dtype: DTypeLike) -> jax.Array:
        centre = tuple(size // 2 for size in shape[:-2])
        one = (gain * jnp.eye(shape[-2], shape[-1])).astype(dtype)
        return jnp.zeros(shape, dtype).at[centre].set(one)

    return by_fans(initializer(init, "identity", least_rank=2))
