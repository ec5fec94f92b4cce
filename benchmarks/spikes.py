"""The spike-response table: what every adaptive rule does to a norm that misbehaves.

    python -m benchmarks.spikes [--save]

A run is a stream of norms, level · exp(σ·N(0, 1)), one a step, through the rule itself.
Everything is in units of the ordinary level; medians over the seeds.

| column | meaning |
|---|---|
| clipped | share of ordinary steps clipped, over 1000 steps from the first |
| spike 10, 1000 | what a spike of that height passes at, after 1000 ordinary steps |
| five | the most that one of five spikes of 1000 in a row passes at |
| second | what a spike of 1000 passes at on the second step of all |
| ×1.5 … ×10 | the first step from which the new level passes at 0.9, in median of 20 |
| drift | the least share of a step that passes while the level rises 100-fold in 1000 |
"""

import argparse
import functools
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import optclip

RESULTS = pathlib.Path(__file__).parent / "results" / "spikes"
SEEDS = 20
HORIZON = 1000
SHIFTS = (1.5, 2.0, 3.0, 10.0)
NOISES = (0.1, 0.3)

# Of one number every measure is the same; this one is measured in one pass.
SIZE = optclip.measures.max_abs
RULES: dict[str, optax.GradientTransformation] = {
    "spike_clip": optclip.spike_clip(measure=SIZE),
    "zclip": optclip.zclip(measure=SIZE),
    "zclip, mean": optclip.zclip(mode="mean", measure=SIZE),
    "zclip, max": optclip.zclip(mode="max", measure=SIZE),
    "adagc": optclip.adagc(measure=SIZE),
    "autoclip": optclip.autoclip(measure=SIZE),
    "autoclip, 2 × median of 100": optclip.autoclip(50.0, 100, 2.0, measure=SIZE),
    "quantile_clip": optclip.quantile_clip(measure=SIZE),
    "norm_growth_clip": optclip.norm_growth_clip(measure=SIZE),
    "second_moment_clip, θ = 9": optclip.second_moment_clip(9.0, 0.99),
}

# What spike_clip promises, at 10 % and at 30 % noise: the median over the seeds keeps
# the bound, the worst seed keeps 1.4 times the bound. Upper bounds but for the drift.
BOUNDS = {
    "clipped": (0.01, 0.01),
    "spike 10": (1.5, 2.5),
    "spike 1000": (1.5, 2.5),
    "five": (1.6, 3.0),
    "second": (3.0, 3.0),
    **{f"×{shift:g}": (30, 30) for shift in SHIFTS},
    "drift": (0.5, 0.5),
}


class Played(NamedTuple):
    """A stream through a rule: what passed, and what a norm at `level` would have."""

    passed: np.ndarray  # (steps, seeds)
    probed: np.ndarray
    state: Any


@functools.partial(jax.jit, static_argnums=0)
def _play(tx: Any, norms: jax.Array, levels: jax.Array, state: Any) -> Any:
    def step(state, seen):
        norm, level = seen
        passed, after = tx.update(norm[None], state)
        probed, _ = tx.update(level[None], state)
        return after, (passed[0], probed[0])

    def stream(norms, state):
        return jax.lax.scan(step, state, (norms, levels))

    return jax.vmap(stream, in_axes=(1, 0), out_axes=(0, 1))(norms, state)


def play(
    tx: optax.GradientTransformation,
    norms: np.ndarray,
    level: float = 1.0,
    state: Any = None,
) -> Played:
    """Plays a (steps, seeds) array of norms, from a fresh state if there is none."""
    steps, seeds = norms.shape
    if state is None:
        state = jax.vmap(lambda _: tx.init(jnp.zeros(1)))(jnp.arange(seeds))
    levels = jnp.full((steps,), level, jnp.float32)
    state, (passed, probed) = _play(tx, jnp.asarray(norms, jnp.float32), levels, state)
    return Played(np.asarray(passed), np.asarray(probed), state)


@functools.partial(jax.jit, static_argnums=0)
def limits(tx: Any, norms: jax.Array) -> Any:
    """The limit of each step of a stream, as the rule's metrics have it.

    A rule of single elements keeps none: there it is what a huge norm passes at.
    """

    def step(state, norm):
        _, after = tx.update(norm[None], state)
        huge, _ = tx.update(jnp.array([1e9]), state)
        return after, optclip.metrics(after).get("limit", huge[0])

    return jax.lax.scan(step, tx.init(jnp.zeros(1)), norms)[1]


def noise(stream: int, steps: int, sigma: float) -> np.ndarray:
    """Ordinary norms at level 1, (steps, seeds); each stream has its own numbers."""
    columns = [
        np.random.default_rng([stream, seed]).standard_normal(steps)
        for seed in range(SEEDS)
    ]
    return np.exp(sigma * np.stack(columns, axis=1))


def recovery(probed: np.ndarray, level: float) -> np.ndarray:
    """The first step, 1 at the earliest, from which 20 steps let the level pass.

    At 0.9 of itself, in the median of the 20: a rule that still clips a step now and
    then has recovered. Infinity for never.
    """
    windows = np.lib.stride_tricks.sliding_window_view(probed, 20, axis=0)
    passes = np.median(windows, axis=-1) >= 0.9 * level
    return np.where(passes.any(axis=0), np.argmax(passes, axis=0) + 1.0, np.inf)


def respond(tx: optax.GradientTransformation, sigma: float) -> dict[str, np.ndarray]:
    """Every column of the table, one number a seed."""
    ordinary = noise(1, HORIZON, sigma)
    clipped = play(tx, ordinary).passed < ordinary * (1 - 1e-5)
    settled = play(tx, noise(2, 1000, sigma)).state
    spikes = {
        height: play(tx, np.full((5, SEEDS), height), state=settled).passed
        for height in (10.0, 1000.0)
    }
    second = np.stack([noise(3, 1, sigma)[0], np.full(SEEDS, 1000.0)])
    rise = 100 ** (np.arange(1000) / 1000)[:, None] * noise(4, 1000, sigma)
    columns = {
        "clipped": clipped.mean(axis=0),
        "spike 10": spikes[10.0][0],
        "spike 1000": spikes[1000.0][0],
        "five": spikes[1000.0].max(axis=0),
        "second": play(tx, second).passed[1],
    }
    for shift in SHIFTS:
        after = play(tx, shift * noise(5, HORIZON, sigma), shift, settled)
        columns[f"×{shift:g}"] = recovery(after.probed, shift)
    columns["drift"] = (play(tx, rise, state=settled).passed / rise).min(axis=0)
    return columns


def broken(columns: dict[str, np.ndarray], sigma: float) -> list[str]:
    """The bounds that the columns break, in their median or in their worst seed."""
    names = []
    for name, bounds in BOUNDS.items():
        bound, seeds = bounds[NOISES.index(sigma)], columns[name]
        if name == "drift":
            kept = np.median(seeds) >= bound and seeds.min() >= bound / 1.4
        else:
            kept = np.median(seeds) <= bound and seeds.max() <= bound * 1.4
        if not kept:
            names.append(name)
    return names


def table(responses: dict[str, dict[float, dict[str, np.ndarray]]]) -> str:
    """Markdown: medians at 10 % / 30 % noise, in bold where a bound is broken."""
    lines = [
        "| rule | " + " | ".join(BOUNDS) + " |",
        "|---" * (len(BOUNDS) + 1) + "|",
    ]
    for rule, by_noise in responses.items():
        cells = []
        for name in BOUNDS:
            parts = []
            for sigma, columns in by_noise.items():
                text = _number(name, float(np.median(columns[name])))
                worse = name in broken(columns, sigma)
                parts.append(f"**{text}**" if worse else text)
            cells.append(" / ".join(parts))
        lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(name: str, value: float) -> str:
    if np.isinf(value):
        return f"> {HORIZON}"
    return f"{100 * value:.2g} %" if name == "clipped" else f"{value:.3g}"


def draw(path: pathlib.Path) -> None:
    """Norms in and out over time, one panel a rule, one column an event."""
    from matplotlib.figure import Figure

    before, sigma = 200, 0.1
    quiet = noise(6, before + 150, sigma)[:, :1]
    after = np.arange(len(quiet))[:, None] - before
    events = {
        "a spike of 30": quiet * np.where(after == 0, 30, 1),
        "five in a row": quiet * np.where((after >= 0) & (after < 5), 30, 1),
        "a shift to 3": quiet * np.where(after >= 0, 3, 1),
        "a drift, ×30 in 150": quiet * 30 ** (np.maximum(after, 0) / 150),
    }
    figure = Figure(figsize=(14, 1.7 * len(RULES) + 0.8), layout="constrained")
    axes = figure.subplots(
        len(RULES), len(events), sharex=True, sharey=True, squeeze=False
    )
    for row, (rule, tx) in zip(axes, RULES.items(), strict=True):
        row[0].set_ylabel(rule.replace(", ", "\n"), fontsize="small")
        for panel, (event, norms) in zip(row, events.items(), strict=True):
            passed = play(tx, norms).passed
            panel.plot(after, norms, color="0.7", linewidth=2.2, label="norm in")
            panel.plot(after, passed, color="C3", linewidth=0.9, label="norm out")
            limit = limits(tx, jnp.asarray(norms[:, 0], jnp.float32))
            style = {"color": "black", "linewidth": 0.9, "linestyle": ":"}
            panel.plot(after, limit, **style, label="limit")
            panel.set(yscale="log", ylim=(0.3, 60), xlim=(-40, 149))
            if panel in axes[0]:
                panel.set_title(event)
            if panel in axes[-1]:
                panel.set_xlabel("steps after it begins")
    axes[0][-1].legend(fontsize="small", loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def save(responses: dict[str, dict[float, dict[str, np.ndarray]]]) -> None:
    """The numbers of every seed, where `load` finds them."""
    numbers = {
        rule: {
            f"{sigma:g}": {
                name: [float(f"{seed:.5g}") for seed in seeds]
                for name, seeds in columns.items()
            }
            for sigma, columns in by_noise.items()
        }
        for rule, by_noise in responses.items()
    }
    rules = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in numbers.items())
    RESULTS.with_suffix(".json").write_text("{\n" + rules + "\n}\n")


def load() -> dict[str, dict[float, dict[str, np.ndarray]]]:
    """The numbers that were saved."""
    numbers = json.loads(RESULTS.with_suffix(".json").read_text())
    return {
        rule: {
            float(sigma): {name: np.array(seeds) for name, seeds in columns.items()}
            for sigma, columns in by_noise.items()
        }
        for rule, by_noise in numbers.items()
    }


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--save", action="store_true", help="renew benchmarks/results")
    chosen = options.parse_args()
    responses = {
        rule: {sigma: respond(tx, sigma) for sigma in NOISES}
        for rule, tx in tqdm(RULES.items(), unit="rule")
    }
    print(table(responses))
    if chosen.save:
        save(responses)
        draw(RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()
