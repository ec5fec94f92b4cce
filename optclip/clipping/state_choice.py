"""An optimizer's step, or zero updates and the old state: what `skip_step` returns.

No copy of the state is made: every array of it is chosen where it is made.

Chosen at the end, `where(skip, old, new)` costs a copy of the state: the updates are
computed from `new`, so XLA writes it to memory beside the choice. But the updates of a
dropped step are zero whatever they were computed from. So they are computed from the
choice, and `new` is never written: the optimizer's program runs one operation at a
time, and what makes an array of the state is followed by the choice.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Var, jaxpr_as_fun
from jax.typing import ArrayLike

from optclip._core import numerics

Step = tuple[optax.Updates, optax.OptState]


def unless(skip: jax.Array, step: Callable[[], Step], state: optax.OptState) -> Step:
    """What `step` gives; zero updates and the state as it was, if `skip`."""

    def choose(old: ArrayLike, new: ArrayLike) -> jax.Array:
        return jnp.where(skip, old, new)  # of any kind, and of any two dtypes

    if isinstance(skip, Tracer):
        moved, new = _choosing_early(choose, step, state)
    else:  # an eager step writes every array anyway
        moved, new = step()
        new = jax.tree.map(choose, state, new)
    moved = jax.tree.map(lambda u: numerics.choose(skip, jnp.zeros_like(u), u), moved)
    return moved, new


def _choosing_early(
    choose: Callable[[ArrayLike, ArrayLike], jax.Array],
    step: Callable[[], Step],
    state: optax.OptState,
) -> Step:
    program, shapes = jax.make_jaxpr(step, return_shape=True)()
    jax.tree.map(lambda *_: None, state, shapes[1])  # raises if their structures differ
    values = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
    results, old = program.jaxpr.outvars, jax.tree.leaves(state)
    first = len(results) - len(old)  # of the state's; before it are the updates'
    early = {
        variable: array
        for variable, array in zip(results[first:], old, strict=True)
        if isinstance(variable, Var) and variable not in values
        if _kind(variable.aval) == _kind(array)
    }
    for operation in program.jaxpr.eqns:
        inputs = [v for v in operation.invars if isinstance(v, Var)]
        alone = program.jaxpr.replace(
            constvars=[], invars=inputs, outvars=operation.outvars, eqns=[operation]
        )
        made = jaxpr_as_fun(ClosedJaxpr(alone, []))(*(values[v] for v in inputs))
        for variable, x in zip(operation.outvars, made, strict=True):
            values[variable] = choose(early[variable], x) if variable in early else x

    out = [values[v] if isinstance(v, Var) else v.val for v in results]
    for index, array in enumerate(old, first):
        # One variable can be two arrays of the state, or one that came through.
        variable = results[index]
        if not isinstance(variable, Var) or early.get(variable) is not array:
            out[index] = choose(array, out[index])
    return jax.tree.unflatten(jax.tree.structure(shapes), out)


def _kind(array: object) -> tuple[object, object]:
    return getattr(array, "shape", None), getattr(array, "dtype", None)
