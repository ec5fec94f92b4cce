"""Sets of matrices, by their singular values.

    spectral_ball   W = U diag(σ) Vᵀ ← U diag(min(σ, radius)) Vᵀ
    orthogonal      W ← U Vᵀ, the polar factor

A parameter is read as a matrix from its inputs (over the window of a convolution) to
its outputs by its layout; stacked layers are matrices of their own, and a bias or scale
is one column. Computed in float32 or wider with products at full precision: exactly by
a singular value decomposition, or by products alone (Newton-Schulz), which suit large
matrices and accelerators. Both keep copies of the leaf in memory, about four and six.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from optclip._core import checks, layouts, numerics
from optclip._core.groupings import stack_of
from optclip._core.public import public
from optclip._core.rounding import bound_towards, power_of_two, rounded
from optclip._core.types import Radius, Shapes, Stacked
from optclip.projections import polar
from optclip.projections.base import (
    Set,
    as_it_is,
    is_complex,
    not_real,
    require_whole,
    trailing,
)
from optclip.projections.radii import Sized, sized


class Sides(NamedTuple):
    """The axes of a matrix's rows and columns; all others count matrices."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def axes(self) -> tuple[int, ...]:
        return self.rows + self.columns


@public
def spectral_ball(
    radius: Radius = 1.0,
    *,
    iterations: int | None = None,
    stacked: Stacked = None,
) -> Set:
    """Matrices whose largest singular value is bounded.

        {W : σ_max(W) ≤ radius}

    The Lipschitz constant of a Dense layer is then at most the radius; a convolution's
    at most that times the root of its window's size.

    Args:
      radius: a positive number of any type, in the units of the parameters; an array
        of one for each matrix, of the leaf's shape without the axes of a matrix or with
        1 in their place; or a tree of these, which may be a prefix of the parameters.
      iterations: None for singular value decompositions, or how many Newton-Schulz
        steps to take instead. After k steps no singular value is off by more than
        ‖WᵀW / radius² - 1‖_F · 1.875^-k / 4 radii: 16 steps do inside a training run,
        24 for a start far outside. Static.
      stacked: how many leading axes count independent layers: True (one) or a number
        for every leaf, a regular expression for the leaves with one, or None to read it
        off the parameter's layout.

    Returns:
      A set for `project`, `project_params` and `intersection`.

    On a mesh: stacked matrices that are split over the stack send nothing. A matrix
    that is split is made whole first. With Explicit axes, devices share the stack out
    where the size of the mesh axis divides it: one all-to-all there and one back, in
    which each device receives its share of the leaf. Otherwise every device gathers the
    leaf (one all-gather for each such axis), and all compute the same. With Auto axes
    XLA moves what it must, in general by gathering.

    Edge cases: a matrix inside keeps its bits (with iterations: up to rounding), and so
    does one that was projected. Those are never outside, by their exact norm, and at
    most 12 + 6√n units in the last place inside, for n rows or columns up to 1024; in
    float16 and bfloat16, where rounding the elements moves σ_max too, 2 units of theirs
    more, which they may rarely exceed. Derivatives are finite at repeated singular
    values and at zero. NaN or infinity makes its matrix NaN. A JAX array is not
    checked: a radius below 0 counts as 0.

    Raises:
      ValueError: if radius is not positive, or iterations not a positive integer; at
        init, if radius does not fit a leaf, or a leaf is complex or varies over a mesh
        axis inside `shard_map`.

    Reference: Newhouse et al. 2025, https://arxiv.org/abs/2507.13338, who use other
    polynomials.

    >>> import jax.numpy as jnp, optclip
    >>> matrix = jnp.array([[3.0, 0.0], [0.0, 0.5]])
    >>> print(optclip.project_params(matrix, spectral_ball(2.0)).round(4))
    [[2.  0. ]
     [0.  0.5]]
    """
    _check_iterations(iterations)

    def project(x: jax.Array, ball: Sized, memory: None) -> jax.Array:
        top = ball.bound(numerics.accumulation_dtype(x.dtype), x.ndim)
        top, _ = trailing(top, *ball.extent)
        return capped(x, ball.extent, top, iterations)[0]

    def contains(x: jax.Array, ball: Sized, memory: None) -> jax.Array:
        limit = ball.bound(numerics.accumulation_dtype(x.dtype), x.ndim)
        return _largest(x, ball.extent, lambda s: s, 0) <= limit

    extent = sized(_sides_of(stacked), checks.positive, radius=radius)
    return Set(extent, as_it_is, project, contains)


@public
def orthogonal(*, iterations: int | None = None, stacked: Stacked = None) -> Set:
    """Matrices whose columns (or rows, if those are fewer) are orthonormal.

        {W : WᵀW = I}   (or WWᵀ = I)

    The nearest one is the polar factor, which has all singular values 1.

    Args:
      iterations: None for singular value decompositions, or how many Newton-Schulz
        steps to take instead: a singular value s converges after about
        log(‖W‖_F / s) / log(1.875) + 3. Static.
      stacked: how many leading axes count independent layers: True (one) or a number
        for every leaf, a regular expression for the leaves with one, or None to read it
        off the parameter's layout.

    Returns:
      A set for `project`, `project_params` and `intersection`.

    On a mesh: stacked matrices that are split over the stack send nothing. A matrix
    that is split is made whole first. With Explicit axes, devices share the stack out
    where the size of the mesh axis divides it: one all-to-all there and one back, in
    which each device receives its share of the leaf. Otherwise every device gathers the
    leaf (one all-gather for each such axis), and all compute the same. With Auto axes
    XLA moves what it must, in general by gathering.

    Edge cases: singular values are 1 to 4 units in the last place of the leaf's dtype
    for up to 256 rows or columns, and to 5 for up to 1024.
    Directions whose singular value is 0, to rounding beside the largest, become 0: a
    zero bias stays zero, and a matrix of ones has one singular value 1. The derivative
    grows as 1/s for small singular values s, and is taken as 0 at 0; at repeated ones
    it is finite. NaN or infinity makes its matrix NaN.

    Raises:
      ValueError: if iterations is not a positive integer; at init, if a leaf is
        complex, or varies over a mesh axis inside `shard_map`.

    Reference: Higham 1986, https://doi.org/10.1137/0907079.

    >>> import jax.numpy as jnp, optclip
    >>> matrix = jnp.array([[0.0, 2.0], [-3.0, 0.0]])
    >>> print(optclip.project_params(matrix, orthogonal()).round(5))
    [[ 0.  1.]
     [-1.  0.]]
    """
    _check_iterations(iterations)

    def project(x: jax.Array, sides: Sides, memory: None) -> jax.Array:
        w, undo, finite = _matrices(x, sides)
        if iterations is None:
            found, _ = polar.mapped(w, polar.one(_error(max(w.shape[-2:]), w.dtype)))
        else:
            found = polar.polar_by_products(w, iterations)
        found = jnp.where(finite, found, jnp.nan)
        return undo(rounded(found, x.dtype)).astype(x.dtype)

    def contains(x: jax.Array, sides: Sides, memory: None) -> jax.Array:
        wide = numerics.accumulation_dtype(x.dtype)
        side = max(math.prod(x.shape[n] for n in axes) for axes in sides)
        slack = 4 * float(jnp.finfo(x.dtype).eps) + _error(side, wide)
        # Directions that are 0 stay 0.
        return _largest(x, sides, lambda s: jnp.minimum(s, abs(s - 1)), 0) <= slack

    return Set(_sides_of(stacked), as_it_is, project, contains)


def capped(
    x: jax.Array,
    sides: Sides,
    bound: ArrayLike,
    iterations: int | None,
    spikes: bool = False,
    soft: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Matrices with no singular value above a positive bound, and how large they were.

    How large is the largest singular value of each; by products, which do not find it,
    the bound or, where more than a thousandth of it was taken off, twice the bound.
    With `spikes`, products that would leave the largest far above the bound lose the
    small directions beside it instead. `soft` takes σ to σ / √(1 + σ²/bound²).
    """
    w, undo, finite = _matrices(x, sides)
    # How far off a singular value may be, as computed: what is at most one margin
    # inside counts as inside, what is capped comes two margins inside.
    margin = _error(max(w.shape[-2:]), w.dtype)
    rounding = 0.0 if x.dtype == w.dtype else 2 * float(jnp.finfo(x.dtype).eps)
    top = bound_towards(bound, w.dtype, 0.0)
    goal = top * (1 - rounding - 2 * margin)
    near, unit = _near(w, goal)
    if iterations is None:
        found, s = polar.mapped(near, (polar.soft if soft else polar.cap)(margin))
        largest = jnp.max(s, axis=-1, initial=0)[..., None, None] * unit
        largest = jnp.minimum(largest, jnp.finfo(w.dtype).max)
    else:
        # A cap takes products of wᵀw, whose singular values are the squares.
        steps = iterations if soft else iterations / 2
        within = _within_reach(near, steps) if spikes else near
        by = polar.softened_by_products if soft else polar.capped_by_products
        found = by(within, iterations)
        off = jnp.sum(jnp.square(near - found), axis=(-2, -1), keepdims=True)
        largest = jnp.where(off > 1e-6, 2 * top, top)
    inside = jnp.all(found == near, axis=(-2, -1), keepdims=True)
    found = jnp.where(inside, w, found * goal)
    found, largest = (jnp.where(finite, y, jnp.nan) for y in (found, largest))
    return undo(rounded(found, x.dtype)).astype(x.dtype), largest


def _within_reach(near: jax.Array, steps: float) -> jax.Array:
    """As large as these steps bring to within a hundredth of the goal, at most."""
    reach = 0.2 * 1.875**steps
    squares = jnp.sum(jnp.square(near), axis=(-2, -1), keepdims=True)
    return near * (reach / jnp.maximum(numerics.safe_sqrt(squares), reach))


def _check_iterations(iterations: int | None) -> None:
    if iterations is not None:
        checks.at_least(1, iterations=iterations)


def _sides_of(stacked: Stacked) -> Callable[[str, jax.Array, Shapes], Sides]:
    count = stack_of(stacked)

    def extent(path: str, leaf: jax.Array, shapes: Shapes) -> Sides:
        if is_complex(leaf):
            raise not_real(path)
        require_whole(path, leaf)
        layout = layouts.layout(path, shapes, stacked=count(path))
        return Sides((*layout.window, *layout.inputs), layout.outputs)

    return extent


def _matrices(
    x: jax.Array, sides: Sides
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array], jax.Array]:
    """Each matrix along the last two axes, what undoes it, and which are finite.

    The others are zeros: a decomposition of an infinity does not return.
    """
    w, undo = trailing(x, *sides)
    w = w.astype(numerics.accumulation_dtype(x.dtype))
    finite = jnp.all(jnp.isfinite(w), axis=(-2, -1), keepdims=True)
    return jnp.where(finite, w, 0), undo, finite


def _error(side: int, wide: DTypeLike) -> float:
    """By how much, relatively, a computed singular value may be off: 4 + 2√n units."""
    return float(jnp.finfo(wide).eps) * (4 + 2 * math.sqrt(side))


def _near(w: jax.Array, goal: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The matrices in units of the goal, those far outside moved towards it; the units.

    At 2^30 goals what is no larger than the goal is noise beside the rest; and squares
    stay in range.
    """
    largest = jnp.max(jnp.abs(w), axis=(-2, -1), keepdims=True)
    far = jax.lax.stop_gradient(largest) > 2.0**30 * goal
    power = power_of_two(largest)
    near = jnp.where(far, w * (1 / power) * 2.0**30, w / jnp.where(far, 1, goal))
    return near, jnp.where(far, power * 2.0**-30, goal)


def _largest(
    x: jax.Array, sides: Sides, of: Callable[[jax.Array], jax.Array], least: float
) -> jax.Array:
    """The largest number that a function makes of singular values, matrix by matrix."""
    w, _, finite = _matrices(x, sides)
    worst = jnp.max(of(jnp.linalg.svd(w, compute_uv=False)), axis=-1, initial=least)
    worst = jnp.where(finite[..., 0, 0], worst, jnp.nan)
    inner = (*sides.rows, *sides.columns)
    return worst.reshape([1 if n in inner else size for n, size in enumerate(x.shape)])
