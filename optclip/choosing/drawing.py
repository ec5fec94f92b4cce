"""What pictures are drawn with: lines of logs, marks, axes and legends.

Of a long log the lowest and highest size of each of a thousand bins is drawn, which
looks the same and takes no longer than a short one. matplotlib is imported by calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from optclip._core.public import caller

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind readers tell apart.
GREY, BLACK, BLUE, RED = "0.6", "black", "#0072B2", "#D55E00"
# One for each rule, in turns of different length.
COLOURS = (BLUE, RED, "#009E73", "#CC79A7", "#E69F00")
DASHES = ("-", "--", "-.", ":")
BINS = 1000  # more points than this cannot be told apart across a figure


def axes(ax: Axes | None, height: float = 4.0) -> Axes:
    """The given Axes, or those of a new figure."""
    if ax is not None:
        return ax
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ImportError(
            f"{caller()}: pictures need matplotlib, pip install matplotlib ({missing})."
        ) from None
    return Figure(figsize=(8, height), layout="constrained").subplots()


def draw_log(
    ax: Axes, steps: np.ndarray, size: np.ndarray, over: np.ndarray, label: str | None
) -> None:
    """Sizes over steps, with what is over a limit and what is not finite marked."""
    finite = np.isfinite(size)
    draw_line(ax, steps, size, GREY, label="size", linewidth=0.8)
    at = peaks(size, over & finite)
    if label is not None:
        small = 4 if len(at) < 200 else 2
        ax.plot(steps[at], size[at], "^", color=RED, markersize=small, label=label)
    mark_lost(ax, steps, ~finite)
    logarithmic(ax, size)


def mark_lost(ax: Axes, steps: np.ndarray, lost: np.ndarray) -> None:
    """Crosses along the upper edge for steps that are not finite."""
    if lost.any():
        at = steps[peaks(np.zeros(len(steps)), lost)]
        edge = {"transform": ax.get_xaxis_transform(), "clip_on": False, "zorder": 4}
        label = f"not finite: {lost.sum():,}"
        ax.plot(at, np.full(len(at), 0.97), "x", color=BLACK, label=label, **edge)


def draw_line(
    ax: Axes, steps: np.ndarray, values: np.ndarray, colour: str, **how: str | float
) -> None:
    at = shown(values)
    known = np.where(np.isfinite(values[at]), values[at], np.nan)
    ax.plot(steps[at], known, color=colour)[0].set(**how)


def shown(values: np.ndarray) -> np.ndarray:
    """The places of all values, or of the extremes within each of many bins."""
    if len(values) <= 2 * BINS:
        return np.arange(len(values))
    finite = np.isfinite(values)
    return np.union1d(peaks(values, finite), peaks(-values, finite))


def peaks(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The place of the largest chosen value within each bin; all, if they are few."""
    places = np.flatnonzero(chosen)
    bins = places * BINS // max(len(values), BINS)
    order = np.lexsort((values[places], bins))
    last = np.diff(bins[order], append=BINS) > 0
    return np.sort(places[order][last])


def spread(count: int, most: int) -> np.ndarray:
    """At most so many places, evenly."""
    return np.arange(0, count, -(-count // most) or 1)


def logarithmic(ax: Axes, sizes: np.ndarray, which: Literal["x", "y"] = "y") -> None:
    """With numbers as they are written, not as powers; linear if all sizes are 0."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    if (np.isfinite(sizes) & (sizes > 0)).any():
        ax.set(**{f"{which}scale": "log"})
        axis = ax.xaxis if which == "x" else ax.yaxis
        axis.set_major_formatter(Plain())
        axis.set_minor_formatter(Plain())


def labelled(ax: Axes, size: str, columns: int = 3) -> Axes:
    ax.set(xlabel="step", ylabel=size)
    ax.margins(x=0.01)
    ax.spines[["top", "right"]].set_visible(False)
    return with_legend(ax, columns)


def with_legend(ax: Axes, columns: int = 3) -> Axes:
    """Below the picture, where it hides nothing."""
    if ax.get_legend_handles_labels()[0]:
        below = {"loc": "upper left", "bbox_to_anchor": (0, 0)}
        look = {"fontsize": "small", "frameon": False, "borderaxespad": 4.5}
        legend = ax.legend(ncols=columns, **look, **below)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return ax
