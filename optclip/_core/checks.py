"""Validators whose keyword is the name in the message.

    non_negative(max_norm=-1.0)
    ValueError: clip_by_norm: max_norm must be non-negative, got -1.0.

Factories call them on the numbers a user typed. Tracers and JAX arrays pass (checking
them would wait for the device at every step); so do the schedules of `limit_like`.
"""

import difflib
import math
import numbers
import sys
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optclip._core.public import error


def non_negative(**named: object) -> None:
    """Raises unless each value is a real number >= 0; infinity is allowed."""
    _number("non-negative", lambda value: value >= 0, **named)


def positive(**named: object) -> None:
    """Raises unless each value is a real number > 0."""
    _number("positive", lambda value: value > 0, **named)


def fraction(**named: object) -> None:
    """Raises unless each value is a real number in [0, 1), as decays are."""
    _number("in [0, 1)", lambda value: 0 <= value < 1, **named)


def between(low: float, high: float, **named: object) -> None:
    """Raises unless each value is a real number in [low, high]."""
    wanted = f"in [{low}, {high}]"
    _number(wanted, lambda value: low <= value <= high, **named)


def at_least(low: int, **named: Any) -> None:
    """Raises unless each value is an integer >= low."""
    for name, value in named.items():
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if isinstance(value, jax.Array):  # as a traced hyperparameter
            raise error(
                f"{name} must be a Python integer, got an array; under "
                f'optax.inject_hyperparams say static_args=("{name}",).'
            )
        if not whole or value < low:
            raise _wrong(name, f"an integer of at least {low}", repr(value))


def real(**named: object) -> None:
    """Raises unless each value is a real number and not NaN."""
    _number("a number and not NaN", lambda value: not math.isnan(value), **named)


def limit_like(**named: object) -> None:
    """Raises unless each value is a non-negative scalar or a schedule."""
    for name, value in named.items():
        if callable(value):
            continue
        if not isinstance(value, (numbers.Number, np.generic, np.ndarray, jax.Array)):
            raise _wrong(name, "a non-negative number, array or schedule", repr(value))
        scalar(**{name: value})
        non_negative(**{name: value})


def scalar(**named: Any) -> None:
    """Raises unless each value has shape (); works on tracers too."""
    for name, value in named.items():
        if jnp.shape(value) != ():
            shape = jnp.shape(value)
            raise _wrong(name, "a scalar", f"an array of shape {shape}")


def given(**named: Any) -> None:
    """Raises unless each value, which a schedule gave, is one real number or NaN."""
    _number("a real number", lambda value: True, **named)
    scalar(**named)


def limits(shape: tuple[int, ...], **named: Any) -> None:
    """Raises unless what a threshold gave is a limit, or one for each group."""
    for name, value in named.items():
        if value is None or jnp.shape(value) not in ((), shape):
            got = "None" if value is None else f"shape {jnp.shape(value)}"
            raise error(
                f"{name} must give a scalar or an array of shape {shape}, got {got}."
            )
        if not isinstance(value, jax.Array):
            non_negative(**{f"the limit of {name}": value})


def axes(**named: object) -> None:
    """Raises unless each value is None, an integer or a tuple of integers."""
    for name, value in named.items():
        several = value if isinstance(value, (tuple, list)) else (value,)
        if value is not None and not all(
            isinstance(axis, (int, np.integer)) and not isinstance(axis, bool)
            for axis in several
        ):
            raise _wrong(name, "an integer or a tuple of integers", repr(value))


def other_shape(path: str, params: Any, updates: Any) -> ValueError:
    """What is wrong with a parameter that has not the shape of its update."""
    return error(
        f"params must have the shapes of updates, got {params.shape} for "
        f"{updates.shape} at {path!r}."
    )


def optimizer(**named: object) -> None:
    """Raises unless each value has the functions of a gradient transformation."""
    for name, value in named.items():
        if not (hasattr(value, "init") and hasattr(value, "update")):
            raise _wrong(name, "an optimizer", repr(value))


def other_state(kind: type, state: object) -> ValueError:
    """What is wrong with a state that is not of the kind that `init` makes."""
    return _wrong("state", f"a {kind.__name__}", type(state).__name__)


def choice(options: tuple[str, ...], **named: object) -> None:
    """Raises unless each value is one of the options."""
    for name, value in named.items():
        if value not in options:
            listed = " or ".join(repr(option) for option in options)
            raise _wrong(name, listed, repr(value))


def known(options: Iterable[str], **named: object) -> None:
    """Raises unless each value is one of many names; the message has the nearest."""
    options = list(options)
    for name, value in named.items():
        if value not in options:
            wanted = f"a known name, such as {nearest(value, options)}"
            raise _wrong(name, wanted, repr(value))


def nearest(word: object, options: Iterable[str]) -> str:
    """The names most like a word, quoted; all of them if none is."""
    options = list(options)
    near = difflib.get_close_matches(str(word), options, n=3, cutoff=0.5)
    return ", ".join(repr(option) for option in near or options)


def instance(kind: type, **named: object) -> None:
    """Raises unless each value is of the kind, say a Measure."""
    for name, value in named.items():
        if not isinstance(value, kind):
            listed = f"a {kind.__name__} of optclip"
            raise _wrong(name, listed, repr(value))


def _number(wanted: str, holds: Callable[[Any], bool], **named: object) -> None:
    for name, value in named.items():
        if isinstance(value, jax.Array):
            if not jnp.issubdtype(value.dtype, jnp.floating) and not jnp.issubdtype(
                value.dtype, jnp.integer
            ):
                raise _wrong(name, wanted, f"an array of dtype {value.dtype}")
            continue
        # bool is a number to Python, and `max_norm=True` is never what was meant.
        numeric = isinstance(value, (numbers.Real, np.ndarray, np.generic))
        if not numeric or not _is_real(value):
            raise _wrong(name, wanted, repr(value))
        if isinstance(value, int) and abs(int(value)) > sys.float_info.max:
            digits = f"an integer of {len(str(abs(int(value))))} digits"
            raise _wrong(name, "a number that a float can hold", digits)
        if not all(map(holds, np.ravel(np.asarray(value)).tolist())):
            raise _wrong(name, wanted, str(value))


def _is_real(value: Any) -> bool:
    if isinstance(value, int):  # NumPy would make an object of a huge one
        return not isinstance(value, bool)
    dtype = np.asarray(value).dtype
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def _wrong(name: str, wanted: str, got: str) -> ValueError:
    return error(f"{name} must be {wanted}, got {got}.")
