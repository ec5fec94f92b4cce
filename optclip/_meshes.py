"""Which mesh axes a leaf's elements are spread over, inside `shard_map` and `pmap`.

Under `jax.jit` arrays are global and nothing here acts. Inside `shard_map` a leaf's
type says over which manual axes it varies; a sum over exactly those axes is the sum
over the whole array, and a replicated leaf is counted once. `axis_name` replaces the
reading of types where they say nothing (`pmap`, `check_vma=False`) or something else
than meant (gradients before their reduction, all_gathered leaves).
"""

from collections.abc import Callable, Hashable
from typing import Any

import jax

from optclip import _paths

AxisName = Any  # None, (), a name, a tuple of names, or a prefix tree of these


def varying_axes(x: Any) -> tuple[Hashable, ...]:
    """The manual mesh axes over which a value varies, by its type."""
    aval = jax.typeof(x)
    # The set moved from `vma` to `manual_axis_type.varying` after jax 0.8.
    manual = getattr(aval, "manual_axis_type", None)
    axes = manual.varying if manual is not None else getattr(aval, "vma", ())
    return tuple(sorted(axes, key=str))


def axes_of(rule: str, axis_name: AxisName) -> Callable[[str], Any]:
    """path -> the axes that `axis_name` gives that leaf; None means: read its type."""
    if axis_name is None or _is_axes(axis_name):
        axes = _tuple(axis_name)
        return lambda path: axes
    lookup = _paths.prefix_lookup(rule, "axis_name", axis_name, is_leaf=_is_axes)
    return lambda path: _tuple(lookup(path))


def axis_size(axes: tuple[Hashable, ...]) -> int:
    """How many devices these axes span together."""
    return int(jax.lax.psum(1, axes)) if axes else 1


def _is_axes(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(isinstance(name, str) for name in value)
    return value is None or isinstance(value, str)


def _tuple(axes: Any) -> tuple[Hashable, ...] | None:
    if axes is None or isinstance(axes, tuple):
        return axes
    return tuple(axes) if isinstance(axes, list) else (axes,)
