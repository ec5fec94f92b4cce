"""Norms of a tree on their own: right in every dtype, on any mesh.

    tree ──gather──▶ groups ──sizes_of──▶ one size for the whole tree, or one a leaf

They are the sizes that clipping uses.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optclip._core import checks, groups, meshes, paths
from optclip._core.grouped import Groups
from optclip._core.groupings import Grouping, per_leaf, whole
from optclip._core.measures import Measure, l2
from optclip._core.public import error, public
from optclip._core.sizes import sizes_of
from optclip._core.types import AxisName, Tree


@public
def global_norm(
    tree: Tree, measure: Measure = l2, axis_name: AxisName = None
) -> jax.Array:
    """The size of a whole tree, ‖tree‖ over all leaves together.

    Args:
      tree: any tree; integers, random keys, None and empty leaves do not count.
      measure: one of `optclip.measures`.
      axis_name: inside `shard_map` and `pmap`, the mesh axes that leaves extend over: a
        name, a tuple of names, or a tree of these; None reads them from the types (see
        `clip_by`). Gradients that `pmean` has averaged are whole on each of n devices:
        name no axis for them, or the norm is √n times too large.

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
    known, sizes = _sizes(tree, measure, whole(), axis_name)
    return sizes[0] if sizes else jnp.zeros((), known.dtype)


@public
def leaf_norms(
    tree: Tree,
    separator: str = "/",
    top: int | None = None,
    measure: Measure = l2,
    axis_name: AxisName = None,
) -> dict[str, jax.Array]:
    """The size of each leaf, by path.

    Args:
      tree: any tree; leaves without a magnitude are left out.
      separator: between the names of a path.
      top: only the largest `top` leaves, largest first (NaN counts as largest); needs
        concrete values, so not inside `jit`.
      measure: one of `optclip.measures`.
      axis_name: inside `shard_map` and `pmap`, the mesh axes that leaves extend over,
        as in `global_norm`.

    Returns:
      A dict from path to a float32 (float64) scalar, in the tree's order without `top`.
      Leaves whose paths spell alike are told apart as JAX's `keystr` does:
      `['a/b']` and `['a']['b']`.

    Raises:
      ValueError: if measure is not a measure, top is not a positive integer, or top is
        given inside `jit`.

    >>> import jax.numpy as jnp
    >>> norms = leaf_norms({"a": {"w": jnp.array([3.0, 4.0])}, "b": jnp.ones(4)})
    >>> print({path: float(norm) for path, norm in norms.items()})
    {'a/w': 5.0, 'b': 2.0}
    """
    checks.instance(Measure, measure=measure)
    known, sizes = _sizes(tree, measure, per_leaf(), axis_name)
    names = paths.unique_names(tree, separator)
    named = dict(zip([names[p] for p in known.places], sizes, strict=True))
    return named if top is None else _largest(named, top)


def _largest(named: dict[str, jax.Array], top: int) -> dict[str, jax.Array]:
    checks.at_least(1, top=top)
    if any(isinstance(size, Tracer) for size in named.values()):
        raise error(
            f"top must be None inside jit, where sizes have no values yet, got {top}."
        )
    values = {name: float(size) for name, size in named.items()}
    order = sorted(
        values, key=lambda name: (np.isnan(values[name]), values[name]), reverse=True
    )
    return {name: named[name] for name in order[:top]}


def _sizes(
    tree: Tree, measure: Measure, grouping: Grouping, axis_name: AxisName
) -> tuple[Groups, list[jax.Array]]:
    known, leaves = groups.gather(tree, grouping, meshes.axes_of(axis_name))
    return known, sizes_of(known, leaves, measure)
