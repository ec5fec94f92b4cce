"""Presets of one law that reads no fans: constants, normals, and patterns.

All of them as whole-model presets draw kernels and embeddings by their law, biases at 0
and scales at 1. JAX's distribution is used wherever JAX has it; values are drawn in
float32 (float64 for float64) and rounded to the parameter's dtype.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers as jax_initializers

from optclip._core import checks
from optclip._core.public import public
from optclip.initializers.presets import Preset, by_fans, of_any_shape

# √Var of a standard normal truncated at ±2.
_TRUNCATED_STDDEV = math.sqrt(
    1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2))
)


@public
def zeros() -> Preset:
    """Kernels, embeddings and biases are zero.

        W = 0

    For a layer whose output must start at zero: a head, the last layer of a residual
    branch. Not for hidden layers: all units of a layer get the same gradient, and stay
    equal for ever.

    >>> import jax
    >>> zeros()(jax.random.key(0), (2, 2)).tolist()
    [[0.0, 0.0], [0.0, 0.0]]
    """
    return of_any_shape("zeros", jax_initializers.zeros)


@public
def normal(stddev: float = 0.01) -> Preset:
    """Normal with a given deviation; JAX's `normal`.

        W ~ N(0, stddev²)

    For embeddings, heads and models whose recipe names a number, as BERT's and GPT-2's
    0.02. Not for deep plain networks: the signal's size then depends on the width.

    Args:
      stddev: a non-negative number.

    Raises:
      ValueError: if stddev is negative or not a number.

    >>> import jax
    >>> round(float(normal(0.02)(jax.random.key(0), (512, 512)).std()), 3)
    0.02
    """
    checks.non_negative(stddev=stddev)
    return of_any_shape("normal", jax_initializers.normal(stddev))


@public
def uniform(scale: float = 0.01) -> Preset:
    """Uniform from zero up; JAX's `uniform`.

        W ~ U[0, scale)

    JAX's name for JAX's distribution, which is not centred: for gates and decays that
    must start positive. A centred one by its bound b is
    `lambda *args: b * (2 * uniform(1.0)(*args) - 1)`; by fans `xavier_uniform`.

    Args:
      scale: the upper end, a non-negative number.

    Raises:
      ValueError: if scale is negative or not a number.

    >>> import jax
    >>> bool((uniform(0.5)(jax.random.key(0), (64,)) >= 0).all())
    True
    """
    checks.non_negative(scale=scale)
    return of_any_shape("uniform", jax_initializers.uniform(scale))


@public
def truncated_normal(stddev: float = 0.01, corrected: bool = True) -> Preset:
    """Normal without its tails: nothing beyond two deviations.

        W ~ N(0, s²) given |W| ≤ 2 s,    s = stddev / 0.8796 if corrected, else stddev

    Cutting the tails narrows the law to 0.8796 of its deviation. With `corrected` the
    deviation is `stddev` and the bound 2.27 stddev. Without, it is what TensorFlow's,
    Keras' and JAX's `truncated_normal` draw, and timm's `trunc_normal_tf_`. PyTorch's
    `trunc_normal_` cuts at ±2 whatever the deviation: at 0.02 that is `normal`.

    Args:
      stddev: a non-negative number.
      corrected: whether `stddev` is the deviation after the cut.

    Raises:
      ValueError: if stddev is negative or not a number.

    >>> import jax
    >>> w = truncated_normal(0.02)(jax.random.key(0), (512, 512))
    >>> round(float(w.std()), 3), bool(abs(w).max() <= 0.0455)
    (0.02, True)
    """
    checks.non_negative(stddev=stddev)
    parent = stddev / _TRUNCATED_STDDEV if corrected else stddev
    return of_any_shape("truncated_normal", jax_initializers.truncated_normal(parent))


@public
def sparse(sparsity: float, stddev: float = 0.01) -> Preset:
    """Each output listens to a few inputs only.

        W[i, o] ~ N(0, stddev²), and ⌈sparsity · fan_in⌉ of each output's inputs are 0

    Keeps units apart and unsaturated whatever their fan-in (15 inputs each in the
    paper). Not for convolutions of small fan-in. PyTorch's `sparse_` on its (out, in)
    weight does the transpose: it silences outputs of each input.

    Args:
      sparsity: the share of zeros, in [0, 1].
      stddev: of the others, a non-negative number.

    Raises:
      ValueError: if sparsity is outside [0, 1] or stddev is negative; at the draw, for
        a shape with fewer than two axes.

    >>> import jax
    >>> w = sparse(0.75)(jax.random.key(0), (8, 3))
    >>> (w == 0).sum(0).tolist()
    [6, 6, 6]

    Martens 2010, "Deep learning via Hessian-free optimization".
    """
    checks.between(0, 1, sparsity=sparsity)
    checks.non_negative(stddev=stddev)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        chosen, drawn = jax.random.split(key)
        inputs = (math.prod(shape[:-1]), shape[-1])
        rank = jnp.argsort(jax.random.uniform(chosen, inputs), axis=0)
        # A product a hair above a whole number is that number.
        silent = math.ceil(round(sparsity * inputs[0], 9))
        values = stddev * jax.random.normal(drawn, inputs, dtype)
        return jnp.where(rank < silent, 0, values).reshape(shape)

    return by_fans("sparse", init)
