"""How big may a group be: what a threshold is, and the limits that are given.

A threshold is up to three small functions on one block of groups. `limit` gives the
limit from the threshold's state and from what it observes, `observe` gives the next
state, and `init` the first. The engine never lets it learn from a group that is not
finite. Limits that are learned stand with their rules, one file a paper.

| threshold | limit |
|---|---|
| `constant(limit)` | the number |
| `scheduled(schedule)` | schedule(step), as in Optax |
| `unlimited()` | none: measure only |
| `per_path(limits)` | a number or schedule for each named group |
| `tightest(a, b, …)` | the smallest of several |
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optclip._core import checks, numerics, paths
from optclip._core.public import Part, caller, error, naming, public
from optclip._core.types import Limit, Tree

S = TypeVar("S")


class Observation(NamedTuple):
    """What a threshold sees of one block.

    Attributes:
      size: the size of each group, float32 or float64, in the block's shape; one that
        is not finite shows as the largest number, and its limit is not used.
      step: how many updates came before, an int32 scalar.
      names: the groups' names where they have any (`per_leaf`, `per_label`).
      partial: whether leaves are masked or have no magnitude, so that limits may be
        given for groups that are not there.
      params: the sizes of the parameters, for a threshold that needs them.
      combined: the size of all finite groups together, a scalar, for a threshold that
        needs it.
    """

    size: jax.Array
    step: jax.Array
    names: tuple[str, ...] | None = None
    partial: bool = False
    params: jax.Array | None = None
    combined: jax.Array | None = None


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Threshold(Part, Generic[S]):
    """How big a group may be; see this module's docstring.

    Attributes:
      limit: (state, observation) to the limits, a scalar or an array of the block's
        shape; None for no limit at all.
      init: observation (sizes all zero) to the first state, or None for a threshold
        without state. The trailing axes of every array in the state are the block's.
      observe: (state, observation, limit) to the next state.
      needs_params: whether it reads `Observation.params`.
      needs_combined: whether it reads `Observation.combined`.
    """

    limit: Callable[[S, Observation], ArrayLike] | None
    init: Callable[[Observation], S] | None = None
    observe: Callable[[S, Observation, jax.Array], S] = lambda state, seen, limit: state
    needs_params: bool = False
    needs_combined: bool = False


@public
def constant(limit: ArrayLike) -> Threshold[tuple[()]]:
    """The same limit for every group at every step.

    Args:
      limit: a non-negative scalar, static or traced, in the units of the size. 0 gives
        zeros, infinity never clips.

    Returns:
      The threshold, without state.

    Raises:
      ValueError: if a static limit is negative, NaN, a bool, a string or not a scalar.

    >>> import optclip
    >>> tx = optclip.clip_by(constant(1.0))
    """
    checks.limit_like(limit=limit)
    if callable(limit):
        raise error(f"limit must be a number, got {limit!r}; use scheduled(schedule).")
    return _fixed(limit)


@public
def scheduled(schedule: optax.Schedule) -> Threshold[tuple[()]]:
    """A limit that follows an Optax schedule: schedule(step), with step 0 first.

    A value slightly below zero, where schedules tend to end, counts as 0 and shows in
    the metrics as it is.

    Args:
      schedule: a function from the int32 step count to a scalar in the units of the
        size.

    Returns:
      The threshold, without state: the clip counts the steps.

    Raises:
      ValueError: if it is not callable, or (at init) returns something that is not a
        real scalar, such as None.

    >>> import optax, optclip
    >>> tx = optclip.clip_by(scheduled(optax.linear_schedule(1.0, 0.1, 1000)))
    """
    if not callable(schedule):
        raise error(f"schedule must be callable, got {schedule!r}.")

    @naming(caller())
    def limit(state: tuple[()], observation: Observation) -> jax.Array:
        return jnp.asarray(at_step(schedule, observation.step))

    return Threshold(limit)


@public
def unlimited() -> Threshold[tuple[()]]:
    """No limit: sizes are measured, and no update is ever changed.

    Returns:
      The threshold, without state.

    >>> import optclip
    >>> tx = optclip.clip_by(unlimited())
    """
    return Threshold(None)


@public
def per_path(limits: Tree, default: Limit | None = None) -> Threshold[tuple[()]]:
    """A limit of its own for each named group.

    Args:
      limits: a tree of numbers or schedules that may be a prefix of the parameters,
        `{"encoder": 1.0, "head": {"kernel": 0.1, "bias": 1.0}}`; for `per_label`, a
        dict from labels.
      default: for groups that `limits` leaves out; None makes them an error.

    Returns:
      The threshold, without state.

    Raises:
      ValueError: if a limit is negative, NaN or not a number; at init, if a group has
        no limit, an entry of `limits` belongs to no group, or the grouping's groups
        have no names.

    >>> import jax.numpy as jnp, optclip
    >>> tx = optclip.clip_by(
    ...     per_path({"a": 1.0, "b": 9.0}), grouping=optclip.groupings.per_leaf()
    ... )
    >>> updates, _ = tx.update({"a": jnp.array([3.0]), "b": jnp.array([3.0])}, None)
    >>> print(updates["a"], updates["b"])
    [1.] [3.]
    """
    given = paths.leaves(limits)
    for path, value in given:
        checks.limit_like(**{f"limits[{str(path)!r}]": value})
    if default is not None:
        checks.limit_like(default=default)
    lookup = paths.prefix_lookup("limits", limits, default=default)

    @naming(caller())
    def limit(state: tuple[()], observation: Observation) -> jax.Array:
        names = observation.names
        if names is None:
            raise error(
                "limits must go with a grouping whose groups have names (per_leaf, "
                "per_label), got one whose groups have none."
            )
        named = {place for name in names for place in paths.prefixes_of(name)}
        unused = [p for p, _ in given if named.isdisjoint(paths.places_of(p))]
        if unused and not observation.partial:
            raise error(
                f"limits must name groups, got {paths.some(unused)} among the groups "
                f"{paths.some(list(names))}."
            )
        each = [
            at_step(lookup(name), observation.step, f"limits[{str(name)!r}]")
            for name in names
        ]
        return jnp.stack([jnp.asarray(x, observation.size.dtype) for x in each])

    return Threshold(limit)


@public
def tightest(*thresholds: Threshold) -> Threshold[tuple]:
    """The smallest limit of several thresholds, group by group.

    The way to add a hard ceiling to any rule that sets its own threshold.

    Args:
      *thresholds: at least one. Each learns from its own limit.

    Returns:
      The threshold, whose state is the tuple of theirs.

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

    def limits(states: tuple, observation: Observation) -> list[jax.Array | None]:
        return [
            None
            if threshold.limit is None
            else jnp.asarray(
                threshold.limit(state, observation), observation.size.dtype
            )
            for threshold, state in zip(
                thresholds, states or ((),) * len(thresholds), strict=True
            )
        ]

    def init(observation: Observation) -> tuple:
        return tuple(t.init(observation) if t.init else () for t in thresholds)

    def limit(states: tuple, observation: Observation) -> jax.Array:
        found = [x for x in limits(states, observation) if x is not None]
        return functools.reduce(jnp.minimum, found)

    def observe(states: tuple, observation: Observation, limit: jax.Array) -> tuple:
        if not states:  # beside thresholds with state, when none of these has any
            return states
        # Each learns from its own limit: a ceiling beside it is not what it decided.
        each = zip(thresholds, states, limits(states, observation), strict=True)
        return tuple(
            state if own is None else t.observe(state, observation, own)
            for t, state, own in each
        )

    learns = any(threshold.init for threshold in thresholds)
    return Threshold(
        None if all(threshold.limit is None for threshold in thresholds) else limit,
        init if learns else None,
        observe,
        needs_params=any(threshold.needs_params for threshold in thresholds),
        needs_combined=any(threshold.needs_combined for threshold in thresholds),
    )


def as_threshold(**named: Limit | Threshold) -> Threshold:
    """A rule's limit argument: a number, an array, a schedule or a threshold."""
    ((name, value),) = named.items()
    if isinstance(value, Threshold):
        return value
    checks.limit_like(**{name: value})
    return scheduled(value) if callable(value) else _fixed(value)


def _fixed(limit: ArrayLike) -> Threshold[tuple[()]]:
    number = numerics.as_float(limit)
    return Threshold(lambda state, observation: number)


def at_step(limit: Limit, step: jax.Array, name: str = "schedule(step)") -> ArrayLike:
    """The value of a number or schedule at a step, which may be NaN."""
    if not callable(limit):
        return numerics.as_float(limit)
    value = limit(step)
    checks.given(**{name: value})
    return numerics.as_float(value)
