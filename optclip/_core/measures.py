"""How big: the magnitude of one group of elements.

A measure is a monoid. `map` turns an element into a summand, `combine` joins summands
(within a leaf, across leaves, across devices), and `finalize` turns the total of
`count` elements into a size:

    size = finalize(combine(map(x_1), ..., map(x_n)), n)

Every size is positively homogeneous, size(c·x) = c·size(x), which is what lets the
engine measure at another scale where summands would overflow or vanish.

| measure | size |
|---|---|
| `l2` | √Σ\\|x\\|² (default) |
| `rms` | √(Σ\\|x\\|² / n) |
| `l1` | Σ\\|x\\| |
| `max_abs` | max \\|x\\| |
| `lp(p)` | (Σ\\|x\\|^p)^(1/p) |

A complex element counts by its modulus.
"""

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optclip._core import checks, meshes, numerics
from optclip._core.public import Part, error, public


class Combine(NamedTuple):
    """One associative operation: within an array, and across devices."""

    reduce: Callable[..., jax.Array]
    across: Callable[..., jax.Array]


SUM = Combine(jnp.sum, jax.lax.psum)
MAX = Combine(jnp.max, meshes.largest_across)
ANY = Combine(jnp.any, meshes.anywhere)  # of flags


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Measure(Part):
    """How big a group is; see this module's docstring for the three functions.

    Attributes:
      map: element (real or complex, float32 or wider) to real summand.
      combine: `SUM` or `MAX`.
      finalize: (total, count) to size; count is a Python number.
      power: the exponent p of the summands, which decides when they overflow; None if
        summands are as large as the size itself.
      averages: whether the size is a mean, so that in a union every group weighs as
        many elements as it has.
    """

    map: Callable[[jax.Array], jax.Array]
    combine: Combine
    finalize: Callable[[jax.Array, float], jax.Array]
    power: float | None = None
    averages: bool = False


def _square(x: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(x):
        return jnp.square(x.real) + jnp.square(x.imag)
    return jnp.square(x)


l2 = Measure(
    map=_square,
    combine=SUM,
    finalize=lambda total, count: numerics.safe_sqrt(total),
    power=2.0,
).as_constant("l2")

rms = Measure(
    map=_square,
    combine=SUM,
    finalize=lambda total, count: numerics.safe_sqrt(total / max(count, 1)),
    power=2.0,
    averages=True,
).as_constant("rms")

l1 = Measure(map=jnp.abs, combine=SUM, finalize=lambda total, count: total).as_constant(
    "l1"
)

max_abs = Measure(
    map=jnp.abs, combine=MAX, finalize=lambda total, count: total
).as_constant("max_abs")


@public
def lp(p: float) -> Measure:
    """The p-norm, (Σ|x|^p)^(1/p), for any real p >= 1.

    `lp(1)`, `lp(2)` and `lp(inf)` are `l1`, `l2` and `max_abs`. Values are right over
    float32's range for every p; derivatives only where |x|^p does not overflow.

    Args:
      p: a real number >= 1; `math.inf` is allowed.

    Returns:
      The measure.

    Raises:
      ValueError: if p is not a number, is NaN or is below 1.

    >>> import optclip
    >>> import jax.numpy as jnp
    >>> print(optclip.global_norm([jnp.array([1.0, 2.0])], measure=lp(3)))
    2.0800838
    """
    checks.real(p=p)
    if p < 1:
        raise error(f"p must be at least 1, got {p}.")
    if p == 1:
        return l1
    if p == 2:
        return l2
    if p == math.inf:
        return max_abs

    power = float(p)

    def finalize(total: jax.Array, count: float) -> jax.Array:
        zero = total == 0  # where the root's derivative is infinite
        nonzero = jnp.where(zero, 1, total)
        used, inverse = (float(np.asarray(x, total.dtype)) for x in (power, 1 / power))
        # The exponent's rounding error counts as often as the total has e-folds.
        missing = float(1 / Fraction(used) - Fraction(inverse))
        folds = jnp.log(jnp.minimum(nonzero, jnp.finfo(total.dtype).max))
        correction = jax.lax.stop_gradient(1 + missing * folds)
        return jnp.where(zero, total, nonzero**inverse * correction)

    return Measure(lambda x: jnp.abs(x) ** power, SUM, finalize, power=power)


def joined(combine: Combine, parts: list[jax.Array]) -> jax.Array:
    """Several parts of one shape combined.

    Behind a barrier, because XLA:CPU would make one chain of operations of a stack and
    its reduction: the norm of 1000 small leaves compiles in 1.1 s, and with a chain or
    a tree of additions in 2.9 s.
    """
    if len(parts) == 1:
        return parts[0]
    return combine.reduce(jax.lax.optimization_barrier(jnp.stack(parts)), axis=0)
