"""What clipping does to a training run that dies without it.

A small Flax network learns a regression whose targets are in the hundreds, so the first
gradients are too. With plain SGD the loss is NaN within one epoch; with a clip in front
of the same SGD the network learns. The program prints the smallest useful use of
optclip, trains once per rule and once for each of many limits, prints two tables and
what the norms of one run advise, and draws one picture: the targets, the losses of
every run, the loss by limit, and what each clip measured next to its limit.
"""

import argparse
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import make_regression
from tqdm import tqdm

import optclip

BATCH = 32
LIMITS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, np.inf)
COLORS = colormaps["tab20"](range(20))


class Rule(NamedTuple):
    """A clip, what its `size` is, and its limit where the clip keeps no state."""

    clip: optax.GradientTransformation
    measured: str
    limit: float = np.inf


# `clip_by_value` measures nothing, so that it costs nothing: a monitor goes beside it.
by_value = optax.chain(
    optclip.monitor(optclip.measures.max_abs), optclip.clip_by_value(5.0)
)
per_unit = optclip.groupings.per_unit()
smooth = optclip.actions.smooth()
RULES = {
    "none": Rule(optclip.monitor(), "norm"),
    "clip_by_value(5)": Rule(by_value, "largest entry", limit=5.0),
    "clip_by_norm(1)": Rule(optclip.clip_by_norm(1.0), "largest norm of a leaf"),
    "clip_by_norm(1, per unit)": Rule(
        optclip.clip_by_norm(1.0, grouping=per_unit), "largest norm of a unit"
    ),
    "clip_by_block_rms(0.1)": Rule(
        optclip.clip_by_block_rms(0.1), "largest RMS of a leaf"
    ),
    "clip_by_global_norm(1)": Rule(optclip.clip_by_global_norm(1.0), "norm"),
    "clip_by_global_norm(10, smooth)": Rule(
        optclip.clip_by_global_norm(10.0, action=smooth), "norm"
    ),
    "adaptive_grad_clip(0.01)": Rule(
        optclip.adaptive_grad_clip(0.01), "norm of the worst unit"
    ),
    "spike_clip": Rule(optclip.spike_clip(), "norm"),
    "autoclip": Rule(optclip.autoclip(), "norm"),
    "zclip": Rule(optclip.zclip(), "norm"),
    "zclip(max_norm=1)": Rule(optclip.zclip(max_norm=1.0), "norm"),
    "adagc": Rule(optclip.adagc(), "norm of the worst leaf"),
    "quantile_clip": Rule(optclip.quantile_clip(), "norm"),
    "norm_growth_clip": Rule(optclip.norm_growth_clip(), "norm of the worst leaf"),
}


class Run(NamedTuple):
    """Losses per epoch, the first before any step; what was measured per step."""

    train_mse: np.ndarray
    test_mse: np.ndarray
    norm: np.ndarray  # of the whole gradient, before the clip
    size: np.ndarray  # of what the rule measures
    limit: np.ndarray
    seconds: float

    @property
    def clipped(self) -> float:
        """The share of the steps that were clipped."""
        return float(np.mean(self.size > self.limit))

    @property
    def diverged_at(self) -> int | None:
        """The first epoch that ended with a loss that is not finite."""
        lost = ~np.isfinite(self.train_mse)
        return int(lost.argmax()) if lost.any() else None


def smallest() -> None:
    """The smallest useful program: clip, descend, read what the clip saw."""
    optimizer = optax.chain(optclip.clip_by_global_norm(1.0), optax.sgd(0.1))
    params = {"slope": jnp.array(0.0), "offset": jnp.array(0.0)}
    gradient = jax.grad(lambda p: (3.0 * p["slope"] + p["offset"] - 1.0) ** 2)
    state = optimizer.init(params)
    for _ in range(5):
        updates, state = optimizer.update(gradient(params), state)
        params = optax.apply_updates(params, updates)
    for name, value in optclip.metrics(state).items():
        print(f"{name:20} {value:.4g}")


class Network(nnx.Module):
    """25 ReLU units and one linear output."""

    def __init__(self, features: int, rngs: nnx.Rngs):
        he_uniform = nnx.initializers.he_uniform()
        self.hidden = nnx.Linear(features, 25, kernel_init=he_uniform, rngs=rngs)
        self.output = nnx.Linear(25, 1, rngs=rngs)

    def __call__(self, features: jax.Array) -> jax.Array:
        return self.output(nnx.relu(self.hidden(features)))[:, 0]


def start(features, targets) -> tuple[Callable[..., jax.Array], nnx.State]:
    """The loss of some rows, and the parameters before any step."""
    network, params = nnx.split(Network(features.shape[1], nnx.Rngs(0)))

    def loss(params, rows):
        predicted = nnx.merge(network, params)(features[rows])
        return jnp.mean((predicted - targets[rows]) ** 2)

    return loss, params


def batches_of(key: jax.Array, half: int) -> jax.Array:
    """One epoch's whole batches; which rows are left out varies."""
    full = half - half % BATCH
    return jax.random.permutation(key, half)[:full].reshape(-1, BATCH)


def train(rule: Rule, features, targets, epochs: int, progress: tqdm) -> Run:
    """Trains on the first half of the examples and tests on the second."""
    half = len(targets) // 2
    loss, params = start(features, targets)
    optimizer = optax.named_chain(
        ("gradient", optclip.monitor()),
        ("clip", rule.clip),
        ("sgd", optax.sgd(0.01, momentum=0.9)),
    )

    def step(training, rows):
        params, state = training
        updates, state = optimizer.update(jax.grad(loss)(params, rows), state, params)
        seen = optclip.metrics(state)
        clip = {k.split("/")[-1]: x for k, x in seen.items() if k.startswith("clip/")}
        limit = jnp.minimum(clip.get("limit", jnp.inf), rule.limit)
        # Nothing is limited at the largest number, which has no place in a picture.
        limit = jnp.where(limit < jnp.finfo(limit.dtype).max, limit, jnp.inf)
        history = seen["gradient/size"], clip["size"], limit
        return (optax.apply_updates(params, updates), state), history

    @jax.jit
    def losses(params):
        return loss(params, slice(half)), loss(params, slice(half, None))

    @jax.jit
    def epoch(training, key):
        training, seen = jax.lax.scan(step, training, batches_of(key, half))
        return training, seen, losses(training[0])

    training = params, optimizer.init(params)
    keys = list(jax.random.split(jax.random.key(0), epochs))
    curve, history = [losses(params)], []
    compiled = epoch.lower(training, keys[0]).compile()
    began = time.perf_counter()
    for key in keys:
        training, seen, after = jax.block_until_ready(compiled(training, key))
        history.append(seen)
        curve.append(after)
        progress.update()
    seconds = time.perf_counter() - began
    train_mse, test_mse = np.transpose(curve)
    norm, size, limit = np.concatenate(history, axis=1)
    return Run(train_mse, test_mse, norm, size, limit, seconds)


def try_limits(features, targets, epochs: int) -> optclip.Sweep:
    """The same training by `clip_by_global_norm`, for all limits at once."""
    half = len(targets) // 2
    loss, params = start(features, targets)
    keys = jax.random.split(jax.random.key(0), epochs)
    batches = jnp.concatenate([batches_of(key, half) for key in keys])

    def train_with(limit):
        clip = optclip.clip_by_global_norm(limit)
        optimizer = optax.chain(clip, optax.sgd(0.01, momentum=0.9))

        def step(training, rows):
            params, state = training
            now, updates = jax.value_and_grad(loss)(params, rows)
            updates, state = optimizer.update(updates, state, params)
            return (optax.apply_updates(params, updates), state), now

        training = params, optimizer.init(params)
        (_, state), losses = jax.lax.scan(step, training, batches)
        return losses, state

    return optclip.sweep(train_with, LIMITS)


def print_table(runs: dict[str, Run]) -> None:
    """Norms are of the whole gradient before the clip; seconds leave out compiling."""
    columns = ("train MSE", "test MSE", "clipped", "median norm", "seconds")
    print(f"\n{'rule':32}" + "".join(f"{column:>12}" for column in columns))
    for name, run in runs.items():
        errors = f"{run.train_mse[-1]:12.4g}{run.test_mse[-1]:12.4g}"
        if run.diverged_at:
            errors = f"diverged at epoch {run.diverged_at}".rjust(24)
        norm = np.nanmedian(run.norm)
        print(f"{name:32}{errors}{run.clipped:12.1%}{norm:12.4g}{run.seconds:12.2f}")


def advice(run: Run) -> str:
    """What the norms of a run say of a limit for the next."""
    return str(optclip.suggest(run.norm, clip_rate=0.05))


def draw(
    targets, runs: dict[str, Run], sweep: optclip.Sweep, path: pathlib.Path
) -> None:
    """The targets, the losses and the sweep, and below them one panel per rule."""
    columns = 4
    rows = -(-len(runs) // columns)
    figure = Figure(figsize=(19, 5 + 2.8 * rows), layout="constrained")
    parts = figure.subfigures(
        2, squeeze=False, height_ratios=(5, 2.8 * rows), hspace=0.04
    )
    top, bottom = parts[:, 0]
    layout = [["histogram", "losses", "sweep"], ["box", "losses", "sweep"]]
    axes = top.subplot_mosaic(layout, width_ratios=(2, 5, 3), height_ratios=(4, 1))
    draw_targets(axes["histogram"], axes["box"], targets)
    draw_losses(axes["losses"], runs)
    optclip.plot.sweep(sweep, axes["sweep"])
    axes["sweep"].set_title("clip_by_global_norm: train MSE by limit")
    bottom.suptitle("What each rule measured before it clipped")
    for number, (name, run) in enumerate(runs.items()):
        draw_history(bottom.add_subplot(rows, columns, number + 1), number, name, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def draw_targets(histogram: Axes, box: Axes, targets) -> None:
    histogram.hist(targets, bins=40, color="0.6")
    histogram.set(title="Targets, not scaled", ylabel="examples")
    histogram.tick_params(labelbottom=False)
    box.boxplot(targets, orientation="horizontal", widths=0.6)
    box.set(xlabel="target", yticks=[], xlim=histogram.get_xlim())


def draw_losses(axes: Axes, runs: dict[str, Run]) -> None:
    for number, (name, run) in enumerate(runs.items()):
        if last := run.diverged_at:
            name += f": diverged at epoch {last}"
            end = last - 1, run.train_mse[last - 1]
            axes.plot(*end, "X", color=COLORS[number], markersize=10, zorder=5)
        axes.plot(run.train_mse, color=COLORS[number], label=name)
        axes.plot(run.test_mse, color=COLORS[number], linestyle="--", alpha=0.7)
    axes.set(xlabel="epoch", ylabel="mean squared error", yscale="log")
    axes.set_ylim(top=1e9)  # a run that diverges leaves the picture
    axes.set_title("Losses: train solid, test dashed")
    axes.legend(fontsize="small", loc="upper right", ncols=2)


def draw_history(axes: Axes, number: int, name: str, run: Run) -> None:
    axes.plot(run.size, color=COLORS[number], linewidth=0.7)
    outcome = f"{run.clipped:.0%} of the steps clipped"
    if np.isfinite(run.limit).any():
        axes.plot(run.limit, color="black", linestyle="--", linewidth=0.8)
        label = {"xytext": (0, 4), "textcoords": "offset points"}
        axes.annotate("limit", (0, run.limit[0]), **label)
    if run.diverged_at:
        outcome = f"not finite from step {np.isfinite(run.size).argmin()} on"
    axes.set_title(f"{name}\n{outcome}", fontsize="medium")
    axes.set(xlabel="step", ylabel=RULES[name].measured, yscale="log")


def main() -> None:
    options = argparse.ArgumentParser(description="Compare clips on a regression.")
    output = pathlib.Path(__file__).parent / "output"
    options.add_argument("--epochs", type=int, default=100)
    options.add_argument("--output", type=pathlib.Path, default=output)
    chosen = options.parse_args()

    print("The smallest program, after five steps:")
    smallest()
    features, targets, *_ = make_regression(
        n_samples=1000, n_features=20, noise=0.1, random_state=1
    )
    data = jnp.asarray(features, jnp.float32), jnp.asarray(targets, jnp.float32)
    runs = {}
    with tqdm(total=len(RULES) * chosen.epochs, unit="epoch") as progress:
        for name, rule in RULES.items():
            progress.set_description(f"{name:32}")
            runs[name] = train(rule, *data, chosen.epochs, progress)
    print_table(runs)
    sweep = try_limits(*data, chosen.epochs)
    print(f"\nclip_by_global_norm, all limits at once; the best is {sweep.best:g}:")
    print(sweep)
    print(f"\nThe norms under spike_clip: {advice(runs['spike_clip'])}")
    picture = chosen.output / "regression.png"
    draw(targets, runs, sweep, picture)
    print(f"\nThe picture is in {picture}")


if __name__ == "__main__":
    main()
