"""One spelling of a parameter's path, and the selectors that read it.

A path is the "/"-joined names from the root to the leaf, the same for every library:
`Dense_0/kernel` for Linen (without the collection name `params`), `layers/0/kernel`
for NNX (with or without its Variables around the arrays), `layers/0/weight` for
Equinox. Everything that users select by (`where`, labels, per-leaf limits, axis names)
goes through this file, so tree definitions, which differ between NNX's `init` and
`update`, are never compared.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from optclip._core.public import error, public

Where = str | re.Pattern[str] | Callable[[str, Any], bool] | Any


class Leaf(NamedTuple):
    """A leaf and its normalised path."""

    path: str
    value: Any


def spell(keys: tuple[Any, ...]) -> str:
    """The normalised path of a key path.

    >>> spell((jax.tree_util.DictKey("params"), jax.tree_util.DictKey("Dense_0")))
    'Dense_0'
    """
    spelled = names(keys)
    if len(spelled) > 1 and spelled[0] == "params":
        spelled = spelled[1:]  # Linen's collection
    return "/".join(spelled)


def names(keys: tuple[Any, ...]) -> list[str]:
    """The names along a key path, without the wrapper around an array."""
    spelled = [_name(key) for key in keys]
    # NNX Variables and Linen's boxed parameters hold their array in `.value`.
    if len(keys) > 1 and spelled[-1] == "value" and hasattr(keys[-1], "name"):
        spelled = spelled[:-1]
    return spelled


def leaves(tree: Any) -> list[Leaf]:
    """The leaves of a tree with their paths, in the tree's own order."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [Leaf(spell(keys), value) for keys, value in flat]


@public
def mask(where: Where) -> Callable[[Any], Any]:
    """A mask for `optax.masked`: True at the leaves that `where` selects.

    Args:
      where: a regular expression searched in the "/"-joined path (without Linen's
        collection name), a predicate `(path, leaf) -> bool`, or a tree of booleans
        that may be a prefix of the parameters (returned as a full mask).

    Returns:
      A function from a tree of parameters or updates to a tree of booleans. It
      raises `ValueError` if nothing is selected in a tree that has leaves.

    >>> import jax.numpy as jnp, optclip
    >>> params = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    >>> optclip.mask("kernel$")(params)
    {'dense': {'bias': False, 'kernel': True}}
    """
    selects = selector(where)

    def select(tree: Any) -> Any:
        flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
        chosen = [selects(spell(keys), value) for keys, value in flat]
        if flat and not any(chosen):
            paths = some([spell(keys) for keys, _ in flat])
            raise error(f"where={where!r} selects no leaf of {paths}.")
        return jax.tree_util.tree_unflatten(treedef, chosen)

    return select


def selector(where: Where) -> Callable[[str, Any], bool]:
    """A predicate `(path, leaf) -> bool` from any form of `where`."""
    if isinstance(where, (str, re.Pattern)):
        try:
            pattern = re.compile(where)
        except re.error as wrong:
            raise error(
                f"where must be a regular expression, got {where!r} ({wrong})."
            ) from None
        return lambda path, leaf: pattern.search(path) is not None
    if callable(where):
        return lambda path, leaf: bool(where(path, leaf))
    for path, value in leaves(where):
        if not isinstance(value, bool) and getattr(value, "dtype", "") != "bool":
            raise error(
                f"where must be a pattern, a predicate or a tree of booleans, "
                f"got {value!r} at {path!r}."
            )
    lookup = prefix_lookup("where", where)
    return lambda path, leaf: bool(lookup(path))


def prefix_lookup(
    name: str,
    tree: Any,
    is_leaf: Callable[[Any], bool] | None = None,
    default: Any = None,
) -> Callable[[str], Any]:
    """Reads a tree that may be a prefix of the parameters, by path."""
    stop = is_leaf or (lambda value: False)
    flat, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda value: stop(value) or isinstance(value, optax.MaskedNode)
    )
    values = {spell(keys): value for keys, value in flat}

    def lookup(path: str) -> Any:
        prefix = path
        while prefix not in values:
            if not prefix and default is not None:
                return default
            if not prefix:
                raise error(
                    f"{name} must cover every leaf, got none for {path!r} "
                    f"(it has {some(list(values))})."
                )
            prefix = prefix.rpartition("/")[0]
        return values[prefix]

    return lookup


def first_match(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern found in the path."""
    for pattern, value in patterns.items():
        if re.search(pattern, path):
            return value
    return default


@public
def everything(path: str, leaf: Any) -> bool:
    """A `where` that selects every leaf.

    >>> import jax.numpy as jnp, optclip
    >>> optclip.mask(optclip.everything)({"kernel": jnp.ones(2), "bias": jnp.ones(2)})
    {'bias': True, 'kernel': True}
    """
    return True


def some(paths: list[str]) -> str:
    """The first few paths, for a message."""
    shown = ", ".join(repr(path) for path in paths[:5])
    return shown + (f", … ({len(paths)} leaves)" if len(paths) > 5 else "")


def _name(key: Any) -> str:
    # DictKey and FlattenedIndexKey carry `key`, SequenceKey `idx`, GetAttrKey `name`.
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
