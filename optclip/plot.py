"""Pictures for choosing a clip: one function each, drawn by matplotlib.

| function | what it shows |
|---|---|
| `history(history)` | size and limit at each step, what was clipped or not finite |
| `layers(history)` | a heat map of every leaf's size over the steps |
| `replay(replays)` | the limits of several rules over one log, and where each clips |
| `advice(advice, sizes)` | the log, the advised limit and its interval, the verdict |
| `sweep(sweep)` | the final loss by limit, with the clip rate beside it |
| `distribution(sizes)` | how often a fixed limit would clip, with the tail |

Each returns matplotlib's Axes, which holds its figure: `.figure.savefig("clip.png")`.
`ax=` draws into Axes of yours, such as `plt.gca()`; a new figure does not go through
pyplot. Colours are Okabe and Ito's, which colour-blind readers tell apart; markers and
dashes say the same in black and white. Only a call imports matplotlib.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from optclip._core.measures import Measure, l2
from optclip._core.public import error, public
from optclip.choosing import drawing
from optclip.choosing.drawing import BLACK, BLUE, COLOURS, DASHES, GREY, RED
from optclip.choosing.evidence import tail_index
from optclip.choosing.logged_sizes import Sizes, combined
from optclip.choosing.replay import Replay
from optclip.choosing.suggest import Advice
from optclip.choosing.sweep import Sweep
from optclip.insight.history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["advice", "distribution", "history", "layers", "replay", "sweep"]

NAMES = 40  # of leaves that fit beside a heat map


@public
def history(history: History, ax: Axes | None = None) -> Axes:
    """Size and limit at each recorded step; what was clipped or not finite is marked.

    Args:
      history: what `optclip.history` returns for one rule.
      ax: where to draw; a new figure if None.

    Returns:
      The Axes, with a logarithmic size.

    Edge cases: sizes of 0 have no place on a logarithmic axis. Of many steps the lowest
    and highest of each thousandth are drawn, and its largest clipped one.

    Raises:
      ValueError: if history is no history, or has no steps.
      ImportError: if matplotlib is not installed.

    >>> import jax.numpy as jnp, optclip
    >>> tx = optclip.clip_by_global_norm(2.0, record=16)
    >>> _, state = tx.update(jnp.array([3.0, 4.0]), None)
    >>> history(optclip.history(state)).get_ylabel()
    'size before clipping (l2)'
    """
    past = _checked(history)
    ax = drawing.axes(ax)
    limited = np.isfinite(past.limit).any()
    if limited:
        drawing.draw_line(
            ax, past.steps, past.limit, BLUE, label="limit", drawstyle="steps-mid"
        )
    share = 100 * past.clipped.mean()
    clipped = f"clipped: {share:.3g} % of the steps" if limited else None
    drawing.draw_log(ax, past.steps, past.size, past.clipped, clipped)
    return drawing.labelled(ax, f"size before clipping ({past.measure})")


@public
def layers(history: History, ax: Axes | None = None) -> Axes:
    """A heat map of the sizes of all leaves, or groups, over the steps.

    Args:
      history: what `optclip.history` returns for one rule.
      ax: where to draw; a new figure if None.

    Returns:
      The Axes; the first leaf is on top. Crosses mark what was not finite, white is 0.

    Edge cases: of more than 40 leaves only some are named. Steps that the recorder
    skipped leave no gap: columns are in its order, labelled by step.

    Raises:
      ValueError: if history is no history, or has no steps.
      ImportError: if matplotlib is not installed.

    >>> import jax.numpy as jnp, optclip
    >>> tx = optclip.clip_by_norm(2.0, record=16)
    >>> _, state = tx.update({"bias": jnp.ones(2), "kernel": jnp.ones(3)}, None)
    >>> ax = layers(optclip.history(state))
    >>> print([label.get_text() for label in ax.get_yticklabels()])
    ['bias', 'kernel']
    """
    past = _checked(history)
    height = 2.0 + 0.2 * min(len(past.names), NAMES)
    ax = drawing.axes(ax, height)
    from matplotlib.colors import LogNorm

    sizes = np.where(np.isfinite(past.sizes) & (past.sizes > 0), past.sizes, np.nan).T
    known = sizes[np.isfinite(sizes)]
    low, high = (known.min(), known.max()) if known.size else (1.0, 1.0)
    image = ax.imshow(
        sizes,
        cmap="cividis",  # even in brightness, so a black and white print is right too
        norm=LogNorm(low, high if high > low else 2 * low),
        aspect="auto",
        interpolation="none",
    )
    bar = ax.figure.colorbar(
        image, ax=ax, label=f"size before clipping ({past.measure})"
    )
    drawing.logarithmic(bar.ax, sizes)
    step, leaf = np.nonzero(past.nonfinite)
    edged = {"color": BLACK, "markeredgecolor": "white", "markersize": 8}
    if step.size:
        ax.plot(step, leaf, "X", label=f"not finite: {step.size:,}", **edged)
    shown = drawing.spread(len(past.names), NAMES)
    names = [past.names[place] for place in shown]
    ax.set_yticks(shown, names, fontsize="small", parse_math=False)
    ticks = drawing.spread(len(past.steps), 9)
    ax.set_xticks(ticks, [f"{past.steps[place]:,}" for place in ticks])
    ax.set_xlabel("step")
    return drawing.with_legend(ax)


@public
def replay(replays: Mapping[str, Replay], ax: Axes | None = None) -> Axes:
    """The limits of several rules over one log, and where each of them clips.

    Args:
      replays: what `optclip.replay` returns.
      ax: where to draw; a new figure if None.

    Returns:
      The Axes. Each rule has a line for its limit and a row of ticks above for the
      steps that it clips; the legend has the shares of steps clipped and of size kept.

    Edge cases: a limit that is infinite, or that a rule does not tell, has no line. A
    table of several groups is drawn by its largest finite size.

    Raises:
      ValueError: if there is no replay.
      ImportError: if matplotlib is not installed.

    >>> import optclip
    >>> rules = {"1": optclip.clip_by_global_norm(1.0), "spike": optclip.spike_clip()}
    >>> ax = replay(optclip.replay([1.0, 1.2, 9.0, 1.1], rules))
    >>> print([text.get_text() for text in ax.get_legend().get_texts()][1])
    75.0 % clipped, 71.3 % kept: 1
    """
    if not replays:
        raise error("replays must hold at least one, got none.")
    ax = drawing.axes(ax, 4.2 + 0.3 * len(replays))
    from matplotlib.transforms import offset_copy

    first = next(iter(replays.values()))
    steps = np.arange(len(first.clipped))
    table = first.size if first.size.ndim > 1 else first.size[:, None]
    missing = ~np.isfinite(table)
    size = np.where(missing, -np.inf, table).max(1)
    size = np.where(np.isfinite(size), size, np.nan)
    drawing.draw_line(ax, steps, size, GREY, label="size", linewidth=0.8)
    drawing.mark_lost(ax, steps, np.asarray(missing.any(1)))
    for number, (name, own) in enumerate(replays.items()):
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
        kept = "-" if np.isnan(own.kept) else f"{100 * own.kept:.1f} %"
        label = f"{100 * own.clip_rate:.1f} % clipped, {kept} kept: {name}"
        drawing.draw_line(ax, steps, own.limit, colour, label=label, linestyle=dash)
        at = steps[drawing.peaks(np.zeros(len(steps)), own.clipped)]
        edge, points = ax.get_xaxis_transform(), 9 * (len(replays) - number)
        row = offset_copy(edge, ax.get_figure(root=True), y=points, units="points")
        tick = {"color": colour, "markersize": 7, "clip_on": False, "transform": row}
        ax.plot(at, np.ones(len(at)), "|", **tick)
    pad = 9 * len(replays) + 8
    ax.set_title("steps that each rule clips", loc="left", fontsize="small", pad=pad)
    drawing.logarithmic(ax, size)
    return drawing.labelled(ax, "size before clipping", columns=1)


@public
def advice(
    advice: Advice, sizes: Sizes, ax: Axes | None = None, *, measure: Measure = l2
) -> Axes:
    """The log with the advised limit, its interval and the verdict in words.

    Args:
      advice: what `optclip.suggest` returned.
      sizes: what it was given.
      ax: where to draw; a new figure if None.
      measure: as it was given; it joins a table of several groups.

    Returns:
      The Axes, with a logarithmic size and the verdict as its title.

    Edge cases: as `history`. The warm-up that the advice leaves out is shaded.

    Raises:
      ValueError: if sizes are not those of the advice, or no sizes.
      ImportError: if matplotlib is not installed.

    >>> import numpy as np, optclip
    >>> norms = np.exp(0.2 * np.random.default_rng(0).normal(size=200))
    >>> advice(optclip.suggest(norms), norms).get_title("left")
    'A fixed 1.37 clips 5 % of the steps (95 % interval: 1.28 to 1.44).'
    """
    if not isinstance(advice, Advice):
        raise error(f"advice must be what suggest returned, got {advice!r}.")
    column = combined(sizes, measure)
    known = advice.evidence
    if len(column) != known.steps:
        raise error(
            f"sizes must be those of the advice, {known.steps} steps, got "
            f"{len(column)}."
        )
    ax = drawing.axes(ax)
    steps = sizes.steps if isinstance(sizes, History) else np.arange(len(column))
    usable = np.isfinite(column)
    if known.warmup:  # counts steps that have a logarithm
        last = np.flatnonzero(usable & (column > 0))[known.warmup - 1]
        shade = {"color": "0.9", "zorder": 0, "label": "warm-up, left out"}
        ax.axvspan(float(steps[0]), float(steps[last]), **shade)
        usable[: last + 1] = False
    label = f"limit {advice.limit:.3g} ({advice.low:.3g} to {advice.high:.3g})"
    ax.axhspan(advice.low, advice.high, color=BLUE, alpha=0.2)
    ax.axhline(advice.limit, color=BLUE, label=label, zorder=3)
    over = usable & (column > advice.limit)
    share = 100 * over.sum() / max(usable.sum(), 1)
    drawing.draw_log(ax, steps, column, over, f"above it: {share:.3g} % of the steps")
    title = textwrap.fill(advice.text, 100)
    ax.set_title(title, loc="left", fontsize="small", parse_math=False)
    return drawing.labelled(ax, "size before clipping")


@public
def distribution(
    sizes: Sizes, ax: Axes | None = None, *, measure: Measure = l2
) -> Axes:
    """How sizes are distributed, and how often a fixed limit would clip.

        share above(limit) = |{t : size_t > limit}| / |{t}|

    Args:
      sizes: as for `optclip.suggest`.
      ax: where to draw; a new figure if None.
      measure: joins a table of several groups.

    Returns:
      The Axes, logarithmic both ways: bars are the share of steps at a size, the line
      the share above it, which is the clip rate of that limit. The dashed line is the
      power law of the largest twentieth; index 2 or less is a heavy tail.

    Edge cases: sizes of 0, NaN and infinity have no bar; how many is in the legend.

    Raises:
      ValueError: if sizes are no sizes, or none is finite and above 0.
      ImportError: if matplotlib is not installed.

    >>> import numpy as np
    >>> norms = np.exp(0.2 * np.random.default_rng(0).normal(size=200))
    >>> distribution(norms).get_xlabel()
    'size, or limit'
    """
    column = combined(sizes, measure)
    known = np.sort(column[np.isfinite(column) & (column > 0)]).astype(np.float64)
    if not known.size:
        raise error(f"sizes must hold finite ones above 0, got none of {len(column)}.")
    ax = drawing.axes(ax)
    wide = 1.0 if known[-1] > 1.1 * known[0] else 1.05
    low, high = known[0] / wide, known[-1] * wide
    edges = np.geomspace(low, high, 41)
    edges[[0, -1]] = low, high  # geomspace may round past a size
    share = np.full(known.size, 1 / known.size)
    ax.hist(known, edges, weights=share, color="0.8", label="share of steps")
    above = np.arange(known.size, 0, -1) / known.size
    at = drawing.shown(known)
    ax.step(known[at], above[at], color=BLUE, label="share above: the clip rate")
    index, largest = tail_index(np.log(known))
    if np.isfinite(index):
        place = known.size - largest
        tail = np.array([known[place], known[-1]])
        law = above[place] * (tail / tail[0]) ** -index
        label = f"tail: power law of index {index:.2g}"
        ax.plot(tail, law, "--", color=RED, linewidth=2, label=label)
    left_out = len(column) - known.size
    if left_out:
        label = f"{left_out:,} of {len(column):,} are 0 or not finite"
        ax.plot([], [], " ", label=label)
    drawing.logarithmic(ax, known, "x")
    drawing.logarithmic(ax, above)
    ax.set(xlabel="size, or limit", ylabel="share of steps")
    ax.set_ylim(0.5 / known.size, 1.5)
    return drawing.with_legend(ax)


@public
def sweep(sweep: Sweep, ax: Axes | None = None) -> Axes:
    """The final loss by limit, with the clip rate beside it.

    Args:
      sweep: what `optclip.sweep` returned.
      ax: where to draw; a new figure if None. The clip rate has a second axis.

    Returns:
      The Axes of the loss, logarithmic both ways if no loss is negative.

    Edge cases: an infinite limit is a line across, for training without a clip, or a
    word in the legend if that was lost. Crosses along the upper edge are other runs
    that were lost.

    Raises:
      ValueError: if sweep is no sweep.
      ImportError: if matplotlib is not installed.

    >>> import jax.numpy as jnp, optclip
    >>> found = optclip.sweep(lambda limit: limit + jnp.ones(5), [0.1, 1.0, 10.0])
    >>> print(sweep(found).get_lines()[0].get_ydata())
    [ 1.1  2.  11. ]
    """
    if not isinstance(sweep, Sweep):
        raise error(f"sweep must be what optclip.sweep returned, got {sweep!r}.")
    ax = drawing.axes(ax)
    order = np.argsort(sweep.limits)
    limits, final = sweep.limits[order], sweep.final[order]
    here = np.isfinite(limits)
    drawing.draw_line(
        ax, limits[here], final[here], BLUE, marker="o", label="final loss"
    )
    for loss in final[~here][:1]:
        if np.isfinite(loss):
            label = "final loss without a clip"
            ax.axhline(loss, color=BLACK, linestyle=":", label=label)
        else:
            ax.plot([], [], " ", label="without a clip: lost")
    drawing.mark_lost(ax, limits[here], ~np.isfinite(final[here]))
    drawing.logarithmic(ax, limits, "x")
    if not (final < 0).any():
        drawing.logarithmic(ax, final)
    ax.set(xlabel="limit", ylabel="final loss")
    if sweep.clip_rates is not None:
        beside = ax.twinx()
        rates = 100 * sweep.clip_rates[order]
        beside.plot(limits[here], rates[here], "s--", color=RED, markersize=4)
        beside.set(ylim=(-3, 103), ylabel="% of steps clipped")
        ax.plot([], [], "s--", color=RED, markersize=4, label="clipped (right axis)")
    return drawing.with_legend(ax)


def _checked(history: History) -> History:
    if not isinstance(history, History):
        kind = type(history).__name__
        several = "; take one of them" if isinstance(history, dict) else ""
        raise error(f"history must be one History of optclip, got a {kind}{several}.")
    if not len(history.steps):
        raise error("history must have steps, got none.")
    return history
