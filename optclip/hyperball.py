"""Matrices on the spheres that they started on, moved by a fixed share of their norm.

    u ← rate · R · u / ‖u‖        R = ‖w at init‖, matrix by matrix
    w ← R · (w + u) / ‖w + u‖

The optimizer says where to go, the rate how far: neither the size of its updates nor a
weight decay matters any more. `sets.init_sphere` keeps R, and `project`'s landing puts
each step on the sphere in the parameters' own dtype.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optclip._core import checks, layouts, numerics
from optclip._core.groupings import Grouping, per_matrix
from optclip._core.public import error, public
from optclip._core.types import AxisName, Limit, Shapes, Where
from optclip.clipping.thresholds import at_step
from optclip.projections.base import Extent, Sum
from optclip.projections.init_sphere import first_norm, init_sphere
from optclip.projections.norm_arithmetic import norm_of, scaled
from optclip.projections.project import (
    Member,
    chosen_by,
    landed,
    projecting,
    sets_by_path,
)


class HyperballState(NamedTuple):
    """The state of `hyperball`.

    Attributes:
      inner_state: of the optimizer.
      steps: how many there were, int32, which a schedule sees.
      sphere: the radii, as `project(sets.init_sphere(...))` keeps them.
    """

    inner_state: optax.OptState
    steps: jax.Array
    sphere: Any  # a ProjectState


@public
def hyperball(
    optimizer: optax.GradientTransformation,
    rate: Limit,
    *,
    grouping: Grouping = per_matrix(),
    where: Where | None = None,
    tangent: bool = False,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Steps of a fixed relative size on the spheres that matrices started on.

        u ← rate · R · u / ‖u‖,   w ← R · (w + u) / ‖w + u‖,   R = ‖w at init‖

    Hyperball. It wraps an optimizer (AdamH is this around Adam, MuonH around Muon) and
    ends a chain, as `project` does. Of the optimizer's updates the direction counts,
    with the sign that its learning rate gives it, and not the size: its learning rate
    and weight decay act only on leaves that `where` leaves out, which it updates as it
    would alone.

        hyperball(optax.adam(1e-3), rate=0.01)
        hyperball(optax.contrib.muon(1e-3), optax.cosine_decay_schedule(0.02, 1000))

    Args:
      optimizer: any, as it would be used alone.
      rate: the size of a step, relative to the matrix: a non-negative number, an array
        of shape () or a schedule of the step.
      grouping: what has a norm: `groupings.per_matrix()` (default: each stacked layer
        and expert apart; `per_matrix(stacked=…)` says what is stacked), `per_leaf()`,
        or `per_unit(axes=…)`, which can say what a head is.
      where: which leaves: a regular expression searched in the "/"-joined path, a
        predicate `(path, leaf) -> bool`, or a tree of booleans that may be a prefix of
        the parameters. None takes leaves of at least two axes beside those of stacked
        layers. Static (static_args).
      tangent: whether the part of an update along w is taken away before it is sized:
        u ← u - ⟨u, w⟩ w / ‖w‖², so that all of the step is along the sphere. Static.
      axis_name: inside `shard_map` and `pmap`, the mesh axes that groups extend over: a
        name, a tuple of names, () for groups that are whole, or a tree of these.

    Returns:
      A gradient transformation with state `HyperballState`, one number a group beside
      the optimizer's own. Parameters keep their first norms to 4 units in the last
      place of their dtype at every step.

    Edge cases: an update of zero (or, with tangent, one along w) moves nothing. A
    matrix that starts at zero has no norm to keep: it gets the optimizer's own updates,
    as if `where` left it out. In bfloat16 a step of less than about 1/256 of an element
    rounds away, so keep float32 parameters for small rates. NaN or infinity makes a
    group NaN. `init` takes abstract leaves (`jax.ShapeDtypeStruct`): their radii are
    NaN, never 0, until a saved state is restored in their place.

    Raises:
      ValueError: if optimizer is none, rate is negative, NaN, not a scalar or not a
        number, or grouping joins leaves; at init, if `where` selects nothing in a tree
        that has leaves; at update, if params are missing or of other shapes than the
        updates, or state is another rule's.

    Reference: Hyperball 2026, https://arxiv.org/abs/2606.16899.

    >>> import jax.numpy as jnp, optclip
    >>> kernel = jnp.array([[3.0, 0.0], [0.0, 4.0]])
    >>> params = {"kernel": kernel, "bias": jnp.zeros(2)}
    >>> tx = hyperball(optax.sgd(1.0), rate=0.1)
    >>> grads = {"kernel": jnp.array([[9.0, 0.0], [0.0, 0.0]]), "bias": jnp.ones(2)}
    >>> updates, _ = tx.update(grads, tx.init(params), params)
    >>> stepped = optax.apply_updates(params, updates)
    >>> print(stepped["kernel"], stepped["bias"])
    [[2.6499949 0.       ]
     [0.        4.2399917]] [-1. -1.]
    """
    checks.optimizer(optimizer=optimizer)
    checks.limit_like(rate=rate)
    optimizer = optax.with_extra_args_support(optimizer)
    sphere = init_sphere(grouping, axis_name=axis_name)
    chosen = is_matrix if where is None else chosen_by(where)
    sphere_of = sets_by_path(sphere)
    keep = projecting(sphere, chosen, every=1)

    def init(params: optax.Params) -> HyperballState:
        steps = jnp.zeros((), jnp.int32)
        return HyperballState(optimizer.init(params), steps, keep.init(params))

    def update(
        updates: optax.Updates,
        state: Any,  # a HyperballState, or None
        params: optax.Params | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, HyperballState]:
        if params is None:
            raise error("params must be given to update, got None.")
        state = init(params) if state is None else state
        if not isinstance(state, HyperballState):
            raise checks.other_state(HyperballState, state)
        updates, inner_state = optimizer.update(
            updates, state.inner_state, params, **extra_args
        )
        share = jnp.asarray(at_step(rate, state.steps, "rate(step)"))

        def resize(member: Member, u: jax.Array, memory: jax.Array) -> jax.Array:
            extent, v, least = member.extent, u, 0.0
            if tangent:
                v, least = along_sphere(u, member.leaf, extent)
            norm = norm_of(Sum((v,)), extent)
            radius, free = first_norm(norm.value, memory)
            goal = jnp.maximum(share, 0).astype(radius.dtype) * radius
            goal = jnp.where(norm.size <= least, 0, goal)
            sized = scaled(v, norm, goal, jnp.zeros((), bool), nearest=True)
            return jnp.where(free, u, sized.astype(u.dtype))

        updates = landed(sphere_of, chosen, updates, state.sphere, params, resize)
        steps = jnp.asarray(optax.safe_increment(state.steps))
        return updates, HyperballState(inner_state, steps, state.sphere)

    return optax.GradientTransformationExtraArgs(init, update)


def is_matrix(path: str, leaf: jax.Array, shapes: Shapes) -> bool:
    """Whether a leaf has two axes or more beside those of stacked layers."""
    return leaf.ndim > 1 and bool(layouts.layout(path, shapes, unnamed="io").outputs)


def along_sphere(u: jax.Array, w: jax.Array, extent: Extent) -> tuple[jax.Array, float]:
    """The direction of u without its part along w, and what norm is mere rounding.

    In float32 or wider, of norm 1 or less.
    """
    wide = numerics.accumulation_dtype(u.dtype, w.dtype)
    u, w = (_unit(numerics.widen(x, wide), extent) for x in (u, w))
    product = jnp.sum((u * w.conj()).real, extent.axes, keepdims=True)
    if extent.mesh:
        product = jax.lax.psum(product, extent.mesh)
    return u - numerics.times(w, product), 8 * float(jnp.finfo(wide).eps)


def _unit(x: jax.Array, extent: Extent) -> jax.Array:
    norm = norm_of(Sum((x,)), extent)
    return scaled(x, norm, jnp.ones_like(norm.value), jnp.zeros((), bool), nearest=True)
