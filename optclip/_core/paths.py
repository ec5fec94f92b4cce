"""How a parameter is called, and the selectors that go by it.

A path is the "/"-joined names from the root to the leaf, the same for every library:
`Dense_0/kernel` for Linen (without the collection name `params`), `layers/0/kernel` for
NNX (with or without its Variables around the arrays), `layers/0/weight` for Equinox.
Everything that users select by (`where`, labels, limits by path, axis names) goes by
paths, because tree definitions differ between NNX's `init` and `update`.

Two leaves may spell alike, as in `{"a/b": ..., "a": {"b": ...}}`. A `Path` knows its
place in the tree, so that such leaves stay two wherever paths are compared or are keys.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import optax

from optclip._core.public import error, naming, public
from optclip._core.types import Tree, Where

T = TypeVar("T")
Place = tuple[str, ...]
Select = Callable[[str, Any], bool]


class Path(str):
    """The spelled path of a leaf, equal to another leaf's only at the same place."""

    place: Place

    def __new__(cls, place: Place) -> Path:
        path = super().__new__(cls, "/".join(_without_collection(place)))
        path.place = place
        return path

    def __reduce__(self) -> tuple[type[Path], tuple[Place]]:
        return Path, (self.place,)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Path):
            return self.place == other.place
        return str.__eq__(self, other) if isinstance(other, str) else NotImplemented

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__  # so that plain strings find it in a dict


class Leaf(NamedTuple):
    """A leaf and its path."""

    path: str  # a `Path` where it comes from `leaves`
    value: Any


def leaves(tree: Tree) -> list[Leaf]:
    """The leaves of a tree with their paths, in the tree's own order."""
    return list(map(Leaf, spelled(tree), jax.tree_util.tree_leaves(tree)))


def spelled(tree: Tree) -> list[Path]:
    """The paths of a tree's leaves, in the tree's own order."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    boxed = _boxed(tree, [keys for keys, _ in flat])
    return [
        Path(tuple(names(keys[:-1] if number in boxed else keys)))
        for number, (keys, _) in enumerate(flat)
    ]


def unique_names(tree: Tree, separator: str = "/") -> list[str]:
    """The paths as keys of a dict: those that spell alike as JAX's `keystr`.

    >>> unique_names({"a/b": 1, "a": {"b": 2}, "c": {"d": 3}})
    ["['a']['b']", "['a/b']", 'c/d']
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    plain = [separator.join(_without_collection(p.place)) for p in spelled(tree)]
    count = Counter(plain)
    return [
        path if count[path] == 1 else jax.tree_util.keystr(keys)
        for path, (keys, _) in zip(plain, flat, strict=True)
    ]


def names(keys: tuple[Any, ...]) -> list[str]:
    """The names along a key path."""
    return [_name(key) for key in keys]


def is_box(node: object) -> bool:
    """Whether it is a Variable of NNX or a boxed parameter of Linen."""
    return hasattr(node, "get_metadata") or hasattr(node, "unbox")


def _name(key: Any) -> str:
    # DictKey and FlattenedIndexKey carry `key`, SequenceKey `idx`, GetAttrKey `name`.
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _boxed(tree: Tree, flat: list[tuple[Any, ...]]) -> set[int]:
    """Which leaves are the `value` of a box, whose name is no part of their path.

    Any other field or key named value, as attention has one, keeps its name.
    """
    found = {n for n, keys in enumerate(flat) if keys and _name(keys[-1]) == "value"}
    if not found:
        return found
    nodes, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_box)
    boxes = {keys for keys, node in nodes if is_box(node)}
    return {n for n in found if flat[n][:-1] and flat[n][:-1] in boxes}


def _without_collection(place: Place) -> Place:
    """A place without the name of Linen's collection."""
    return place[1:] if len(place) > 1 and place[0] == "params" else place


@public
def mask(where: Where) -> Callable[[Tree], Tree]:
    """A mask for `optax.masked`: True at the leaves that `where` selects.

    Args:
      where: a regular expression searched in the "/"-joined path (without Linen's
        collection name), a predicate `(path, leaf) -> bool`, or a tree of booleans
        that may be a prefix of the parameters (returned as a full mask).

    Returns:
      A function from a tree of parameters or updates to a tree of booleans. It
      raises `ValueError` if nothing is selected in a tree that has leaves.

    Raises:
      ValueError: if where is no regular expression, predicate or tree of booleans.

    >>> import jax.numpy as jnp, optclip
    >>> params = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    >>> optclip.mask("kernel$")(params)
    {'dense': {'bias': False, 'kernel': True}}
    """
    selects = selector(where)

    def select(tree: Tree) -> Tree:
        found = leaves(tree)
        with naming("mask"):
            chosen = [selects(path, value) for path, value in found]
            if found and not any(chosen):
                listed = some([path for path, _ in found])
                raise error(f"where={where!r} selects no leaf of {listed}.")
        return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(tree), chosen)

    return select


def compiled(name: str, pattern: str | re.Pattern[str]) -> re.Pattern[str]:
    """A regular expression; raises if it is none."""
    try:
        return re.compile(pattern)
    except re.error as wrong:
        raise error(
            f"{name} must be a regular expression, got {pattern!r} ({wrong})."
        ) from None


def selector(where: Where, name: str = "where") -> Select:
    """A predicate `(path, leaf) -> bool` from any form of `where`."""
    if isinstance(where, (str, re.Pattern)):
        pattern = compiled(name, where)
        return lambda path, leaf: pattern.search(path) is not None
    if callable(where):
        return lambda path, leaf: bool(where(path, leaf))
    for path, value in leaves(where):
        if not isinstance(value, bool) and getattr(value, "dtype", "") != "bool":
            raise error(
                f"{name} must be a pattern, a predicate or a tree of booleans, got "
                f"{value!r} at {str(path)!r}."
            )
    lookup = prefix_lookup(name, where)
    return lambda path, leaf: bool(lookup(path))


def prefix_lookup(
    name: str,
    tree: Tree,
    is_leaf: Callable[[Any], bool] | None = None,
    default: Any = None,
) -> Callable[[str], Any]:
    """Reads a tree that may be a prefix of the parameters, by path."""
    values = dict(prefixes(tree, is_leaf))
    # Linen's collection may be missing on either side.
    values = {_without_collection(place): v for place, v in values.items()} | values

    def lookup(path: str) -> Any:
        for place in prefixes_of(path):
            if place in values:
                return values[place]
        if default is not None:
            return default
        raise error(
            f"{name} must cover every leaf, got none for {str(path)!r} (it has "
            f"{some(['/'.join(place) for place in values])})."
        )

    return lookup


def prefixes(
    tree: Tree, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[Place, Any]]:
    """The leaves of a tree of values, masked nodes among them, by place."""
    stop = is_leaf or (lambda value: False)
    flat, treedef = jax.tree_util.tree_flatten(
        tree, is_leaf=lambda value: stop(value) or isinstance(value, optax.MaskedNode)
    )
    # Spelled with plain leaves in the place of values that may be trees themselves.
    numbers = jax.tree_util.tree_unflatten(treedef, range(len(flat)))
    order = jax.tree_util.tree_leaves(numbers)
    return [(p.place, flat[n]) for p, n in zip(spelled(numbers), order, strict=True)]


def prefixes_of(path: str) -> list[Place]:
    """The places that stand for a path in a prefix tree, the longest first.

    A plain string, such as a label, is one name or several joined by "/".
    """
    whole = places_of(path)
    return [place[:end] for place in whole for end in range(len(place), 0, -1)] + [()]


def places_of(path: str) -> list[Place]:
    """The places that a path, or a label, may mean."""
    if isinstance(path, Path):
        return [path.place, _without_collection(path.place)]
    return [(str(path),), tuple(path.split("/"))]


def first_match(patterns: Mapping[str, T], path: str, default: T) -> T:
    """The value of the first pattern found in the path."""
    for pattern, value in patterns.items():
        if re.search(pattern, path):
            return value
    return default


def everything(path: str, leaf: object) -> bool:
    """A `where` that selects every leaf.

    Args:
      path: ignored.
      leaf: ignored.

    Returns:
      True.

    >>> import jax.numpy as jnp, optclip
    >>> optclip.mask(optclip.everything)({"kernel": jnp.ones(2), "bias": jnp.ones(2)})
    {'bias': True, 'kernel': True}
    """
    return True


def some(paths: list[str]) -> str:
    """The first few paths, for a message."""
    shown = ", ".join(repr(str(path)) for path in paths[:5])
    return shown + (f", … ({len(paths)} leaves)" if len(paths) > 5 else "")
