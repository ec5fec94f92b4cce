"""`optclip.plot`: what is in each picture, for every kind of log."""

import dataclasses
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import optclip
from optclip import History, plot
from tests.choosing.processes import PROCESSES
from tests.untyped import untyped


def recorded(steps: int = 60, leaves: int = 3, limit: float = 2.0) -> History:
    rng = np.random.default_rng(0)
    sizes = np.exp(0.3 * rng.normal(size=(steps, leaves)))
    sizes[steps // 2 :][:1, -1] = np.nan
    size = np.sqrt((sizes**2).sum(1))
    return History(
        tuple(f"layer_{number}/kernel$" for number in range(leaves)),
        np.arange(steps) + 100,
        sizes,
        size,
        np.full(steps, limit),
        size > limit,
        ~np.isfinite(sizes),
    )


def drawn(ax: Axes) -> Axes:
    """The Axes, once all of its figure was rendered without a warning."""
    figure = untyped(ax.figure)
    assert isinstance(ax, Axes)
    figure.savefig("/dev/null", format="png")
    return ax


def lines(ax: Axes) -> dict[str, Any]:
    """Lines by the first word of their label."""
    return {str(line.get_label()).split()[0]: line for line in ax.get_lines()}


def norms(name: str = "log-normal, 30 %", steps: int = 400) -> np.ndarray:
    return PROCESSES[name].draw(np.random.default_rng(0), 1, steps)[0]


PAST = recorded()
NORMS = norms()
ADVICE = optclip.suggest(NORMS)
REPLAYS = optclip.replay(
    NORMS, {"_$1": optclip.clip_by_global_norm(1.0), "2": optclip.clip_by_value(2.0)}
)
SWEEP = optclip.Sweep(
    np.array([1.0, 0.1, np.inf, 10.0]),
    np.array([2.0, 3.0, 5.0, np.nan])[:, None] * np.ones(20),
    np.array([0.2, 0.9, 0.0, 0.01]),
)
PICTURES = {
    "history": lambda ax: plot.history(PAST, ax),
    "layers": lambda ax: plot.layers(PAST, ax),
    "replay": lambda ax: plot.replay(REPLAYS, ax),
    "advice": lambda ax: plot.advice(ADVICE, NORMS, ax),
    "distribution": lambda ax: plot.distribution(NORMS, ax),
    "sweep": lambda ax: plot.sweep(SWEEP, ax),
}


def test_every_picture_is_tested():
    assert sorted(PICTURES) == plot.__all__


@pytest.mark.parametrize("name", PICTURES)
def test_axes_are_returned_and_taken(name: str):
    own = Figure(layout="constrained").subplots()
    assert drawn(PICTURES[name](own)) is own
    fresh = drawn(PICTURES[name](None))
    assert fresh.figure is not own.figure


@pytest.mark.parametrize("name", PICTURES)
def test_black_and_white_tells_what_is_drawn(name: str):
    """No two lines of a legend look alike without their colour."""
    ax = PICTURES[name](None)
    legend = ax.get_legend()
    looks = [
        (line.get_linestyle(), line.get_marker(), line.get_linewidth())
        for line in map(untyped, legend.legend_handles if legend else ())
        if hasattr(line, "get_marker")
    ]
    assert len(set(looks)) == len(looks)


def test_history_marks_what_was_clipped_and_what_was_lost():
    found = lines(drawn(plot.history(PAST)))
    assert found["clipped:"].get_xdata().tolist() == PAST.steps[PAST.clipped].tolist()
    assert found["not"].get_xdata().tolist() == [130]
    np.testing.assert_array_equal(found["size"].get_ydata(), PAST.size)
    np.testing.assert_array_equal(found["limit"].get_ydata(), PAST.limit)


@pytest.mark.parametrize("limit", [np.inf, np.nan])
def test_a_history_without_limits_has_no_line_for_them(limit: float):
    past = dataclasses.replace(
        PAST, limit=np.full(60, limit), clipped=np.zeros(60, bool)
    )
    assert set(lines(drawn(plot.history(past)))) == {"size", "not"}


@pytest.mark.parametrize("size", [0.0, np.nan, np.inf, 1.0, 1e38])
@pytest.mark.parametrize("picture", [plot.history, plot.layers])
def test_a_history_of_one_number(picture: Any, size: float):
    every = np.full((5, 2), size)
    bad = ~np.isfinite(every)
    past = dataclasses.replace(
        recorded(5, 2), sizes=every, size=every[:, 0], nonfinite=bad
    )
    drawn(picture(past))


def test_layers_has_a_row_for_each_leaf_and_a_cross_where_one_was_lost():
    ax = drawn(plot.layers(PAST))
    (image,) = ax.get_images()
    shown = np.ma.filled(untyped(image.get_array()), np.nan)
    np.testing.assert_allclose(shown, PAST.sizes.T)
    assert [label.get_text() for label in ax.get_yticklabels()] == [*PAST.names]
    (cross,) = ax.get_lines()
    assert untyped(cross).get_xydata().tolist() == [[30, 2]]


def test_layers_names_some_of_many():
    ax = drawn(plot.layers(recorded(leaves=1000)))
    assert 10 < len(ax.get_yticks()) <= 40


def test_replay_has_limits_and_the_steps_that_each_rule_clips():
    ax = drawn(plot.replay(REPLAYS))
    for name, own in REPLAYS.items():
        label = f"{100 * own.clip_rate:.1f} % clipped, {100 * own.kept:.1f} % kept: "
        (line,) = [x for x in ax.get_lines() if x.get_label() == label + name]
        np.testing.assert_array_equal(line.get_ydata(), own.limit)
    ticks = [line for line in ax.get_lines() if line.get_marker() == "|"]
    for line, own in zip(ticks, REPLAYS.values(), strict=True):
        at = np.flatnonzero(own.clipped)
        np.testing.assert_array_equal(untyped(line).get_xdata(), at)


@pytest.mark.parametrize("sizes", [[np.nan] * 3, [0.0] * 3, [1.0], np.ones((4, 2))])
def test_replay_of_unusual_sizes(sizes: Any):
    rules = {str(size): optclip.clip_by_global_norm(size) for size in range(9)}
    drawn(plot.replay(optclip.replay(sizes, rules | {"all": optclip.monitor()})))


@pytest.mark.parametrize("name", PROCESSES)
def test_advice_on_every_kind_of_log(name: str):
    sizes = norms(name)
    advice = optclip.suggest(sizes)
    ax = drawn(plot.advice(advice, sizes))
    assert ax.get_title("left").replace("\n", " ") == advice.text
    found = lines(ax)
    assert set(found["limit"].get_ydata()) == {advice.limit}
    with np.errstate(invalid="ignore"):
        over = sizes > advice.limit
    over[: advice.evidence.warmup] = False
    assert found["above"].get_xdata().tolist() == np.flatnonzero(over).tolist()


def test_advice_of_histories_and_tables():
    past = recorded(200)
    ax = drawn(plot.advice(optclip.suggest(past), past))
    assert lines(ax)["size"].get_xdata()[0] == 100  # its own steps
    measure = optclip.measures.max_abs
    advice = optclip.suggest(past.sizes, measure=measure)
    ax = drawn(plot.advice(advice, past.sizes, measure=measure))
    np.testing.assert_array_equal(
        lines(ax)["size"].get_ydata(), np.max(past.sizes, axis=1)
    )


def test_long_logs_keep_their_extremes():
    sizes = norms(steps=30_000)
    sizes[[7, 20_001]] = 50.0, 0.01
    ax = drawn(plot.advice(optclip.suggest(sizes), sizes))
    found = lines(ax)
    shown = found["size"].get_ydata()
    assert len(shown) <= 2000
    assert (shown.max(), shown.min()) == (50.0, 0.01)
    at, marked = untyped(found["above"]).get_data()
    assert len(at) <= 1000
    np.testing.assert_array_equal(sizes[at], marked)
    assert 7 in at


def test_distribution_is_the_clip_rate_of_every_limit():
    ax = drawn(plot.distribution(NORMS))
    limits, above = lines(ax)["share"].get_data()
    for limit, share in zip(limits[1::50], above[1::50], strict=True):
        assert share == pytest.approx((limit <= NORMS).mean())
    bars = [untyped(bar).get_height() for bar in ax.patches]
    assert sum(bars) == pytest.approx(1.0)


@pytest.mark.parametrize("sizes", [[1.0], [2.0] * 9, [1e-30, 1e30], [0, 1, np.nan, 2]])
def test_distribution_of_unusual_sizes(sizes: Any):
    ax = drawn(plot.distribution(np.asarray(sizes, np.float64)))
    labels = [text.get_text() for text in untyped(ax.get_legend()).get_texts()]
    assert ("2 of 4 are 0 or not finite" in labels) == (0 in sizes)


def test_sweep_has_losses_in_the_order_of_limits_and_the_clip_rates():
    ax = drawn(plot.sweep(SWEEP))
    loss, without, lost, _ = ax.get_lines()
    np.testing.assert_array_equal(untyped(loss).get_data()[0], [0.1, 1.0, 10.0])
    np.testing.assert_array_equal(untyped(loss).get_data()[1], [3.0, 2.0, np.nan])
    assert set(untyped(without).get_ydata()) == {5.0}
    assert untyped(lost).get_xdata().tolist() == [10.0]
    (rates,) = untyped(ax.figure).axes[1].get_lines()
    np.testing.assert_allclose(rates.get_ydata(), [90.0, 20.0, 1.0])
    bare = drawn(plot.sweep(SWEEP._replace(clip_rates=None, losses=-SWEEP.losses)))
    assert (len(untyped(bare.figure).axes), bare.get_yscale()) == (1, "linear")
    endless = np.isinf(SWEEP.limits)[:, None]
    lost = SWEEP._replace(losses=np.where(endless, np.nan, SWEEP.losses))
    legend = untyped(drawn(plot.sweep(lost)).get_legend())
    assert "without a clip: lost" in [text.get_text() for text in legend.get_texts()]


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (lambda: plot.history(untyped({"a": PAST})), "history: history must be one H"),
        (lambda: plot.layers(untyped(NORMS)), "layers: history must be one History"),
        (lambda: plot.history(recorded(0)), "history: history must have steps, got no"),
        (lambda: plot.replay({}), "replay: replays must hold at least one, got none."),
        (lambda: plot.advice(untyped(3), NORMS), "advice: advice must be what sugges"),
        (lambda: plot.advice(ADVICE, NORMS[1:]), "advice: .* 400 steps, got 399"),
        (lambda: plot.distribution([0.0, np.nan]), "distribution: sizes must hold fin"),
        (
            lambda: plot.sweep(untyped(3)),
            "sweep: sweep must be what optclip.sweep retu",
        ),
        (lambda: plot.distribution([-1.0]), "distribution: sizes must be non-negative"),
    ],
)
def test_bad_input(picture: Any, message: str):
    with pytest.raises(ValueError, match=message):
        picture()


def test_without_matplotlib():
    """It is imported by a picture only, and missed by name."""
    script = """
import sys
import optclip
assert not any(name.startswith("matplotlib") for name in sys.modules)
sys.modules["matplotlib"] = sys.modules["matplotlib.figure"] = None
try:
    optclip.plot.distribution([1.0, 2.0])
except ImportError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    expected = "distribution: pictures need matplotlib, pip install matplotlib"
    assert done.stdout.startswith(expected)
