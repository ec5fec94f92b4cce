"""Sets that look at every element on its own: intervals.

    x ← min(max(x, lower), upper)

Bounds that a dtype cannot represent are rounded inward: 0.01 is 0.009949 in bfloat16,
where the nearest number is 0.01001. No reductions, nothing to send on any mesh.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optclip._core import checks, meshes
from optclip._core.groupings import Shape, per_element
from optclip._core.measures import max_abs
from optclip._core.public import error, public
from optclip._core.rounding import bound_towards
from optclip.insight.norms import global_norm
from optclip.projections.base import Extent, Set, as_it_is, extent_of


@public
def box(lower: ArrayLike, upper: ArrayLike) -> Set:
    """Elements between two bounds.

        {x : lower ≤ x_i ≤ upper}

    Args:
      lower, upper: numbers, or arrays that broadcast against every leaf, in the units
        of the parameters; ±inf means no bound.

    Edge cases: ±inf goes to the bound, NaN stays NaN. Bounds are rounded inward to each
    leaf's dtype.

    Raises:
      ValueError: if a bound is NaN or not a number, or lower is above upper; at init,
        if a leaf is complex, a bound does not broadcast against it, or its dtype has no
        number between the bounds.

    >>> import jax.numpy as jnp, optclip
    >>> weights = {"w": jnp.array([-3.0, 0.2, 3.0])}
    >>> print(optclip.project_params(weights, box(-1.0, 0.5))["w"])
    [-1.   0.2  0.5]
    """
    return _interval(lower, upper)


@public
def nonnegative() -> Set:
    """Elements that are not negative.

        {x : x_i ≥ 0}

    Keras' NonNeg. Negative zero counts as zero. Edge cases and errors as for `box`.

    >>> import jax.numpy as jnp, optclip
    >>> print(optclip.project_params(jnp.array([-3.0, 0.2]), nonnegative()))
    [0.  0.2]
    """
    return _interval(0.0, np.inf)


@public
def linf_ball(radius: ArrayLike) -> Set:
    """Elements whose magnitude is bounded.

        {x : |x_i| ≤ radius}

    Args:
      radius: a non-negative number in the units of the parameters.

    Edge cases and errors as for `box`; radius 0 gives zeros.

    Raises:
      ValueError: if radius is negative, NaN or not a number.

    >>> import jax.numpy as jnp, optclip
    >>> print(optclip.project_params(jnp.array([-3.0, 0.2]), linf_ball(0.5)))
    [-0.5  0.2]
    """
    checks.non_negative(radius=radius)
    reach = bound_array(radius=radius)
    return _interval(-reach, reach)


@public
def init_box(kappa: ArrayLike = 1.0, *, axis_name: Any = None) -> Set:
    """Elements not much larger than the largest that their parameter started with.

        {x : |x_i| ≤ kappa · max_j |x_j at init|}   for each leaf

    Weight clipping. The paper's bound is that of a uniform initializer, 1/√fan_in; the
    largest first value is that bound there, and with kappa >= 1 no initializer's values
    are clipped at the start. It is kept in the state, one float32 a leaf.

    Args:
      kappa: a non-negative number; the paper uses 1 to 5.
      axis_name: under `pmap`, the mesh axes that leaves are spread over, if any.

    Edge cases: a leaf that starts at zero (a bias) has no scale and is left free.
    Elsewhere as for `box`. In `project_params` a parameter's own values are the start.

    Raises:
      ValueError: if kappa is negative, NaN or not a number; at init, if a leaf is
        complex.

    Reference: Elsayed, Lan, Lyle, Mahmood 2024, arXiv 2407.01704.

    >>> import jax.numpy as jnp, optax, optclip
    >>> params = jnp.array([0.5, -1.0])
    >>> tx = optclip.project(init_box(2.0))
    >>> updates, _ = tx.update(jnp.array([0.1, -9.0]), tx.init(params), params)
    >>> print(optax.apply_updates(params, updates))
    [ 0.6 -2. ]
    """
    checks.non_negative(kappa=kappa)
    checks.scalar(kappa=kappa)

    def init(param: jax.Array) -> jax.Array:
        axes = axis_name if meshes.bound(axis_name) else ()
        scale = global_norm(param, max_abs, axes).astype(jnp.float32)
        return jnp.where(scale > 0, scale, jnp.inf).reshape(1)

    def bounds(x: jax.Array, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Infinity, not chosen, would still make 0·inf of a kappa or a cotangent of 0.
        free = jnp.isinf(memory[0])
        scale = jnp.where(free, 1, memory[0])
        reach = jnp.maximum(jnp.asarray(kappa, jnp.float32) * scale, 0)
        reach = jnp.where(free, jnp.inf, reach)
        upper = bound_towards(reach, x.dtype, 0.0)
        return -upper, upper

    def project(x: jax.Array, seen: Extent, memory: jax.Array) -> jax.Array:
        return _clamp(x, *bounds(x, memory))

    def contains(x: jax.Array, seen: Extent, memory: jax.Array) -> jax.Array:
        lower, upper = bounds(x, memory)
        return (x >= lower) & (x <= upper)

    extent = extent_of(per_element(), real=True)
    return Set(extent, as_it_is, project, contains, init)


def bound_array(**named: Any) -> Any:
    """A number or array that can be calculated with; raises for anything else."""
    ((name, value),) = named.items()
    checks.real(**{name: value})
    return value if isinstance(value, jax.Array) else np.asarray(value, np.float64)


def _interval(lower: ArrayLike, upper: ArrayLike) -> Set:
    low, high = bound_array(lower=lower), bound_array(upper=upper)
    static = isinstance(low, np.ndarray) and isinstance(high, np.ndarray)
    if static and np.any(low > high):
        raise error(f"lower must not be above upper, got {lower} and {upper}.")
    fits = extent_of(per_element(), real=True)

    def bounds(dtype: Any) -> tuple[jax.Array, jax.Array]:
        return (
            bound_towards(low, dtype, np.inf),
            bound_towards(high, dtype, -np.inf),
        )

    def extent(path: str, leaf: jax.Array, shapes: Mapping[str, Shape]) -> Extent:
        found = fits(path, leaf, shapes)
        shape = jnp.shape(leaf)
        for name, bound in (("lower", low), ("upper", high)):
            if not _broadcasts(bound.shape, shape):
                raise error(
                    f"{name} must broadcast against every leaf, got shape "
                    f"{bound.shape} for {path!r} of shape {shape}."
                )
        if static:
            with jax.ensure_compile_time_eval():
                empty = bool(np.any(np.greater(*bounds(leaf.dtype))))
            if empty:
                raise error(
                    f"lower and upper must have a {leaf.dtype} between them, "
                    f"got {lower} and {upper} for {path!r}."
                )
        return found

    def project(x: jax.Array, seen: Extent, memory: Any) -> jax.Array:
        return _clamp(x, *bounds(x.dtype))

    def contains(x: jax.Array, seen: Extent, memory: Any) -> jax.Array:
        lower, upper = _aligned(x, *bounds(x.dtype))
        return (x >= lower) & (x <= upper)

    return Set(extent, as_it_is, project, contains)


def _broadcasts(shape: Shape, to: Shape) -> bool:
    ends = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(own in (1, other) for own, other in ends)


def _clamp(x: jax.Array, lower: jax.Array, upper: jax.Array) -> jax.Array:
    return jnp.clip(x, *_aligned(x, lower, upper))


def _aligned(x: jax.Array, *bounds: jax.Array) -> list[jax.Array]:
    """The bounds with leading axes of size 1, so that ranks are equal."""
    return [
        b if b.ndim == 0 else jax.lax.expand_dims(b, range(x.ndim - b.ndim))
        for b in bounds
    ]
