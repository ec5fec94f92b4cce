"""Value clipping: every element is clamped into an interval.

    g ← min(max(g, min_value), max_value)

It has no groups, so it does not use the engine of `clip_by` and keeps no metrics; a
`monitor` beside it in the chain measures what it sees.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optclip._core import checks, numerics, paths
from optclip._core.public import error, public
from optclip._core.types import Limit


class StepState(NamedTuple):
    """The step count that a scheduled bound needs, int32."""

    steps: jax.Array


State: TypeAlias = optax.EmptyState | StepState


@public
def clip_by_value(
    max_delta: Limit | None = None,
    *,
    min_value: Limit | None = None,
    max_value: Limit | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clamps every element.

        g ← clip(g, -max_delta, max_delta)    or    g ← clip(g, min_value, max_value)

    Equals `optax.clip`, `torch.nn.utils.clip_grad_value_`, Keras' `clipvalue` and
    `tf.clip_by_value`. Needs no collective on any mesh.

    Args:
      max_delta: the largest magnitude, a non-negative scalar of any numeric type in the
        units of the updates, or a schedule. A complex element keeps its direction and
        is bounded in modulus.
      min_value: the lower bound, a scalar or a schedule, or None for no lower bound.
      max_value: the upper bound, a scalar or a schedule, or None for no upper bound.

    Returns:
      A gradient transformation without state, or with a step count if a bound is a
      schedule. Integers, random keys and float0 pass unchanged.

    Edge cases: ±inf goes to the bound, NaN stays NaN, a NaN bound gives NaN. A bound is
    rounded to the dtype of each leaf, and leaves keep their dtype; a bound too large
    for the dtype bounds nothing. What lies within the bounds keeps its bits.

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
        _check_interval(min_value=min_value, max_value=max_value)
    bounds = (max_delta,) if symmetric else (min_value, max_value)
    scheduled = any(callable(bound) for bound in bounds)

    def init(params: optax.Params) -> State:
        del params
        return StepState(jnp.zeros((), jnp.int32)) if scheduled else optax.EmptyState()

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, State]:
        del params, extra_args
        state = init(updates) if state is None else state
        if scheduled and not isinstance(state, StepState):
            raise checks.other_state(StepState, state)
        step = state.steps if isinstance(state, StepState) else None
        clip_to = _within_modulus if symmetric else _between
        now = [_at_step(bound, step) for bound in bounds]

        def clamp(path: str, leaf: jax.Array) -> jax.Array:
            if not numerics.is_measured(leaf):
                return leaf
            return clip_to(path, jnp.asarray(leaf), *now)

        treedef = jax.tree_util.tree_structure(updates)
        clamped = [clamp(path, leaf) for path, leaf in paths.leaves(updates)]
        if isinstance(state, StepState):
            state = StepState(jnp.asarray(optax.safe_increment(state.steps)))
        return jax.tree_util.tree_unflatten(treedef, clamped), state

    return optax.GradientTransformationExtraArgs(init, update)


@public
def clip(max_delta: Limit) -> optax.GradientTransformationExtraArgs:
    """`clip_by_value(max_delta)` under the name that Optax gives it.

        g ← clip(g, -max_delta, max_delta)

    Args:
      max_delta: the largest magnitude, a non-negative scalar of any numeric type in the
        units of the updates, or a schedule.

    Returns:
      A gradient transformation without state, or with a step count for a schedule.

    Edge cases: ±inf goes to the bound, NaN stays NaN; see `clip_by_value`.

    Raises:
      ValueError: if a static max_delta is negative, NaN, a bool or not a number.

    >>> import jax.numpy as jnp
    >>> print(clip(1.0).update(jnp.array([-3.0, 0.5]), None)[0])
    [-1.   0.5]
    """
    checks.limit_like(max_delta=max_delta)
    return clip_by_value(max_delta)


def _check_interval(min_value: Any, max_value: Any) -> None:
    for name, bound in (("min_value", min_value), ("max_value", max_value)):
        if bound is not None and not callable(bound):
            checks.real(**{name: bound})
            checks.scalar(**{name: bound})
    static = (int, float, np.generic, np.ndarray)
    known = all(isinstance(bound, static) for bound in (min_value, max_value))
    if known and min_value > max_value:
        raise error(
            f"min_value must not be above max_value, got {min_value} and {max_value}."
        )


def _at_step(bound: Any, step: jax.Array | None) -> Any:
    """The value of a bound at this step; None stays None."""
    if callable(bound):
        bound = bound(step)
        checks.given(**{"schedule(step)": bound})
    return bound


def _within_modulus(path: str, x: jax.Array, max_delta: ArrayLike) -> jax.Array:
    """Each |x| at most max_delta."""
    del path
    real = jnp.finfo(x.dtype).dtype  # of the modulus of a complex number
    bound = numerics.bound_in(max_delta, real)
    bound = jnp.maximum(bound, jnp.zeros_like(bound))
    if not jnp.iscomplexobj(x):
        return _clamped(x, -bound, bound)
    given, lost = x, jnp.isnan(x.real) | jnp.isnan(x.imag) | jnp.isnan(bound)
    # An infinite component is a direction: a finite one beside it adds nothing.
    infinite = jnp.isinf(x.real) | jnp.isinf(x.imag)
    x = jax.lax.complex(
        *(
            jnp.where(infinite, jnp.sign(part) * jnp.isinf(part).astype(real), part)
            for part in (x.real, x.imag)
        )
    )
    size = jnp.abs(x)
    over = infinite | ~(size <= bound)
    # Where the modulus of two finite parts overflows, only the direction counts.
    x = jnp.where(over & jnp.isinf(size), x / 4, x)
    size = jnp.where(over, jnp.abs(x), size)
    target = jnp.where(over, numerics.finite(bound), size)
    scaled = numerics.scale_by(x, numerics.factor(size, target))
    # NaN stays, beside an infinity too; a bound of 0 would make it zero.
    return jnp.where(lost, jnp.nan, jnp.where(bound == jnp.inf, given, scaled))


def _between(
    path: str, x: jax.Array, lower: ArrayLike | None, upper: ArrayLike | None
) -> jax.Array:
    if jnp.iscomplexobj(x):
        raise error(
            "min_value and max_value must go with real updates, got "
            f"complex ones at {path!r}; use max_delta, a bound on the modulus."
        )
    bounds = [
        None if bound is None else numerics.bound_in(bound, x.dtype)
        for bound in (lower, upper)
    ]
    return _clamped(x, *bounds)


def _clamped(
    x: jax.Array, lower: jax.Array | None, upper: jax.Array | None
) -> jax.Array:
    if jnp.finfo(x.dtype).bits > 16:
        clamped = jnp.clip(x, lower, upper)
        # Chosen, because XLA flushes subnormal numbers where it takes a minimum.
        return jnp.where(clamped == x, x, clamped)
    lower = numerics.bound_in(-np.inf, x.dtype) if lower is None else lower
    upper = numerics.bound_in(np.inf, x.dtype) if upper is None else upper
    if x.dtype == jnp.bfloat16:
        return _clamped_bits(x, lower, upper)
    return _chosen(x, lower, upper)


def _chosen(x: jax.Array, lower: jax.Array, upper: jax.Array) -> jax.Array:
    """By comparisons: XLA:CPU rounds half precision after a minimum, which is slow."""
    below = (x < lower) | jnp.isnan(lower)
    above = (x > upper) | jnp.isnan(upper)
    low = jnp.minimum(lower, upper)  # of crossed bounds the upper one counts
    return jnp.where(above, upper, jnp.where(below, low, x))


@jax.custom_jvp
def _clamped_bits(x: jax.Array, lower: jax.Array, upper: jax.Array) -> jax.Array:
    """Of bfloat16 by integers of the same order.

    XLA:CPU makes a choice between numbers, or between bits that were numbers, in
    float32, where it flushes what is subnormal.
    """
    number, low, high = map(_ordered, (x, lower, upper))
    low, high = jnp.where(low == 0, -1, low), jnp.where(high == -1, 0, high)  # ±0
    missing = jnp.isnan(lower) | jnp.isnan(upper)
    low, high = (jnp.where(missing, 0x7FC0, key) for key in (low, high))  # NaN
    is_nan = (number > 0x7F80) | (number < -0x7F81)  # beyond either infinity
    clamped = jnp.where(is_nan, number, jnp.clip(number, low, high))
    return jax.lax.bitcast_convert_type(_bits_or_order(clamped), jnp.bfloat16)


@_clamped_bits.defjvp
def _clamped_bits_jvp(
    primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    return _clamped_bits(*primals), jax.jvp(_chosen, primals, tangents)[1]


def _ordered(x: jax.Array) -> jax.Array:
    """Integers in the order of bfloat16 numbers; -0 is -1."""
    return _bits_or_order(jax.lax.bitcast_convert_type(x, jnp.int16))


def _bits_or_order(bits: jax.Array) -> jax.Array:
    """From bits to integers in their numbers' order, or from these to bits."""
    return jnp.where(bits < 0, bits ^ 0x7FFF, bits)
