"""Limits that are given: numbers, schedules, one for each named group, the smallest.

| threshold | limit |
|---|---|
| `constant(limit)` | the number |
| `scheduled(schedule)` | schedule(step), as in Optax |
| `unlimited()` | none: measure only |
| `per_path(limits)` | a number or schedule for each named group |
| `tightest(a, b, …)` | the smallest of several |
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optclip._core import checks, paths
from optclip._core.public import error, public
from optclip.clipping.thresholds.base import Seen, Threshold


@public
def constant(limit: ArrayLike) -> Threshold:
    """The same limit for every group at every step.

    Args:
      limit: a non-negative scalar, static or traced, in the units of the size. 0 gives
        zeros, infinity never clips.

    Raises:
      ValueError: if a static limit is negative, NaN, a bool, a string or not a scalar.

    >>> import optclip
    >>> tx = optclip.clip_by(constant(1.0))
    """
    checks.limit_like(limit=limit)
    if callable(limit):
        raise error(f"limit must be a number, got {limit!r}; use scheduled(schedule).")
    return Threshold(lambda _, seen: limit)


@public
def scheduled(schedule: optax.Schedule) -> Threshold:
    """A limit that follows an Optax schedule: schedule(step), with step 0 first.

    A value slightly below zero, where schedules tend to end, counts as 0 and shows in
    the metrics as it is.

    Args:
      schedule: a function from the int32 step count to a scalar.

    Raises:
      ValueError: if it is not callable, or (at init) returns something that is not a
        real scalar, such as None.

    >>> import optax, optclip
    >>> tx = optclip.clip_by(scheduled(optax.linear_schedule(1.0, 0.1, 1000)))
    """
    if not callable(schedule):
        raise error(f"schedule must be callable, got {schedule!r}.")

    def limit(state: Any, seen: Seen) -> ArrayLike:
        value = schedule(seen.step)
        checks.given(**{"schedule(step)": value})
        return value

    return Threshold(limit)


@public
def from_limit(**named: Any) -> Threshold:
    """A rule's threshold argument: a number, an array, a traced value, a schedule."""
    checks.limit_like(**named)
    ((_, value),) = named.items()
    if not callable(value):
        return Threshold(lambda _, seen: value)
    schedule: Any = value
    return scheduled(schedule)


@public
def unlimited() -> Threshold:
    """No limit: sizes are measured, and no update is ever changed.

    >>> import optclip
    >>> tx = optclip.clip_by(unlimited())
    """
    return Threshold(lambda _, seen: None)


@public
def per_path(
    limits: Any, default: ArrayLike | optax.Schedule | None = None
) -> Threshold:
    """A limit of its own for each named group.

    Args:
      limits: a tree of numbers or schedules that may be a prefix of the parameters,
        `{"encoder": 1.0, "head": {"kernel": 0.1, "bias": 1.0}}`; for `per_label`, a
        dict from labels.
      default: for groups that `limits` leaves out; None makes them an error.

    Raises:
      ValueError: if a limit is negative, NaN or not a number; at init, if a group has
        no limit, or the grouping's groups have no names.

    >>> import jax.numpy as jnp, optclip
    >>> tx = optclip.clip_by(
    ...     per_path({"a": 1.0, "b": 9.0}), grouping=optclip.groupings.per_leaf()
    ... )
    >>> updates, _ = tx.update({"a": jnp.array([3.0]), "b": jnp.array([3.0])}, None)
    >>> print(updates["a"], updates["b"])
    [1.] [3.]
    """
    for path, value in paths.leaves(limits):
        checks.limit_like(**{f"limits[{path!r}]": value})
    if default is not None:
        checks.limit_like(default=default)
    lookup = paths.prefix_lookup("limits", limits, default=default)

    def limit(state: Any, seen: Seen) -> jax.Array:
        if seen.names is None:
            raise error(
                "limits must go with a grouping whose groups have names "
                "(per_leaf, per_label), got one whose groups have none."
            )
        values = []
        for name in seen.names:
            value = lookup(name)
            value = value(seen.step) if callable(value) else value
            checks.given(**{f"limits[{name!r}]": value})
            values.append(jnp.asarray(value, seen.size.dtype))
        return jnp.stack(values)

    return Threshold(limit)


@public
def tightest(*thresholds: Threshold) -> Threshold:
    """The smallest limit of several thresholds, group by group.

    The way to add a hard ceiling to any rule that sets its own threshold.

    Raises:
      ValueError: if there is none, or an argument is not a threshold.

    >>> import optax, optclip
    >>> falling = scheduled(optax.exponential_decay(10.0, 100, 0.5))
    >>> tx = optclip.clip_by(tightest(falling, constant(5.0)))
    """
    if not thresholds:
        raise error("thresholds must be at least one, got none.")
    for index, threshold in enumerate(thresholds):
        checks.instance(Threshold, **{f"thresholds[{index}]": threshold})

    def each(states: tuple[Any, ...]) -> zip:
        return zip(thresholds, states, strict=True)

    def init(seen: Seen) -> tuple[Any, ...]:
        return tuple(t.init(seen) if t.init else () for t in thresholds)

    def limit(states: tuple[Any, ...], seen: Seen) -> jax.Array | None:
        states = states or ((),) * len(thresholds)
        limits = [threshold.limit(state, seen) for threshold, state in each(states)]
        arrays = [jnp.asarray(x, seen.size.dtype) for x in limits if x is not None]
        return functools.reduce(jnp.minimum, arrays) if arrays else None

    def observe(states: tuple[Any, ...], seen: Seen, limit: Any) -> tuple[Any, ...]:
        # Each learns from its own limit: a ceiling beside it is not what it decided.
        return tuple(
            t.observe(state, seen, t.limit(state, seen)) for t, state in each(states)
        )

    if not any(threshold.init for threshold in thresholds):
        return Threshold(limit)
    return Threshold(limit, init, observe)
