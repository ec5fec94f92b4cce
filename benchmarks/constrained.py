"""Parameters that end in a set: contestants of the contexts `projections` and `sets`.

By hand means the equation in a line of JAX: without a bound that holds in the leaf's
dtype, and without norms beyond the range of that dtype.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optclip
from benchmarks import contestants
from benchmarks.contestants import Arrays, Contestant, Shapes
from optclip import initializers, sets

Tree = dict[str, jax.Array]
C, RADIUS = 0.01, 1.0  # which every step of AdamW leaves again


class Way(NamedTuple):
    """Whether the chain's last transform keeps a set, or what follows the step.

    Either may import a peer, so both are called when a contestant is made.
    """

    last: Callable[[], optax.GradientTransformation] = optax.identity
    after: Callable[[], Callable[[Any], Any]] = lambda: lambda params: params


def stepping(
    way: Way, optimizer: optax.GradientTransformation, arrays: Arrays
) -> Contestant:
    """Step, project, apply, or step, apply, project: parameters and state in place."""
    params, _ = arrays.tree
    last, after = way.last(), way.after()

    def update(tree: Any, own: Any, limit: jax.Array, grads: Any) -> Any:
        params, state = tree
        updates, state = optimizer.update(grads, state, params)
        updates, own = last.update(updates, own, params)
        return (after(optax.apply_updates(params, updates)), state), own

    return contestants.with_jax(update, arrays, jax.jit(last.init)(params))


def ways(name: str) -> dict[str, Way]:
    """Those to keep parameters in a set, by their names in the results."""
    constraint = SETS[name]
    found = {"alone": Way()}
    if name == "box":
        found["clip_weights"] = Way(last=lambda: optclip.clip_weights(C))
    found["project"] = Way(last=lambda: optclip.project(constraint))
    found["project_params"] = Way(after=lambda: lambda p: projected(p, constraint))
    found["by hand"] = Way(after=lambda: BY_HAND[name])
    if name in OPTAX:
        found["optax"] = Way(after=lambda: OPTAX[name])
    if name in ("max_norm", "unit_norm"):
        found["keras"] = Way(after=lambda: keras_constraint(name))
    return found


SETS: dict[str, sets.Set] = {
    "box": sets.box(-C, C),
    "max_norm": sets.max_norm(RADIUS),
    "unit_norm": sets.unit_norm(),
    "l2_ball": sets.l2_ball(RADIUS),
}


def projected(params: Any, constraint: sets.Set) -> Any:
    return optclip.project_params(params, constraint)


def unit_axis(path: str) -> int:
    """The axis of a unit's norm: inputs of a kernel, features of an embedding."""
    return -1 if path.endswith("embedding") else 0


def _by_unit(function: Callable[[jax.Array, jax.Array], jax.Array]) -> Any:
    """The function of each leaf and of the norms of its units."""

    def after(params: Tree) -> Tree:
        return {
            path: function(x, jnp.linalg.norm(x, axis=unit_axis(path), keepdims=True))
            for path, x in params.items()
        }

    return after


def _at_most(x: jax.Array, norm: jax.Array) -> jax.Array:
    return x * jnp.minimum(1, RADIUS / norm)


BY_HAND: dict[str, Callable[[Tree], Tree]] = {
    "box": lambda params: {path: jnp.clip(x, -C, C) for path, x in params.items()},
    "max_norm": _by_unit(_at_most),
    "unit_norm": _by_unit(lambda x, norm: x / norm),
    "l2_ball": lambda params: {
        path: _at_most(x, jnp.linalg.norm(x)) for path, x in params.items()
    },
}
OPTAX: dict[str, Callable[[Tree], Tree]] = {
    "box": lambda params: optax.projections.projection_box(
        params, dict.fromkeys(params, -C), dict.fromkeys(params, C)
    ),
    # Of one leaf each: of a tree it would be one ball for all leaves together.
    "l2_ball": lambda params: {
        path: optax.projections.projection_l2_ball(x, RADIUS)
        for path, x in params.items()
    },
}


def keras_constraint(name: str) -> Callable[[Tree], Tree]:
    """Keras on JAX: its constraint of each variable, over the same axes."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras  # pyright: ignore[reportMissingImports] (in the extra "bench")

    constraints: Any = keras.constraints  # its types know integers only
    if name == "max_norm":
        make = functools.partial(constraints.MaxNorm, RADIUS)
    else:
        make = constraints.UnitNorm
    return lambda params: {
        path: make(axis=unit_axis(path))(x) for path, x in params.items()
    }


# The context `sets`: p ← P(p + u), with u fixed, so that p is outside at every call.


def moved(tree: Shapes) -> Arrays:
    """Parameters, and updates that take them out of any set."""
    params = contestants.normal(tree, jnp.float32, seed=1)
    return Arrays(params, contestants.normal(tree, jnp.float32))


def placing(after: Callable[[Any], Any], arrays: Arrays) -> Contestant:
    """Moves parameters and projects each leaf."""

    def update(tree: Any, own: Any, limit: jax.Array, updates: Any) -> Any:
        return jax.tree.map(after, optax.apply_updates(tree, updates)), own

    return contestants.with_jax(update, arrays)


def _placed(constraint: sets.Set) -> Callable[[Arrays], Contestant]:
    return functools.partial(placing, lambda x: projected(x, constraint))


def _singular_values_at_most(x: jax.Array) -> jax.Array:
    u, s, v = jnp.linalg.svd(x, full_matrices=False)
    return (u * jnp.minimum(s, RADIUS)[None, :]) @ v


TAU, LOGIT = 100.0, 101.0  # weights would soon be zero if logits were far above


def attending(by_hand: bool, arrays: Arrays) -> Contestant:
    """QK-clip of one layer, all of whose heads are above tau."""
    tx = optclip.qk_clip(TAU)
    heads = arrays.tree["attention/query/kernel"].shape[-2]

    def update(tree: Any, largest: Any, limit: jax.Array, updates: Any) -> Any:
        if by_hand:
            factor = jnp.sqrt(jnp.minimum(1, TAU / largest))[None, :, None]
            after = optax.apply_updates(tree, updates)
            return jax.tree.map(lambda x: x * factor, after), largest
        logits = {"attention": largest}
        updates, _ = tx.update(updates, optax.EmptyState(), tree, max_logits=logits)
        return optax.apply_updates(tree, updates), largest

    return contestants.with_jax(update, arrays, jnp.full((heads,), LOGIT))


def drawing(draw: Callable[[Tree, jax.Array], Tree], arrays: Arrays) -> Contestant:
    """All parameters drawn anew."""

    def update(tree: Any, key: Any, limit: jax.Array, updates: Any) -> Any:
        key, own = jax.random.split(key)
        return draw(tree, own), key

    return contestants.with_jax(update, arrays, jax.random.key(0))


def drawn_by_hand(params: Tree, key: jax.Array) -> Tree:
    """He's normal law: kernels by their inputs, embeddings by their features."""
    keys = jax.random.split(key, len(params))
    found = {}
    for own, (path, x) in zip(keys, params.items(), strict=True):
        if x.ndim == 1:
            found[path] = jnp.full_like(x, float(path.endswith("scale")))
        else:
            inputs = 1 if path.endswith("embedding") else x.shape[0]
            found[path] = jax.random.normal(own, x.shape) * (2 / inputs) ** 0.5
    return found


RARE: dict[str, dict[str, Callable[[Arrays], Contestant]]] = {
    "spectral_ball": {
        "optclip": _placed(sets.spectral_ball(RADIUS)),
        "iterations=10": _placed(sets.spectral_ball(RADIUS, iterations=10)),
        "by hand": functools.partial(placing, _singular_values_at_most),
    },
    "simplex": {
        "optclip": _placed(sets.simplex()),
        "optax": functools.partial(placing, optax.projections.projection_simplex),
    },
    "l1_ball": {
        "optclip": _placed(sets.l1_ball()),
        "optax": functools.partial(placing, optax.projections.projection_l1_ball),
    },
    "qk_clip": {
        "optclip": functools.partial(attending, False),
        "by hand": functools.partial(attending, True),
    },
    "redraw": {
        "optclip": functools.partial(
            drawing,
            lambda p, key: initializers.redraw(p, initializers.he_normal(), key),
        ),
        "by hand": functools.partial(drawing, drawn_by_hand),
    },
}
