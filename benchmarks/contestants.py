"""What is timed: the same work through optclip, its peers, and the floors.

A contestant is made for one tree of shapes and one dtype. It owns its arrays, and one
`step` of it is one timed call: gradients in, clipped gradients (or stepped parameters)
out, in place where the library can. A limit that falls by one percent a call keeps
every group above it, so that each call both measures and rescales.
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


class Contestant(NamedTuple):
    """One way to do the work; `step(arrays, limit)` waits until it is done."""

    arrays: Any
    step: Callable[[Any, float], Any]
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


def with_jax(function: Callable[..., Any], arrays: Any, *rest: Any) -> Contestant:
    """`function(arrays, limit, *rest)` to the next arrays, compiled and donated.

    Compiled ahead of time with cold caches, so that its seconds can be compared.
    """
    jax.clear_caches()
    jitted = jax.jit(function, donate_argnums=0)
    start = time.perf_counter()
    lowered = jitted.lower(arrays, jnp.float32(1.0), *rest)
    traced = time.perf_counter()
    program = lowered.compile()
    compiled = time.perf_counter()
    # A GPU compiles to one program a device; a list of one in older releases.
    cost = program.cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list) else cost
    memory = program.memory_analysis()
    collectives = re.findall(r" (?:all-reduce|all-gather)[\w-]*\(", program.as_text())
    about = Compiled(
        traced - start,
        compiled - traced,
        int(memory.temp_size_in_bytes) if memory is not None else -1,
        float(cost.get("bytes accessed", -1.0)),
        len(collectives),
    )

    def step(arrays: Any, limit: float) -> Any:
        return jax.block_until_ready(program(arrays, jnp.float32(limit), *rest))

    return Contestant(arrays, step, about)


# Floors: the passes over memory that the work cannot do without.


def reading(shapes: Shapes, dtype: Any) -> Contestant:
    """Every leaf read once."""
    grads = normal(shapes, dtype)

    def read(total: jax.Array, limit: jax.Array, grads: Any) -> jax.Array:
        leaves = jax.tree.leaves(grads)
        return limit * sum(jnp.sum(x, dtype=jnp.float32) for x in leaves) + total

    return with_jax(read, jnp.zeros(()), grads)


def rewriting(shapes: Shapes, dtype: Any) -> Contestant:
    """Every leaf read and written once, in place."""

    def write(grads: Any, limit: jax.Array) -> Any:
        return jax.tree.map(lambda x: x * limit.astype(x.dtype), grads)

    return with_jax(write, normal(shapes, dtype))


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


def clipping(rule: Rule, shapes: Shapes, dtype: Any, params: bool) -> Contestant:
    """One update of a rule, its limit traced."""
    grads = normal(shapes, dtype)
    weights = (normal(shapes, dtype, seed=1),) if params else ()

    def update(arrays: Any, limit: jax.Array, *weights: Any) -> Any:
        grads, state = arrays
        # In the gradients' dtype, because Optax's rules take no other.
        return rule(limit.astype(dtype)).update(grads, state, *weights)

    start = jax.jit(rule(1.0).init)(weights[0] if params else grads)
    return with_jax(update, (grads, start), *weights)


def within(
    make: Callable[[], optax.GradientTransformation],
    shapes: Shapes,
    dtype: Any,
    metrics: bool = True,
) -> Contestant:
    """One update that finds nothing to clip, with its metrics or without."""
    tx = make()
    grads = normal(shapes, dtype)

    def update(arrays: Any, limit: jax.Array) -> Any:
        grads, state = arrays
        updates, after = tx.update(grads, state)
        if not metrics:
            after = after._replace(metrics=state.metrics)
        return updates, after

    return with_jax(update, (grads, jax.jit(tx.init)(grads)))


def compiling(rule: Rule, shapes: Shapes, dtype: Any) -> Contestant:
    """Not the update but its tracing and compiling, from cold caches at every call."""
    tx = rule(0.5)
    grads = {p: jax.ShapeDtypeStruct(shape, dtype) for p, shape in shapes.items()}
    state = jax.eval_shape(tx.init, grads)

    def step(arrays: Any, limit: float) -> Any:
        jax.clear_caches()
        return jax.jit(tx.update, donate_argnums=0).lower(grads, state).compile()

    return Contestant(None, step)


# Before an optimizer.


def optimizing(
    clip: Rule, optimizer: optax.GradientTransformation, shapes: Shapes, dtype: Any
) -> Contestant:
    """Clip, step, apply: parameters and state in place, gradients as they came."""
    grads, params = normal(shapes, dtype), normal(shapes, dtype, seed=1)

    def update(arrays: Any, limit: jax.Array, grads: Any) -> Any:
        params, state = arrays
        tx = optax.chain(clip(limit.astype(dtype)), optimizer)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(optax.chain(clip(1.0), optimizer).init)(params)
    return with_jax(update, (params, state), grads)


def keras_sgd(shapes: Shapes, dtype: Any) -> Contestant:
    """Keras on JAX: SGD with `global_clipnorm`, which Keras takes as a constant."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    grads, params = normal(shapes, dtype), normal(shapes, dtype, seed=1)
    optimizer = keras.optimizers.SGD(0.1, global_clipnorm=0.5)
    name = jnp.dtype(dtype).name
    optimizer.build([keras.Variable(x, dtype=name) for x in params.values()])
    state = [variable.value for variable in optimizer.variables]

    def update(arrays: Any, limit: jax.Array, grads: Any) -> Any:
        params, state = arrays
        return optimizer.stateless_apply(state, grads, params)

    # Lists: JAX sorts a dict's keys, and Keras goes by the order of its variables.
    return with_jax(update, (list(params.values()), state), list(grads.values()))


# PyTorch, in place, with `foreach`, on the same device as JAX.


def pytorch(rule: str, shapes: Shapes, dtype: Any) -> Contestant:
    """`clip_grad_norm_` or `clip_grad_value_`."""
    import torch

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

    def step(arrays: Any, limit: float) -> Any:
        clip(arrays, limit, foreach=True)
        if gpu:
            torch.cuda.synchronize()
        return arrays

    return Contestant(params, step)


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
