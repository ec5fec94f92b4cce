"""`skip_step`: a bad step is dropped whole, and the inner optimizer never sees it.

    size of all updates > limit, or not finite, or the loss above its own limit
        → updates zero, inner state as it was (selected, never multiplied)

It wraps an optimizer, while a clip comes before one in a chain.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optclip._core import checks, numerics
from optclip._core.measures import Measure, l2, max_abs
from optclip._core.metrics import SkipMetrics
from optclip._core.public import error, public
from optclip._core.types import AxisName, Limit
from optclip.clipping import state_choice
from optclip.clipping.clip_by import clip_by
from optclip.clipping.thresholds import Threshold, as_threshold


class SkipState(NamedTuple):
    """The state of `skip_step`.

    Attributes:
      watch: what watches the updates: threshold state, size, limit, counters.
      value_watch: the same for the loss, () without `value_threshold`.
      metrics: the counters of skips; read all of them with `optclip.metrics`.
      inner_state: of the inner optimizer.
    """

    watch: Any  # ClipState
    value_watch: Any  # ClipState or ()
    metrics: SkipMetrics
    inner_state: optax.OptState


@public
def skip_step(
    inner: optax.GradientTransformation,
    threshold: Limit | Threshold,
    *,
    value_threshold: Limit | Threshold | None = None,
    max_consecutive: int = 10,
    measure: Measure = l2,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Drops a step whose updates, or whose loss, are out of bounds.

    On a dropped step the updates are zero and the inner optimizer's state stays as it
    was: no moment, no counter, no schedule moves. A step that is not finite is always
    dropped. After `max_consecutive` drops in a row a finite step passes whatever its
    size, so that a lasting change of level does not stop the training.

    Args:
      inner: any optimizer.
      threshold: how big all updates together may be: a non-negative number (infinity
        drops only steps that are not finite), a schedule of the step, or any of
        `optclip.thresholds` (`robust()`, `zscore()`, …).
      value_threshold: the same for the magnitude of the loss, which the training loop
        then passes as `update(updates, state, params, value=loss)`: a real scalar.
        `nnx.Optimizer.update` passes extra arguments on; Linen's
        `TrainState.apply_gradients` cannot.
      max_consecutive: a positive integer (static_args).
      measure: of the updates, one of `optclip.measures`.
      axis_name: inside `shard_map` and `pmap`, the mesh axes that the updates extend
        over, a name or a tuple of names; None reads them from the types (see
        `clip_by`). Gradients that `pmean` has averaged are whole on each of n devices:
        name no axis for them, or their norm is √n times too large. The loss must be the
        same on every device.

    Returns:
      A gradient transformation with state `SkipState`. A threshold learns from the size
      of dropped finite steps too, and never from one that is not finite, so the next
      good step passes.

    Metrics: `optclip.metrics(state)` has these keys, without `watch/` if `short=True`:
      watch/size, watch/limit: of all updates at the last step, before the verdict.
      watch/clipped_steps, watch/nonfinite_steps: how many were above the threshold, and
        how many not finite. watch/clipped_fraction is 1 or 0, watch/steps counts all.
      value_watch/…: the same of the loss, with `value_threshold`.
      skipped_steps, consecutive_skips: how many were dropped, and how many of them in a
        row up to now. Above the threshold but not dropped: `max_consecutive` was
        reached.
      inner_state/…: what rules within the inner optimizer measured, of the steps that
        were not dropped.

    Cost: a step reads the updates once more than the inner optimizer does, and no array
    of its state is copied, so it costs what a clip by the global norm costs.

    Edge cases: a size at its limit is within it. A NaN limit drops every step until
    `max_consecutive` is reached.

    Raises:
      ValueError: if inner is no gradient transformation, a static limit is negative,
        NaN or not a number, or max_consecutive is not a positive integer; at update, if
        `value` is missing or not a real scalar.

    Reference: [OLMo's SkipStepOptimizer](https://github.com/allenai/OLMo-core), here
    with any threshold.

    >>> import jax.numpy as jnp, optclip
    >>> tx = skip_step(optax.sgd(1.0, momentum=0.9), 10.0)
    >>> state = tx.init(jnp.zeros(1))
    >>> for size in (1.0, 1000.0, jnp.nan):
    ...     updates, state = tx.update(jnp.array([size]), state)
    >>> print(updates, state.metrics.skipped_steps)
    [0.] 2
    """
    checks.at_least(1, max_consecutive=max_consecutive)
    checks.optimizer(inner=inner)
    inner = optax.with_extra_args_support(inner)
    watch = _watch("threshold", threshold, measure, axis_name)
    value_watch = None
    if value_threshold is not None:
        value_watch = _watch("value_threshold", value_threshold, max_abs, ())

    def init(params: optax.Params) -> SkipState:
        return SkipState(
            watch=watch.init(params),
            value_watch=value_watch.init(jnp.zeros(())) if value_watch else (),
            metrics=SkipMetrics(
                skipped_steps=jnp.zeros((), jnp.int32),
                consecutive_skips=jnp.zeros((), jnp.int32),
            ),
            inner_state=inner.init(params),
        )

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SkipState]:
        if state is None:
            state = init(updates if params is None else params)
        if not isinstance(state, SkipState):
            raise checks.other_state(SkipState, state)
        watched: Any
        _, watched = watch.update(updates, state.watch, params)
        finite, high = _judge(watched)
        watched_value: Any = ()
        if value_watch:
            loss = _loss(extra_args)
            _, watched_value = value_watch.update(loss, state.value_watch)
            finite_value, high_value = _judge(watched_value)
            finite, high = finite & finite_value, high | high_value

        patient = state.metrics.consecutive_skips < max_consecutive
        skip = ~finite | (high & patient)
        moved, inner_state = state_choice.unless(
            skip,
            lambda: inner.update(updates, state.inner_state, params, **extra_args),
            state.inner_state,
        )
        counters = _count(state.metrics, skip)
        return moved, SkipState(watched, watched_value, counters, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _watch(
    name: Literal["threshold", "value_threshold"],
    limit: Limit | Threshold,
    measure: Measure,
    axis_name: AxisName,
) -> optax.GradientTransformationExtraArgs:
    """A clip of which only the state is used; its output is dead code to XLA."""
    threshold = as_threshold(**{name: limit})
    return clip_by(threshold, measure=measure, axis_name=axis_name)


def _judge(watched: Any) -> tuple[jax.Array, jax.Array]:
    """Whether the last size was finite, and whether it was not within its limit."""
    size, limit = watched.metrics.size, watched.metrics.limit
    if limit is None:  # of `unlimited()`
        return jnp.isfinite(size), jnp.zeros((), bool)
    return jnp.isfinite(size), ~(size <= jnp.maximum(limit, 0))  # nothing is within NaN


def _count(counters: SkipMetrics, skip: jax.Array) -> SkipMetrics:
    skipped, consecutive = counters
    return SkipMetrics(
        jnp.where(skip, optax.safe_increment(skipped), skipped),
        jnp.where(skip, optax.safe_increment(consecutive), 0),
    )


def _loss(extra_args: dict[str, Any]) -> jax.Array:
    if "value" not in extra_args:
        raise error(
            "value must be given to update beside a value_threshold, got none; call "
            "update(updates, state, params, value=loss)."
        )
    checks.given(value=extra_args["value"])
    return numerics.bound_in(extra_args["value"], jnp.float32)
