"""Linen: keywords for a layer that is being built, and where a tree has its parameters.

Linen keeps names and shapes only: a finished model is a dict of collections, of which
`params` is drawn and the others (BatchNorm's statistics, caches) are left alone.
"""

from collections.abc import Mapping
from typing import Any

from optclip.initializers.layers import layer as layer


def params(tree: Any) -> Any:
    """What is in the collection `params`, or the tree itself if it has none."""
    return tree["params"] if _has_collections(tree) else tree


def with_params(tree: Any, new: Any) -> Any:
    """The same collections with new parameters."""
    return type(tree)({**tree, "params": new}) if _has_collections(tree) else new


def _has_collections(tree: Any) -> bool:
    # An nnx.State is a mapping too, and its "params" would be some module's name.
    plain = isinstance(tree, Mapping) and type(tree).__name__ in ("dict", "FrozenDict")
    return plain and isinstance(tree.get("params"), Mapping)
