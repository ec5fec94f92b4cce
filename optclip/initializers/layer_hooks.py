"""Taps: every layer's output, seen while a Flax model runs.

    outputs = run(params, tap, batch),   tap(path, y) -> y  at each layer that has
                                         parameters of its own

In Linen `nn.intercept_methods` calls the tap. In NNX a copy of the module runs, in
which each layer's type is extended by a `__call__` that does; the copy shares its
arrays, and the module that the user holds is never touched. What a tap measures leaves
through `jax.debug.callback`, so that layers inside `jit`, `scan` and `remat` are seen
like any others, each layer of a scanned stack by itself.
"""

import contextvars
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optclip._core.public import error
from optclip.initializers import linen, nnx

Tap = Callable[[str, jax.Array], jax.Array]

_METHODS = ("__call__", "attend")
_tap: contextvars.ContextVar[Tap] = contextvars.ContextVar("tap")


def opened(model: Any, params: Any) -> tuple[Any, Callable[..., Any]]:
    """The parameters of a model, and `run(params, tap, batch)`.

    The model is a Linen module or a function `(variables, batch)` that applies one,
    with its variables; or an NNX module alone, or a function `(module, batch)` with it.
    """
    module = model if nnx.is_module(model) else params
    if nnx.is_module(module):
        call = (lambda m, batch: m(batch)) if module is model else model
        return _opened_nnx(module, call)
    apply = getattr(model, "apply", model)
    if not callable(apply) or params is None:
        raise error(
            f"model must be an nnx.Module, or a Linen module or function with "
            f"its params, got {type(model).__name__} with params={params!r}."
        )

    def run(own: Any, tap: Tap, batch: Any) -> Any:
        from flax import linen as nn

        variables = linen.with_params(params, own)
        if model is not apply and variables is own:
            variables = {"params": own}
        with nn.intercept_methods(functools.partial(_intercepted, tap)):
            return apply(variables, batch)

    return linen.params(params), run


class Recorder:
    """Takes numbers out of running computations: `record(path, *numbers)`."""

    def __init__(self) -> None:
        self._seen: list[tuple[str, tuple[float, ...]]] = []

    def __call__(self, path: str, *numbers: Any) -> None:
        self._seen.append((path, tuple(float(number) for number in numbers)))

    def during(self, run: Callable[[], Any]) -> dict[str, list[tuple[float, ...]]]:
        """What a computation sends, by path, each path's in the order it ran."""
        self._seen.clear()
        jax.block_until_ready(run())
        jax.effects_barrier()
        by_path: dict[str, list[tuple[float, ...]]] = {}
        for path, numbers in self._seen:
            by_path.setdefault(path, []).append(numbers)
        return by_path


def in_order(
    called: list[str], seen: Mapping[str, list[Any]], stacks: Mapping[str, int]
) -> Iterator[tuple[str, int | None]]:
    """Every layer once, as (path, its number in a stack or None), as they are called.

    Layers are stacked where a path was seen as often as its parameters have copies.
    Neighbouring paths of one stack come layer by layer: all of the first, then all of
    the second.
    """

    def copies(path: str) -> int:
        count = stacks.get(path.split("[")[0], 1)
        return count if count == len(seen.get(path, ())) else 1

    for count, group in itertools.groupby(dict.fromkeys(called), copies):
        paths = list(group)
        for number in range(count):
            yield from ((path, number if count > 1 else None) for path in paths)


def _intercepted(tap: Tap, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    out = call(*args, **kwargs)
    if context.method_name not in _METHODS:
        return out
    own = context.module.variables.get("params", {})
    if not any(hasattr(jax.tree.leaves(v)[0], "dtype") and not hasattr(v, "keys")
               for v in own.values()):  # fmt: skip
        return out
    path = "/".join(context.module.path)
    suffix = "" if context.method_name == "__call__" else f".{context.method_name}"
    return tapped(tap, path + suffix, out)


def tapped(tap: Tap, path: str, out: Any) -> Any:
    """A layer's output after the tap; of several arrays, each by its number."""
    flat, treedef = jax.tree.flatten(out)
    names = [f"{path}[{i}]" if len(flat) > 1 else path for i in range(len(flat))]
    seen = [
        tap(name, y) if jnp.issubdtype(jnp.result_type(y), jnp.floating) else y
        for name, y in zip(names, flat, strict=True)
    ]
    return jax.tree.unflatten(treedef, seen)


def _opened_nnx(module: Any, call: Callable[..., Any]) -> tuple[Any, Any]:
    from flax import nnx as flax_nnx

    graph, params, rest = flax_nnx.split(module, flax_nnx.Param, ...)

    def run(own: Any, tap: Tap, batch: Any) -> Any:
        # New Variables of this trace, which a random stream needs to count in.
        own, others = jax.tree.map(lambda x: x, (own, rest))
        copy = flax_nnx.merge(graph, own, others)
        for path, node in list(flax_nnx.iter_graph(copy)):
            owns = isinstance(node, flax_nnx.Module) and any(
                isinstance(value, flax_nnx.Param) for value in vars(node).values()
            )
            if owns:
                kind = _watching(type(node), "/".join(str(name) for name in path))
                object.__setattr__(node, "__class__", kind)
        token = _tap.set(tap)
        try:
            return call(copy, batch)
        finally:
            _tap.reset(token)

    return params, run


@functools.cache
def _watching(kind: type, path: str) -> type:
    """The type with taps on its calls; one type a path, for scans keep types only."""

    def watched(name: str) -> Any:
        suffix = "" if name == "__call__" else f".{name}"

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            out = getattr(kind, name)(self, *args, **kwargs)
            return tapped(_tap.get(), path + suffix, out)

        return method

    methods = {name: watched(name) for name in _METHODS if hasattr(kind, name)}
    return type(kind)(kind.__name__, (kind,), methods)
