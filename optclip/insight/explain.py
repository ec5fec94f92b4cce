"""What happened, in words: `explain` reads what a recorder kept and says it.

    History ──▶ how often it clipped ──▶ the steps furthest over ──▶ the first NaN

A leaf's share of a norm is that of its p-th power, size_i^p / size^p, which sum to one.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from optclip._core.public import public
from optclip._core.types import Tree
from optclip.insight.history import History, histories

_WORDS = {"l2": "norm", "l1": "l1 norm", "max_abs": "largest magnitude", "rms": "RMS"}
_MOST = 3  # steps that are told one by one


@public
def explain(opt_state: Tree, params: Tree | None = None) -> str:
    """What the rules that record saw at their last steps, in words.

    How often each clipped, the three steps furthest over its limit (or the largest, if
    none was) and the leaf or group that made them, and where what was not finite came
    first, in the order of the tree.

    Args:
      opt_state: any optimizer state with a rule that has `record=K`, as for
        `optclip.history`.
      params: as for `optclip.history`.

    Returns:
      A line for each fact; if several rules record, under the path of each.

    Raises:
      ValueError: as `optclip.history` does.

    >>> import jax.numpy as jnp, optclip
    >>> tx = optclip.clip_by_global_norm(6.0, record=100)
    >>> state = tx.init({"a": jnp.zeros(1), "b": jnp.zeros(1)})
    >>> for a, b in ((3.0, 4.0), (3.0, 40.0), (jnp.nan, 1.0)):
    ...     _, state = tx.update({"a": jnp.array([a]), "b": jnp.array([b])}, state)
    >>> print(explain(state))
    Steps 1 to 3: 1 of 3 clipped (33 %), 1 not finite.
    Step 2: norm 40.1 against a limit of 6; b made 99 % of it.
    Step 3: NaN first in a.
    """
    recorded = histories(opt_state, params)
    if len(recorded) == 1:
        return "\n".join(_told(*recorded.values()))
    return "\n".join(
        "\n".join([f"{key}:", *(f"  {line}" for line in _told(past))])
        for key, past in recorded.items()
    )


def _told(past: History) -> list[str]:
    count = len(past.steps)
    if not count:
        return ["No step is recorded yet."]
    names = tuple(name or "the only leaf" for name in past.names)
    past = dataclasses.replace(past, names=names)
    bad = ~np.isfinite(past.size) | past.nonfinite.any(axis=1)
    clipped = int(past.clipped.sum())
    steps = f"Steps {past.steps[0]:,} to {past.steps[-1]:,}: {clipped:,} of {count:,}"
    share = f"{100 * clipped / count:.0f} %"
    lines = [f"{steps} clipped ({share}), {int(bad.sum()):,} not finite."]
    rows = np.flatnonzero(past.clipped & ~bad)
    with np.errstate(over="ignore", invalid="ignore"):  # of infinities
        over = past.size / np.maximum(past.limit, np.finfo(past.limit.dtype).tiny)
    if not len(rows):  # the largest one, which is 0 over an infinite limit
        rows, over = np.flatnonzero(~bad), past.size
    told = rows[np.argsort(-over[rows], kind="stable")]
    told = told[: _MOST if past.clipped[told].any() else 1]
    lines += [_step(past, row) for row in told]
    first = np.flatnonzero(bad)[:1]
    return lines + [_broken(past, row) for row in first]


def _step(past: History, row: int) -> str:
    """The size of a step, its limit, and what made it."""
    word = _WORDS.get(past.measure, "size")
    size, limit = past.size[row], past.limit[row]
    against = f" against a limit of {limit:.3g}" if np.isfinite(limit) else ""
    start = f"Step {past.steps[row]:,}: "
    if not past.names:
        return f"{start}{word} {size:.3g}{against}."
    if past.parts != "leaves":
        apart = abs(past.sizes[row] - size)  # several may be of that size
        some = np.flatnonzero(apart == apart.min())[:_MOST]
        own = " or ".join(past.names[column] for column in some)
        own = f"a unit of {own}" if past.parts == "units" else own
        return f"{start}{own} had {word} {size:.3g}{against}."
    column = int(np.argmax(past.sizes[row]))
    largest, name = past.sizes[row, column], past.names[column]
    power = _power(past.measure)
    if power is None or not size > 0:
        return (
            f"{start}{word} {size:.3g}{against}; the largest is {name}, {largest:.3g}."
        )
    share = 100 * float(largest / size) ** power
    return f"{start}{word} {size:.3g}{against}; {name} made {share:.0f} % of it."


def _power(measure: str) -> float | None:
    """The p of a size whose p-th power is a sum over leaves; None if there is none."""
    given = re.fullmatch(r"lp\((?:p=)?([\d.]+)\)", measure)
    return float(given[1]) if given else {"l1": 1.0, "l2": 2.0}.get(measure)


def _broken(past: History, row: int) -> str:
    """The first leaf of a step that is not finite."""
    columns = np.flatnonzero(past.nonfinite[row])
    start = f"Step {past.steps[row]:,}: "
    if not len(columns):
        return f"{start}all leaves finite, and together beyond the range of numbers."
    kind = "NaN" if np.isnan(past.sizes[row, columns[0]]) else "infinity"
    others = f", and in {len(columns) - 1:,} more" if len(columns) > 1 else ""
    return f"{start}{kind} first in {past.names[columns[0]]}{others}."
