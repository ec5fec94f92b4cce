"""The doors: `project` ends a chain, `project_params` changes parameters at once.

    y = what apply_updates would give,  q = nearest point to y,  u ← the way from p to q

`places` says which leaves, `landing` goes the way in the parameters' own dtype.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optclip._core import checks, numerics, paths
from optclip._core.public import error, public
from optclip.projections.base import Set
from optclip.projections.boxes import linf_ball
from optclip.projections.landing import applied, landing, settled, wide_sum
from optclip.projections.places import (
    Chosen,
    chosen_by,
    is_weight,
    places,
    remembers,
    sets_by_path,
)


class ProjectState(NamedTuple):
    """The state of `project`.

    Attributes:
      steps: how many there were, int32; () with `every=1`.
      memory: what sets remember of the start, one vector; () for sets without memory.
    """

    steps: Any
    memory: Any


@public
def project(
    constraint: Set | Any, where: paths.Where | None = None, every: int = 1
) -> optax.GradientTransformationExtraArgs:
    """Keeps parameters in a set: the last transform of a chain.

        u ← P(p + u) - p

    such that `optax.apply_updates(params, updates)` lies in the set as the parameters'
    dtype represents it, for parameters inside and updates of their dtype or a wider
    one, eager and jitted; from outside after at most two steps.

    It must be the last: what follows changes the updates again, and a transform cannot
    see what follows it. `optax.chain(optax.adam(1e-3), project(sets.box(-1, 1)))` is
    right; so is `optax.MultiSteps` around that chain.

    Args:
      constraint: one of `optclip.sets`, or a tree of them that may be a prefix of the
        parameters.
      where: which leaves: a regular expression searched in the "/"-joined path, a
        predicate `(path, leaf) -> bool`, or a tree of booleans that may be a prefix of
        the parameters; None for all. Static (static_args).
      every: projects at every so many-th step, a positive integer; the steps between
        pass. Static (static_args).

    Returns:
      A gradient transformation with state `ProjectState`. Leaves outside `where`, None,
      MaskedNode, integers and keys pass untouched; an update of zero is projected like
      any other. Inside the set updates keep their bits.

    Edge cases: NaN stays NaN, for its whole group if the set has groups; infinity goes
    to a bound, and makes a group NaN.

    Raises:
      ValueError: if constraint is no set, or every is not a positive integer; at init,
        if `where` selects nothing in a tree that has leaves, or a set does not fit a
        leaf; at update, if params are missing or of other shapes than the updates.

    >>> import jax.numpy as jnp, optax, optclip
    >>> tx = optax.chain(optax.sgd(1.0), project(optclip.sets.nonnegative()))
    >>> params = jnp.array([0.1, 2.0])
    >>> updates, _ = tx.update(jnp.array([1.0, 1.0]), tx.init(params), params)
    >>> print(optax.apply_updates(params, updates))
    [0. 1.]
    """
    return _closing(constraint, chosen_by(where), every)


@public
def clip_weights(
    c: ArrayLike = 0.01, where: paths.Where | None = None, every: int = 1
) -> optax.GradientTransformationExtraArgs:
    """WGAN weight clipping: keeps weights in [-c, c], after the step.

        w ← clip(w + u, -c, c)

    The last transform of the critic's chain: `optax.chain(optax.rmsprop(5e-5),
    clip_weights(0.01))`. So the critic that the generator meets is clipped, as in the
    paper; code that clips before the step leaves it unclipped.

    Args:
      c: the largest magnitude of a weight, a non-negative number.
      where: as in `project`. None takes weights: leaves named kernel, embedding or w,
        a `weight` or any other leaf of at least two axes beside those of stacked
        layers, and never a scale or bias. Clipping a batch norm's scale to 0.01 all
        but turns it off. `where=optclip.everything` clips all, as the authors' code
        did.
      every: as in `project`.

    Edge cases, errors and state: as for `project` with `sets.linf_ball(c)`.

    Reference: Arjovsky, Chintala, Bottou 2017, arXiv 1701.07875.

    >>> import jax.numpy as jnp, optax
    >>> params = {"kernel": jnp.array([[0.005, 0.002]]), "scale": jnp.ones(2)}
    >>> tx = clip_weights(0.01)
    >>> updates = {"kernel": jnp.array([[0.5, -0.001]]), "scale": jnp.ones(2)}
    >>> updates, _ = tx.update(updates, tx.init(params), params)
    >>> after = optax.apply_updates(params, updates)
    >>> print(after["kernel"], after["scale"])
    [[0.01  0.001]] [2. 2.]
    """
    checks.non_negative(c=c)
    constraint = linf_ball(c)
    chosen = is_weight if where is None else chosen_by(where)
    return _closing(constraint, chosen, every)


@public
def project_params(
    params: Any, constraint: Set | Any, where: paths.Where | None = None
) -> Any:
    """The nearest parameters in a set: for the start, or after `apply_updates`.

    Args:
      params: a tree (dicts, FrozenDict, `nnx.State`, an Equinox module, …), of which a
        new one is returned; or an `nnx.Module`, whose parameters are changed in place.
      constraint, where: as in `project`.

    Returns:
      The tree with its dtypes and structure, or the same module.

    Raises:
      ValueError: if constraint is no set, does not fit a leaf, or `where` selects
        nothing in a tree that has leaves.

    >>> import jax.numpy as jnp, optclip
    >>> print(project_params({"w": jnp.array([-1.0, 3.0])}, optclip.sets.box(0.0, 2.0)))
    {'w': Array([0., 2.], dtype=float32)}
    """
    set_of = sets_by_path(constraint)
    if _is_nnx_module(params):
        from flax import nnx

        held = nnx.state(params, nnx.Param)
        nnx.update(params, project_params(held, constraint, where))
        return params
    flat, treedef = jax.tree_util.tree_flatten(params)
    for place in places(params, set_of, chosen_by(where)):
        memory = None if place.set.init is None else place.set.init(place.leaf)
        flat[place.index] = place.set.nearest(place.leaf, place.extent, memory)
    return jax.tree_util.tree_unflatten(treedef, flat)


def _closing(
    constraint: Any, chosen: Chosen, every: int
) -> optax.GradientTransformationExtraArgs:
    set_of = sets_by_path(constraint)
    checks.at_least(1, every=every)

    def init(params: optax.Params) -> ProjectState:
        kept = [
            place.set.init(place.leaf)
            for place in places(params, set_of, chosen)
            if place.set.init is not None
        ]
        memory: Any = ()
        if remembers(constraint):  # of an empty tree as well
            memory = jnp.concatenate(kept) if kept else jnp.zeros((1,), jnp.float32)
        return ProjectState(jnp.zeros((), jnp.int32) if every > 1 else (), memory)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ProjectState]:
        del extra_args
        if params is None:
            raise error("params must be given to update, got None.")
        state = init(params) if state is None else state
        if every == 1:
            return projected(updates, state.memory, params), state
        steps = optax.safe_increment(state.steps)
        updates = jax.lax.cond(
            steps % every == 0,
            lambda: projected(updates, state.memory, params),
            lambda: updates,
        )
        return updates, ProjectState(steps, state.memory)

    def projected(updates: Any, memory: Any, params: Any) -> Any:
        flat, treedef = jax.tree_util.tree_flatten(updates)
        found = {path: number for number, (path, _) in enumerate(paths.leaves(updates))}
        start = 0
        for place in places(params, set_of, chosen):
            own = None
            if place.set.init is not None:
                width = jax.eval_shape(place.set.init, place.leaf).size
                own, start = memory[start : start + width], start + width
            number = found.get(place.path)
            if number is None or not numerics.is_measured(flat[number]):
                continue
            p, u = place.leaf, jnp.asarray(flat[number])
            checks.same_shape(place.path, p, u)
            # Summed once more behind a barrier, so that XLA does not write the sum to
            # memory to share it between the measuring and the landing.
            seen = place.set.measure(
                wide_sum(*jax.lax.optimization_barrier((p, u))), place.extent
            )
            u = settled(u)
            y = applied(p, u)
            flat[number] = landing(p, u, y, place.set.project(y, seen, own))
        return jax.tree_util.tree_unflatten(treedef, flat)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_nnx_module(params: Any) -> bool:
    # Nobody who has a module has not imported flax.
    return any(
        base.__module__.startswith("flax.nnx") and base.__name__ == "Module"
        for base in type(params).__mro__
    )
