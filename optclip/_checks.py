"""Validators whose keyword is the name in the message.

    non_negative("clip_by_norm", max_norm=-1.0)
    ValueError: clip_by_norm: max_norm must be non-negative, got -1.0.

Factories call them on the numbers a user typed. Tracers and JAX arrays pass (checking
them would wait for the device at every step); so do the schedules of `limit_like`.
"""

import contextlib
import contextvars
import difflib
import math
import numbers
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_caller: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "caller", default=None
)


@contextlib.contextmanager
def inside(rule: str) -> Iterator[None]:
    """Messages from within name this rule: the one that the user called."""
    token = _caller.set(caller(rule))
    try:
        yield
    finally:
        _caller.reset(token)


def caller(rule: str) -> str:
    """The rule that messages name: the one that the user called, or else this one."""
    return _caller.get() or rule


def non_negative(rule: str, **named: Any) -> None:
    """Raises unless each value is a real number >= 0; infinity is allowed."""
    _number(rule, "non-negative", lambda value: value >= 0, **named)


def positive(rule: str, **named: Any) -> None:
    """Raises unless each value is a real number > 0."""
    _number(rule, "positive", lambda value: value > 0, **named)


def fraction(rule: str, **named: Any) -> None:
    """Raises unless each value is a real number in [0, 1), as decays are."""
    _number(rule, "in [0, 1)", lambda value: 0 <= value < 1, **named)


def between(rule: str, low: float, high: float, **named: Any) -> None:
    """Raises unless each value is a real number in [low, high]."""
    wanted = f"in [{low}, {high}]"
    _number(rule, wanted, lambda value: low <= value <= high, **named)


def at_least(rule: str, low: int, **named: Any) -> None:
    """Raises unless each value is an integer >= low."""
    for name, value in named.items():
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not whole or value < low:
            raise _error(rule, name, f"an integer of at least {low}", repr(value))


def real(rule: str, **named: Any) -> None:
    """Raises unless each value is a real number and not NaN."""
    _number(rule, "a number and not NaN", lambda value: not math.isnan(value), **named)


def limit_like(rule: str, **named: Any) -> None:
    """Raises unless each value is a non-negative scalar or a schedule."""
    for name, value in named.items():
        if callable(value):
            continue
        if not isinstance(value, (numbers.Number, np.generic, np.ndarray, jax.Array)):
            raise _error(
                rule, name, "a non-negative number, array or schedule", repr(value)
            )
        scalar(rule, **{name: value})
        non_negative(rule, **{name: value})


def scalar(rule: str, **named: Any) -> None:
    """Raises unless each value has shape (); works on tracers too."""
    for name, value in named.items():
        if jnp.shape(value) != ():
            shape = jnp.shape(value)
            raise _error(rule, name, "a scalar", f"an array of shape {shape}")


def given(rule: str, **named: Any) -> None:
    """Raises unless each value, which a schedule gave, is one real number or NaN."""
    _number(rule, "a real number", lambda value: True, **named)
    scalar(rule, **named)


def axes(rule: str, **named: Any) -> None:
    """Raises unless each value is None, an integer or a tuple of integers."""
    for name, value in named.items():
        several = value if isinstance(value, (tuple, list)) else (value,)
        if value is not None and not all(
            isinstance(axis, (int, np.integer)) and not isinstance(axis, bool)
            for axis in several
        ):
            raise _error(rule, name, "an integer or a tuple of integers", repr(value))


def same_shape(rule: str, path: str, params: Any, updates: Any) -> None:
    """Raises unless a parameter has the shape of its update."""
    if params.shape != updates.shape:
        raise ValueError(
            f"{caller(rule)}: params must have the shapes of updates, got "
            f"{params.shape} for {updates.shape} at {path!r}."
        )


def choice(rule: str, options: tuple[str, ...], **named: Any) -> None:
    """Raises unless each value is one of the options."""
    for name, value in named.items():
        if value not in options:
            listed = " or ".join(repr(option) for option in options)
            raise _error(rule, name, listed, repr(value))


def known(rule: str, options: Iterable[str], **named: Any) -> None:
    """Raises unless each value is one of many names; the message has the nearest."""
    options = list(options)
    for name, value in named.items():
        if value not in options:
            wanted = f"a known name, such as {nearest(value, options)}"
            raise _error(rule, name, wanted, repr(value))


def nearest(word: Any, options: Iterable[str]) -> str:
    """The names most like a word, quoted; all of them if none is."""
    options = list(options)
    near = difflib.get_close_matches(str(word), options, n=3, cutoff=0.5)
    return ", ".join(repr(option) for option in near or options)


def instance(rule: str, kind: type, **named: Any) -> None:
    """Raises unless each value is of the kind, say a Measure."""
    for name, value in named.items():
        if not isinstance(value, kind):
            listed = f"a {kind.__name__} of optclip"
            raise _error(rule, name, listed, repr(value))


def _number(rule: str, wanted: str, holds: Callable[[Any], bool], **named: Any) -> None:
    for name, value in named.items():
        if isinstance(value, jax.Array):
            if not jnp.issubdtype(value.dtype, jnp.floating) and not jnp.issubdtype(
                value.dtype, jnp.integer
            ):
                raise _error(rule, name, wanted, f"an array of dtype {value.dtype}")
            continue
        # bool is a number to Python, and `max_norm=True` is never what was meant.
        numeric = isinstance(value, (numbers.Real, np.ndarray, np.generic))
        numeric = numeric and np.asarray(value).dtype.kind in "iuf"
        if not numeric:
            raise _error(rule, name, wanted, repr(value))
        if not all(map(holds, np.ravel(np.asarray(value)).tolist())):
            raise _error(rule, name, wanted, str(value))


def _error(rule: str, name: str, wanted: str, got: str) -> ValueError:
    return ValueError(f"{caller(rule)}: {name} must be {wanted}, got {got}.")
