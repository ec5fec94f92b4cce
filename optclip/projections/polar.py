"""Functions of singular values, by decomposition or by products of matrices alone.

    W = U diag(σ) Vᵀ  ->  U diag(f(σ)) Vᵀ

`matrices` has the two sets that use them, f(σ) = min(σ, 1) and f(σ) = 1, and for
`spectral_clip` f(σ) = σ / √(1 + σ²). The last two axes are a matrix, all others count
matrices. W is float32 or wider, and finite.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optclip._core import numerics
from optclip._core.rounding import power_of_two


class Spectral(NamedTuple):
    """A function of singular values.

    Attributes:
      value: (singular values, slack) to new ones; the slack is relative.
      slope: its derivative, where singular values repeat.
      slack: by how much singular values are uncertain: `value` says what that means.
      polished: whether results have singular values 0 and 1, which a product improves.
    """

    value: Callable[[jax.Array, float], jax.Array]
    slope: Callable[[jax.Array], jax.Array]
    slack: float
    polished: bool = False


def cap(slack: float) -> Spectral:
    """Singular values above 1 become 1; a matrix with none above 1 + slack stays.

    What rounding alone makes beside a huge one becomes 0.
    """
    return Spectral(_capped, _capped_slope, slack)


def soft(slack: float) -> Spectral:
    """σ / √(1 + σ²): what is far below 1 stays, what is far above becomes 1."""
    return Spectral(_softened, _softened_slope, slack)


def one(slack: float) -> Spectral:
    """All become 1 but those that are 0, to the slack beside the largest."""
    return Spectral(_ones, jnp.zeros_like, slack, polished=True)


def _capped(s: jax.Array, slack: float) -> jax.Array:
    stays = jnp.all(s <= 1 + slack, axis=-1, keepdims=True)
    return jnp.where(stays, s, _without_noise(s, jnp.minimum(s, 1), slack))


def _without_noise(s: jax.Array, values: jax.Array, slack: float) -> jax.Array:
    noise = slack * jnp.max(s, axis=-1, keepdims=True)
    return jnp.where((s <= noise) & (noise > 1), 0, values)


def _capped_slope(s: jax.Array) -> jax.Array:
    return (s <= 1).astype(s.dtype)


def _softened(s: jax.Array, slack: float) -> jax.Array:
    return _without_noise(s, s / jnp.sqrt(1 + jnp.square(s)), slack)


def _softened_slope(s: jax.Array) -> jax.Array:
    return (1 + jnp.square(s)) ** -1.5


def _ones(s: jax.Array, slack: float) -> jax.Array:
    return (s > slack * jnp.max(s, axis=-1, keepdims=True)).astype(s.dtype)


def times(*factors: jax.Array) -> jax.Array:
    """The product of matrices, without the shortcuts of accelerators."""
    return functools.reduce(
        lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST), factors
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def mapped(w: jax.Array, f: Spectral) -> tuple[jax.Array, jax.Array]:
    """U diag(f(σ)) Vᵀ, the very same matrix where f changes no σ; and the σ."""
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    values = f.value(s, f.slack)
    found = times(u * values[..., None, :], vt)
    if f.polished:
        found = _polished(found)
    return jnp.where(jnp.all(values == s, axis=-1)[..., None, None], w, found), s


def _polished(x: jax.Array) -> jax.Array:
    """A step of Newton and Schulz: singular values near 1 come nearer."""
    if x.shape[-2] < x.shape[-1]:
        return _polished(x.mT).mT
    return x + times(x, identity(x) - times(x.mT, x)) / 2


@mapped.defjvp
def _mapped_jvp(
    f: Spectral, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    # Daleckii and Krein's formula, for singular values: divided differences on the
    # symmetric part, divided sums on the skew part; both have limits where the formula
    # of the singular vectors themselves divides by zero.
    (w,), (d_w,) = primals, tangents
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    ut, v, values = u.mT, vt.mT, f.value(s, f.slack)
    row, column = s[..., None, :], s[..., :, None]
    f_row, f_column = values[..., None, :], values[..., :, None]
    differences = _ratio(f_column - f_row, column - row, f.slope(column))
    sums = _ratio(f_column + f_row, column + row, f.slope(column))
    inner = times(ut, d_w, v)
    core = differences * (inner + inner.mT) / 2 + sums * (inner - inner.mT) / 2
    share = _ratio(values, s, f.slope(s))[..., None, :]
    left = times((d_w - times(u, ut, d_w)), v * share, vt)
    right = times(u * share, ut, d_w - times(d_w, v, vt))
    d_s = jnp.diagonal(inner, axis1=-2, axis2=-1)
    return mapped(w, f), (times(u, core, vt) + left + right, d_s)


def _ratio(a: jax.Array, b: jax.Array, otherwise: jax.Array) -> jax.Array:
    zero = b == 0
    return jnp.where(zero, otherwise, a / jnp.where(zero, 1, b))


def identity(w: jax.Array) -> jax.Array:
    """One for each matrix, of the size of its columns."""
    side = w.shape[-1]
    return jnp.broadcast_to(jnp.eye(side, dtype=w.dtype), (*w.shape[:-2], side, side))


# Jitted, because eager code would compile the loop at every call.
@functools.partial(jax.jit, static_argnums=1)
def polar_by_products(w: jax.Array, iterations: int) -> jax.Array:
    """The polar factor by x ← x (15 - 10 xᵀx + 3 (xᵀx)²) / 8, which takes σ to 1."""
    if w.shape[-2] < w.shape[-1]:
        return polar_by_products(w.mT, iterations).mT
    largest = jnp.max(jnp.abs(w), axis=(-2, -1), keepdims=True)
    w = w * (1 / power_of_two(largest))  # keeps squares in range
    size = numerics.safe_sqrt(jnp.sum(jnp.square(w), axis=(-2, -1), keepdims=True))
    x = w / jnp.where(size > 0, size, 1)
    unit = identity(w)

    def step(_: jax.Array, x: jax.Array) -> jax.Array:
        gram = times(x.mT, x)
        return times(x, (15 * unit - 10 * gram + 3 * times(gram, gram)) / 8)

    return jax.lax.fori_loop(0, iterations, step, x)


def capped_by_products(w: jax.Array, iterations: int) -> jax.Array:
    """Caps singular values at 1: w on the span of those below it, polar factor above.

    The projectors on both are made of the sign of wᵀw - 1. Where the sign has not yet
    converged, singular values are near 1, and w near its polar factor.
    """
    if w.shape[-2] < w.shape[-1]:
        return capped_by_products(w.mT, iterations).mT
    unit = identity(w)
    sign = polar_by_products(times(w.mT, w) - unit, iterations)
    polar = polar_by_products(w, iterations)
    below, above = _purified((unit - sign) / 2), _purified((unit + sign) / 2)
    return times(w, below) + times(polar, above)


def softened_by_products(w: jax.Array, iterations: int) -> jax.Array:
    """w (1 + wᵀw)^(-1/2): the polar factor of w above the identity, less the latter."""
    if w.shape[-2] < w.shape[-1]:
        return softened_by_products(w.mT, iterations).mT
    unit = identity(w) + jnp.zeros_like(w[..., :1, :])  # lies where w does
    both = jnp.concatenate([w, unit], axis=-2)
    return polar_by_products(both, iterations)[..., : w.shape[-2], :]


def _purified(x: jax.Array) -> jax.Array:
    """A projector whose eigenvalues are nearer to 0 and 1.

    Each on its own, not as one minus the other: what is left of w where it is far above
    1 has to vanish even beside w.
    """
    for _ in range(2):
        square = times(x, x)
        x = 3 * square - 2 * times(square, x)
    return x
