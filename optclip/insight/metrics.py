"""Reading what every clip measured, from any optimizer state.

    opt_state ──▶ the `ClipMetrics` and `SkipMetrics` in it ──▶ {name: scalar}

`_core.metrics` writes these numbers at each update; here they get names for a logger,
and beside them, on request, what a recorder kept of the last step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from optclip._core import paths
from optclip._core.metrics import ClipMetrics, SkipMetrics
from optclip._core.public import caller, error, public
from optclip._core.types import Tree
from optclip.clipping.recorder import RecorderState

T = TypeVar("T")
KeyPath = tuple[Any, ...]


class _Number(NamedTuple):
    """One scalar, and where in the state its metrics are."""

    keys: KeyPath
    field: str
    value: jax.Array


@public
def metrics(
    opt_state: Tree, separator: str = "/", *, short: bool = False, sizes: bool = False
) -> dict[str, jax.Array]:
    """The metrics of every clip in an optimizer state, ready for a logger.

    Args:
      opt_state: any optimizer state: of `chain`, `named_chain`, `masked`, `partition`,
        `MultiSteps`, `inject_hyperparams`, …, an `nnx.Optimizer` or its `opt_state`, a
        `TrainState`.
      separator: between the names of a key.
      short: whether to leave out of a key all but the names that you gave, so that it
        stays the same when the chain grows: `size` for the only clip of a state,
        `clip/size` in `optax.named_chain(("clip", …))`. What `skip_step` measures of
        the loss is `value_watch/size`.
      sizes: whether to add what rules with `record=K` measured at the last step, for
        each leaf or label: `size/{name}` and, if recorded, `ratio/{name}`. One step is
        enough for it, `record=1`.

    Returns:
      A flat dict `{path of the state}/{field}` of scalar arrays; the path is empty for
      a clip that stands alone, the fields are those of `ClipMetrics` and `SkipMetrics`
      that the rule has. Empty if there is no clip. No value is read, so it works inside
      `jit`. Before the first update `steps` is 0, and the other numbers mean nothing.

    Raises:
      ValueError: if short names of two clips are the same, sizes are asked for and no
        rule records, or opt_state is an `nnx.State`, whose types are lost.

    >>> import jax.numpy as jnp, optax, optclip
    >>> tx = optax.chain(optclip.clip_by_global_norm(1.0), optax.sgd(0.1))
    >>> params = {"w": jnp.array([3.0, 4.0])}
    >>> _, state = tx.update(params, tx.init(params))
    >>> for name, value in metrics(state).items():
    ...     print(name, value)
    0/size 5.0
    0/limit 1.0
    0/clipped_fraction 1.0
    0/steps 1
    0/clipped_steps 1
    0/nonfinite_steps 0
    >>> print(metrics(state, short=True)["size"])
    5.0
    """
    numbers = list(_numbers(opt_state))
    if sizes:
        recorded = list(_recorded(opt_state, separator))
        if not recorded:
            raise error("sizes must be False where no rule has record=K, got True.")
        numbers += recorded
    names_of = _given_names if short else paths.names
    keys = [separator.join([*names_of(n.keys), n.field]) for n in numbers]
    several = {key for key, count in Counter(keys).items() if count > 1}
    if short and several:
        raise error(
            f"short must be False where keys of two clips are the same, got "
            f"{min(several)!r} twice; or name the clips in optax.named_chain."
        )
    return {
        _place(number) if key in several else key: number.value
        for key, number in zip(keys, numbers, strict=True)
    }


def found(opt_state: Tree, *kinds: type[T]) -> list[tuple[KeyPath, T]]:
    """The parts of these kinds in a state, with the keys of the state they are in."""
    kind = type(opt_state)
    if kind.__module__.startswith("flax.nnx") and kind.__name__ == "State":
        raise error(
            "opt_state must have the types of a state, got an nnx.State; call "
            f"{caller()}(optimizer.opt_state)."
        )
    flat, _ = jax.tree_util.tree_flatten_with_path(
        opt_state, is_leaf=lambda node: isinstance(node, kinds)
    )
    return [(keys[:-1], node) for keys, node in flat if isinstance(node, kinds)]


def unwrapped(value: Tree) -> Tree:
    """An array without the Variable of `nnx.Optimizer` around it: a tree of one."""
    return None if value is None else jax.tree_util.tree_leaves(value)[0]


def _numbers(opt_state: Tree) -> Iterator[_Number]:
    for keys, node in found(opt_state, ClipMetrics, SkipMetrics):
        for field, value in zip(node._fields, node, strict=True):
            if value is not None:
                yield _Number(keys, field, unwrapped(value))


def _recorded(opt_state: Tree, separator: str) -> Iterator[_Number]:
    """The last row of every recorder."""
    for keys, state in found(opt_state, RecorderState):
        last = jnp.argmax(unwrapped(state.steps), axis=-1)[..., None, None]
        for kind, table in (("size", state.sizes), ("ratio", state.ratios)):
            if table is None:
                continue
            row = jnp.take_along_axis(unwrapped(table), last, axis=-2)[..., 0, :]
            for column, name in enumerate(state.labels.names):
                yield _Number(keys, f"{kind}{separator}{name}", row[..., column])


def _given_names(keys: KeyPath) -> list[str]:
    """The names that users gave, which are keys of dicts, and what watches a loss."""
    return [
        name
        for key, name in zip(keys, paths.names(keys), strict=True)
        if isinstance(key, jax.tree_util.DictKey) or name == "value_watch"
    ]


def _place(number: _Number) -> str:
    """A key that no other number has."""
    return f"{jax.tree_util.keystr(number.keys)}.{number.field}"
