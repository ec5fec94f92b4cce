"""The case that gradient clipping was made for: recurrent networks that explode.

A vanilla RNN and an LSTM read strings of random letters, in which an A or a B stands
twice, and must say at the end which came first and which second: the temporal order
task of Pascanu, Mikolov and Bengio (2012), at the scale of a laptop. The program first
trains without a clip and records every norm, asks `optclip.suggest` for a limit and
`optclip.sweep` for a better one, and then trains with each way to clip, several seeds
at once. It prints a table for each network and what helped, and draws one picture: the
cliff in the loss of one unit, norms, the sweep, losses and who learned the task.
"""

import argparse
import concurrent.futures
import pathlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

import optclip

LETTERS, LENGTH, BATCH = 6, 20, 20  # A, B and four that mean nothing
SOLVED = 0.01  # the share of test strings that may be wrong, as in the paper
TESTED = 1000
NONE, RATE = "no clip", "no clip, rate / 10"
ADVISED, BEST = "norm, advised", "norm, best of sweep"
SEEDS, RUNS = 4, 9  # the sweep counts as one
CLIFF_LIMIT = 0.1
RED, BLUE = "#D55E00", "#0072B2"  # Okabe and Ito's, as all colours here
COLORS = ("#D55E00", "#E69F00", "#56B4E9", "#0072B2", "#CC79A7", "#882255")
COLORS += ("black", "#009E73")
DASHES = "-", "--", "-."
STATE = 0.03  # chosen by hand: no recorder sees a cotangent
COUNTED = ADVISED, BEST, "spike_clip"  # the others do not count what they clip
SWEPT = (1 / 100, 1 / 30, 1 / 10, 1 / 3, 1, 3)  # times the limit that is advised


class Cell(NamedTuple):
    """A recurrent cell, how many units it has, and the learning rate it is given."""

    kind: type[nn.SimpleCell] | type[nn.OptimizedLSTMCell]
    units: int
    rate: float
    steps: int


CELLS = {
    "vanilla RNN": Cell(nn.SimpleCell, 32, 0.03, 600),
    "LSTM": Cell(nn.OptimizedLSTMCell, 24, 0.1, 700),
}


class Limits(NamedTuple):
    """What each clip allows, infinity for all, and the rate relative to the usual."""

    norm: float | jax.Array = np.inf
    element: float | jax.Array = np.inf
    state: float | jax.Array = np.inf
    spike: float | jax.Array = np.inf
    rate: float = 1.0


class Run(NamedTuple):
    """What one training came to, or several, with an axis in front."""

    losses: jax.Array  # of every step
    error: jax.Array  # the share of test strings that it gets wrong
    state: Any  # of the optimizer


class Guarded(nn.RNNCellBase):
    """A cell; what flows back from it to the step before is clipped."""

    cell: nn.RNNCellBase
    limit: float | jax.Array

    def __call__(self, carry, letters):
        return self.cell(optclip.clip_cotangent(carry, self.limit), letters)

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        return self.cell.initialize_carry(rng, input_shape)

    @property
    def num_feature_axes(self) -> int:
        return 1


class Network(nn.Module):
    """The logits of AA, AB, BA and BB, after the last letter."""

    cell: Cell
    limit: float | jax.Array = np.inf

    @nn.compact
    def __call__(self, strings):
        orthogonal = nn.initializers.orthogonal()
        cell = self.cell.kind(self.cell.units, recurrent_kernel_init=orthogonal)
        states: Any = nn.RNN(Guarded(cell, self.limit))(strings)
        return nn.Dense(4)(states[:, -1])


def make_strings(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Strings as one-hot letters, and which of the four orders each has."""
    noise, first, second, which = jax.random.split(key, 4)
    letters = jax.random.randint(noise, (count, LENGTH), 2, LETTERS)
    early = jax.random.randint(first, (count,), LENGTH // 10, LENGTH // 5 + 1)
    late = jax.random.randint(second, (count,), 2 * LENGTH // 5, LENGTH // 2 + 1)
    order = jax.random.randint(which, (2, count), 0, 2)
    row = jnp.arange(count)
    letters = letters.at[row, early].set(order[0]).at[row, late].set(order[1])
    return jax.nn.one_hot(letters, LETTERS), 2 * order[0] + order[1]


def train(cell: Cell, seed, limits: Limits) -> Run:
    """One training. A clip at infinity changes nothing, so one program serves all."""
    optimizer = optax.named_chain(
        ("largest", optclip.monitor(optclip.measures.max_abs, record=cell.steps)),
        ("element", optclip.clip_by_value(limits.element)),
        ("spike", optclip.spike_clip(limits.spike)),
        ("norm", optclip.clip_by_global_norm(limits.norm, record=cell.steps)),
        ("sgd", optax.sgd(cell.rate * limits.rate, momentum=0.9)),
    )

    def loss(params, strings, order):
        logits: Any = Network(cell, limits.state).apply(params, strings)
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, order)
        return entropy.mean(), jnp.mean(logits.argmax(-1) != order)

    def step(training, key):
        params, state = training
        batch = make_strings(key, BATCH)
        (now, _), updates = jax.value_and_grad(loss, has_aux=True)(params, *batch)
        updates, state = optimizer.update(updates, state, params)
        return (optax.apply_updates(params, updates), state), now

    start, after, during = jax.random.split(jax.random.key(seed), 3)
    params = Network(cell).init(start, make_strings(start, 1)[0])
    training = params, optimizer.init(params)
    keys = jax.random.split(during, cell.steps)
    (params, state), losses = jax.lax.scan(step, training, keys)
    return Run(losses, loss(params, *make_strings(after, TESTED))[1], state)


class Found(NamedTuple):
    """All that the trainings of one cell came to."""

    unclipped: optclip.History
    advice: optclip.Advice
    sweep: optclip.Sweep
    limits: dict[str, Limits]
    runs: dict[str, Run]

    @property
    def solved(self) -> dict[str, int]:
        """How many of the seeds learned the task, by rule."""
        return {
            name: int((run.error < SOLVED).sum()) for name, run in self.runs.items()
        }


def compare(cell: Cell, seeds: int, progress: tqdm) -> Found:
    """Finds a limit, from a run without one, and trains with each way to clip."""

    @jax.jit
    def all_seeds(limits: Limits) -> Run:
        return jax.vmap(lambda seed: train(cell, seed, limits))(jnp.arange(seeds))

    def run(limits: Limits) -> Run:
        made = jax.device_get(all_seeds(limits))
        progress.update()
        return made

    def swept(limit: jax.Array) -> tuple[jax.Array, optax.OptState]:
        made = all_seeds(Limits(norm=limit))
        return made.losses.mean(0), made.state

    without = run(Limits())
    past: Any = optclip.history(jax.tree.map(lambda leaf: leaf[0], without.state))
    advice = optclip.suggest(past["norm"])
    largest = optclip.suggest(past["largest"], measure=optclip.measures.max_abs).limit
    tried = [float(f"{advice.limit * factor:.2g}") for factor in SWEPT]
    sweep = optclip.sweep(swept, tried)
    progress.update()
    limits = {
        RATE: Limits(rate=0.1),
        ADVISED: Limits(norm=advice.limit),
        BEST: Limits(norm=sweep.best),
        "value, advised": Limits(element=largest),
        # As much smaller as the best norm is.
        "value, smaller alike": Limits(element=largest * sweep.best / advice.limit),
        "spike_clip": Limits(spike=3.0),
        "clip_cotangent": Limits(state=STATE),
    }
    runs = {NONE: without, **{name: run(limit) for name, limit in limits.items()}}
    return Found(past["norm"], advice, sweep, {NONE: Limits(), **limits}, runs)


def clipped(run: Run) -> float:
    """The share of steps that the norm's limit or `spike_clip` acted on."""
    numbers = optclip.metrics(run.state)
    return max(
        float(np.mean(numbers[f"{name}/clipped_steps"] / numbers[f"{name}/steps"]))
        for name in ("norm", "spike")
    )


def print_table(name: str, found: Found) -> None:
    print(f"\nThe norms of one {name} without a clip: {found.advice}")
    print(f"Mean losses of the {name} under limits around {found.advice.limit:.2g}:")
    print(found.sweep)
    columns = "limit", "clipped", "train loss", "test error", "solved"
    print(f"\n{name:24}" + "".join(f"{column:>12}" for column in columns))
    for rule, run in found.runs.items():
        limit = min(found.limits[rule][:3])
        shown = f"{limit:.2g}" if np.isfinite(limit) else "-"
        share = f"{clipped(run):.1%}" if rule in COUNTED else "-"
        end = run.losses[:, -30:].mean()
        solved = f"{found.solved[rule]} of {len(run.error)}"
        numbers = f"{shown:>12}{share:>12}{end:12.3f}{run.error.mean():12.1%}"
        print(f"{rule:24}{numbers}{solved:>12}")


def print_story(found: dict[str, Found]) -> None:
    """What helped and what did not, from the numbers."""
    print(
        f"\nsolved: at most {SOLVED:.0%} of {TESTED:,} new strings wrong (chance: 75%)"
    )
    print("advised: what would have clipped 5% of the steps of a run without a clip")
    print("best of sweep: the limit with the lowest loss at the end, mean of the seeds")
    print("value, smaller alike: by the factor from the advised norm to the best one")
    print("clip_cotangent: at every step back through the string, limit chosen by hand")
    print("(a seed more or less may be rounding: these networks are chaotic)")
    for name, own in found.items():
        seeds = len(own.runs[NONE].error)
        solved = own.solved
        groups = {
            f"solved all {seeds} seeds": [r for r, n in solved.items() if n == seeds],
            "some": [f"{r} ({n})" for r, n in solved.items() if 0 < n < seeds],
            "none": [rule for rule, n in solved.items() if n == 0],
        }
        told = [f"{how}: {', '.join(rules)}" for how, rules in groups.items() if rules]
        print(f"{name}: {'; '.join(told)}.")


def single_unit(weights: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The loss of one unit that should be at 0.7 after 50 steps of its own output."""
    recurrent, bias = weights

    def step(unit, _):
        return recurrent * nn.sigmoid(unit) + bias, None

    unit, _ = jax.lax.scan(step, jnp.full_like(bias, 0.5), length=50)
    return (nn.sigmoid(unit) - 0.7) ** 2


def descend(limit: float) -> np.ndarray:
    """The weights and biases that one unit descends through, (2, steps)."""
    optimizer = optax.chain(optclip.clip_by_global_norm(limit), optax.sgd(3.0))

    def step(training, _):
        weights, state = training
        updates, state = optimizer.update(jax.grad(single_unit)(weights), state)
        return (optax.apply_updates(weights, updates), state), weights

    start = jnp.float32(5.0), jnp.float32(-1.5)
    training = start, optimizer.init(start)
    return np.asarray(jax.lax.scan(step, training, length=150)[1])


def draw_cliff(axes: Axes) -> None:
    """The loss of one unit as a map, and how it descends with a clip and without."""
    recurrent, bias = jnp.linspace(2, 8.5, 500), jnp.linspace(-4, 7.5, 500)
    loss = jax.jit(single_unit)(tuple(jnp.meshgrid(recurrent, bias)))
    image = axes.pcolormesh(recurrent, bias, loss, cmap="cividis", rasterized=True)
    axes.figure.colorbar(image, ax=axes, label="loss")
    for limit, color, mark in ((np.inf, RED, "X"), (CLIFF_LIMIT, "white", "o")):
        path = descend(limit)
        label = "no clip" if limit == np.inf else f"norm clipped to {limit}"
        axes.plot(*path, marker=".", color=color, lw=1.5, ms=5, label=label)
        axes.plot(*path[:, -1], mark, color=color, ms=10, mec="black")
    axes.plot(*path[:, 0], "s", color="black", ms=7, mec="white", label="start")
    axes.text(5.9, 1.2, "one step, thrown\nout of the valley", color="white")
    axes.text(2.4, -3.6, "top of the cliff", color="black")
    axes.set(xlabel="recurrent weight", ylabel="bias")
    axes.set_title("The cliff: the loss of one unit run for 50 steps")
    axes.legend(loc="upper left", fontsize="small", facecolor="0.6", framealpha=0.9)


def draw_norms(axes: Axes, found: dict[str, Found]) -> None:
    bins = np.geomspace(1e-2, 3e2, 46)
    middles = np.sqrt(bins[1:] * bins[:-1])
    for (name, own), color in zip(found.items(), (RED, BLUE), strict=False):
        for rule, dash in ((NONE, "-"), (BEST, "--")):
            norms = own.runs[rule].state["norm"].recorder.size
            counts, _ = np.histogram(norms.clip(bins[0], bins[-1]), bins)
            share = 100 * counts / norms.size
            look: Any = {"color": color, "linestyle": dash}
            axes.step(middles, share, where="mid", label=f"{name}, {rule}", **look)
        axes.axvline(own.sweep.best, color=color, linestyle=":")
    axes.plot([], [], ":", color="0.4", label="best limit of the sweep")
    axes.set(xscale="log", yscale="log", xlabel="norm before the clip (0.01: or less)")
    axes.set(ylabel="% of all steps", ylim=(5e-3, 300))
    axes.set_title("Norms spread over decades once a network learns")
    axes.legend(loc="upper right", fontsize="small")


def draw_losses(axes: Axes, found: Found) -> None:
    for number, (rule, run) in enumerate(found.runs.items()):
        mean = run.losses.mean(0)
        window = max(len(mean) // 20, 1)
        smooth = np.convolve(mean, np.ones(window) / window, "valid")
        steps = np.arange(window - 1, len(mean))
        dash = DASHES[number % len(DASHES)]
        axes.plot(steps, smooth, dash, color=COLORS[number], label=rule, lw=1.6)
    axes.axhline(np.log(4), color="0.6", lw=1, zorder=0)
    beside = {"xycoords": ("axes fraction", "data"), "va": "center"}
    axes.annotate("guessing", (1.01, np.log(4)), **beside)
    axes.set(xlabel="step", yscale="log")
    axes.set_ylabel(f"train loss, mean of seeds and {window} steps")
    axes.legend(fontsize="small", loc="lower left")


def draw_solved(axes: Axes, found: dict[str, Found]) -> None:
    rules = list(next(iter(found.values())).runs)
    high, marks = 0.8 / len(found), ((RED, ""), (BLUE, "//"))
    for number, ((name, own), (color, hatch)) in enumerate(
        zip(found.items(), marks, strict=False)
    ):
        place = np.arange(len(rules)) + (number - (len(found) - 1) / 2) * high
        wrong = [100 * own.runs[rule].error.mean() for rule in rules]
        bars = axes.barh(place, wrong, high, color=color, label=name)
        for rule, bar in zip(rules, bars, strict=True):
            bar.set(hatch=hatch, edgecolor="white")
            text = f"{own.solved[rule]} of {len(own.runs[rule].error)}"
            corner = bar.get_width() + 1, bar.get_y() + high / 2
            axes.annotate(text, corner, va="center", fontsize="small")
    axes.set_yticks(range(len(rules)), rules)
    axes.invert_yaxis()
    axes.set(
        xlim=(0, 95), xlabel="% of new strings wrong; beside: seeds that solved it"
    )
    axes.set_title("Who learned the order")
    axes.legend(fontsize="small", loc="lower right")


def draw(found: dict[str, Found], path: pathlib.Path) -> None:
    figure = Figure(figsize=(18, 10.5), layout="constrained")
    title = f"Which of two letters came first in a string of {LENGTH}"
    figure.suptitle(f"{title}: recurrent networks with each way to clip", fontsize=15)
    name, first = next(iter(found.items()))
    (cliff, norms, record), (sweep, losses, solved) = figure.subplots(2, 3)
    draw_cliff(cliff)
    draw_norms(norms, found)
    optclip.plot.history(first.unclipped, record)
    record.set_title(f"Recorded: one {name} without a clip")
    optclip.plot.sweep(first.sweep, sweep)
    sweep.set_title(f"The sweep of limits on the {name}")
    draw_losses(losses, first)
    losses.set_title(f"Losses of the {name}")
    draw_solved(solved, found)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    options = argparse.ArgumentParser(
        description="Compare clips of recurrent networks."
    )
    output = pathlib.Path(__file__).parent / "output"
    options.add_argument("--quick", action="store_true", help="the RNN, two seeds")
    options.add_argument("--output", type=pathlib.Path, default=output)
    chosen = options.parse_args()

    cells = dict(list(CELLS.items())[:1]) if chosen.quick else CELLS
    seeds = 2 if chosen.quick else SEEDS
    # A thread for each network: the programs are too small to share two cores.
    with (
        tqdm(total=len(cells) * RUNS, unit="run") as progress,
        concurrent.futures.ThreadPoolExecutor() as threads,
    ):
        made = threads.map(lambda cell: compare(cell, seeds, progress), cells.values())
        found = dict(zip(cells, made, strict=True))
    for name, own in found.items():
        print_table(name, own)
    print_story(found)
    picture = chosen.output / "rnn_exploding.png"
    draw(found, picture)
    print(f"\nThe picture is in {picture}")


if __name__ == "__main__":
    main()
