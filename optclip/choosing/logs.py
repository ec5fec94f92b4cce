"""Reads one column of sizes from what training runs leave behind.

| file | its rows |
|---|---|
| CSV, TSV | lines under a header, as W&B exports them: `run - grad_norm` |
| CSV with `key` and `value` | one metric a row, as MLflow exports them |
| CSV of `History.to_csv` | its column `size` |
| any with what `optclip.metrics` gives | `size`, beside `limit` or `clipped_fraction` |
| JSONL | one object a line; inner objects have names joined by "/" |
| JSON | a list of objects or numbers, or `log_history` of a `trainer_state.json` |
| a bare column | one number a line |

Cells that are empty are steps at which nothing was logged; NaN and infinity are sizes.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from optclip._core.public import error
from optclip._core.types import Tree

NORM = re.compile(r"grad(ient)?s?[ _./-]*(global[ _./-]*)?norm|gnorm|global_norm", re.I)
SIZE = re.compile(r"(^|/| - )size$")
HISTORY = ["step", "size", "limit", "clipped"]  # and more, of `History.to_csv`
STEPS = ("step", "_step", "global_step", "trainer/global_step")
BARE, HEAD = "the only column", 1000
Row = dict[str, Any]


class Column(NamedTuple):
    """A column and its name, in the order of the steps if the file has them."""

    name: str
    values: np.ndarray


def read_column(lines: Iterable[str], wanted: str | None = None) -> Column:
    """The wanted column of a log, or the one that looks like a gradient norm.

    Raises:
      ValueError: if there is no such column, several that could be meant, several runs
        in it, or no numbers.
    """
    rows = _rows(lines)
    head = list(itertools.islice(rows, HEAD))
    names = _names(head)
    known = any(map(NORM.search, names)) or _of_metrics(names)
    if wanted not in names and (wanted or not known):
        head += rows  # it may begin later
        names = _names(head)
    name = _found(names, wanted)
    values, steps, runs = [], [], set()
    stepped = next((other for other in names if other.lower() in STEPS), None)
    for number, row in enumerate(itertools.chain(head, rows), 1):
        cell = row.get(name)
        if _is_empty(cell):
            continue
        values.append(_number(cell, name, number))
        runs.add(row.get("run_id"))
        step = row.get(stepped) if stepped else None
        if stepped and not _is_empty(step):
            steps.append(_number(step, stepped, number))
    if len(runs) > 1:
        raise error(
            f"file must hold one run, got {len(runs)} of them under 'run_id'; export "
            "one alone."
        )
    found = np.array(values, np.float64)
    if len(steps) == len(values) and np.any(np.diff(steps) < 0):
        found = found[np.argsort(steps, kind="stable")]
    return Column(name, found)


def _names(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _is_empty(cell: object) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip())


def _found(names: list[str], wanted: str | None) -> str:
    listed = ", ".join(map(repr, names[:50]))
    if wanted is not None:
        if wanted not in names:
            raise error(f"column must be one of {listed}, got {wanted!r}.")
        return wanted
    # W&B puts the extremes of what it drew as one point beside each column.
    like = [n for n in names if NORM.search(n) and not n.endswith(("__MIN", "__MAX"))]
    exact = [n for n in like if re.split(r"/| - ", n)[-1] == "grad_norm"]
    others = [n for n in names if n.lower() not in STEPS]
    past = ["size"] if names[: len(HISTORY)] == HISTORY else []
    for some in (past, exact, like, _of_metrics(names), others):
        if len(some) == 1:
            return some[0]
        if some:
            break
    raise error(
        f"column must be named where none or several look like a gradient norm, got "
        f"None among {listed}."
    )


def _of_metrics(names: list[str]) -> list[str]:
    """The columns `size` of `optclip.metrics`, which has more of the same stem."""
    sizes = [name for name in names if SIZE.search(name)]
    beside = ("limit", "clipped_fraction")
    return [n for n in sizes if any(f"{n[:-4]}{other}" in names for other in beside)]


def _number(cell: object, name: str, row: int) -> float:
    try:
        return float(str(cell))  # so that true is no number
    except ValueError:
        raise error(
            f"column {name!r} must hold numbers, got {cell!r} in row {row:,}."
        ) from None


def _rows(lines: Iterable[str]) -> Iterator[Row]:
    """The rows of any of the formats, told by the first line that is not empty."""
    lines = (line for line in lines if line.strip())
    first = next(lines, "").lstrip("\ufeff")
    lines = itertools.chain([first], lines)
    if first.lstrip().startswith(("{", "[")):
        return _json(first, lines)
    mark = next((mark for mark in ",\t;" if mark in first), None)
    if mark is None and _is_number(first):
        return ({BARE: line.strip()} for line in lines)
    return _csv(csv.reader(lines, delimiter=mark or ","))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _csv(table: Iterator[list[str]]) -> Iterator[Row]:
    header = next(table, [])
    names = [name.strip() for name in header]
    if names and all(map(_is_number, names)):
        raise error(
            f"file must have a header where it has several columns, got {names[0]!r} "
            "first."
        )
    long = {"key", "value"} <= set(names)
    for cells in table:
        row = dict(zip(names, cells, strict=False))
        yield {**row, row["key"]: row["value"]} if long and "value" in row else row


def _json(first: str, lines: Iterable[str]) -> Iterator[Row]:
    """Objects a line, or one document over all lines."""
    try:
        document = json.loads(first)
    except json.JSONDecodeError:
        document = _document("".join(lines))
    else:
        if isinstance(document, dict) and "log_history" not in document:
            return (_flat(_document(line)) for line in lines)
    if isinstance(document, dict):
        document = document.get("log_history", [document])
    return (_flat(row) if isinstance(row, dict) else {BARE: row} for row in document)


def _document(text: str) -> Tree:
    try:
        return json.loads(text)
    except json.JSONDecodeError as wrong:
        shown = text.strip()[:40]
        raise error(f"file must be JSON, got {shown!r} ({wrong}).") from None


def _flat(row: Row, stem: str = "") -> Row:
    flat: Row = {}
    for name, value in row.items():
        flat |= (
            _flat(value, f"{stem}{name}/")
            if isinstance(value, dict)
            else {stem + name: value}
        )
    return flat
