"""A WGAN on handwritten digits, with three ways to treat its critic.

The critic of a Wasserstein GAN may not be steep. Arjovsky et al. (2017) clip its
weights to [-c, c] after every step; a bound on every layer's largest singular value is
the sharper tool; and without either the critic's ratings grow without end. Three runs
see the same 8×8 digits of scikit-learn, in the same order, from the same start, with
RMSProp and five critic steps for each generator step; they differ only in what closes
the critic's chain, and in the learning rates that go with it. The program prints a
table, and draws samples over the training, the critic's estimate of the Wasserstein
distance, and the critic's weights.
"""

import argparse
import functools
import itertools
import pathlib
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from tqdm import tqdm

import optclip

BATCH, NOISE, WIDTH, CRITIC_STEPS = 64, 16, 128, 5
GRID = 6  # samples drawn, in each direction
C = 0.01  # the paper's bound
LayerList = getattr(nnx, "List", list)  # a list itself before Flax 0.12
CHUNKS = 20  # of a run, one jitted scan each
TIMES = (1, 4, 10, 20)  # in chunks, at which samples are drawn


class Contender(NamedTuple):
    """What closes the critic's chain, and the learning rates of critic and generator.

    The paper's 5e-5 suits weights of at most 0.01; weights that may be ten times as
    large take steps ten times as large.
    """

    closing: optax.GradientTransformation
    critic_rate: float
    generator_rate: float


SPECTRAL = optclip.sets.spectral_ball(1.0, iterations=8)
CONTENDERS = {
    "clip_weights(0.01)": Contender(optclip.clip_weights(C), 5e-5, 2e-4),
    # Once for each step of the generator, as products of matrices cost more than steps.
    "spectral_ball(1)": Contender(
        optclip.project(SPECTRAL, "kernel$", every=CRITIC_STEPS), 5e-4, 5e-4
    ),
    "no bound": Contender(optax.identity(), 5e-4, 2e-4),
}


class Run(NamedTuple):
    """What one run left."""

    estimates: np.ndarray  # of the Wasserstein distance, by generator step
    samples: list[np.ndarray]  # at TIMES, from the same noise
    weights: np.ndarray  # of the critic's kernels
    slope: float  # at most: the product of its layers' largest singular values
    seconds: float


class Layers(nnx.Module):
    """Three dense layers, ReLU between them."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
        pairs = itertools.pairwise((inputs, WIDTH, WIDTH, outputs))
        self.layers = LayerList([nnx.Linear(*pair, rngs=rngs) for pair in pairs])

    def __call__(self, x: jax.Array) -> jax.Array:
        *hidden, last = self.layers
        for layer in hidden:
            x = nnx.relu(layer(x))
        return last(x)


GENERATOR, START = nnx.split(Layers(NOISE, 64, nnx.Rngs(0)))
CRITIC, CRITIC_START = nnx.split(Layers(64, 1, nnx.Rngs(1)))


def generated(params, noise: jax.Array) -> jax.Array:
    return jnp.tanh(nnx.merge(GENERATOR, params)(noise))


def estimate(critic, generator, real: jax.Array, noise: jax.Array) -> jax.Array:
    """How much higher the critic rates real digits than generated ones."""
    judge = nnx.merge(CRITIC, critic)
    return judge(real).mean() - judge(generated(generator, noise)).mean()


def train(contender: Contender, digits: jax.Array, steps: int, progress: tqdm) -> Run:
    critic_tx = optax.chain(optax.rmsprop(contender.critic_rate), contender.closing)
    generator_tx = optax.rmsprop(contender.generator_rate)

    def critic_step(generator, carry, key):
        critic, state = carry
        chosen, noise = jax.random.split(key)
        real = digits[jax.random.randint(chosen, (BATCH,), 0, len(digits))]
        noise = jax.random.normal(noise, (BATCH, NOISE))
        value, up = jax.value_and_grad(estimate)(critic, generator, real, noise)
        down = jax.tree.map(jnp.negative, up)  # the critic climbs
        updates, state = critic_tx.update(down, state, critic)
        return (optax.apply_updates(critic, updates), state), value

    def step(carry, key):
        generator, state, critic = carry
        *keys, last = jax.random.split(key, CRITIC_STEPS + 1)
        one = functools.partial(critic_step, generator)
        critic, values = jax.lax.scan(one, critic, jnp.stack(keys))
        noise = jax.random.normal(last, (BATCH, NOISE))
        down = jax.grad(estimate, argnums=1)(critic[0], generator, digits[:1], noise)
        updates, state = generator_tx.update(down, state, generator)
        return (optax.apply_updates(generator, updates), state, critic), values[-1]

    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
    carry = (
        START,
        generator_tx.init(START),
        (CRITIC_START, critic_tx.init(CRITIC_START)),
    )
    keys = jax.random.split(jax.random.key(2), (CHUNKS, steps // CHUNKS))
    run = run.lower(carry, keys[0]).compile()
    fixed = jax.random.normal(jax.random.key(3), (GRID * GRID, NOISE))
    estimates, samples = [], []
    start = time.perf_counter()
    for chunk in keys:
        carry, values = run(carry, chunk)
        estimates.append(np.asarray(values))
        if len(estimates) in TIMES:
            samples.append(np.asarray(generated(carry[0], fixed)))
        progress.update(len(chunk))
    seconds = time.perf_counter() - start
    kernels = [np.asarray(x) for x in jax.tree.leaves(carry[2][0]) if x.ndim == 2]
    weights = np.concatenate([kernel.ravel() for kernel in kernels])
    slope = float(np.prod([np.linalg.norm(kernel, 2) for kernel in kernels]))
    return Run(np.concatenate(estimates), samples, weights, slope, seconds)


def judged(samples: np.ndarray, digits: np.ndarray, labels: np.ndarray) -> tuple:
    """How far samples are from real digits, and which of the ten they resemble.

    The distance of each to its nearest real digit, as a multiple of the same between
    real digits: 1 is as good as real. Classes count from two samples on.
    """

    def nearest(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        squares = np.sum(x**2, 1)[:, None] + np.sum(digits**2, 1) - 2 * x @ digits.T
        squares = np.where(squares < 1e-3, np.inf, squares)  # of real ones, themselves
        return np.sqrt(squares.min(1)), labels[squares.argmin(1)]

    distance, resembled = nearest(samples)
    ordinary, _ = nearest(digits[:200])
    classes = int(np.sum(np.bincount(resembled, minlength=10) >= 2))
    return float(distance.mean() / ordinary.mean()), classes


def print_table(runs: dict[str, Run], digits: np.ndarray, labels: np.ndarray) -> None:
    columns = (
        "estimate",
        "slope at most",
        "largest |w|",
        "distance",
        "classes",
        "seconds",
    )
    print(f"\n{'critic':20}" + "".join(f"{column:>15}" for column in columns))
    for name, run in runs.items():
        distance, classes = judged(run.samples[-1], digits, labels)
        numbers = run.estimates[-100:].mean(), run.slope, np.abs(run.weights).max()
        text = "".join(f"{number:15.4g}" for number in numbers)
        print(f"{name:20}{text}{distance:15.3f}{classes:15}{run.seconds:15.1f}")
    print("\nestimate: of the Wasserstein distance, in units of the critic's own slope")
    print("slope at most: the product of the critic's largest singular values")
    print("distance: of samples to the nearest real digit, 1 as between real ones")
    print("classes: how many of the ten digits the samples resemble")


def draw(runs: dict[str, Run], steps: int, path: pathlib.Path) -> None:
    """Samples over the training, one row a run; estimates and weights below."""
    figure = Figure(figsize=(13, 15), layout="constrained")
    parts = figure.subfigures(2, squeeze=False, height_ratios=(11, 5), hspace=0.03)
    top, bottom = parts[:, 0]
    panels = top.subplots(len(runs), len(TIMES))
    for row, (name, run) in zip(panels, runs.items(), strict=True):
        for axes, chunk, sample in zip(row, TIMES, run.samples, strict=True):
            tiles = sample.reshape(GRID, GRID, 8, 8)
            tiles = np.pad(tiles, ((0, 0), (0, 0), (2, 2), (2, 2)), constant_values=-1)
            image = tiles.swapaxes(1, 2).reshape(12 * GRID, 12 * GRID)
            axes.imshow(image, cmap="gray_r", interpolation="bicubic")
            axes.set(xticks=[], yticks=[], title=f"step {chunk * steps // CHUNKS}")
        row[0].set_ylabel(name)
    top.suptitle("Samples from the same noise, by what closes the critic's chain")
    left, *rest = bottom.subplots(1, 1 + len(runs), width_ratios=(2, *[1] * len(runs)))
    for number, (name, run) in enumerate(runs.items()):
        window = max(steps // 50, 1)
        means = np.convolve(run.estimates, np.ones(window) / window, "valid")
        left.plot(np.arange(len(means)) + window, means, color=f"C{number}", label=name)
        rest[number].hist(run.weights, bins=60, color=f"C{number}")
        rest[number].set(title=f"weights: {name}", xlabel="weight", yscale="log")
    for bound in (-C, C):
        rest[0].axvline(bound, color="black", linestyle="--")
    rest[0].annotate(f"dashed: ±{C}", (0.5, 0.97), xycoords="axes fraction",
                     ha="center", va="top")  # fmt: skip
    left.set(title="The critic's estimate", xlabel="generator step", yscale="log")
    left.set_ylabel(f"mean difference of ratings, over {window} steps")
    left.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    options = argparse.ArgumentParser(description="Train a WGAN on 8×8 digits.")
    output = pathlib.Path(__file__).parent / "output"
    options.add_argument("--steps", type=int, default=4000, help="of the generator")
    options.add_argument("--long", action="store_true", help="five times the steps")
    options.add_argument("--output", type=pathlib.Path, default=output)
    chosen = options.parse_args()

    steps = chosen.steps * (5 if chosen.long else 1)
    steps = -(-steps // CHUNKS) * CHUNKS  # whole chunks
    images, labels = load_digits(return_X_y=True)
    digits = (images / 8 - 1).astype(np.float32)
    runs = {}
    with tqdm(total=len(CONTENDERS) * steps, unit="step") as progress:
        for name, contender in CONTENDERS.items():
            progress.set_description(f"{name:20}")
            runs[name] = train(contender, jnp.asarray(digits), steps, progress)
    print_table(runs, digits, labels)
    picture = chosen.output / "wgan_digits.png"
    draw(runs, steps, picture)
    print(f"\nThe picture is in {picture}")


if __name__ == "__main__":
    main()
