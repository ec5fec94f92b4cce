"""`project` ends a chain: after `optax.apply_updates` parameters lie in their set.

    y = what apply_updates would give,  q = nearest point to y,  u ← q - p

A set says what q is, `landing` what u is in the dtypes of parameter and update. Here is
which leaves are projected, on which set, and when. Paths are the same in the updates,
the parameters and the constraint, so that trees which name their leaves differently at
`init` and `update` are the same here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optclip._core import checks, numerics, paths
from optclip._core.public import error, public
from optclip._core.types import Shapes, Tree, Where
from optclip.projections.base import Set, Sum, joined
from optclip.projections.landing import applied, steered

Constraint: TypeAlias = Set | Tree
Memory: TypeAlias = jax.Array | tuple[()]
Chosen: TypeAlias = Callable[[str, jax.Array, Shapes], bool]
SetOf: TypeAlias = Callable[[str], Set]
Resize: TypeAlias = Callable[["Member", jax.Array, Any], jax.Array]


class ProjectState(NamedTuple):
    """The state of `project`.

    Attributes:
      steps: how many there were, int32; () with `every=1`.
      memory: what sets remember of the start, one vector; () for sets without memory.
      apart: what they remember in arrays of a leaf's rank, by the order of leaves.
    """

    steps: ArrayLike | tuple[()]
    memory: Memory
    apart: tuple[jax.Array, ...] = ()


@public
def project(
    constraint: Constraint, where: Where | None = None, every: int = 1
) -> optax.GradientTransformationExtraArgs:
    """Keeps parameters in a set: the last transform of a chain.

        u ← P(p + u) - p

    such that `optax.apply_updates(params, updates)` lies in the set as the parameters'
    dtype represents it, for parameters inside and updates of their dtype or a wider
    one, eager and jitted; from outside after at most two steps.

    Behind an optimizer, in one `jit`: boxes join its pass over memory and keep no
    temporary copy. Sets of norms look twice, so the optimizer's update is written to
    memory, once, and nothing else; `project_params` after `apply_updates` looks at the
    parameters themselves, and is cheaper for them.

    It must be the last: what follows changes the updates again, and a transform cannot
    see what follows it. `optax.chain(optax.adam(1e-3), project(sets.box(-1, 1)))` is
    right; so are several `project` in a row for different leaves, and
    `optax.MultiSteps` around that chain. Before the optimizer it bounds a gradient
    step that is never taken, and parameters leave the set at the next step:
    `project_params(params, constraint, strict=True)` says so.

    Args:
      constraint: one of `optclip.sets`, or a tree of them (dicts, lists, tuples, …)
        that may be a prefix of the parameters.
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
    to a bound, and makes a group NaN. `init` takes abstract leaves
    (`jax.ShapeDtypeStruct`): what a set remembers of one is NaN until a saved state is
    restored in its place.

    Raises:
      ValueError: if constraint is no set, or every is not a positive integer; at init,
        if `where` selects nothing in a tree that has leaves, or a set does not fit a
        leaf; at update, if params are missing or of other shapes than the updates, or
        state is another rule's.

    >>> import jax.numpy as jnp, optax, optclip
    >>> tx = optax.chain(optax.sgd(1.0), project(optclip.sets.nonnegative()))
    >>> params = jnp.array([0.1, 2.0])
    >>> updates, _ = tx.update(jnp.array([1.0, 1.0]), tx.init(params), params)
    >>> print(optax.apply_updates(params, updates))
    [0. 1.]
    """
    return projecting(constraint, chosen_by(where), every)


def projecting(
    constraint: Constraint, chosen: Chosen, every: int
) -> optax.GradientTransformationExtraArgs:
    """The transformation, for every public function that makes one."""
    set_of = sets_by_path(constraint)
    checks.at_least(1, every=every)
    projected = functools.partial(landed, set_of, chosen)
    has_memory = remembers(constraint)

    def init(params: optax.Params) -> ProjectState:
        kept = [
            own.set.remembered(own.leaf, own.extent)
            for own in members(params, set_of, chosen)
        ]
        apart = tuple(part for part in kept if part is not None and part.ndim != 1)
        memory: Memory = ()
        if has_memory:  # of an empty tree as well
            vectors = [part for part in kept if part is not None and part.ndim == 1]
            memory = joined(vectors or [jnp.zeros((1,), jnp.float32)])
        steps = jnp.zeros((), jnp.int32) if every > 1 else ()
        return ProjectState(steps, memory, apart)

    def update(
        updates: optax.Updates,
        state: Any,  # a ProjectState, or None
        params: optax.Params | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, ProjectState]:
        del extra_args
        if params is None:
            raise error("params must be given to update, got None.")
        state = init(params) if state is None else state
        if not isinstance(state, ProjectState):
            raise checks.other_state(ProjectState, state)
        counts, recalls = (not isinstance(part, tuple) for part in state[:2])
        if (counts, recalls) != (every > 1, has_memory):
            raise error("state must be that of this rule, got one of other arguments.")
        if every == 1:
            return projected(updates, state, params), state
        steps = jnp.asarray(optax.safe_increment(jnp.asarray(state.steps)))
        state = state._replace(steps=steps)
        updates = jax.lax.cond(
            steps % every == 0, projected, _unchanged, *(updates, state, params)
        )
        return updates, state

    return optax.GradientTransformationExtraArgs(init, update)


def landed(
    set_of: SetOf,
    chosen: Chosen,
    updates: optax.Updates,
    state: ProjectState,
    params: optax.Params,
    resize: Resize | None = None,
) -> optax.Updates:
    """The updates that land.

    Args:
      set_of, chosen: the set of each leaf, and whether it is projected.
      updates, state, params: as `update` has them.
      resize: what becomes of an update before it is projected, from the leaf, the
        update and what the set remembers of the leaf.
    """
    flat, treedef = jax.tree_util.tree_flatten(updates)
    index = None  # the same leaves in both trees
    if treedef != jax.tree_util.tree_structure(params):
        index = {path: n for n, (path, _) in enumerate(paths.leaves(updates))}
    memory, apart = state.memory, state.apart
    for member in members(params, set_of, chosen):
        own = None
        if member.set.init is not None:
            own, memory, apart = _recalled(member, jnp.asarray(memory), apart)
        number = member.index if index is None else index.get(member.path)
        if number is None or not numerics.is_measured(flat[number]):
            continue  # a frozen parameter has no update, or MaskedNode for one
        p, u = member.leaf, jnp.asarray(flat[number])
        if p.shape != u.shape:
            raise checks.other_shape(member.path, p, u)
        u = u if resize is None else resize(member, u, own)
        total = Sum((p, u))
        measured = member.set.measure(total, member.extent)
        u, y = applied(p, total.terms[-1])
        q = member.set.project(y, measured, own)
        flat[number] = steered(p, u, y, q)
    return jax.tree_util.tree_unflatten(treedef, flat)


def _recalled(
    member: Member, memory: jax.Array, apart: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    """What is remembered of a leaf, and the rest for those that follow."""
    known = member.set.memory_like(member.leaf, member.extent)
    if known.ndim == 1:
        own, memory = memory[: known.size], memory[known.size :]
    else:
        own, apart = apart[0] if apart else memory[:0], apart[1:]
    if own.shape != known.shape:
        raise error(
            f"state must remember an array of shape {known.shape} for "
            f"{member.path!r}, got shape {own.shape}; it is that of other sets or of "
            "another mesh."
        )
    return own.astype(known.dtype), memory, apart


def _unchanged(
    updates: optax.Updates, state: ProjectState, params: optax.Params
) -> optax.Updates:
    return updates


class Member(NamedTuple):
    """A leaf that is projected: where it is in the tree, on what, over which axes."""

    index: int
    path: str
    leaf: jax.Array
    set: Set
    extent: Any


def members(params: Tree, set_of: SetOf, chosen: Chosen) -> list[Member]:
    """The leaves that are projected."""
    abstract = jax.ShapeDtypeStruct  # `init` takes these as well
    leaves: list[tuple[int, str, Any]] = [
        (index, path, value if isinstance(value, abstract) else jnp.asarray(value))
        for index, (path, value) in enumerate(paths.leaves(params))
        if numerics.is_measured(value)
    ]
    shapes = {path: leaf.shape for _, path, leaf in leaves}
    kept = [entry for entry in leaves if chosen(*entry[1:], shapes)]
    if leaves and not kept:
        listed = paths.some(list(shapes))
        raise error(f"where must select a leaf, got none of {listed}.")
    found = []
    for index, path, leaf in kept:
        own = set_of(path)
        found.append(Member(index, path, leaf, own, own.extent(path, leaf, shapes)))
    return found


def sets_by_path(constraint: Constraint) -> SetOf:
    """The set of each path."""
    if isinstance(constraint, Set):
        return lambda path: constraint
    wrong = "constraint must be a Set of optclip or a tree of them, got"
    leaves = paths.leaves(constraint)
    for path, value in leaves:
        if not isinstance(value, Set):
            at = f" at {path!r}" if path else ""
            raise error(f"{wrong} {_short(value)}{at}.")
    if not leaves:
        raise error(f"{wrong} {_short(constraint)}.")
    lookup = paths.prefix_lookup("constraint", constraint, default=leaves)

    def set_of(path: str) -> Set:
        found = lookup(path)
        if not isinstance(found, Set):
            raise error(
                f"constraint must cover every leaf, got none for {path!r} (it has "
                f"{paths.some([path for path, _ in leaves])}); where= chooses leaves, "
                f"and box(-inf, inf) leaves one free."
            )
        return found

    return set_of


def remembers(constraint: Constraint) -> bool:
    """Whether any of the sets keeps something in the state."""
    return any(leaf.init is not None for leaf in jax.tree_util.tree_leaves(constraint))


def chosen_by(where: Where | None) -> Chosen:
    """What says whether a leaf is projected."""
    if where is None:
        return lambda path, leaf, shapes: True
    selects = paths.selector(where)
    return lambda path, leaf, shapes: selects(path, leaf)


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
