"""What is timed: the same work through optclip, its peers, and the floors.

One `step` of a contestant is one timed call: gradients in, clipped gradients (or
stepped parameters) out, in place where the library can. In a race all contestants on
JAX hand the same arrays on to each other, because of equal arrays some lie better in
memory than others. A limit that falls by one percent a call keeps every group above it,
so that each call both measures and rescales.
"""

import functools
import os
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optclip

Shapes = dict[str, tuple[int, ...]]


class Compiled(NamedTuple):
    """What the compiled program says of itself."""

    trace_seconds: float
    compile_seconds: float
    temporary_bytes: int
    bytes_accessed: float
    collectives: int


class Arrays(NamedTuple):
    """What goes from hand to hand in a race."""

    tree: Any  # changed in place
    fixed: Any = ()  # only read


class Contestant(NamedTuple):
    """One way to do the work; `step(arrays, own, limit)` waits until it is done.

    It returns the next arrays and what the contestant keeps for itself.
    """

    step: Callable[[Arrays, Any, float], tuple[Arrays, Any]]
    own: Any = ()
    compiled: Compiled | None = None


def normal(shapes: Shapes, dtype: Any, seed: int = 0) -> dict[str, jax.Array]:
    """Gradients or parameters with a root mean square of one."""
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    draw = jax.jit(
        lambda key, shape: jax.random.normal(key, shape, dtype), static_argnums=1
    )
    return {
        path: draw(key, shape)
        for key, (path, shape) in zip(keys, shapes.items(), strict=True)
    }


def with_jax(function: Callable[..., Any], arrays: Arrays, own: Any = ()) -> Contestant:
    """`function(tree, own, limit, fixed)` to the next tree and own, in place.

    Compiled ahead of time with cold caches, so that its seconds can be compared.
    """
    jax.clear_caches()
    jitted = jax.jit(function, donate_argnums=(0, 1))
    start = time.perf_counter()
    lowered = jitted.lower(arrays.tree, own, jnp.float32(1.0), arrays.fixed)
    traced = time.perf_counter()
    program = lowered.compile()
    compiled = time.perf_counter()
    # A GPU compiles to one program a device; a list of one in older releases.
    cost = program.cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list) else cost
    memory = program.memory_analysis()
    collectives = re.findall(
        r" (?:all-reduce|all-gather)[\w-]*\(", program.as_text() or ""
    )
    about = Compiled(
        traced - start,
        compiled - traced,
        int(memory.temp_size_in_bytes) if memory is not None else -1,
        float(cost.get("bytes accessed", -1.0)),
        len(collectives),
    )

    def step(arrays: Arrays, own: Any, limit: float) -> tuple[Arrays, Any]:
        after = program(arrays.tree, own, jnp.float32(limit), arrays.fixed)
        tree, own = jax.block_until_ready(after)
        return arrays._replace(tree=tree), own

    return Contestant(step, own, about)


# Floors: the passes over memory that the work cannot do without.


def reading(arrays: Arrays) -> Contestant:
    """Every leaf read once."""

    def read(tree: Any, total: jax.Array, limit: jax.Array, fixed: Any) -> Any:
        sums = [jnp.sum(x, dtype=jnp.float32) for x in jax.tree.leaves(tree)]
        return tree, limit * sum(sums) + total

    return with_jax(read, arrays, jnp.zeros(()))


def rewriting(arrays: Arrays) -> Contestant:
    """Every leaf read and written once, in place."""

    def write(tree: Any, own: Any, limit: jax.Array, fixed: Any) -> Any:
        nearly_one = 1 - 1e-3 * limit  # nothing is to fall below what clips it
        return jax.tree.map(lambda x: x * nearly_one.astype(x.dtype), tree), own

    return with_jax(write, arrays)


# The clip alone.

Rule = Callable[[Any], optax.GradientTransformation]
OPTCLIP: dict[str, Rule] = {
    "clip_by_global_norm": optclip.clip_by_global_norm,
    "clip_by_norm": optclip.clip_by_norm,
    "clip_by_block_rms": optclip.clip_by_block_rms,
    "clip_by_value": optclip.clip_by_value,
    "adaptive_grad_clip": optclip.adaptive_grad_clip,
}
OPTAX: dict[str, Rule] = {
    "clip_by_global_norm": optax.clip_by_global_norm,
    "clip_by_block_rms": optax.clip_by_block_rms,
    "clip_by_value": optax.clip,
    "adaptive_grad_clip": optax.adaptive_grad_clip,
}
# Rules that learn their limit, against the fixed one: constant norms are never clipped.
LEARNED: dict[str, Callable[[], optax.GradientTransformation]] = {
    "autoclip": optclip.autoclip,
    "zclip": optclip.zclip,
    "adagc": functools.partial(optclip.adagc, absolute=1e30),
    "spike_clip": optclip.spike_clip,
}


def gradients(shapes: Shapes, dtype: Any, params: bool = False) -> Arrays:
    """Gradients, and parameters beside them for a rule that reads them."""
    weights = (normal(shapes, dtype, seed=1),) if params else ()
    return Arrays(normal(shapes, dtype), weights)


def clipping(rule: Rule, arrays: Arrays) -> Contestant:
    """One update of a rule, its limit traced."""
    start = jax.jit(rule(1.0).init)(arrays.tree)

    def update(grads: Any, state: Any, limit: jax.Array, weights: Any) -> Any:
        # In the gradients' dtype, because Optax's rules take no other.
        dtype = jax.tree.leaves(grads)[0].dtype
        return rule(limit.astype(dtype)).update(grads, state, *weights)

    return with_jax(update, arrays, start)


def within(
    make: Callable[[], Any],
    arrays: Arrays,
    metrics: bool = True,
) -> Contestant:
    """One update that finds nothing to clip, with its metrics or without."""
    tx: Any = make()

    def update(grads: Any, state: Any, limit: jax.Array, fixed: Any) -> Any:
        updates, after = tx.update(grads, state)
        if not metrics:
            after = after._replace(metrics=state.metrics)
        return updates, after

    return with_jax(update, arrays, jax.jit(tx.init)(arrays.tree))


def compiling(rule: Rule, shapes: Shapes, dtype: Any) -> Contestant:
    """Not the update but its tracing and compiling, from cold caches at every call."""
    tx = rule(0.5)
    grads = {p: jax.ShapeDtypeStruct(shape, dtype) for p, shape in shapes.items()}
    state = jax.eval_shape(tx.init, grads)

    def step(arrays: Arrays, own: Any, limit: float) -> tuple[Arrays, Any]:
        jax.clear_caches()
        jax.jit(tx.update, donate_argnums=0).lower(grads, state).compile()
        return arrays, own

    return Contestant(step)


# Before an optimizer.


def parameters(
    optimizer: optax.GradientTransformation, shapes: Shapes, dtype: Any
) -> Arrays:
    """Parameters with the optimizer's state, and gradients that stay as they are."""
    params = normal(shapes, dtype, seed=1)
    state = jax.jit(optimizer.init)(params)
    return Arrays((params, state), normal(shapes, dtype))


def optimizing(
    clip: Rule, optimizer: optax.GradientTransformation, arrays: Arrays
) -> Contestant:
    """Clip, step, apply: parameters and state in place."""
    params, _ = arrays.tree
    start = jax.jit(clip(1.0).init)(params)

    def update(tree: Any, clips: Any, limit: jax.Array, grads: Any) -> Any:
        params, state = tree
        dtype = jax.tree.leaves(grads)[0].dtype
        # One after the other as `optax.chain` has them; the optimizer's state goes on.
        updates, clips = clip(limit.astype(dtype)).update(grads, clips, params)
        updates, state = optimizer.update(updates, state, params)
        return (optax.apply_updates(params, updates), state), clips

    return with_jax(update, arrays, start)


def within_wrapper(wrapper: optax.GradientTransformation, arrays: Arrays) -> Contestant:
    """Step, apply: the optimizer is within one that keeps its state `inner_state`.

    That state goes from hand to hand, as in `optimizing`.
    """
    params, _ = arrays.tree
    start: Any = jax.jit(wrapper.init)(params)
    update_whole: Callable[..., Any] = wrapper.update

    def update(tree: Any, own: Any, limit: jax.Array, grads: Any) -> Any:
        params, state = tree
        whole = own._replace(inner_state=state)
        updates, after = update_whole(grads, whole, params)
        stepped = optax.apply_updates(params, updates), after.inner_state
        return stepped, after._replace(inner_state=())

    return with_jax(update, arrays, start._replace(inner_state=()))


def keras_sgd(arrays: Arrays) -> Contestant:
    """Keras on JAX: SGD with `global_clipnorm`, which Keras takes as a constant."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras  # pyright: ignore[reportMissingImports] (in the extra "bench")

    optimizer = keras.optimizers.SGD(0.1, global_clipnorm=0.5)
    params, _ = arrays.tree
    name = jax.tree.leaves(params)[0].dtype.name
    optimizer.build([keras.Variable(x, dtype=name) for x in params.values()])
    variables = [variable.value for variable in optimizer.variables]

    def update(tree: Any, own: Any, limit: jax.Array, grads: Any) -> Any:
        params, state = tree
        # Lists: JAX sorts a dict's keys; Keras goes by the order of its variables.
        values = [params[path] for path in arrays.fixed]
        after, own = optimizer.stateless_apply(
            own, [grads[path] for path in arrays.fixed], values
        )
        return (dict(zip(arrays.fixed, after, strict=True)), state), own

    return with_jax(update, arrays, variables)


# PyTorch, in place, with `foreach`, on the same device as JAX.


def pytorch(rule: str, shapes: Shapes, dtype: Any) -> Contestant:
    """`clip_grad_norm_` or `clip_grad_value_`; of arrays of its own, unlike others."""
    import torch  # pyright: ignore[reportMissingImports] (in the extra "bench")

    gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    kind = getattr(torch, jnp.dtype(dtype).name)
    generator = torch.Generator(device).manual_seed(0)
    params = [torch.nn.Parameter(torch.empty(0)) for _ in shapes]
    for param, shape in zip(params, shapes.values(), strict=True):
        param.data = torch.empty(shape, dtype=kind, device=device)
        grad = torch.randn(shape, generator=generator, device=device)
        param.grad = grad.to(kind)
    clip = {
        "clip_by_global_norm": torch.nn.utils.clip_grad_norm_,
        "clip_by_value": torch.nn.utils.clip_grad_value_,
    }[rule]

    def step(arrays: Arrays, own: Any, limit: float) -> tuple[Arrays, Any]:
        clip(own, limit, foreach=True)
        if gpu:
            torch.cuda.synchronize()
        return arrays, own

    return Contestant(step, params)


def about_peers() -> dict[str, str]:
    """The releases compared, as far as they are installed."""
    import importlib.metadata

    found = {}
    for package in ("jax", "optax", "torch", "keras"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def size_in_bytes(shapes: Shapes, dtype: Any) -> int:
    """Of one tree."""
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    return count * jnp.dtype(dtype).itemsize
