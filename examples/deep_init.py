"""Which initialization a deep network trains from, and how to see it before training.

He et al. 2015, figure 3, at laptop scale: a network of 30 layers learns the handwritten
digits of scikit-learn with plain SGD, once for each way to draw it. With ReLU it trains
from He's initialization and stalls from Xavier's, where each layer halves the variance;
with tanh it trains from Xavier's. Zeros show the symmetry problem in a small network:
all units of a layer stay equal. LSUV scales the same kernels on a batch. The program
prints one table and draws one picture: the losses of every run, and beside them what
`signal_report` measured in each network before its first step.
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
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from optclip import initializers as init

LayerList = getattr(nnx, "List", list)  # a list itself before Flax 0.12
WIDTH, CLASSES, BATCH = 64, 10, 128
RATE = 0.003
CHUNKS = 20  # of a run, one jitted scan each


class Network(nnx.Module):
    """A plain deep network; the last layer is its head."""

    def __init__(self, depth: int, activation: Callable[[jax.Array], jax.Array]):
        rngs = nnx.Rngs(0)
        widths = [64, *[WIDTH] * (depth - 1)]
        self.layers = LayerList([nnx.Linear(n, WIDTH, rngs=rngs) for n in widths[:-1]])
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = self.activation(layer(x))
        return self.head(x)


class Start(NamedTuple):
    """How one run begins."""

    depth: int
    activation: Callable[[jax.Array], jax.Array]
    draw: Callable[[nnx.Module, jax.Array, jax.Array], None]  # model, key, batch


def redrawn(preset: init.Preset) -> Callable[..., None]:
    return lambda model, key, batch: init.redraw(model, preset, key)


def by_lsuv(model: nnx.Module, key: jax.Array, batch: jax.Array) -> None:
    init.lsuv(model, batch, key=key)


def starts(depth: int) -> dict[str, Start]:
    return {
        "He, ReLU": Start(depth, nnx.relu, redrawn(init.he_normal())),
        "Xavier, ReLU": Start(depth, nnx.relu, redrawn(init.xavier_normal())),
        "PyTorch default, ReLU": Start(depth, nnx.relu, redrawn(init.torch_default())),
        "LSUV, ReLU": Start(depth, nnx.relu, by_lsuv),
        "Xavier, tanh": Start(depth, nnx.tanh, redrawn(init.xavier_normal())),
        "zeros, 2 layers": Start(2, nnx.tanh, redrawn(init.zeros())),
        "Xavier, 2 layers": Start(2, nnx.tanh, redrawn(init.xavier_normal())),
    }


class Run(NamedTuple):
    """Losses of every step, and what came of it."""

    report: init.SignalReport  # before the first step
    loss: np.ndarray
    accuracy: float  # on examples that it has not seen
    distinct: int  # units of the first layer that differ after training
    seconds: float


class Data(NamedTuple):
    images: jax.Array  # (examples, 64), each pixel standardized
    labels: jax.Array


def digits() -> tuple[Data, Data]:
    images, labels = load_digits(return_X_y=True)
    images = (images - images.mean(0)) / np.maximum(images.std(0), 1)
    parts = train_test_split(images, labels, test_size=0.25, random_state=0)
    train, test, train_labels, test_labels = map(np.asarray, parts)
    return data(train, train_labels), data(test, test_labels)


def data(images: np.ndarray, labels: np.ndarray) -> Data:
    return Data(jnp.asarray(images, jnp.float32), jnp.asarray(labels, jnp.int32))


def entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(start: Start, train: Data, test: Data, steps: int, progress: tqdm) -> Run:
    model = Network(start.depth, start.activation)
    first = Data(train.images[:BATCH], train.labels[:BATCH])
    start.draw(model, jax.random.key(0), first.images)
    report = init.signal_report(
        model, None, first.images, lambda logits: entropy(logits, first.labels)
    )
    graph, params = nnx.split(model)
    optimizer = optax.sgd(RATE, momentum=0.9)

    def loss(params: nnx.State, batch: Data) -> jax.Array:
        return entropy(nnx.merge(graph, params)(batch.images), batch.labels)

    def step(training: tuple, rows: jax.Array) -> tuple[tuple, jax.Array]:
        params, state = training
        batch = Data(train.images[rows], train.labels[rows])
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), value

    random = np.random.default_rng(0)
    rows = random.integers(len(train.labels), size=(CHUNKS, steps // CHUNKS, BATCH))
    training, losses = (params, optimizer.init(params)), []
    scan = jax.jit(lambda training, rows: jax.lax.scan(step, training, rows))
    begin = time.perf_counter()
    for part in rows:
        training, values = scan(training, part)
        losses.append(jax.device_get(values))
        progress.update(len(part))
    model = nnx.merge(graph, training[0])
    accuracy = (model(test.images).argmax(1) == test.labels).mean()
    kernel = np.asarray(model.layers[0].kernel[...])
    distinct = len(np.unique(kernel.round(6), axis=1).T)
    seconds = time.perf_counter() - begin
    return Run(report, np.concatenate(losses), float(accuracy), distinct, seconds)


def print_table(runs: dict[str, Run]) -> None:
    columns = "last signal", "first grad", "loss", "accuracy", "units", "seconds"
    print(f"\n{'start':24}" + "".join(f"{column:>12}" for column in columns))
    for name, run in runs.items():
        ahead = run.report.rows[-1].forward.std
        back = run.report.rows[0].backward.std
        print(
            f"{name:24}{ahead:12.2g}{back:12.2g}{run.loss[-20:].mean():12.3f}"
            f"{run.accuracy:12.1%}{run.distinct:12}{run.seconds:12.1f}"
        )
    print("\nlast signal: standard deviation of the head's output before training")
    print("first grad: that of the loss's gradient at the first layer's output")
    print("units: how many of the first layer's units differ after training\n")
    for name, run in runs.items():
        print(f"{name}: " + run.report.verdict.replace("\n", f"\n{name}: "))


def draw(runs: dict[str, Run], depth: int, path: pathlib.Path) -> None:
    """The losses; beside them, one column a deep network, its signal report."""
    deep = {name: run for name, run in runs.items() if len(run.report.rows) > 2}
    figure = Figure(figsize=(19, 9), layout="constrained")
    parts = figure.subfigures(1, 2, squeeze=False, width_ratios=(1, 2))
    left, right = parts[0]
    # The first two colours are the signal report's.
    colours = {name: f"C{number}" for number, name in enumerate(runs, start=2)}
    for axes, layers in zip(left.subplots(2), (depth, 2), strict=True):
        these = {n: r for n, r in runs.items() if (n in deep) == (layers > 2)}
        draw_losses(axes, these, colours)
        axes.set_title(f"{layers} layers")
    right.suptitle("The signal report before the first step")
    grid = right.subplots(2, len(deep), sharex=True, sharey="row", height_ratios=(3, 1))
    for column, (name, run) in zip(grid.T, deep.items(), strict=True):
        run.report.plot(column)
        column[0].set_title(name, color=colours[name], fontweight="bold")
        ticks = range(0, depth, 5)
        column[1].set_xticks(ticks, [str(tick) for tick in ticks], rotation=0)
    for axes in grid[:, 1:].flat:
        axes.set_ylabel("")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def draw_losses(axes: Axes, runs: dict[str, Run], colours: dict[str, str]) -> None:
    """One curve a run; each is thinner than those before, so that none is hidden."""
    axes.axhline(np.log(CLASSES), color="0.85", linewidth=9, label="chance")
    for width, (name, run) in zip(
        np.linspace(4, 1.2, len(runs)), runs.items(), strict=True
    ):
        window = max(len(run.loss) // 50, 1)
        means = np.convolve(run.loss, np.ones(window) / window, "valid")
        style = {"color": colours[name], "linewidth": width, "label": name}
        axes.plot(np.arange(window - 1, len(run.loss)), means, **style)
    axes.set(xlabel="step", ylabel=f"loss, mean of {window} steps", ylim=(-0.1, 3))
    axes.legend()


def main() -> None:
    options = argparse.ArgumentParser(description="Compare initializations.")
    output = pathlib.Path(__file__).parent / "output"
    options.add_argument("--depth", type=int, default=30)
    options.add_argument("--steps", type=int, default=600)
    options.add_argument("--output", type=pathlib.Path, default=output)
    chosen = options.parse_args()

    data, test = digits()
    steps = -(-chosen.steps // CHUNKS) * CHUNKS  # whole chunks
    runs, chances = {}, starts(chosen.depth)
    with tqdm(total=len(chances) * steps, unit="step") as progress:
        for name, start in chances.items():
            progress.set_description(f"{name:24}")
            runs[name] = train(start, data, test, steps, progress)
    print_table(runs)
    picture = chosen.output / "deep_init.png"
    draw(runs, chosen.depth, picture)
    print(f"\nThe picture is in {picture}")


if __name__ == "__main__":
    main()
