"""The types that signatures share, so that they stay readable in `help()`."""

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import jax
import optax
from jax.typing import ArrayLike

Shape: TypeAlias = tuple[int, ...]
# The shapes of all leaves, by path.
Shapes: TypeAlias = Mapping[str, Shape]
# Any tree of arrays: gradients, parameters, states.
Tree: TypeAlias = Any
# A number, an array, a traced value or a schedule.
Limit: TypeAlias = ArrayLike | optax.Schedule
# What becomes of a group that is not finite.
Nonfinite: TypeAlias = Literal["propagate", "zero"]
# None, (), a name, a tuple of names, or a tree of these that may be a prefix.
AxisName: TypeAlias = str | tuple[str, ...] | Mapping[str, Any] | list[Any] | None
# Axes of an array.
Axes: TypeAlias = int | tuple[int, ...]
# A regular expression, a predicate of path and leaf, or a tree of booleans.
Where: TypeAlias = str | re.Pattern[str] | Callable[[str, Any], bool] | Tree
# The axes that count independent layers: how many, or a pattern for leaves with one.
Stacked: TypeAlias = bool | int | str | None
# A number, an array of one for each group, or a tree of these that may be a prefix.
Radius: TypeAlias = ArrayLike | Tree
# The values, or the tangents, that a rule of `jax.custom_jvp` is given.
Arrays: TypeAlias = tuple[jax.Array, ...]
