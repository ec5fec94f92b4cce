"""Replays of several rules side by side, as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from optclip._core.public import error, public
from optclip.choosing.replay import Replay

HEADER = ("rule", "clipped", "kept", "largest", "limit", "lowest", "highest")


@public
def replay_table(replays: Mapping[str, Replay]) -> str:
    """Replays as a table: how often each rule clips, and what passes.

    Columns: the share of steps clipped, the mean share of a step that is kept, the
    largest size that passes, and the limit (its median, lowest and highest where there
    is one).

    Args:
      replays: what `replay` returned.

    Returns:
      Lines of text, with what went in above and what a replay cannot know below.

    Raises:
      ValueError: if there is no replay.

    >>> import optclip
    >>> rules = {"1": optclip.clip_by_global_norm(1.0), "spike": optclip.spike_clip()}
    >>> print(replay_table(optclip.replay([1.0, 1.2, 9.0, 1.1], rules)))
    4 steps, 0 of them not finite; sizes from 1 to 9, median 1.15
    rule   clipped    kept  largest  limit  lowest  highest
    1       75.0 %  71.3 %        1      1       1        1
    spike   25.0 %  79.7 %      1.7    1.8     1.7     2.42
    Sizes are held fixed: this predicts how often a rule clips, not losses.
    """
    if not replays:
        raise error("replays must hold at least one, got none.")
    first = next(iter(replays.values()))
    steps = len(first.clipped)
    finite = first.size[np.isfinite(first.size)]
    spread = "no size is finite"
    if finite.size:
        low, high, middle = finite.min(), finite.max(), np.median(finite)
        spread = f"sizes from {low:.3g} to {high:.3g}, median {middle:.3g}"
    rows = [HEADER, *(_row(name, found) for name, found in replays.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(
        [
            f"{steps:,} steps, {first.nonfinite:,} of them not finite; {spread}",
            *lines,
            "Sizes are held fixed: this predicts how often a rule clips, not losses.",
        ]
    )


def _row(name: str, found: Replay) -> tuple[str, ...]:
    shown = ["-" if np.isnan(x) else f"{x:.3g}" for x in (found.worst, *limits(found))]
    kept = "-" if np.isnan(found.kept) else f"{100 * found.kept:.1f} %"
    return name, f"{100 * found.clip_rate:.1f} %", kept, *shown


def limits(found: Replay) -> tuple[float, float, float]:
    """The median, lowest and highest limit, where there is one; NaN if nowhere."""
    known = found.limit[np.isfinite(found.limit)]
    if not known.size:
        return np.nan, np.nan, np.nan
    return float(np.median(known)), float(known.min()), float(known.max())
