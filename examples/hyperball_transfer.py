"""Does a learning rate found on a narrow model serve a wider one? With hyperball and
without.

The small transformer of `transformer_spikes.py` at two widths learns to predict the
next byte of the standard library's source: with AdamW, and with `optclip.hyperball`
around Adam, which fixes every matrix's norm and the size of every step relative to it.
Each trains at three rates, four times apart, from several seeds. The program prints the
validation losses, what it costs to take the narrow model's best rate to the wide one
and what a rate four times too small or too large costs; it draws one picture and saves
all numbers.
"""

import argparse
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from tqdm import tqdm
from transformer_spikes import BATCH, TRAIN, VALIDATION, Transformer, loss, windows

import optclip

Optimizer = Callable[[optax.Schedule], optax.GradientTransformation]

# What hyperball leaves to Adam (the scales of the norms here) has a fixed peak rate.
SCALES = 0.01


def adamw(rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(rate, b2=0.95, weight_decay=0.1)


def hyperball(rate: optax.Schedule) -> optax.GradientTransformation:
    return optclip.hyperball(optax.adam(SCALES, b2=0.95), rate)


class Method(NamedTuple):
    """An optimizer and the rates that it is tried at, four times apart."""

    make: Optimizer
    rates: tuple[float, ...]


METHODS = {
    "adamw": Method(adamw, (0.004, 0.016, 0.064)),
    "hyperball": Method(hyperball, (0.005, 0.02, 0.08)),
}


class Run(NamedTuple):
    """One training run."""

    method: str
    width: int
    rate: float
    seed: int
    validation: float  # nats a byte, after the last step
    training: float  # mean of the last tenth of the steps
    norm: float  # of all matrices together, over their norm at the start


class Summary(NamedTuple):
    """The runs of one method at one width and rate: means over seeds, and spread."""

    validation: float
    deviation: float  # standard deviation of single seeds
    norm: float


def trainer(make: Optimizer, network: nnx.GraphDef, steps: int) -> Callable:
    """From a start, the peak rate and the batches to what `Run` holds."""
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(steps // 10, 1), steps)
    gradient = jax.value_and_grad(lambda p, text: loss(network, p, text)[0])

    def norm(params) -> jax.Array:
        matrices = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
        return optclip.global_norm(matrices)

    @jax.jit
    def train(start, rate, batches, validation):
        optimizer = make(lambda step: rate * shape(step))

        def step(training, text):
            params, state = training
            value, updates = gradient(params, text)
            updates, state = optimizer.update(updates, state, params)
            return (optax.apply_updates(params, updates), state), value

        training = start, optimizer.init(start)
        (params, _), losses = jax.lax.scan(step, training, batches)
        after, _ = loss(network, params, validation)
        last = jnp.mean(losses[-max(steps // 10, 1) :])
        return after, last, norm(params) / norm(start)

    return train


def all_runs(widths: list[int], seeds: int, steps: int) -> Iterator[Run]:
    validation = windows(VALIDATION, (64,), np.random.default_rng(1))
    texts = [
        windows(TRAIN, (steps, BATCH), np.random.default_rng(100 + seed))
        for seed in range(seeds)
    ]
    for width in widths:
        starts = [nnx.split(Transformer(nnx.Rngs(s), width)) for s in range(seeds)]
        for name, method in METHODS.items():
            train = trainer(method.make, starts[0][0], steps)
            for rate in method.rates:
                for seed, (_, start) in enumerate(starts):
                    numbers = train(start, rate, texts[seed], validation)
                    yield Run(name, width, rate, seed, *map(float, numbers))


def summarized(runs: list[Run]) -> dict[tuple[str, int, float], Summary]:
    """By method, width and rate."""
    found = {}
    for run in runs:
        place = run.method, run.width, run.rate
        same = [other for other in runs if other[:3] == place]
        losses = [other.validation for other in same]
        deviation = np.std(losses, ddof=1) if len(losses) > 1 else np.nan
        norm = np.mean([other.norm for other in same])
        found[place] = Summary(*map(float, (np.mean(losses), deviation, norm)))
    return found


def print_report(found: dict[tuple[str, int, float], Summary], seeds: int) -> None:
    widths = sorted({width for _, width, _ in found})
    print(f"\nvalidation loss in nats a byte, mean of {seeds} seeds ± one seed's")
    for name, method in METHODS.items():
        rates = "".join(f"{rate:>18g}" for rate in method.rates)
        print(f"\n{name:20}{rates}")
        for width in widths:
            cells = [found[name, width, rate] for rate in method.rates]
            shown = "".join(f"{c.validation:11.3f} ± {c.deviation:.3f}" for c in cells)
            norms = ", ".join(f"{cell.norm:.3g}" for cell in cells)
            print(f"  width {width:<12}{shown}   norm grew × {norms}")
    print()
    narrow, wide = widths[0], widths[-1]
    for name, method in METHODS.items():

        def at(width: int, rate: float, name: str = name) -> float:
            value = found[name, width, rate].validation
            return value if np.isfinite(value) else np.inf

        best = {w: min(method.rates, key=lambda r, w=w: at(w, r)) for w in widths}
        moved = at(wide, best[narrow]) - at(wide, best[wide])
        print(
            f"{name}: best rate {best[narrow]:g} at width {narrow}, {best[wide]:g} at "
            f"{wide}; the narrow one's costs {moved:+.3f} at {wide}; its best loss "
            f"there is {at(wide, best[wide]):.3f}"
        )
        for end, rate in (("smallest", method.rates[0]), ("largest", method.rates[-1])):
            costs = [f"{at(w, rate) - at(w, best[w]):+.3f}" for w in widths]
            pairs = zip(costs, widths, strict=True)
            listed = ", ".join(f"{cost} at {width}" for cost, width in pairs)
            print(f"  the {end} rate instead of the best costs {listed}")


def draw(found: dict[tuple[str, int, float], Summary], path: pathlib.Path) -> None:
    """The losses over the rates, one panel a method, one line a width."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, len(METHODS), sharey=True, squeeze=False)[0]
    for axes, (name, method) in zip(panels, METHODS.items(), strict=True):
        for width in sorted({width for _, width, _ in found}):
            cells = [found[name, width, rate] for rate in method.rates]
            means, errors = ([c[n] for c in cells] for n in (0, 1))
            axes.errorbar(
                method.rates, means, np.nan_to_num(errors), marker="o", capsize=4,
                label=f"width {width}",
            )  # fmt: skip
        axes.set(xscale="log", title=name, xlabel="peak rate")
        axes.set_xticks(method.rates, [f"{rate:g}" for rate in method.rates])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    panels[0].set_ylabel("validation loss (nats a byte)")
    figure.savefig(path, dpi=110)


def main() -> None:
    options = argparse.ArgumentParser(description="Does the learning rate transfer?")
    output = pathlib.Path(__file__).parent / "output"
    options.add_argument("--quick", action="store_true", help="a short, small version")
    options.add_argument("--steps", type=int)
    options.add_argument("--seeds", type=int)
    options.add_argument("--widths", type=int, nargs=2)
    options.add_argument("--output", type=pathlib.Path, default=output)
    chosen = options.parse_args()
    steps = chosen.steps or (60 if chosen.quick else 300)
    seeds = chosen.seeds or (2 if chosen.quick else 3)
    widths = chosen.widths or ([8, 16] if chosen.quick else [16, 64])

    start, runs = time.perf_counter(), []
    count = len(widths) * seeds * sum(len(m.rates) for m in METHODS.values())
    for run in tqdm(all_runs(widths, seeds, steps), total=count, unit="run"):
        runs.append(run)
    found = summarized(runs)
    print_report(found, seeds)
    minutes = (time.perf_counter() - start) / 60
    print(f"\n{count} runs of {steps} steps took {minutes:.1f} minutes")
    chosen.output.mkdir(parents=True, exist_ok=True)
    picture = chosen.output / "hyperball_transfer.png"
    draw(found, picture)
    settings = {"steps": steps, "seeds": seeds, "widths": widths}
    numbers = {"settings": settings, "runs": [run._asdict() for run in runs]}
    picture.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n")
    print(f"The picture and the numbers are in {picture}")


if __name__ == "__main__":
    main()
