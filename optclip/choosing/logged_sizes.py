"""Sizes that a run left behind, as every function here takes them.

    column (n,), table (n, names) or History ──sizes_of──▶ names, sizes (n, names)

A column is one number a step, such as a logged `grad_norm`. A table, or what a recorder
kept, has one for each leaf or group. What is no size is refused here, by name.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from optclip._core.measures import MAX, Measure
from optclip._core.public import error
from optclip.insight.history import History

Sizes: TypeAlias = ArrayLike | History


class Logged(NamedTuple):
    """Sizes of steps × groups in float32 or float64; a column has one unnamed group.

    `measure` is the name of theirs, if a history says it.
    """

    names: tuple[str, ...]
    sizes: np.ndarray
    column: bool
    measure: str | None = None


def logged(sizes: Sizes) -> Logged:
    """The sizes as a table, checked.

    Raises:
      ValueError: if they are no numbers, complex, negative, none at all, of another
        shape, or if a history's names do not fit them.
    """
    names, measure = None, None
    if isinstance(sizes, History):
        names, measure, sizes = sizes.names, sizes.measure, sizes.sizes
    found = _table(sizes)
    column = found.ndim == 1
    table = found[:, None] if column else found
    if names is None:
        names = tuple(map(str, range(table.shape[1])))
    if len(names) != table.shape[1] or len(set(names)) != len(names):
        raise error(
            f"sizes must have one name for each column, got {len(names)} names, "
            f"{len(set(names))} of them different, for {table.shape[1]} columns."
        )
    return Logged(names, table, column, measure)


def combined(sizes: Sizes, measure: Measure) -> np.ndarray:
    """The size of each step: the column, what a recorder kept, or all groups' together.

    Raises:
      ValueError: as `logged`; if means of several groups would have to be joined.
    """
    if isinstance(sizes, History):
        if sizes.measure != repr(measure):
            raise error(
                f"measure must be that of the sizes, {sizes.measure}, got {measure}."
            )
        return _table(sizes.size)
    table = logged(sizes).sizes
    if table.shape[1] == 1:
        return table[:, 0]
    if measure.averages:
        raise error(
            f"sizes must be one column under {measure}, whose sizes of several groups "
            f"cannot be joined, got {table.shape[1]} columns."
        )
    largest = table.max(1, keepdims=True)
    if measure.combine is MAX:
        return largest[:, 0]
    power = measure.power or 1.0
    unit = np.where(np.isfinite(largest) & (largest > 0), largest, 1)
    return unit[:, 0] * np.sum((table / unit) ** power, 1) ** (1 / power)


def _table(sizes: ArrayLike) -> np.ndarray:
    found = np.asarray(sizes)
    wanted = "sizes must be non-negative real numbers, (steps,) or (steps, groups), got"
    if found.dtype.kind not in "fiu" and found.dtype.name != "bfloat16":
        raise error(f"{wanted} an array of dtype {found.dtype}.")
    if found.ndim not in (1, 2) or not found.size:
        raise error(f"{wanted} shape {found.shape}.")
    found = (
        found.astype(np.promote_types(found.dtype.name, np.float32), copy=False)
        if found.dtype.kind == "f"
        else found.astype(np.float64)
    )
    negative = np.argwhere(found < 0)
    if negative.size:
        place = tuple(negative[0].tolist())
        raise error(f"{wanted} {found[place]} at step {place[0]}.")
    return found
