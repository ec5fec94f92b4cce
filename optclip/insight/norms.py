"""Norms of a tree, on their own: right in every dtype, on any mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optclip._core import checks, groups, meshes
from optclip._core.groupings import Grouping, per_leaf, whole
from optclip._core.measures import Measure, l2
from optclip._core.public import error, public
from optclip._core.sizes import sizes_of


@public
def global_norm(tree: Any, measure: Measure = l2, axis_name: Any = None) -> jax.Array:
    """The size of a whole tree, ‖tree‖ over all leaves together.

    Args:
      tree: any tree; integers, random keys, None and empty leaves do not count.
      measure: one of `optclip.measures`.
      axis_name: as in `clip_by`.

    Returns:
      A scalar of float32, or float64 if there are float64 leaves.

    Edge cases: an empty tree has size 0. Right over the whole range of float32, so
    1e30 and 1e-30 entries in any dtype; NaN or infinity in any leaf shows. Its
    derivative at zero is 0.

    Raises:
      ValueError: if measure is not a measure.

    >>> import jax.numpy as jnp
    >>> print(global_norm({"a": jnp.array([3e30]), "b": jnp.array([4e30])}))
    5e+30
    """
    checks.instance(Measure, measure=measure)
    gathered, sizes = _sizes(tree, measure, whole(), axis_name)
    return sizes[0] if sizes else jnp.zeros((), gathered.dtype)


@public
def leaf_norms(
    tree: Any,
    separator: str = "/",
    top: int | None = None,
    measure: Measure = l2,
    axis_name: Any = None,
) -> dict[str, jax.Array]:
    """The size of each leaf, by path.

    Args:
      tree: any tree; leaves without a magnitude are left out.
      separator: between the names of a path.
      top: only the largest `top` leaves, largest first (NaN counts as largest); needs
        concrete values, so not inside `jit`.
      measure: one of `optclip.measures`.
      axis_name: as in `clip_by`.

    Returns:
      A dict from path to a float32 (float64) scalar, in the tree's order without `top`.

    Raises:
      ValueError: if top is not a positive integer, or is given inside `jit`.

    >>> import jax.numpy as jnp
    >>> norms = leaf_norms({"a": {"w": jnp.array([3.0, 4.0])}, "b": jnp.ones(4)})
    >>> print({path: float(norm) for path, norm in norms.items()})
    {'a/w': 5.0, 'b': 2.0}
    """
    checks.instance(Measure, measure=measure)
    gathered, sizes = _sizes(tree, measure, per_leaf(), axis_name)
    paths = [path.replace("/", separator) for path in gathered.names or ()]
    named = dict(zip(paths, sizes, strict=True))
    if top is None:
        return named
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise error(f"top must be a positive integer, got {top!r}.")
    if any(isinstance(size, Tracer) for size in sizes):
        raise error(
            f"top must be None inside jit, where sizes have no values yet, got {top}."
        )
    values = {path: float(size) for path, size in named.items()}
    order = sorted(
        values, key=lambda path: (np.isnan(values[path]), values[path]), reverse=True
    )
    return {path: named[path] for path in order[:top]}


def _sizes(
    tree: Any, measure: Measure, grouping: Grouping, axis_name: Any
) -> tuple[groups.Groups, list[jax.Array]]:
    gathered, leaves = groups.gather(tree, grouping, meshes.axes_of(axis_name))
    return gathered, sizes_of(gathered, leaves, measure)
