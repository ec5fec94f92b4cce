"""What each adaptive rule does at corrupted batches of a language model.

A small Flax transformer learns to predict the next byte of the standard library's own
source, with AdamW near the largest learning rate that it bears. A few batches are
corrupted: random bytes instead of text, their loss multiplied by a wrong weight: once
while ZClip still warms up, once alone, three in a row, once with the right weight, and
once by NaN. Seven runs see the same batches from the same start and differ only in what
stands before AdamW (`skip_step` stands around it). The program prints one table and
what it shows, and draws one picture: the losses, what each rule measured and its limit,
and what became of each corrupted batch.
"""

import argparse
import pathlib
import sysconfig
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

import optclip

TRAIN = "argparse inspect typing tarfile doctest http/client json/decoder".split()
VALIDATION = ["subprocess"]
ALPHABET = 128  # ASCII; the few other bytes become the last of them
CONTEXT, BATCH = 64, 16
WIDTH, HEADS, LAYERS = 64, 4, 2
CHUNKS = 10  # of a run, one jitted scan each
LayerList = getattr(nnx, "List", list)  # a list itself before Flax 0.12
CHANCE = 0.05  # how far another seed moves the difference between two rules

Guard = Callable[[optax.GradientTransformation], optax.GradientTransformation]


def before(clip: optax.GradientTransformation) -> Guard:
    """The clip, then the optimizer, named like the parts of `skip_step`."""
    return lambda inner: optax.named_chain(("watch", clip), ("inner_state", inner))


# Where in the run, in percent; how many batches; what their loss is multiplied by.
CORRUPTIONS = {
    "loss ×100": (4, 1, 100),
    "loss ×1000": (40, 1, 1000),
    "three, loss ×1000": (60, 3, 1000),
    "loss ×1": (75, 1, 1),
    "NaN": (90, 1, np.nan),
}
FIXED = "clip_by_global_norm(1)"
# A NaN cannot be scaled to a limit, but it can be zeroed: nonfinite="zero".
RULES: dict[str, Guard] = {
    "none": before(optclip.monitor()),
    FIXED: before(optclip.clip_by_global_norm(1.0, nonfinite="zero")),
    "autoclip": before(optclip.autoclip(nonfinite="zero")),
    "zclip": before(optclip.zclip(nonfinite="zero")),
    "adagc": before(optclip.adagc(nonfinite="zero")),
    "spike_clip": before(optclip.spike_clip(nonfinite="zero")),
    "skip_step": lambda inner: optclip.skip_step(inner, optclip.thresholds.robust()),
}


class Run(NamedTuple):
    """Numbers of every step, and the validation loss after the last."""

    loss: np.ndarray  # without the weight
    norm: np.ndarray  # of the whole gradient, as it came
    passed: np.ndarray  # the same of what AdamW got, 0 for nothing
    size: np.ndarray  # of what the rule measures
    limit: np.ndarray
    changed: np.ndarray  # whether the rule did anything
    validation: float
    seconds: float

    @property
    def lost_at(self) -> int | None:
        """The first step whose gradient was not finite when AdamW got it."""
        lost = ~np.isfinite(self.passed)
        return int(lost.argmax()) if lost.any() else None

    def outcome(self, steps: np.ndarray) -> str:
        """What became of corrupted batches: the largest norm that AdamW got."""
        norm, passed = self.norm[steps], self.passed[steps]
        if not np.isfinite(passed).all():
            return "lost"
        if passed.max() == 0:
            return "dropped"
        most = passed.argmax()
        word = "cut to" if passed[most] < norm[most] else "passed"
        return f"{word} {float(f'{passed[most]:.2g}'):g}"


class Block(nnx.Module):
    """Causal attention and a GELU layer, each behind an RMS norm, without biases."""

    def __init__(self, rngs: nnx.Rngs, width: int):
        plain = {"use_bias": False, "rngs": rngs}
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, width, decode=False, **plain)
        up, down = (width, 4 * width), (4 * width, width)
        layers = nnx.Linear(*up, **plain), nnx.gelu, nnx.Linear(*down, **plain)
        self.mlp = nnx.Sequential(nnx.RMSNorm(width, rngs=rngs), *layers)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm(x), mask=mask)
        return x + self.mlp(x)


class Transformer(nnx.Module):
    """The logits of the byte after each byte."""

    def __init__(self, rngs: nnx.Rngs, width: int = WIDTH):
        self.token = nnx.Embed(ALPHABET, width, rngs=rngs)
        self.position = nnx.Embed(CONTEXT, width, rngs=rngs)
        self.blocks = LayerList([Block(rngs, width) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, ALPHABET, use_bias=False, rngs=rngs)

    def __call__(self, text: jax.Array) -> jax.Array:
        x = self.token(text) + self.position(jnp.arange(text.shape[-1]))
        mask = nnx.make_causal_mask(text)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


def windows(modules: Sequence[str], shape: tuple[int, ...], random) -> np.ndarray:
    """Random windows of these modules' source, CONTEXT bytes and the one after each."""
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    source = b"".join((library / f"{name}.py").read_bytes() for name in modules)
    text = np.minimum(np.frombuffer(source, np.uint8), ALPHABET - 1).astype(np.int32)
    start = random.integers(len(text) - CONTEXT, size=(*shape, 1))
    return text[start + np.arange(CONTEXT + 1)]


def make_batches(
    steps: int, size: int
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """The corrupted steps, the text of every step, and its loss's weight."""
    random = np.random.default_rng(0)
    text, weight = windows(TRAIN, (steps, size), random), np.ones(steps, np.float32)
    bad = {}
    for label, (percent, count, wrong) in CORRUPTIONS.items():
        here = bad[label] = percent * steps // 100 + np.arange(count)
        text[here] = random.integers(ALPHABET, size=text[here].shape)
        weight[here] = wrong
    return bad, text, weight


def loss(network: nnx.GraphDef, params, text, weight=1.0) -> tuple[jax.Array, ...]:
    """With the weight and without, in nats a byte."""
    logits = nnx.merge(network, params)(text[:, :-1])
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:])
    return weight * entropy.mean(), entropy.mean()


def train(guard: Guard, network, params, batches, validation, progress: tqdm) -> Run:
    adamw = optax.adamw(optax.linear_schedule(0.0, 0.01, 20), b2=0.95)
    inner = optax.named_chain(("passed", optclip.monitor()), ("adamw", adamw))
    optimizer = optax.named_chain(("all", optclip.monitor()), ("rule", guard(inner)))
    gradient = jax.grad(loss, argnums=1, has_aux=True)

    def step(training, batch):
        params, state = training
        updates, unweighted = gradient(network, params, *batch)
        updates, state = optimizer.update(updates, state, params)
        seen = optclip.metrics(state)
        norm, passed = seen["all/size"], seen["rule/inner_state/passed/size"]
        passed = jnp.where(seen.get("rule/consecutive_skips", 0) > 0, 0.0, passed)
        dropped = jnp.isfinite(passed) & ~jnp.isfinite(norm)
        changed = dropped | (seen["rule/watch/clipped_fraction"] > 0)
        size, limit = seen["rule/watch/size"], seen.get("rule/watch/limit", jnp.inf)
        # Nothing is limited at the largest number, which has no place in a picture.
        limit = jnp.where(limit < jnp.finfo(size.dtype).max, limit, jnp.inf)
        history = unweighted, norm, passed, size, limit, changed
        return (optax.apply_updates(params, updates), state), history

    training, histories = (params, optimizer.init(params)), []
    parts = list(zip(*(np.split(array, CHUNKS) for array in batches), strict=True))
    scan = jax.jit(lambda training, part: jax.lax.scan(step, training, part))
    scan = scan.lower(training, parts[0]).compile()
    start = time.perf_counter()
    for part in parts:
        training, history = jax.block_until_ready(scan(training, part))
        histories.append(history)
        progress.update(len(part[0]))
    seconds = time.perf_counter() - start
    after, _ = jax.jit(loss, static_argnums=0)(network, training[0], validation)
    loss_, norm, passed, size, limit, changed = np.concatenate(histories, axis=1)
    return Run(loss_, norm, passed, size, limit, changed, float(after), seconds)


def print_table(runs: dict[str, Run], corrupted: np.ndarray) -> None:
    columns = "train loss", "validation", "acted on", "let through", "seconds"
    print(f"\n{'rule':32}" + "".join(f"{column:>12}" for column in columns))
    for name, run in runs.items():
        losses = f"{run.loss[-20:].mean():12.3f}{run.validation:12.3f}"
        if run.lost_at is not None:
            losses = f"NaN from step {run.lost_at} on".rjust(24)
        passed = np.nanmax(run.passed[corrupted])
        numbers = f"{run.changed.mean():12.1%}{passed:12.4g}{run.seconds:12.1f}"
        print(f"{name:32}{losses}{numbers}")
    print("\nacted on: the share of the steps that were clipped, skipped or dropped")
    print("let through: the largest norm that AdamW got from a corrupted batch")
    more = {name: run.validation - runs[FIXED].validation for name, run in runs.items()}
    worse = [f"{name} ({by:+.3f})" for name, by in more.items() if not by <= 0]
    print(f"worse than {FIXED} by validation loss: {', '.join(worse)}")
    print(f"(another seed moves these differences by about {CHANCE})")


def draw(runs: dict[str, Run], bad: dict[str, np.ndarray], path: pathlib.Path) -> None:
    """The losses, and below them one panel per rule and a key to the panels."""
    figure = Figure(figsize=(17, 14), layout="constrained")
    parts = figure.subfigures(2, squeeze=False, height_ratios=(4, 9), hspace=0.03)
    top, bottom = parts[:, 0]
    whole, near = top.subplots(1, 2, width_ratios=(3, 2))
    draw_losses(whole, runs, bad)
    draw_losses(near, runs, bad)
    whole.legend(loc="upper left", bbox_to_anchor=(0.12, 0.97))
    end = runs[FIXED].loss[-20:].mean()
    near.set(title="The same, closer", ylim=(end - 0.15, end + 0.45))
    bottom.suptitle("The measured norm, the limit, and what became of each corruption")
    *panels, key = bottom.subplots(2, 4, sharex=True, sharey=True).flat
    for number, (name, run) in enumerate(runs.items()):
        draw_history(panels[number], f"C{number}", name, run, bad)
    key.axis("off")
    key.legend(*panels[1].get_legend_handles_labels(), loc="center", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def draw_losses(axes: Axes, runs: dict[str, Run], bad: dict[str, np.ndarray]) -> None:
    """Without the corrupted batches, whose bytes nobody can predict."""
    corrupted = np.concatenate(list(bad.values()))
    for number, (name, run) in enumerate(runs.items()):
        clean = np.setdiff1d(np.arange(len(run.loss)), corrupted)
        window = max(len(clean) // 30, 1)
        means = np.convolve(run.loss[clean], np.ones(window) / window, "valid")
        axes.plot(clean[window - 1 :], means, color=f"C{number}", label=name)
    for label, steps in bad.items():
        axes.axvline(steps[0], color="0.7", linewidth=3, zorder=0)
        where = {"xycoords": ("data", "axes fraction"), "rotation": 90, "va": "top"}
        axes.annotate(label, (steps[-1] + 1, 0.98), zorder=1, **where)
    axes.set(title="Losses; grey: corrupted batches", xlabel="step")
    axes.set_ylabel(f"train loss, mean of {window} steps (nats a byte)")


def draw_history(
    axes: Axes, color: str, name: str, run: Run, bad: dict[str, np.ndarray]
) -> None:
    corrupted = np.concatenate(list(bad.values()))
    line = "." if name == "adagc" else "-"  # the leaf changes from step to step
    axes.plot(run.norm, color="0.8", label="norm of the whole gradient")
    axes.plot(run.size, line, color=color, lw=0.8, ms=2, label="what the rule measures")
    axes.plot(run.limit, line, color="black", lw=1, ms=1.5, label="its limit")
    axes.plot(corrupted, run.norm[corrupted], "x", color="red", label="corrupted batch")
    axes.plot(corrupted, run.passed[corrupted], "kv", label="what AdamW got of it")
    for steps in bad.values():
        where = {"xycoords": ("data", "axes fraction"), "rotation": 90, "ha": "center"}
        axes.annotate(run.outcome(steps), (steps[0], 0.02), **where)
    axes.tick_params(labelbottom=True)
    verb = "skipped" if name == "skip_step" else "clipped"
    axes.set_title(f"{name}\n{run.changed.mean():.1%} of the steps {verb}")
    of = "of the leaf furthest over its limit" if name == "adagc" else "of the gradient"
    axes.set(xlabel="step", ylabel=f"norm {of}", yscale="log", ylim=(1e-5, 1e4))


def main() -> None:
    options = argparse.ArgumentParser(description="Compare clips at corrupted batches.")
    output = pathlib.Path(__file__).parent / "output"
    options.add_argument("--steps", type=int, default=300)
    options.add_argument("--batch", type=int, default=BATCH, help="texts in a batch")
    options.add_argument("--output", type=pathlib.Path, default=output)
    chosen = options.parse_args()

    steps = -(-chosen.steps // CHUNKS) * CHUNKS  # whole chunks
    bad, *batches = make_batches(steps, chosen.batch)
    validation = windows(VALIDATION, (64,), np.random.default_rng(1))
    start = nnx.split(Transformer(nnx.Rngs(0)))
    runs = {}
    with tqdm(total=len(RULES) * steps, unit="step") as progress:
        for name, guard in RULES.items():
            progress.set_description(f"{name:24}")
            runs[name] = train(guard, *start, batches, validation, progress)
    print_table(runs, np.concatenate(list(bad.values())))
    picture = chosen.output / "transformer_spikes.png"
    draw(runs, bad, picture)
    print(f"\nThe picture is in {picture}")


if __name__ == "__main__":
    main()
