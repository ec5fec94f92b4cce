"""Sets of matrices, by their singular values.

    spectral_ball   W = U diag(σ) Vᵀ ← U diag(min(σ, radius)) Vᵀ
    orthogonal      W ← U Vᵀ, the polar factor

A parameter is read as a matrix from its inputs (over the window of a convolution) to
its outputs by its layout; stacked layers are matrices of their own, and a bias or scale
is one column. Computed in float32 or wider with products at full precision: exactly by
a singular value decomposition, or by products alone (Newton-Schulz), which suit large
matrices and accelerators. Both keep copies of the leaf in memory, about four and six.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optclip._core import checks, layouts, numerics
from optclip._core.groupings import Shape, stack_of
from optclip._core.public import public
from optclip._core.rounding import bound_towards, rounded
from optclip.projections.base import (
    Set,
    as_it_is,
    gathered,
    require_real,
    require_whole,
)
from optclip.projections.boxes import bound_array


class Sides(NamedTuple):
    """The axes of a matrix's rows and columns; all others count matrices."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]


@public
def spectral_ball(
    radius: ArrayLike = 1.0,
    *,
    iterations: int | None = None,
    stacked: bool | int | str | None = None,
) -> Set:
    """Matrices whose largest singular value is bounded.

        {W : σ_max(W) ≤ radius}

    The Lipschitz constant of a Dense layer is then at most the radius; a convolution's
    at most that times the root of its window's size.

    Args:
      radius: a positive number in the units of the parameters.
      iterations: None for singular value decompositions, or how many Newton-Schulz
        steps to take instead. After k steps no singular value is off by more than
        ‖WᵀW / radius² - 1‖_F · 1.875^-k / 4 radii: 16 steps do inside a training run,
        24 for a start far outside. Static.
      stacked: how many leading axes count independent layers, as in `per_unit`.

    Edge cases: a matrix inside keeps its bits (with iterations: up to rounding). It is
    2 units in the last place of the leaf's dtype smaller than the radius, because
    rounding the elements moves σ_max, by about half of one: in float16 and bfloat16 not
    never, but hardly ever beyond the radius. Derivatives are finite at repeated
    singular values and at zero. NaN makes its matrix NaN.

    Raises:
      ValueError: if radius is not positive, or iterations not a positive integer; at
        init, if a leaf is complex, or varies over a mesh axis inside `shard_map`.

    Reference: Newhouse et al. 2025, arXiv 2507.13338, who use other polynomials.

    >>> import jax.numpy as jnp, optclip
    >>> matrix = jnp.array([[3.0, 0.0], [0.0, 0.5]])
    >>> print(optclip.project_params(matrix, spectral_ball(2.0)).round(5))
    [[2.  0. ]
     [0.  0.5]]
    """
    checks.positive(radius=radius)
    checks.scalar(radius=radius)
    _check_iterations(iterations)
    bound = bound_array(radius=radius)

    def project(x: jax.Array, sides: Sides, memory: Any) -> jax.Array:
        w, back = _matrices(x, sides)
        goal = bound_towards(bound, w.dtype, 0.0)
        goal = goal * (1 - 2 * float(jnp.finfo(x.dtype).eps))
        scaled = w / goal
        if iterations is None:
            capped = _mapped(scaled, CAP)
        else:
            capped = _capped_by_products(scaled, iterations)
        inside = jnp.all(capped == scaled, axis=(-2, -1), keepdims=True)
        capped = jnp.where(inside, w, capped * goal)
        return back(rounded(capped, x.dtype)).astype(x.dtype)

    def contains(x: jax.Array, sides: Sides, memory: Any) -> jax.Array:
        return _largest(x, sides, lambda s: s, 0) <= bound

    extent = _sides_of(stacked)
    return Set(extent, as_it_is, project, contains)


@public
def orthogonal(
    *, iterations: int | None = None, stacked: bool | int | str | None = None
) -> Set:
    """Matrices whose columns (or rows, if those are fewer) are orthonormal.

        {W : WᵀW = I}   (or WWᵀ = I)

    The nearest one is the polar factor, which has all singular values 1.

    Args:
      iterations: None for singular value decompositions, or how many Newton-Schulz
        steps to take instead: a singular value s converges after about
        log(‖W‖_F / s) / log(1.875) + 3. Static.
      stacked: as in `spectral_ball`.

    Edge cases: singular values are 1 to 4 units in the last place of the leaf's dtype.
    Directions whose singular value is 0 stay 0, so a zero bias stays zero. The
    derivative grows as 1/s for small singular values s, and is taken as 0 at 0; at
    repeated ones it is finite. NaN makes its matrix NaN.

    Raises:
      ValueError: if iterations is not a positive integer; at init, if a leaf is
        complex, or varies over a mesh axis inside `shard_map`.

    >>> import jax.numpy as jnp, optclip
    >>> matrix = jnp.array([[0.0, 2.0], [-3.0, 0.0]])
    >>> print(optclip.project_params(matrix, orthogonal()).round(5))
    [[ 0.  1.]
     [-1.  0.]]
    """
    _check_iterations(iterations)

    def project(x: jax.Array, sides: Sides, memory: Any) -> jax.Array:
        w, back = _matrices(x, sides)
        if iterations is None:
            polar = _mapped(w, POLAR)
        else:
            polar = _polar_by_products(w, iterations)
        return back(rounded(polar, x.dtype)).astype(x.dtype)

    def contains(x: jax.Array, sides: Sides, memory: Any) -> jax.Array:
        slack = 4 * float(jnp.finfo(x.dtype).eps)
        return _largest(x, sides, lambda s: jnp.abs(s - 1), slack) <= slack

    extent = _sides_of(stacked)
    return Set(extent, as_it_is, project, contains)


def _check_iterations(iterations: int | None) -> None:
    if iterations is not None:
        checks.at_least(1, iterations=iterations)


def _sides_of(stacked: bool | int | str | None) -> Callable[..., Sides]:
    def extent(path: str, leaf: jax.Array, shapes: Mapping[str, Shape]) -> Sides:
        require_real(path, leaf)
        require_whole(path, leaf)
        layout = layouts.layout(path, shapes, stacked=stack_of(stacked, path))
        return Sides((*layout.window, *layout.inputs), layout.outputs)

    return extent


def _matrices(x: jax.Array, sides: Sides) -> tuple[jax.Array, Any]:
    w, back = gathered(x, *sides)
    return w.astype(numerics.wide_dtype(x.dtype)), back


def _largest(
    x: jax.Array, sides: Sides, of: Callable[[jax.Array], jax.Array], least: float
) -> jax.Array:
    """The largest number that a function makes of singular values, matrix by matrix."""
    w, _ = _matrices(x, sides)
    worst = jnp.max(of(jnp.linalg.svd(w, compute_uv=False)), axis=-1, initial=least)
    inner = (*sides.rows, *sides.columns)
    return worst.reshape([1 if n in inner else size for n, size in enumerate(x.shape)])


class Spectral(NamedTuple):
    """A function of singular values: its values, and its slopes where they repeat."""

    value: Callable[[jax.Array], jax.Array]
    slope: Callable[[jax.Array], jax.Array]


CAP = Spectral(lambda s: jnp.minimum(s, 1), lambda s: (s <= 1).astype(s.dtype))
POLAR = Spectral(lambda s: (s > 0).astype(s.dtype), jnp.zeros_like)


def _times(*factors: jax.Array) -> jax.Array:
    """The product of matrices, without the shortcuts of accelerators."""
    return functools.reduce(
        lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST), factors
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _mapped(w: jax.Array, f: Spectral) -> jax.Array:
    """U diag(f(σ)) Vᵀ; the very same matrix where f changes no singular value."""
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    same = jnp.all(f.value(s) == s, axis=-1)[..., None, None]
    return jnp.where(same, w, _times(u * f.value(s)[..., None, :], vt))


@_mapped.defjvp
def _mapped_jvp(f: Spectral, primals: Any, tangents: Any) -> Any:
    # Daleckii and Krein's formula, for singular values: divided differences on the
    # symmetric part, divided sums on the skew part; both have limits where the formula
    # of the singular vectors themselves divides by zero.
    (w,), (d_w,) = primals, tangents
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    ut, v, values = u.mT, vt.mT, f.value(s)
    row, column = s[..., None, :], s[..., :, None]
    f_row, f_column = values[..., None, :], values[..., :, None]
    differences = _ratio(f_column - f_row, column - row, f.slope(column))
    sums = _ratio(f_column + f_row, column + row, f.slope(column))
    inner = _times(ut, d_w, v)
    core = differences * (inner + inner.mT) / 2 + sums * (inner - inner.mT) / 2
    share = _ratio(values, s, f.slope(s))[..., None, :]
    left = _times((d_w - _times(u, ut, d_w)), v * share, vt)
    right = _times(u * share, ut, d_w - _times(d_w, v, vt))
    return _mapped(w, f), _times(u, core, vt) + left + right


def _ratio(a: jax.Array, b: jax.Array, otherwise: jax.Array) -> jax.Array:
    zero = b == 0
    return jnp.where(zero, otherwise, a / jnp.where(zero, 1, b))


def _polar_by_products(w: jax.Array, iterations: int) -> jax.Array:
    """The polar factor by x ← x (15 - 10 xᵀx + 3 (xᵀx)²) / 8, which takes σ to 1."""
    if w.shape[-2] < w.shape[-1]:
        return _polar_by_products(w.mT, iterations).mT
    size = jnp.max(jnp.abs(w), axis=(-2, -1), keepdims=True)  # keeps squares in range
    w = w / jnp.where(size > 0, size, 1)
    size = numerics.safe_sqrt(jnp.sum(jnp.square(w), axis=(-2, -1), keepdims=True))
    x = w / jnp.where(size > 0, size, 1)
    one = _identity(w)

    def step(_: Any, x: jax.Array) -> jax.Array:
        gram = _times(x.mT, x)
        return _times(x, (15 * one - 10 * gram + 3 * _times(gram, gram)) / 8)

    return jax.lax.fori_loop(0, iterations, step, x)


def _identity(w: jax.Array) -> jax.Array:
    side = w.shape[-1]
    return jnp.broadcast_to(jnp.eye(side, dtype=w.dtype), (*w.shape[:-2], side, side))


def _capped_by_products(w: jax.Array, iterations: int) -> jax.Array:
    """Caps singular values at 1: w - (w - polar) on the span of those above it.

    The span's projector is made of the sign of wᵀw - 1. Where the sign has not yet
    converged, singular values are near 1, and w near its polar factor.
    """
    if w.shape[-2] < w.shape[-1]:
        return _capped_by_products(w.mT, iterations).mT
    one = _identity(w)
    above = (one + _polar_by_products(_times(w.mT, w) - one, iterations)) / 2
    return w - _times(w - _polar_by_products(w, iterations), above)
