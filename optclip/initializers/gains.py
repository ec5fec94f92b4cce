"""Gains: what an initializer multiplies its spread by to undo an activation.

A layer z = W x with Var W = 1 / fan_in keeps the mean square of its input. The
activation behind it then changes it by E f(z)², z ~ N(0, 1), which the gain undoes:

    gain(f) = 1 / √(E f(z)²)

PyTorch's table, which most papers and programs use, agrees for ReLU and its leaky kin;
it has 5/3 for tanh and 3/4 for SELU, which are chosen and not computed. So a name gives
the table's value where the table has one, and a function always the computed one.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from optclip._core import checks
from optclip._core.public import error, public

Activation = str | Callable[[jax.Array], jax.Array]

# `torch.nn.init.calculate_gain`; "leaky_relu" has its slope from the caller.
_TABLE = {
    "linear": 1.0,
    "identity": 1.0,
    "conv": 1.0,
    "conv_transpose": 1.0,
    "sigmoid": 1.0,
    "tanh": 5 / 3,
    "relu": math.sqrt(2),
    "selu": 0.75,
}
# Names without a value in the table, which stand for their function.
_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "celu": jax.nn.celu,
    "elu": jax.nn.elu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "hard_swish": jax.nn.hard_swish,
    "hard_tanh": jax.nn.hard_tanh,
    "mish": jax.nn.mish,
    "relu6": jax.nn.relu6,
    "silu": jax.nn.silu,
    "soft_sign": jax.nn.soft_sign,
    "softplus": jax.nn.softplus,
    "squareplus": jax.nn.squareplus,
    "swish": jax.nn.swish,
}
# Even, with 0 on the grid, where kinks are; the normal density vanishes beyond.
_GRID = np.linspace(-10.0, 10.0, 2**14 + 1)


@public
def gain(activation: Activation, negative_slope: float | None = None) -> float:
    """What an activation's spread must be multiplied by, to be what it was before.

        name       PyTorch's value, if it has one; else as for the function
        function   1 / √(E f(z)²),  z ~ N(0, 1)

    Args:
      activation: a name ("relu", "leaky_relu", "tanh", "gelu", …) or an elementwise
        function of a real float32 array. `gain("tanh")` is PyTorch's 5/3 and
        `gain(jnp.tanh)` the variance-preserving 1.5925; for SELU 3/4 and 1.
      negative_slope: of "leaky_relu", 0.01 unless said; no other activation has one.

    Returns:
      A Python float, so that it may go into any initializer, inside `jit` too. The
      integral is a sum over 16385 points of [-10, 10] and good to 5 digits.

    Raises:
      ValueError: for an unknown name (with the nearest ones), a slope where there is
        none, or a function that is zero, not finite or not elementwise.

    >>> import jax
    >>> round(gain("selu"), 4), round(gain(jax.nn.selu), 4), round(gain("gelu"), 4)
    (0.75, 1.0, 1.5335)

    He et al. 2015, arXiv 1502.01852, for ReLU; Klambauer et al. 2017, arXiv 1706.02515,
    for keeping mean and variance.
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
    known = ["leaky_relu", *_TABLE, *_FUNCTIONS]
    checks.known(known, activation=activation)
    return _by_quadrature(_FUNCTIONS[activation])


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
