"""What each parameter got, as a table: `redraw(…, explain=True)` prints it.

    path       role    shape      law          std
    fc/kernel  kernel  512 × 256  normal    0.0625

The law is that of the initializer; the standard deviation is measured on the values.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.core import Tracer

from optclip._core.public import error
from optclip.initializers.kernel_shapes import Initializer, drawing_dtype
from optclip.initializers.parameter_info import ParameterInfo
from optclip.initializers.presets import Preset


def law_of(init: Initializer) -> str:
    """The law of a preset's initializer; of another function what it is called.

    >>> law_of(jax.nn.initializers.he_normal())
    'variance_scaling'
    """
    while isinstance(init, Preset):
        init = init["kernel"]
    names = getattr(init, "__qualname__", type(init).__name__).split(".")
    # JAX's are functions within the one that is called.
    return names[0 if str(init.__module__).startswith("jax.") else -1]


def table(
    infos: Sequence[ParameterInfo], laws: Sequence[str | None], leaves: Sequence[object]
) -> str:
    """A line for each parameter; a law of None is that of one which kept its values."""
    rows = [("path", "role", "shape", "law", "std")]
    for info, law in zip(infos, laws, strict=True):
        role = "–" if info.role is None else info.role
        shape = " × ".join(map(str, info.shape)) or "scalar"
        values = leaves[info.place]
        rows.append((info.name, role, shape, law or "kept", _std(values)))
    *widths, last = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = []
    for *cells, std in rows:
        padded = [f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)]
        lines.append("  ".join([*padded, f"{std:>{max(last, 8)}}"]))
    return "\n".join(lines)


def _std(values: object) -> str:
    """Of the values, in float32 at least; a dash where there are none to measure."""
    if isinstance(values, Tracer):
        raise error("explain must be False under jit, got True.")
    if not isinstance(values, jax.Array) or values.size == 0:
        return "–"
    return f"{float(values.astype(drawing_dtype(values.dtype)).std()):.3g}"
