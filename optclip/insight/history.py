"""Reading what a recorder kept: the last steps, leaf by leaf, on the host.

    opt_state ──▶ the `RecorderState` in it ──history──▶ `History`, in order of steps
                                                         └──explain──▶ words

`clipping.recorder` writes these numbers at each update, with `record=K`.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import pathlib

import jax
import numpy as np
from jax.core import Tracer

from optclip._core import numerics, paths
from optclip._core.public import error, public
from optclip._core.types import Tree
from optclip.clipping.recorder import Labels, Parts, RecorderState
from optclip.insight.metrics import found, unwrapped


@dataclasses.dataclass(frozen=True, eq=False)
class History:
    """The last steps of one rule, as NumPy arrays; n steps, the oldest first.

    Attributes:
      names: of the columns of `sizes`: the paths of leaves, or labels.
      steps: (n,) which update it was: 1 for the first, as `metrics` counts them.
      sizes: (n, names) before clipping, by the rule's measure.
      size: (n,) what the rule compared with the limit; of several groups, that of the
        group furthest over its limit.
      limit: (n,) of that group; infinity where nothing was limited.
      clipped: (n,) whether at least one group was clipped.
      nonfinite: (n, names) whether it held NaN, infinity, or a size that overflows.
      ratios: (n, names) sizes over those of the parameters, if they were recorded.
      parts: what a column is. "leaves": a leaf, and all of them together make `size`.
        "groups": a group with a limit of its own. "units": of the units of a leaf, that
        furthest over its limit.
      measure: of the sizes, as `optclip.measures` has it: "l2", "lp(3)".
    """

    names: tuple[str, ...]
    steps: np.ndarray
    sizes: np.ndarray
    size: np.ndarray
    limit: np.ndarray
    clipped: np.ndarray
    nonfinite: np.ndarray
    ratios: np.ndarray | None = None
    parts: Parts = "leaves"
    measure: str = "l2"

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """A line for each step, as text, and in a file if a path is given.

        Its columns are step, size, limit, clipped (0 or 1), and `size/NAME` and
        `ratio/NAME` for each name.
        """
        tables = {"size": self.sizes, "ratio": self.ratios}
        tables = {kind: table for kind, table in tables.items() if table is not None}
        heads = [f"{kind}/{name}" for kind in tables for name in self.names]
        columns = [self.steps, self.size, self.limit, self.clipped.astype(int)]
        columns += [column for table in tables.values() for column in table.T]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["step", "size", "limit", "clipped", *heads])
        # `str` of a NumPy number has the digits of its own precision, no more.
        writer.writerows([str(x) for x in row] for row in zip(*columns, strict=True))
        return _written(text.getvalue(), path)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """One object with a list for each array, and in a file if a path is given.

        A number that is not finite is null, because JSON has none.
        """
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {name: _plain(value) for name, value in fields.items()}
        return _written(json.dumps(plain, allow_nan=False), path)


@public
def history(
    opt_state: Tree, params: Tree | None = None
) -> History | dict[str, History]:
    """The last steps of every rule that records, from any optimizer state.

    Args:
      opt_state: any optimizer state, as for `optclip.metrics`, after the last step and
        outside `jit`.
      params: the parameters that the rule sees, to name the leaves by. Needed only for
        a state that lost its names, as `optax.tree.map_params` loses them.

    Returns:
      `History`: the steps in their order, as NumPy arrays. If several rules record, a
      dict of them by the path of their state, the keys of `metrics`.

    Edge cases: before the first step it has no rows. A wrapper that skips a step, such
    as `MultiSteps` between two updates, records none.

    Raises:
      ValueError: if nothing is recorded, opt_state is traced, of several runs at once
        or an `nnx.State`, or params have another number of leaves.

    >>> import jax.numpy as jnp, optclip
    >>> tx = optclip.clip_by_global_norm(6.0, record=100)
    >>> state = tx.init({"a": jnp.zeros(1), "b": jnp.zeros(1)})
    >>> for size in (1.0, 2.0):
    ...     grads = {"a": jnp.array([3.0 * size]), "b": jnp.array([4.0 * size])}
    ...     _, state = tx.update(grads, state)
    >>> past = history(state)
    >>> print(past.names, past.steps, past.size, past.clipped)
    ('a', 'b') [1 2] [ 5. 10.] [False  True]
    """
    recorded = histories(opt_state, params)
    return recorded if len(recorded) > 1 else next(iter(recorded.values()))


def histories(opt_state: Tree, params: Tree | None) -> dict[str, History]:
    """The history of every rule that records, by the path of its state."""
    states = found(opt_state, RecorderState)
    if not states:
        raise error(
            "opt_state must hold a rule that records, got none; make the rule with "
            "record=128, say."
        )
    keys = ["/".join(paths.names(keys)) for keys, _ in states]
    if len({*keys}) < len(keys):
        keys = [jax.tree_util.keystr(keys) for keys, _ in states]
    recorded = [_history(state, params) for _, state in states]
    return dict(zip(keys, recorded, strict=True))


def _history(state: RecorderState, params: Tree | None) -> History:
    kept = {k: unwrapped(v) for k, v in state._asdict().items() if k != "labels"}
    found = {name: value for name, value in kept.items() if value is not None}
    if any(isinstance(value, Tracer) for value in found.values()):
        raise error("opt_state must have values, got traced ones; call it outside jit.")
    arrays = {name: np.asarray(value) for name, value in found.items()}
    steps, shape = arrays["steps"], arrays["sizes"].shape
    if steps.ndim > 1:
        raise error(
            f"opt_state must be of one run, got arrays of shape {shape}; take one of "
            "them, jax.tree.map(lambda x: x[0], opt_state)."
        )
    names = _names(state.labels, arrays["sizes"], params)
    # In the order of steps, without the rows that are still empty.
    order = np.argsort(steps, kind="stable")[np.sum(steps == 0) :]
    rows = {name: value[order] for name, value in arrays.items()}
    sizes, size = rows["sizes"][:, : len(names)], rows["size"]
    limit = rows.get("limit", np.full_like(size, np.inf)).copy()
    # The state holds the largest number instead, see `ClipMetrics`.
    limit[limit == np.finfo(limit.dtype).max] = np.inf
    return History(
        names=names,
        steps=rows["steps"],
        sizes=sizes,
        size=size,
        limit=limit,
        clipped=rows["clipped"],
        nonfinite=~np.isfinite(sizes),
        ratios=rows["ratios"][:, : len(names)] if "ratios" in rows else None,
        parts=state.labels.parts,
        measure=state.labels.measure,
    )


def _names(labels: Labels, sizes: np.ndarray, params: Tree | None) -> tuple[str, ...]:
    """The names that the state has, or else those of the parameters."""
    count = sizes.shape[1]
    if params is None:
        if not labels.names and (count > 1 or np.any(sizes)):
            raise error("params must be given where a state lost its names, got None.")
        return labels.names
    spelled, leaves = paths.unique_names(params), jax.tree_util.tree_leaves(params)
    given = [
        name
        for name, leaf in zip(spelled, leaves, strict=True)
        if numerics.is_measured(leaf)
    ]
    strange = [name for name in labels.names if name not in given]
    if (strange and labels.parts != "groups") or (
        not labels.names and max(len(given), 1) != count
    ):
        recorded = paths.some(strange) if strange else f"{count} {labels.parts}"
        raise error(
            f"params must have what was recorded, {recorded}, got {paths.some(given)}."
        )
    return labels.names or tuple(given)


def _written(text: str, path: str | os.PathLike[str] | None) -> str:
    if path is not None:
        pathlib.Path(path).write_text(text, encoding="utf-8")
    return text


def _plain(value: object) -> object:
    """An array as lists that JSON can hold."""
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        return value.tolist() if isinstance(value, np.ndarray) else value
    # By way of its text, or 0.1 in float32 would have the digits of another number.
    plain = value.astype(str).astype(np.float64).astype(object)
    plain[~np.isfinite(value)] = None
    return plain.tolist()
