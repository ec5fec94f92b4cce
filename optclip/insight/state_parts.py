"""Optimizer states taken apart into what belongs together, and paired part by part.

    state ──node──▶ names and arrays, the same for NamedTuples, dicts and NNX's boxes
    new, old ──pairs──▶ for each part of the new state that fits, a node of the old one

`adopt_state` fills the new state from these pairs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optclip._core import paths
from optclip._core.types import Shape, Tree
from optclip.clipping.engine import ClipState, RecordedClipState
from optclip.clipping.recorder import RecorderState

Path = tuple[str, ...]
_CLIPS = (ClipState.__name__, RecordedClipState.__name__)


@dataclasses.dataclass(frozen=True)
class Node:
    """A leaf, or a subtree that has some, by the names of its children.

    Boxes around arrays, such as NNX's Variables, are left out, as is the dict that a
    restored checkpoint has in their place.
    """

    path: Path
    value: Tree
    kind: str | None  # the type's name if it is a NamedTuple
    children: dict[str, Node]

    @property
    def name(self) -> str:
        return "/".join(self.path)

    @property
    def is_leaf(self) -> bool:
        return jax.tree_util.all_leaves([self.value])

    @property
    def is_state(self) -> bool:
        """Whether it is the state of one transformation, by the custom of Optax."""
        return self.kind is not None and self.kind.endswith("State")

    def walk(self) -> Iterator[Node]:
        """Itself and all below it, in JAX's order."""
        yield self
        for child in self.children.values():
            yield from child.walk()

    def leaves(self) -> list[Node]:
        return [inner for inner in self.walk() if inner.is_leaf]


def node(value: Tree, path: Path = ()) -> Node:
    """A state, or a part of one at this path, as a node."""
    inner, _ = jax.tree_util.tree_flatten_with_path(
        value, is_leaf=lambda other: other is not value
    )
    children: dict[str, Node] = {}
    for keys, child in inner:
        if keys and jax.tree_util.tree_leaves(child):
            (name,) = paths.names(keys)
            children[name] = node(child, (*path, name))
    if children.keys() == {"value"} and children["value"].is_leaf:
        return dataclasses.replace(children["value"], path=path)
    is_named = isinstance(value, tuple) and hasattr(value, "_fields")
    return Node(path, value, type(value).__name__ if is_named else None, children)


class Part(NamedTuple):
    """What is taken whole or not at all: the arrays of one transformation's state.

    Attributes:
      node: the state, in the new structure.
      own: the names of its children that are its own; others hold inner states.
      labels: the names that users gave on the way to it.
    """

    node: Node
    own: tuple[str, ...]
    labels: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Its path, or those of its own children if it has others."""
        if len(self.own) == len(self.node.children):
            return (self.node.name,)
        return tuple(self.node.children[name].name for name in self.own)


def _parts(node: Node, labels: tuple[str, ...] = ()) -> Iterator[Part]:
    inner: dict[str, Node] = {}
    # What a limit was learned from belongs with the count of its steps; what is kept
    # for reading only does not.
    if isinstance(node.value, RecordedClipState):
        inner = {"recorder": node.children["recorder"]}
    elif not isinstance(node.value, ClipState):
        inner = {k: v for k, v in node.children.items() if _holds_states(v)}
    own = tuple(name for name in node.children if name not in inner)
    if node.is_leaf or (own and (node.is_state or not inner)):
        yield Part(node, own, labels)
    gives_names = isinstance(node.value, Mapping)
    for name, child in (inner if node.is_state or not inner else node.children).items():
        yield from _parts(child, (*labels, name) if gives_names else labels)


def _holds_states(node: Node) -> bool:
    return any(inner.is_state for inner in node.walk())


def pairs(new: Node, old: Node) -> list[tuple[Part, Node]]:
    """The parts that fit, with the old nodes that they are filled from."""
    parts, nodes = list(_parts(new)), list(old.walk())
    labels = dict.fromkeys(part.labels for part in parts)
    rounds = [
        # Names that users gave decide, the longest first; then the order of all parts;
        # then each part is looked for anywhere.
        *(([p for p in parts if p.labels == own], own) for own in _longest(labels)),
        (parts, ()),
        *(([part], ()) for part in parts),
    ]
    found: dict[Path, Node] = {}
    for wanted, own in rounds:
        used = {node.path for node in found.values()}
        found |= _in_order(
            [part for part in wanted if part.node.path not in found],
            [node for node in nodes if node.path not in used and _under(own, node)],
        )
    kept = [part for part in parts if part.node.path in found]
    # The metrics beside a recorder count its steps: where they start anew, it does too.
    return [
        (part, found[path])
        for part in kept
        if (path := part.node.path)[:-1] in found
        or not isinstance(part.node.value, RecorderState)
    ]


def _longest(labels: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    return sorted(filter(None, labels), key=len, reverse=True)


def _under(labels: tuple[str, ...], node: Node) -> bool:
    """Whether a path goes through these names, in their order."""
    names = iter(node.path)
    return all(label in names for label in labels)


def _in_order(parts: list[Part], nodes: list[Node]) -> dict[Path, Node]:
    """The nodes that fit parts in the order of both, as many as possible."""
    nodes = [node for node in nodes if any(_is_taken(part, node) for part in parts)]
    above: list[dict[Path, Node]] = [{}] * (len(nodes) + 1)
    for part in parts:
        row = above[:1]
        for column, node in enumerate(nodes):
            options = [above[column + 1], row[column]]
            if _is_taken(part, node):
                options.append({**above[column], part.node.path: node})
            row.append(max(options, key=len))
        above = row
    return above[-1]


def _is_taken(part: Part, old: Node) -> bool:
    """Whether an old node has all that the part needs, and nothing strange beside."""
    new = part.node
    if not new.is_state:
        # One array looks like another: only a place of the same names will do.
        return _field_names(new) == _field_names(old) and _fits(new, old)
    if isinstance(new.value, ClipState | RecordedClipState):
        return (
            old.kind in (None, *_CLIPS)
            and set(part.own) == old.children.keys() - {"recorder"}
            and all(_fits(new.children[name], old.children[name]) for name in part.own)
        )
    if isinstance(new.value, RecorderState) and isinstance(old.value, RecorderState):
        # Rows of other leaves would get the names of these.
        if new.value.labels != old.value.labels:
            return False
    known = set(new.value._fields)
    return (
        new.kind == (old.kind or new.kind)
        and set(part.own) <= old.children.keys() <= known
        and all(_fits(new.children[name], old.children[name]) for name in part.own)
    )


def _field_names(node: Node) -> list[str]:
    return [name for name in node.path if not name.isdigit()]


def _fits(new: Node, old: Node) -> bool:
    """Whether names, shapes and dtypes are the same, and types where both have one."""
    if new.kind and old.kind and new.kind != old.kind:
        return False
    if new.is_leaf or old.is_leaf:
        return new.is_leaf and old.is_leaf and _array(new) == _array(old)
    return new.children.keys() == old.children.keys() and all(
        _fits(child, old.children[name]) for name, child in new.children.items()
    )


def _array(leaf: Node) -> tuple[Shape, np.dtype]:
    return jnp.shape(leaf.value), jnp.result_type(leaf.value)


def sources(part: Part, old: Node) -> dict[Path, Node]:
    """For each leaf of a part, by path, the old leaf of the same name."""
    if part.node.is_leaf:
        return {part.node.path: old}
    return {
        leaf.path: functools.reduce(
            lambda node, name: node.children[name],
            leaf.path[len(part.node.path) :],
            old,
        )
        for name in part.own
        for leaf in part.node.children[name].leaves()
    }
