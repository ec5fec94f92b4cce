"""`replay`: what a rule would have done to sizes that were logged, without retraining.

    sizes ──one element a group──▶ updates ──the rule's own update──▶ sizes after it

The rule runs as it is, under one `lax.scan`, on updates that have one element for each
logged size: of one number every measure is the number itself, so the rule sees exactly
the sizes of the log.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optclip._core.metrics import ClipMetrics
from optclip._core.public import error, public
from optclip._core.types import Tree
from optclip.choosing.logged_sizes import Sizes, logged
from optclip.choosing.replayable import Rule, check, refuse
from optclip.clipping.rules.skip_step import SkipState
from optclip.insight.history import History
from optclip.insight.metrics import found


class Replay(NamedTuple):
    """What one rule does to a log, as NumPy arrays of its n steps.

    Attributes:
      size: what went in, (n,), or (n, names) of a table or history.
      out: what comes out of the rule, of the same shape.
      limit: (n,), of the group furthest over its limit; infinity where nothing is
        limited, NaN for a rule that tells none.
      clipped: (n,) booleans: whether the rule clipped, or dropped, anything.
      kept: the mean of out / size over all finite sizes that are not 0; NaN if none is.
      worst: the largest finite size that comes out; NaN if none does.
      nonfinite: how many steps have a size that is not finite.
    """

    size: np.ndarray
    out: np.ndarray
    limit: np.ndarray
    clipped: np.ndarray
    kept: float
    worst: float
    nonfinite: int

    @property
    def clip_rate(self) -> float:
        """The share of the steps that the rule clips."""
        return float(self.clipped.mean())

    @property
    def touched(self) -> float:
        """The share of the finite sizes, over steps and groups, that come out changed.

        Of a recorder's history these are the leaves that a rule touches.
        """
        finite = np.isfinite(self.size)
        return float((self.out != self.size)[finite].mean()) if finite.any() else np.nan

    def __str__(self) -> str:
        return (
            f"clips {self.clip_rate:.2%} of {len(self.clipped):,} steps, keeps "
            f"{self.kept:.2%} of a step, lets at most {self.worst:.4g} pass"
        )


@public
def replay(sizes: Sizes, rules: Mapping[str, Rule]) -> dict[str, Replay]:
    """What rules would have done to logged sizes, step by step, without retraining.

        out_t = size of rule(update of size_t),   t = 1 … n, with the rule's own state

    The rules themselves run, so what a replay says of a stream of sizes is what the
    rule does to updates of those sizes. It holds the sizes fixed: clipping changes the
    parameters, and with them later gradients, which no log knows. It predicts how often
    and how hard a rule clips, not losses.

    Args:
      sizes: non-negative sizes before clipping, by the measure of the rules: a column
        (n,), such as a logged `grad_norm`; a table (n, names) with one column for each
        leaf; or what `optclip.history` returns. NaN and infinity are steps that were
        not finite. float64 is replayed as float32 unless JAX has x64 enabled.
      rules: Optax transformations by name. A column is one group: for a rule of leaves,
        such as `clip_by_norm`, the norm of one leaf. Of a history the leaves have their
        paths, so that labels and limits by path apply. For `clip_by_value` give the
        sizes of `monitor(measure=max_abs)`: `touched` is the share of leaves that have
        an element over the bound.

    Returns:
      A dict from each rule's name to its `Replay`; `replay_table` shows them side by
      side.

    Edge cases: a size that is not finite comes out as the rule makes it, NaN or 0, and
    is not learned from. It runs on the CPU where JAX has one: a step is a few numbers.

    Raises:
      ValueError: if sizes are negative, complex, empty or of another shape; there is no
        rule, or one twice; a rule measures otherwise than the history did; or a rule
        cannot be replayed from sizes: its groups lie within leaves (`per_unit`,
        `per_element`, `per_example`), its limits are relative to parameters, or it
        needs an average over several leaves.

    >>> import optclip
    >>> norms = [1.0, 1.1, 0.9, 50.0, 1.0]
    >>> found = replay(norms, {"fixed": optclip.clip_by_global_norm(2.0)})["fixed"]
    >>> print(found.out, found.clip_rate)
    [1.  1.1 0.9 2.  1. ] 0.2
    """
    known = logged(sizes)
    if isinstance(sizes, History) and sizes.parts == "units":
        raise error(
            "sizes must be those of leaves or groups, got those of single units of "
            "each leaf."
        )
    check(rules)
    # As wide as gradients would be: `jnp.asarray` narrows float64 unless x64 is on.
    with _on_cpu(), np.errstate(over="ignore"):
        rows = jnp.asarray(known.sizes)
        blank = jax.tree.map(lambda _: jnp.zeros((1,), rows.dtype), _tree(known.names))
        for name, rule in rules.items():
            refuse(name, rule, blank, known.measure)
        replayed = _run(tuple(rules.values()), known.names, rows)
    size = np.asarray(rows)
    return {
        name: _summary(size, *map(np.asarray, numbers), column=known.column)
        for name, numbers in zip(rules, replayed, strict=True)
    }


def _tree(names: tuple[str, ...]) -> Tree:
    """Each column's number by path, for labels and limits; flat where paths clash."""
    numbers = list(range(len(names)))
    if names == tuple(map(str, numbers)):
        return numbers[0] if len(numbers) == 1 else numbers
    tree: dict[str, Any] = {}
    for name, number in zip(names, numbers, strict=True):
        *stem, last = name.split("/")
        node = tree
        for part in stem:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                return dict(zip(names, numbers, strict=True))
        if last in node:
            return dict(zip(names, numbers, strict=True))
        node[last] = number
    return tree


@contextlib.contextmanager
def _on_cpu() -> Iterator[None]:
    """On an accelerator every one of the many small steps would be several launches."""
    try:
        (cpu, *_) = jax.local_devices(backend="cpu")
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        yield
        return
    with jax.default_device(cpu):
        yield


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(
    rules: tuple[Rule, ...],
    names: tuple[str, ...],
    rows: jax.Array,
) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """For each rule: sizes after it, limits, and whether it clipped, by step."""
    order, shape = jax.tree_util.tree_flatten(_tree(names))

    def as_updates(row: jax.Array) -> Tree:
        return shape.unflatten([row[index : index + 1] for index in order])

    def as_row(updates: Tree) -> jax.Array:
        joined = jnp.concatenate(jax.tree_util.tree_leaves(updates))
        return jnp.abs(joined[np.argsort(order)])

    def step(states: list[Tree], row: jax.Array) -> tuple[list[Tree], list[Any]]:
        after, numbers = [], []
        for rule, state in zip(rules, states, strict=True):
            updates, new = rule.update(as_updates(row), state)
            out = as_row(updates)
            counts = _count(new) - _count(state)
            seen = [clip.limit for _, clip in found(new, ClipMetrics)]
            limits = [limit for limit in seen if limit is not None]
            if limits:
                limit, clipped = functools.reduce(jnp.minimum, limits), counts > 0
            else:  # flat: its bound is what it makes of infinity
                endless, _ = rule.update(as_updates(jnp.full_like(row, jnp.inf)), state)
                limit = jnp.max(as_row(endless))
                clipped = (counts > 0) | jnp.any(jnp.isfinite(row) & (out != row))
            largest = jnp.finfo(limit.dtype).max  # how metrics show that nothing limits
            limit = jnp.where(limit < largest, limit, limit * jnp.inf)
            after.append(new)
            numbers.append((out, limit, clipped))
        return after, numbers

    blank = as_updates(jnp.zeros_like(rows[0]))
    return jax.lax.scan(step, [rule.init(blank) for rule in rules], rows)[1]


def _count(state: Tree) -> jax.Array:
    """How many steps a state has counted as clipped or dropped."""
    total = jnp.zeros((), jnp.int32)
    for _, node in found(state, ClipMetrics, SkipState):
        if isinstance(node, SkipState):
            total += node.metrics.skipped_steps + _count(node.inner_state)
        else:
            total += node.clipped_steps
    return total


def _summary(
    size: np.ndarray,
    out: np.ndarray,
    limit: np.ndarray,
    clipped: np.ndarray,
    column: bool,
) -> Replay:
    finite = np.isfinite(size)
    known = finite & (size > 0)
    # In float64, where the mean of many is as good as one.
    kept = (
        float((out[known] / size[known].astype(np.float64)).mean())
        if known.any()
        else np.nan
    )
    passed = out[finite & np.isfinite(out)]
    if column:
        size, out = size[:, 0], out[:, 0]
    return Replay(
        size,
        out,
        limit,
        clipped,
        kept,
        worst=float(passed.max()) if passed.size else np.nan,
        nonfinite=int((~finite).any(1).sum()),
    )
