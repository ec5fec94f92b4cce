"""Resuming a run whose checkpoint was written with another chain.

Adding a clip to a chain changes the structure of its state, and a checkpoint written
before no longer fits. `adopt_state` moves what fits into the new structure.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optclip._core import paths
from optclip._core.public import error, public
from optclip.clipping.engine import ClipState

Path = tuple[str, ...]


class Adopted(NamedTuple):
    """What `adopt_state` made of two states.

    Attributes:
      state: the new structure, with every part of the old state that fits.
      kept: paths, in the new state, of the parts taken from the old one.
      fresh: paths, in the new state, of the leaves that start fresh.
      unused: paths, in the old state, of the leaves that fit nowhere.
    """

    state: Any
    kept: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]


class _Part(NamedTuple):
    """A subtree and where it hangs; one that is `whole` is never taken in pieces."""

    path: Path
    value: Any
    whole: bool = False


@public
def adopt_state(new_state: Any, old_state: Any) -> Adopted:
    """Moves an optimizer state into the structure of another chain.

    For a run whose checkpoint was written without the clip, or with Optax's stateless
    one. A part (the state of one transformation, or of a chain of them) is taken over
    where names, shapes and dtypes of its leaves are the same, in order; where only some
    of a part's fields fit, those are; what a clip has learned comes whole or not at
    all. Restored checkpoints may hold dicts and lists where the state has NamedTuples
    and tuples; they fit too.

    Args:
      new_state: `tx.init(params)` of the new chain: gives the structure, and the values
        of what starts fresh.
      old_state: the restored state.

    Returns:
      `Adopted(state, kept, fresh, unused)`: nothing is lost silently.

    Raises:
      ValueError: if the old state has leaves and none of them fits, or one of the two
        is a gradient transformation.

    >>> import jax.numpy as jnp, optax, optclip
    >>> params = {"w": jnp.ones(2)}
    >>> old = optax.chain(optax.adam(0.1))
    >>> new = optax.chain(optclip.clip_by_global_norm(1.0), optax.adam(0.1))
    >>> adopted = adopt_state(new.init(params), old.init(params))
    >>> adopted.kept, len(adopted.fresh), adopted.unused
    (('1',), 6, ())
    """
    for name, state in (("new_state", new_state), ("old_state", old_state)):
        if isinstance(state, optax.GradientTransformation):
            raise error(
                f"{name} must be a state, as tx.init(params) gives, got a "
                "gradient transformation."
            )
    kept: dict[Path, _Part] = {}

    def adopt(new: _Part, scope: _Part) -> Any:
        wanted = _signature(new.value)
        # A bare array is only taken from its namesake: one scalar looks like another.
        places = list(_walk(scope)) if _holds_states(new.value) else [scope]
        free = [old for old in places if not _overlaps(old.path, kept.values())]
        for old in free:
            if wanted and _signature(old.value) == wanted:
                kept[new.path] = old
                return _filled(new.value, old.value)
        if new.whole:
            return new.value
        children = _children(new)
        for old in free:
            twins = _children(old)
            if (
                children
                and not _is_sequence(new.value)
                and twins.keys() == children.keys()
            ):
                return _rebuilt(
                    new.value,
                    [adopt(child, twins[name]) for name, child in children.items()],
                )
        if not _holds_states(new.value):
            return new.value
        # Names decide where both sides have them (named chains, partitions), order
        # where both are sequences; only then is the rest looked for anywhere.
        twin: dict[str, _Part] = {}
        for old in free:
            if isinstance(new.value, dict) and isinstance(old.value, dict):
                twin = twin or _namesakes(children, _children(old))
            elif _is_sequence(new.value) and _is_sequence(old.value):
                twin = twin or _in_order(children, _children(old))
        first = {name: adopt(children[name], old) for name, old in twin.items()}
        return _rebuilt(
            new.value,
            [first[k] if k in first else adopt(children[k], scope) for k in children],
        )

    state = adopt(_Part((), new_state), _Part((), old_state))
    fresh = [p for p in _signature(new_state) if not any(_inside(p, k) for k in kept)]
    sources = [part.path for part in kept.values()]
    unused = [
        p for p in _signature(old_state) if not any(_inside(p, s) for s in sources)
    ]
    if _signature(old_state) and not kept:
        raise error(
            "old_state must share a part with new_state, got none that "
            f"fits among {', '.join('/'.join(path) for path in unused[:5])}."
        )
    return Adopted(
        state,
        *(tuple("/".join(path) for path in paths) for paths in (kept, fresh, unused)),
    )


def _namesakes(new: dict[str, _Part], old: dict[str, _Part]) -> dict[str, _Part]:
    return {name: old[name] for name in new if name in old}


def _in_order(new: dict[str, _Part], old: dict[str, _Part]) -> dict[str, _Part]:
    """The parts of two sequences that fit, in order, with the most leaves together."""
    above: list[tuple[int, dict[str, _Part]]] = [(0, {})] * (len(old) + 1)
    for name, part in new.items():
        row, wanted = above[:1], _signature(part.value)
        for column, candidate in enumerate(old.values()):
            options = [above[column + 1], row[column]]
            if wanted and _signature(candidate.value) == wanted:
                leaves, pairs = above[column]
                options.append((leaves + len(wanted), {**pairs, name: candidate}))
            row.append(max(options, key=lambda option: option[0]))
        above = row
    return above[-1][1]


def _signature(tree: Any) -> dict[Path, tuple[Any, Any]]:
    """Names, shapes and dtypes of the leaves: the same for a dict and a NamedTuple."""
    return {
        path: (jnp.shape(leaf), jnp.result_type(leaf))
        for path, leaf in _by_name(tree).items()
    }


def _by_name(tree: Any) -> dict[Path, Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {tuple(paths.names(keys)): leaf for keys, leaf in flat}


def _filled(new: Any, old: Any) -> Any:
    flat, treedef = jax.tree_util.tree_flatten_with_path(new)
    source = _by_name(old)
    values = [jnp.asarray(source[tuple(paths.names(keys))]) for keys, _ in flat]
    return jax.tree_util.tree_unflatten(treedef, values)


def _children(part: _Part) -> dict[str, _Part]:
    value = part.value
    if _is_state(value):
        items = zip(value._fields, value, strict=True)
    elif isinstance(value, dict):
        items = value.items()
    elif _is_sequence(value):
        items = enumerate(value)
    else:
        items = ()
    # A history is nothing without its count, nor the count without its history.
    whole = isinstance(value, ClipState)
    return {
        str(name): _Part((*part.path, str(name)), child, whole) for name, child in items
    }


def _rebuilt(like: Any, children: list[Any]) -> Any:
    if _is_state(like):
        return type(like)(*children)
    if isinstance(like, dict):
        return type(like)(zip(like, children, strict=True))
    return type(like)(children) if _is_sequence(like) else like


def _walk(part: _Part) -> Iterator[_Part]:
    yield part
    for child in _children(part).values():
        yield from _walk(child)


def _is_state(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")


def _is_sequence(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and not _is_state(value)


def _holds_states(value: Any) -> bool:
    return any(_is_state(part.value) for part in _walk(_Part((), value)))


def _inside(path: Path, outer: Path) -> bool:
    return path[: len(outer)] == outer


def _overlaps(path: Path, parts: Any) -> bool:
    return any(_inside(path, p.path) or _inside(p.path, path) for p in parts)
