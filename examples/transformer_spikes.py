"""What each adaptive rule does at corrupted batches of a language model.

A small Flax transformer learns to predict the next byte of the standard library's own
source, with AdamW near the largest learning rate that it bears. A few batches are
corrupted: random bytes instead of text, their loss multiplied by a wrong weight, once
early, once alone, three in a row, once with the right weight, and once NaN. Seven runs
see the same batches from the same start and differ only in what stands before AdamW
(`skip_step` stands around it). The program prints one table and what it shows, and
draws one picture: the losses, and what each rule measured, its limit, and what it did
at each corrupted batch.
"""

import argparse
import pathlib
import sysconfig
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
from tqdm import tqdm

import optclip

TRAIN = "argparse inspect typing tarfile doctest http/client json/decoder".split()
VALIDATION = ["subprocess"]
ALPHABET = 128  # ASCII; the few other bytes become the last of them
CONTEXT, BATCH = 64, 16
WIDTH, HEADS, LAYERS = 64, 4, 2
CHUNKS = 10  # each run, one jitted scan a chunk

Transform = optax.GradientTransformationExtraArgs


class Corruption(NamedTuple):
    """Batches of random bytes from one step on, their loss multiplied by a weight."""

    step: int
    count: int
    weight: float

    @property
    def steps(self) -> slice:
        return slice(self.step, self.step + self.count)

    @property
    def label(self) -> str:
        return f"{f'{self.count} in a row, ' * (self.count > 1)}×{self.weight:g}"


class Rule(NamedTuple):
    """What stands before an optimizer, or around it, and what its `size` is."""

    guard: Callable[[optax.GradientTransformation], optax.GradientTransformation]
    measured: str = "norm"
    verb: str = "clipped"


def before(clip: optax.GradientTransformation) -> Callable[..., Transform]:
    """Puts a clip before an optimizer, under the names that `skip_step` uses."""
    return lambda inner: optax.named_chain(("watch", clip), ("inner_state", inner))


def skipping(inner: optax.GradientTransformation) -> Transform:
    return optclip.skip_step(inner, optclip.thresholds.robust())


# A clip cannot undo a NaN, but it can drop it: nonfinite="zero".
RULES = {
    "none": Rule(before(optclip.monitor())),
    "clip_by_global_norm(1)": Rule(
        before(optclip.clip_by_global_norm(1.0, nonfinite="zero"))
    ),
    "autoclip": Rule(before(optclip.autoclip(nonfinite="zero"))),
    "zclip": Rule(before(optclip.zclip(nonfinite="zero"))),
    "adagc": Rule(
        before(optclip.adagc(nonfinite="zero")), "norm of the leaf furthest over"
    ),
    "spike_clip": Rule(before(optclip.spike_clip(nonfinite="zero"))),
    "skip_step(robust)": Rule(skipping, verb="skipped"),
}


class Run(NamedTuple):
    """Numbers of every step, and the validation loss after the last."""

    loss: np.ndarray  # without the weight
    norm: np.ndarray  # of the whole gradient, as it came
    passed: np.ndarray  # the same of what the optimizer saw, 0 where a step was skipped
    size: np.ndarray  # of what the rule measures
    limit: np.ndarray
    changed: np.ndarray  # whether the rule did anything
    validation: float
    seconds: float

    @property
    def train(self) -> float:
        return float(np.mean(self.loss[-20:]))

    @property
    def lost_at(self) -> int | None:
        """The first step after which the parameters were not finite."""
        lost = ~np.isfinite(self.passed)
        return int(lost.argmax()) if lost.any() else None


class Block(nnx.Module):
    """Causal attention and a GELU layer, each behind an RMS norm, without biases."""

    def __init__(self, rngs: nnx.Rngs):
        plain = {"use_bias": False, "rngs": rngs}
        self.attention_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, **plain)
        self.mlp_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, **plain)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, **plain)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class Transformer(nnx.Module):
    """The logits of the next byte after every byte."""

    def __init__(self, rngs: nnx.Rngs):
        self.token = nnx.Embed(ALPHABET, WIDTH, rngs=rngs)
        self.position = nnx.Embed(CONTEXT, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, ALPHABET, use_bias=False, rngs=rngs)

    def __call__(self, text: jax.Array) -> jax.Array:
        x = self.token(text) + self.position(jnp.arange(text.shape[-1]))
        mask = nnx.make_causal_mask(text)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


def windows(modules: list[str], shape: tuple[int, ...], random) -> np.ndarray:
    """Random windows of the source of these modules, CONTEXT + 1 bytes each."""
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    source = b"".join((library / f"{name}.py").read_bytes() for name in modules)
    text = np.minimum(np.frombuffer(source, np.uint8), ALPHABET - 1).astype(np.int32)
    start = random.integers(len(text) - CONTEXT, size=(*shape, 1))
    return text[start + np.arange(CONTEXT + 1)]


def corruptions(steps: int) -> list[Corruption]:
    """At the same shares of every length; at 300 steps ZClip still warms up at the first."""
    planned = (0.04, 1, 100), (0.4, 1, 1000), (0.6, 3, 1000), (0.75, 1, 1), (0.9, 1, np.nan)
    return [Corruption(int(share * steps), *rest) for share, *rest in planned]


def make_batches(steps: int, bad: list[Corruption]) -> tuple[np.ndarray, np.ndarray]:
    """The text of every step, and the weight of its loss."""
    random = np.random.default_rng(0)
    text, weight = windows(TRAIN, (steps, BATCH), random), np.ones(steps, np.float32)
    for corruption in bad:
        here = corruption.steps
        text[here] = random.integers(ALPHABET, size=text[here].shape)
        weight[here] = corruption.weight
    return text, weight


def train(rule: Rule, batches, validation: jax.Array, progress: tqdm) -> Run:
    network, params = nnx.split(Transformer(nnx.Rngs(0)))
    rate = optax.linear_schedule(0.0, 0.005, 20)
    inner = optax.named_chain(
        ("passed", optclip.monitor()), ("adamw", optax.adamw(rate, b2=0.95))
    )
    optimizer = optax.named_chain(
        ("gradient", optclip.monitor()), ("rule", rule.guard(inner))
    )

    def loss(params, text):
        logits = nnx.merge(network, params)(text[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, text[:, 1:]
        ).mean()

    def weighted(params, text, weight):
        unweighted = loss(params, text)
        return weight * unweighted, unweighted

    def step(training, batch):
        params, state = training
        gradient, unweighted = jax.grad(weighted, has_aux=True)(params, *batch)
        updates, state = optimizer.update(gradient, state, params)
        seen = optclip.metrics(state)
        norm, passed = seen["gradient/size"], seen["rule/inner_state/passed/size"]
        passed = jnp.where(seen.get("rule/consecutive_skips", 0) > 0, 0.0, passed)
        over = seen["rule/watch/clipped_fraction"] > 0
        changed = over | (~jnp.isfinite(norm) & jnp.isfinite(passed))
        size, limit = seen["rule/watch/size"], seen["rule/watch/limit"]
        history = unweighted, norm, passed, size, limit, changed
        return (optax.apply_updates(params, updates), state), history

    chunk = jax.jit(lambda training, batches: jax.lax.scan(step, training, batches))
    chunks = list(zip(*(np.split(array, CHUNKS) for array in batches), strict=True))
    training, histories = (params, optimizer.init(params)), []
    chunk = chunk.lower(training, chunks[0]).compile()
    start = time.perf_counter()
    for batch in chunks:
        training, history = jax.block_until_ready(chunk(training, batch))
        histories.append(history)
        progress.update()
    seconds = time.perf_counter() - start
    return Run(
        *(np.concatenate(column) for column in zip(*histories, strict=True)),
        float(jax.jit(loss)(training[0], validation)),
        seconds,
    )
