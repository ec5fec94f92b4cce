"""Calling a hook with every layer's output while a Flax model runs.

    params, run = opened(model, params)
    outputs = run(params, hook, batch),   hook(path, y) -> y  at each layer that has
                                          parameters of its own

In Linen `nn.intercept_methods` calls the hook. In NNX a copy of the module runs, in
which each layer's type is extended by a `__call__` that does; the copy shares its
arrays, and the user's module is never changed. Numbers leave a hook through
`jax.debug.callback`, so layers inside `jit`, `scan` and `remat` are recorded like any
others, each layer of a scanned stack by itself. `signal_report` and `lsuv` use it.
"""

from __future__ import annotations

import contextvars
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp

from optclip._core.public import error
from optclip._core.types import Tree
from optclip.initializers.parameter_info import Model, is_nnx, params_of, with_params

if TYPE_CHECKING:
    from flax import linen, nnx

Hook: TypeAlias = Callable[[str, jax.Array], jax.Array]
# (parameters, hook, batch) -> the model's output
Run: TypeAlias = Callable[[Tree, Hook, Any], Any]
# By path, what each call recorded.
Records: TypeAlias = Mapping[str, list[tuple[float, ...]]]

_METHODS = ("__call__", "attend")
_hook: contextvars.ContextVar[Hook] = contextvars.ContextVar("hook")


def opened(model: Model, params: Tree) -> tuple[Tree, Run]:
    """The parameters of a model, and a function that runs it with a hook.

    The model is a Linen module or a function `(variables, batch)` that applies one,
    with its variables; or an NNX module alone, or a function `(module, batch)` with it.
    """
    module = model if is_nnx(model) else params
    if is_nnx(module):
        call = (lambda module, batch: module(batch)) if module is model else model
        return _opened_nnx(module, call)
    apply = getattr(model, "apply", model)
    if not callable(apply) or params is None:
        raise error(
            f"model must be an nnx.Module, or a Linen module or function with "
            f"its params, got {type(model).__name__} with params={params!r}."
        )

    def run(own: Tree, hook: Hook, batch: Any) -> Any:
        from flax import linen as nn

        variables = with_params(params, own)
        if model is not apply and variables is own:
            variables = {"params": own}
        with nn.intercept_methods(functools.partial(_intercepted, hook)):
            return apply(variables, batch)

    return params_of(params), run


class Recorder:
    """Takes numbers out of running computations: `record(path, *numbers)`."""

    def __init__(self) -> None:
        self._records: list[tuple[str, tuple[float, ...]]] = []

    def __call__(self, path: str, *numbers: jax.Array) -> None:
        self._records.append((path, tuple(float(number) for number in numbers)))

    def during(self, run: Callable[[], Any]) -> Records:
        """What a computation records, by path, each path's in the order it ran."""
        self._records.clear()
        jax.block_until_ready(run())
        jax.effects_barrier()
        by_path: dict[str, list[tuple[float, ...]]] = {}
        for path, numbers in self._records:
            by_path.setdefault(path, []).append(numbers)
        return by_path


def in_order(
    called: list[str], records: Records, stacks: Mapping[str, int]
) -> Iterator[tuple[str, int | None]]:
    """Every layer once, as (path, its number in a stack or None), as they are called.

    Layers are stacked where a path was recorded as often as its parameters have copies.
    Neighbouring paths of one stack come layer by layer: all of the first, then all of
    the second.
    """

    def copies(path: str) -> int:
        count = stacks.get(path.split("[")[0], 1)
        return count if count == len(records.get(path, ())) else 1

    for count, group in itertools.groupby(dict.fromkeys(called), copies):
        paths = list(group)
        for number in range(count):
            yield from ((path, number if count > 1 else None) for path in paths)


def _intercepted(
    hook: Hook,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: linen.module.InterceptorContext,
) -> Any:
    out = call(*args, **kwargs)
    if context.method_name not in _METHODS or _is_looking_for_constants():
        return out
    own = context.module.variables.get("params", {})
    # A child module's parameters are a mapping; a box around an array is not.
    if all(hasattr(value, "keys") for value in own.values()):
        return out
    # What only hands out its parameters is no layer, as in `OptimizedLSTMCell`.
    if {*map(id, jax.tree.leaves(out))} <= {*map(id, jax.tree.leaves(own))}:
        return out
    path = "/".join(context.module.path)
    suffix = "" if context.method_name == "__call__" else f".{context.method_name}"
    return _hooked(hook, path + suffix, out)


def _is_looking_for_constants() -> bool:
    """Whether Flax traces a scan's body only to find what is constant in it.

    The results of that trace are discarded, and Flax 0.12.12 refuses callbacks in it.
    Nothing but the call stack shows it.
    """
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.endswith("axes_scan.py"):
            if frame.f_locals.get("init_mode"):
                return True
        frame = frame.f_back
    return False


def _hooked(hook: Hook, path: str, out: Any) -> Any:
    """A layer's output after the hook; of several arrays, each by its number."""
    flat, treedef = jax.tree.flatten(out)
    names = [f"{path}[{i}]" if len(flat) > 1 else path for i in range(len(flat))]
    after = [
        hook(name, y) if jnp.issubdtype(jnp.result_type(y), jnp.floating) else y
        for name, y in zip(names, flat, strict=True)
    ]
    return jax.tree.unflatten(treedef, after)


def _opened_nnx(module: nnx.Module, call: Callable[..., Any]) -> tuple[Tree, Run]:
    from flax import nnx

    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def run(own: Tree, hook: Hook, batch: Any) -> Any:
        # New Variables of this trace, which a random stream needs to count in.
        own, others = jax.tree.map(lambda x: x, (own, rest))
        copy = nnx.merge(graph, own, others)
        for path, node in list(nnx.iter_graph(copy)):
            owns = isinstance(node, nnx.Module) and any(
                isinstance(value, nnx.Param) for value in vars(node).values()
            )
            if owns:
                kind = _hooked_type(type(node), "/".join(map(str, path)))
                object.__setattr__(node, "__class__", kind)
        token = _hook.set(hook)
        try:
            return call(copy, batch)
        finally:
            _hook.reset(token)

    return params, run


@functools.cache
def _hooked_type(kind: type, path: str) -> type:
    """The type with hooks in its calls.

    One subclass per path, because nnx.scan preserves only the type.
    """

    def hooked(name: str) -> Callable[..., Any]:
        suffix = "" if name == "__call__" else f".{name}"

        def method(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
            out = getattr(kind, name)(self, *args, **kwargs)
            return _hooked(_hook.get(), path + suffix, out)

        return method

    methods = {name: hooked(name) for name in _METHODS if hasattr(kind, name)}
    return type(kind)(kind.__name__, (kind,), methods)
