"""Value clipping: every element into an interval. Flat: it measures nothing.

    g ← min(max(g, min_value), max_value)

It has no groups, so it takes no part in the engine and keeps no metrics; a `monitor`
beside it in the chain gives the numbers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optclip._core import checks, numerics, paths
from optclip._core.public import error, public

Bound = ArrayLike | optax.Schedule


class StepState(NamedTuple):
    """The step count that a scheduled bound needs, int32."""

    steps: jax.Array


@public
def clip_by_value(
    max_delta: Bound | None = None,
    *,
    min_value: Bound | None = None,
    max_value: Bound | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clamps every element.

        g ← clip(g, -max_delta, max_delta)    or    g ← clip(g, min_value, max_value)

    Equals `optax.clip`, `torch.nn.utils.clip_grad_value_`, Keras' `clipvalue` and
    `tf.clip_by_value`. Needs no collective on any mesh.

    Args:
      max_delta: the largest magnitude, a non-negative scalar in the units of the
        updates, or a schedule. A complex element keeps its direction and is bounded in
        modulus.
      min_value: the lower bound, or None for no lower bound.
      max_value: the upper bound, or None for no upper bound.

    Returns:
      A transformation without state, or with a step count if a bound is a schedule.

    Edge cases: ±inf goes to the bound, NaN stays NaN, a NaN bound gives NaN. The bound
    is rounded to the dtype of each leaf, and leaves keep their dtype.

    Raises:
      ValueError: if no bound is given, or max_delta and another; if a static bound is
        NaN or not a number, max_delta is negative, or min_value is above max_value; at
        update, for a complex leaf between min_value and max_value.

    >>> import jax.numpy as jnp
    >>> updates, _ = clip_by_value(1.0).update(jnp.array([-3.0, 0.5, jnp.inf]), None)
    >>> print(updates)
    [-1.   0.5  1. ]
    """
    symmetric = max_delta is not None
    if symmetric == (min_value is not None or max_value is not None):
        raise error(
            "max_delta or (min_value, max_value) must be given, and not "
            f"both, got max_delta={max_delta}, min_value={min_value}, "
            f"max_value={max_value}."
        )
    if symmetric:
        checks.limit_like(max_delta=max_delta)
    else:
        _check_interval(min_value, max_value)
    scheduled = any(callable(bound) for bound in (max_delta, min_value, max_value))

    def init(params: optax.Params) -> optax.EmptyState | StepState:
        del params
        return StepState(jnp.zeros((), jnp.int32)) if scheduled else optax.EmptyState()

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        del params, extra_args
        state = init(updates) if state is None else state
        step = state.steps if scheduled else None
        if symmetric:
            bound = jnp.maximum(_at(max_delta, step), 0)
            lower, upper = -bound, bound
        else:
            lower, upper = _at(min_value, step), _at(max_value, step)

        flat, treedef = jax.tree_util.tree_flatten(updates)
        clamped = [
            _clamp(path, leaf, lower, upper, symmetric)
            if numerics.is_measured(leaf)
            else leaf
            for leaf, (path, _) in zip(flat, paths.leaves(updates), strict=True)
        ]
        if scheduled:
            state = StepState(jnp.asarray(optax.safe_increment(state.steps)))
        return jax.tree_util.tree_unflatten(treedef, clamped), state

    return optax.GradientTransformationExtraArgs(init, update)


@public
def clip(max_delta: Bound) -> optax.GradientTransformationExtraArgs:
    """`clip_by_value(max_delta)` under Optax's name.

    Args:
      max_delta: the largest magnitude, a non-negative scalar or a schedule.

    Raises:
      ValueError: if a static max_delta is negative, NaN, a bool or not a number.

    >>> import jax.numpy as jnp
    >>> print(clip(1.0).update(jnp.array([-3.0, 0.5]), None)[0])
    [-1.   0.5]
    """
    checks.limit_like(max_delta=max_delta)
    return clip_by_value(max_delta)


def _check_interval(min_value: Any, max_value: Any) -> None:
    given = {"min_value": min_value, "max_value": max_value}
    for name, bound in given.items():
        if bound is not None and not callable(bound):
            checks.scalar(**{name: bound})
            checks.real(**{name: bound})
    static = all(isinstance(b, (int, float, np.generic)) for b in given.values())
    if static and min_value > max_value:
        raise error(
            f"min_value must not be above max_value, got {min_value} and {max_value}."
        )


def _at(bound: Any, step: jax.Array | None) -> Any:
    """The bound's value at this step; None stays None."""
    if callable(bound):
        bound = bound(step)
        checks.given(**{"schedule(step)": bound})
    return bound


def _clamp(path: str, leaf: Any, lower: Any, upper: Any, symmetric: bool) -> jax.Array:
    x = jnp.asarray(leaf)
    if not jnp.iscomplexobj(x):
        bounds = [
            None if bound is None else jnp.asarray(bound).astype(x.dtype)
            for bound in (lower, upper)
        ]
        return _within(x, *bounds)
    if not symmetric:
        raise error(
            "min_value and max_value must go with real updates, got "
            f"complex ones at {path!r}; use max_delta, a bound on the modulus."
        )
    # An infinite component is a direction: a finite one beside it adds nothing.
    infinite = jnp.isinf(x.real) | jnp.isinf(x.imag)
    real, imag = (
        jnp.where(infinite, jnp.sign(part) * jnp.isinf(part).astype(part.dtype), part)
        for part in (x.real, x.imag)
    )
    x = jax.lax.complex(real, imag)
    size = jnp.abs(x)
    bound = jnp.asarray(upper).astype(size.dtype)
    over = infinite | ~(size <= bound)
    # Where the modulus of two finite parts overflows, only the direction counts.
    x = jnp.where(over & jnp.isinf(size), x / 4, x)
    size = jnp.where(over, jnp.abs(x), size)
    target = jnp.where(over, bound, size)
    return numerics.scale_by(x, numerics.factor(size, target))


def _within(x: jax.Array, lower: Any, upper: Any) -> jax.Array:
    if jnp.finfo(x.dtype).bits > 16:
        clamped = jnp.clip(x, lower, upper)
        # Chosen, because XLA flushes subnormal numbers where it takes a minimum.
        return jnp.where(clamped == x, x, clamped)
    # Of half precision a minimum is rounded, which takes XLA:CPU three to ten times as
    # long as comparisons do.
    for bound, beyond in ((lower, jnp.less), (upper, jnp.greater)):
        if bound is not None:
            over = beyond(x, bound) | jnp.isnan(bound)
            x = numerics.choose(over, jnp.full_like(x, bound), x)
    return x
