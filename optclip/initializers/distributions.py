"""Presets that draw all kernels and embeddings alike, whatever their fans.

Constants, normal and uniform distributions, and sparse kernels. Biases start at 0 and
scales at 1. JAX's distribution is used wherever JAX has it; values are drawn in float32
(float64 for float64) and rounded to the parameter's dtype.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.nn import initializers as jax_initializers
from jax.typing import DTypeLike

from optclip._core import checks
from optclip._core.public import public
from optclip._core.types import Shape
from optclip.initializers.presets import Preset, by_fans, initializer, of_any_shape


@public
def zeros() -> Preset:
    """Kernels, embeddings and biases are zero.

        W = 0

    For a layer whose output must start at zero: a head, the last layer of a residual
    branch. Not for hidden layers: all units of a layer get the same gradient, and stay
    equal for ever.

    Returns:
      A `Preset`.

    >>> import jax
    >>> zeros()(jax.random.key(0), (2, 2)).tolist()
    [[0.0, 0.0], [0.0, 0.0]]
    """
    return of_any_shape(initializer(jax_initializers.zeros, "zeros"))


@public
def normal(stddev: float = 0.01) -> Preset:
    """Normal with a given standard deviation; JAX's `normal`.

        W ~ N(0, stddev²)

    For embeddings, heads and models whose recipe names a number, as BERT's and GPT-2's
    0.02. Not for deep plain networks: the signal's size then depends on the width.

    Args:
      stddev: a non-negative number.

    Returns:
      A `Preset`.

    Raises:
      ValueError: if stddev is negative or not a number.

    >>> import jax
    >>> round(float(normal(0.02)(jax.random.key(0), (512, 512)).std()), 3)
    0.02

    JAX: https://docs.jax.dev/en/latest/jax.nn.initializers.html.
    """
    checks.non_negative(stddev=stddev)
    return of_any_shape(initializer(jax_initializers.normal(stddev), "normal"))


@public
def uniform(scale: float = 0.01) -> Preset:
    """Uniform from zero up; JAX's `uniform`.

        W ~ U[0, scale)

    JAX's `uniform` is not centred: for gates and decays that must start positive. A
    centred one with bound b is `lambda *args: b * (2 * uniform(1.0)(*args) - 1)`;
    `xavier_uniform` is one whose bound depends on the fans.

    Args:
      scale: the upper end, a non-negative number.

    Returns:
      A `Preset`.

    Raises:
      ValueError: if scale is negative or not a number.

    >>> import jax
    >>> bool((uniform(0.5)(jax.random.key(0), (64,)) >= 0).all())
    True

    JAX: https://docs.jax.dev/en/latest/jax.nn.initializers.html.
    """
    checks.non_negative(scale=scale)
    return of_any_shape(initializer(jax_initializers.uniform(scale), "uniform"))


@public
def truncated_normal(stddev: float = 0.01, corrected: bool = True) -> Preset:
    """Normal without its tails: no value beyond two standard deviations.

        W ~ N(0, s²) given |W| ≤ 2 s,    s = stddev / 0.8796 if corrected, else stddev

    Truncation lowers the standard deviation to 0.8796 of what it was. With `corrected`
    it is `stddev` afterwards, and the bound 2.27 stddev. Without, this is what
    TensorFlow's, Keras' and JAX's `truncated_normal` draw, and timm's
    `trunc_normal_tf_`. PyTorch's `trunc_normal_` truncates at ±2 whatever the
    deviation: at 0.02 that is `normal`.

    Args:
      stddev: a non-negative number.
      corrected: whether `stddev` is the standard deviation after truncation.

    Returns:
      A `Preset`.

    Edge cases: of a complex dtype, the modulus is truncated at 2 s, and E |W|² is s²
    before truncation; the factor is 0.9620.

    Raises:
      ValueError: if stddev is negative or not a number.

    >>> import jax
    >>> w = truncated_normal(0.02)(jax.random.key(0), (512, 512))
    >>> round(float(w.std()), 3), bool(abs(w).max() <= 0.0455)
    (0.02, True)

    JAX: https://docs.jax.dev/en/latest/jax.nn.initializers.html.
    """
    checks.non_negative(stddev=stddev)
    tails = 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2))
    narrowed = math.sqrt(1 - tails) if corrected else 1
    real = jax_initializers.truncated_normal(stddev / narrowed)

    def init(key: jax.Array, shape: Shape, dtype: DTypeLike) -> jax.Array:
        if not jnp.issubdtype(dtype, jnp.complexfloating):
            return real(key, shape, dtype)
        # The squared modulus is exponential. JAX draws no complex numbers here.
        within = 1 - math.exp(-4)
        u, turn = jax.random.uniform(key, (2, *shape), jnp.finfo(dtype).dtype)
        scale = stddev / (math.sqrt(1 - 4 * math.exp(-4) / within) if corrected else 1)
        modulus, angle = scale * jnp.sqrt(-jnp.log1p(-within * u)), 2 * math.pi * turn
        return jax.lax.complex(modulus * jnp.cos(angle), modulus * jnp.sin(angle))

    return of_any_shape(initializer(init, "truncated normal"))


@public
def sparse(sparsity: float, stddev: float = 0.01) -> Preset:
    """Each output is connected to a few inputs only.

        W[i, o] ~ N(0, stddev²), and ⌈sparsity · fan_in⌉ of each output's inputs are 0

    Units start different from each other and unsaturated whatever their fan-in (15
    inputs each in the paper). Not for convolutions of small fan-in. PyTorch's `sparse_`
    on its (out, in) weight does the transpose: it sets outputs of each input to 0.

    Args:
      sparsity: the share of zeros, in [0, 1].
      stddev: of the others, a non-negative number.

    Returns:
      A `Preset`.

    Raises:
      ValueError: if sparsity is outside [0, 1] or stddev is negative; at the draw, for
        a shape with fewer than two axes.

    >>> import jax
    >>> w = sparse(0.75)(jax.random.key(0), (8, 3))
    >>> (w == 0).sum(0).tolist()
    [6, 6, 6]

    Martens 2010, "Deep learning via Hessian-free optimization",
    https://icml.cc/Conferences/2010/papers/458.pdf.
    """
    checks.between(0, 1, sparsity=sparsity)
    checks.non_negative(stddev=stddev)

    def init(key: jax.Array, shape: Shape, dtype: DTypeLike) -> jax.Array:
        chosen, drawn = jax.random.split(key)
        inputs = (math.prod(shape[:-1]), shape[-1])
        rank = jnp.argsort(jax.random.uniform(chosen, inputs), axis=0)
        # A product a hair above a whole number is that number.
        silent = math.ceil(round(sparsity * inputs[0], 9))
        values = stddev * jax.random.normal(drawn, inputs, dtype)
        return jnp.where(rank < silent, 0, values).reshape(shape)

    return by_fans(initializer(init, "sparse normal", least_rank=2))
