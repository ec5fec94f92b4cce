"""Sets that look at every element on its own: intervals.

    x ← min(max(x, lower), upper)

Bounds that a dtype cannot represent are rounded inward: 0.01 is 0.009949 in bfloat16,
where the nearest number is 0.01001. No reductions, nothing to send on any mesh.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optclip._core import checks, meshes, paths
from optclip._core.public import error, public
from optclip._core.rounding import bound_towards, rounded, static_bound
from optclip._core.types import AxisName, Radius, Shapes
from optclip.projections.base import Set, as_it_is, bound_array, not_real
from optclip.projections.radii import broadcasts, by_path

Bound: TypeAlias = np.ndarray | jax.Array


class Interval(NamedTuple):
    """The bounds of one leaf, in its dtype, of its rank or scalars."""

    lower: jax.Array
    upper: jax.Array


@public
def box(lower: ArrayLike, upper: ArrayLike) -> Set:
    """Elements between two bounds.

        {x : lower ≤ x_i ≤ upper}

    Args:
      lower, upper: numbers of any type, or arrays that broadcast against every leaf, in
        the units of the parameters; ±inf means no bound.

    Returns:
      A set for `project`, `project_params` and `intersection`.

    Edge cases: ±inf goes to the bound, NaN stays NaN. Bounds are rounded inward to each
    leaf's dtype; one that is beyond all of its numbers bounds nothing.

    Raises:
      ValueError: if a bound is NaN or not a number, or lower is above upper; at init,
        if a leaf is complex, a bound does not broadcast against it, or its dtype has no
        number between the bounds.

    >>> import jax.numpy as jnp, optclip
    >>> weights = {"w": jnp.array([-3.0, 0.2, 3.0])}
    >>> print(optclip.project_params(weights, box(-1.0, 0.5))["w"])
    [-1.   0.2  0.5]
    """
    low, high = bound_array(lower=lower), bound_array(upper=upper)
    static = isinstance(low, np.ndarray) and isinstance(high, np.ndarray)
    try:
        np.broadcast_shapes(low.shape, high.shape)
    except ValueError:
        raise error(
            f"lower and upper must broadcast, got shapes {low.shape} and {high.shape}."
        ) from None
    if static and np.any(low > high):
        raise error(f"lower must not be above upper, got {low} and {high}.")
    return _interval(lambda path: (low, high))


@public
def nonnegative() -> Set:
    """Elements that are not negative: Keras' NonNeg.

        {x : x_i ≥ 0}

    Returns:
      A set for `project`, `project_params` and `intersection`.

    Edge cases: negative zero counts as zero, infinity stays, NaN stays NaN.

    Raises:
      ValueError: at init, if a leaf is complex.

    >>> import jax.numpy as jnp, optclip
    >>> print(optclip.project_params(jnp.array([-3.0, 0.2]), nonnegative()))
    [0.  0.2]
    """
    ends = np.zeros(()), np.full((), np.inf)
    return _interval(lambda path: ends)


@public
def linf_ball(radius: Radius) -> Set:
    """Elements whose magnitude is bounded.

        {x : |x_i| ≤ radius}

    Args:
      radius: a non-negative number of any type, or an array that broadcasts against
        every leaf, in the units of the parameters; or a tree of these, which may be a
        prefix of the parameters.

    Returns:
      A set for `project`, `project_params` and `intersection`.

    Edge cases: radius 0 gives zeros; ±inf goes to the bound, NaN stays NaN. The radius
    is rounded towards zero to each leaf's dtype.

    Raises:
      ValueError: if radius is negative, NaN or not a number; at init, if a leaf is
        complex or the radius does not broadcast against it.

    >>> import jax.numpy as jnp, optclip
    >>> print(optclip.project_params(jnp.array([-3.0, 0.2]), linf_ball(0.5)))
    [-0.5  0.2]
    """
    reach_of = by_path(checks.non_negative, radius=radius)
    ends = "radius", "radius"
    return _interval(lambda path: (-(reach := reach_of(path)), reach), ends)


@public
def init_box(kappa: ArrayLike = 1.0, *, axis_name: AxisName = None) -> Set:
    """Elements not much larger than the largest that their parameter started with.

        {x : |x_i| ≤ kappa · max_j |x_j at init|}   for each leaf

    Weight clipping. The paper's bound is that of a uniform initializer, 1/√fan_in; the
    largest element at init is that bound there, and with kappa >= 1 no initializer's
    values are clipped at the start. It is kept in the state, one number a leaf.

    Args:
      kappa: a non-negative number of any type; the paper uses 1 to 5.
      axis_name: under `pmap`, the mesh axes that leaves are spread over, if any.

    Returns:
      A set for `project`, `project_params` and `intersection`. In `project_params` a
      parameter's own values are the start.

    Edge cases: a leaf that starts at zero (a bias) has no scale and is left free. One
    that starts with NaN or infinity, or is abstract at init (`jax.ShapeDtypeStruct`),
    has the scale NaN: its elements are NaN from the first step on, unless a saved state
    takes the place of that one. Otherwise ±inf goes to the bound, and NaN stays NaN.

    Raises:
      ValueError: if kappa is negative, NaN or not a number; at init, if a leaf is
        complex.

    Reference: Elsayed, Lan, Lyle, Mahmood 2024, https://arxiv.org/abs/2407.01704.

    >>> import jax.numpy as jnp, optax, optclip
    >>> params = jnp.array([0.5, -1.0])
    >>> tx = optclip.project(init_box(2.0))
    >>> updates, _ = tx.update(jnp.array([0.1, -9.0]), tx.init(params), params)
    >>> print(optax.apply_updates(params, updates))
    [ 0.6 -2. ]
    """
    factor = bound_array(checks.non_negative, kappa=kappa)
    checks.scalar(kappa=kappa)

    def extent(path: str, leaf: jax.Array, shapes: Shapes) -> None:
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise not_real(path)

    def init(param: jax.Array, extent: None) -> jax.Array:
        x = param.astype(np.promote_types(param.dtype, np.float32))
        largest = jnp.max(jnp.abs(x))
        largest = meshes.remembering(largest, jnp.sum(jnp.square(x)))
        given = axis_name if meshes.bound(axis_name) else ()
        axes = meshes.axes_of(given)(paths.Leaf("", param))
        axes = meshes.varying_axes(param) if axes is None else axes
        if axes:
            largest = meshes.largest_across(largest, axes)
        scale = jnp.where(largest < jnp.inf, largest, jnp.nan)
        return jnp.where(largest == 0, jnp.inf, scale).reshape(1)

    def interval(x: jax.Array, memory: jax.Array) -> Interval:
        # Infinity, not chosen, would still make 0·inf of a kappa or a cotangent of 0.
        free = jnp.isinf(memory[0])
        scale = jnp.where(free, 1, memory[0])
        reach = bound_towards(factor, memory.dtype, 0.0) * scale
        reach = jnp.where(free, jnp.inf, reach)
        upper = bound_towards(reach, x.dtype, 0.0)
        return Interval(-upper, upper)

    def project(x: jax.Array, measured: None, memory: jax.Array) -> jax.Array:
        return jnp.clip(x, *interval(x, memory))

    def contains(x: jax.Array, measured: None, memory: jax.Array) -> jax.Array:
        lower, upper = interval(x, memory)
        return (x >= lower) & (x <= upper)

    return Set(extent, as_it_is, project, contains, init)


def _interval(
    ends_of: Callable[[str], tuple[Bound, Bound]],
    names: tuple[str, str] = ("lower", "upper"),
) -> Set:
    def extent(path: str, leaf: jax.Array, shapes: Shapes) -> Interval:
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise not_real(path)
        low, high = ends_of(path)
        static = isinstance(low, np.ndarray) and isinstance(high, np.ndarray)
        inward = static_bound if static else bound_towards
        ends = []
        first, last = names
        for name, bound, toward in ((first, low, np.inf), (last, high, -np.inf)):
            if bound.ndim and not broadcasts(bound.shape, leaf.shape):
                raise error(
                    f"{name} must broadcast against every leaf, got shape "
                    f"{bound.shape} for {path!r} of shape {leaf.shape}."
                )
            if bound.ndim:
                bound = bound.reshape((1,) * (leaf.ndim - bound.ndim) + bound.shape)
            ends.append(inward(bound, leaf.dtype, toward))
        lower, upper = ends
        if static and np.any(lower > upper):
            raise error(
                f"lower and upper must have a {leaf.dtype} between them, "
                f"got {low} and {high} for {path!r}."
            )
        return Interval(jnp.asarray(lower, leaf.dtype), jnp.asarray(upper, leaf.dtype))

    def project(x: jax.Array, interval: Interval, memory: None) -> jax.Array:
        # A set that joins this one to another may ask for a wider dtype.
        wide = np.promote_types(x.dtype, np.float32)
        w, lower, upper = (y.astype(wide) for y in (x, *interval))
        nearest = jnp.where(w < lower, lower, jnp.where(w > upper, upper, w))
        return rounded(nearest, x.dtype)

    def contains(x: jax.Array, interval: Interval, memory: None) -> jax.Array:
        lower, upper = (bound.astype(x.dtype) for bound in interval)
        return (x >= lower) & (x <= upper)

    return Set(extent, lambda total, interval: interval, project, contains)
