"""What every public function shares: its name in messages, and its call in reprs.

    @public
    def constant(limit): ...

    constant(-1.0)    raises    ValueError: constant: limit must be non-negative, ...
    constant(1.0)     shows as  constant(1.0)  and equals every other constant(1.0)

Messages name the function that the user called: the outermost public function while
something is being made, and the transformation itself while it runs. `error` is the one
place that spells a message's first words, so no function has to be told its own name.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, ParamSpec, Self, TypeVar

import jax
import numpy as np
import optax

P = ParamSpec("P")
R = TypeVar("R")


class _Caller(NamedTuple):
    name: str
    makes: bool  # whether it is a call that makes something, not one that runs it


_NOBODY = _Caller("optclip", makes=False)
_caller: contextvars.ContextVar[_Caller] = contextvars.ContextVar(
    "caller", default=_NOBODY
)


def caller() -> str:
    """The public function that messages name."""
    return _caller.get().name


def error(message: str) -> ValueError:
    """A ValueError whose message begins with the public function's name."""
    return ValueError(f"{caller()}: {message}")


@contextlib.contextmanager
def naming(name: str, makes: bool = False) -> Iterator[None]:
    """Messages from within begin with this name."""
    token = _caller.set(_Caller(name, makes))
    try:
        yield
    finally:
        _caller.reset(token)


def public(function: Callable[P, R]) -> Callable[P, R]:
    """Marks a public function: errors from within name it, and parts remember its call.

    The signature is kept, so that `optax.inject_hyperparams` can read it. A public
    function that calls another keeps its own name in messages. A transformation that it
    returns names it too, in `init` and in `update`.
    """
    name = function.__name__

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        outermost = not _caller.get().makes
        with naming(name, makes=True) if outermost else contextlib.nullcontext():
            made = function(*args, **kwargs)
        if isinstance(made, Part):
            made._remember(call, args, kwargs)
        if outermost and isinstance(made, optax.GradientTransformation):
            return type(made)(_named(name, made.init), _named(name, made.update))
        return made

    return call


def _named(name: str, function: Callable[P, R]) -> Callable[P, R]:
    """An `init` or `update` whose messages begin with the name."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        token = _caller.set(_Caller(name, makes=False))
        try:
            return function(*args, **kwargs)
        finally:
            _caller.reset(token)

    return run


class Part:
    """What a public function makes of small pure functions: a measure, a set, a preset.

    A part shows as the call that made it, `per_leaf()`, and equals every part made by
    an equal call; parts can be hashed, and pickled if the call's arguments can. A part
    that the user builds from functions of their own equals itself only.
    """

    _call: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]] | None = None
    _constant: str | None = None

    def _remember(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        if self._call is None and self._constant is None:  # the innermost call counts
            object.__setattr__(self, "_call", (function, args, kwargs))

    def as_constant(self: Self, name: str) -> Self:
        """The part as a constant of its class's module, known by its name."""
        object.__setattr__(self, "_constant", name)
        return self

    def __repr__(self) -> str:
        if self._constant is not None:
            return self._constant
        if self._call is None:
            return f"{type(self).__name__}(…)"
        function, args, kwargs = self._call
        shown = list(map(_shown, args))
        shown += [f"{name}={_shown(value)}" for name, value in kwargs.items()]
        return f"{function.__name__}({', '.join(shown)})"

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Part) or self._call is None or other._call is None:
            return False
        (function, args, kwargs), (others, *rest) = self._call, other._call
        return function is others and _equal((args, kwargs), tuple(rest))

    def __hash__(self) -> int:
        # Arguments may not be hashable; few parts are made by one function.
        return id(self) if self._call is None else hash(self._call[0])

    def __reduce__(self) -> str | tuple[Any, ...]:
        if self._constant is not None:
            return self._constant
        return super().__reduce__() if self._call is None else (_remade, self._call)


def _shown(argument: object) -> str:
    """An argument as in a call; a function by its name, without its address."""
    name = getattr(argument, "__name__", None)
    return name if callable(argument) and isinstance(name, str) else repr(argument)


def _remade(
    function: Callable[..., R], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> R:
    return function(*args, **kwargs)


def _equal(a: Any, b: Any) -> bool:
    """Whether two arguments are the same; a JAX array equals itself only."""
    if a is b:
        return True
    if type(a) is not type(b) or isinstance(a, jax.Array):
        return False
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return bool(a == b)
