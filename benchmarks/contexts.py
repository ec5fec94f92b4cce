"""The races: which contestants meet in each context, and on which arrays.

    context      what is timed
    compile      tracing and compiling a rule
    alone        one update of a rule
    learned      one update of rules that set their own limit
    sgd, adamw   a whole step behind a clip: gradients in, new parameters out
    skip         a whole step of AdamW within a wrapper that drops bad steps
    projections  a whole step of AdamW whose parameters end in a set
    sets         rarely used projections, and `redraw`

Arrays are drawn when a race begins; what it is and who takes part is known before.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

import optclip
from benchmarks import constrained, contestants, shapes, timing
from benchmarks.contestants import Arrays, Contestant, Shapes

CONTEXTS = [
    "compile",
    "alone",
    "learned",
    "sgd",
    "adamw",
    "skip",
    "projections",
    "sets",
]
Makers = dict[str, Callable[[Arrays], Contestant]]


class Race(NamedTuple):
    """One race: contestants that take turns on the same arrays.

    Attributes:
      draw: makes the arrays.
      makers: by name, what makes each contestant of them; ImportError if it is a peer
        that is not installed.
      passes: about how long a call takes, in passes over the tree, for the time left.
    """

    draw: Callable[[], Arrays]
    makers: Makers
    passes: float


def alone(rule: str, tree: Shapes, dtype: Any) -> Race:
    """One rule by every library that has it, between the floors."""
    found: Makers = {
        "floor: read": contestants.reading,
        "floor: rewrite": contestants.rewriting,
        "optclip": functools.partial(contestants.clipping, contestants.OPTCLIP[rule]),
    }
    if rule in contestants.OPTAX:
        optaxes = contestants.OPTAX[rule]
        found["optax"] = functools.partial(contestants.clipping, optaxes)
    if rule in ("clip_by_global_norm", "clip_by_value"):
        found["torch"] = lambda _: contestants.pytorch(rule, tree, dtype)
    reads_params = rule == "adaptive_grad_clip"
    draw = functools.partial(contestants.gradients, tree, dtype, reads_params)
    return Race(draw, found, passes=3)


def learned(tree: Shapes, dtype: Any) -> Race:
    """Rules with limits of their own, and discarded metrics, against the fixed rule."""

    def fixed() -> optax.GradientTransformation:
        return optclip.clip_by_global_norm(1e30)

    found: Makers = {
        "clip_by_global_norm": lambda arrays: contestants.within(fixed, arrays),
        "without metrics": lambda arrays: contestants.within(fixed, arrays, False),
    }
    for name, make in contestants.LEARNED.items():
        found[name] = functools.partial(contestants.within, make)
    draw = functools.partial(contestants.gradients, tree, dtype)
    return Race(draw, found, passes=3)


OPTIMIZERS = {"sgd": optax.sgd(1e-3), "adamw": optax.adamw(1e-3)}
BEFORE = {
    "sgd": ["clip_by_global_norm"],
    "adamw": ["clip_by_global_norm", "clip_by_block_rms", "adaptive_grad_clip"],
}


def before(optimizer: str, tree: Shapes, dtype: Any) -> Race:
    """The optimizer alone, and behind a clip of each library."""
    step = OPTIMIZERS[optimizer]
    rules: dict[str, contestants.Rule] = {"alone": lambda limit: optax.identity()}
    for rule in BEFORE[optimizer]:
        rules[f"optclip {rule}"] = contestants.OPTCLIP[rule]
        rules[f"optax {rule}"] = contestants.OPTAX[rule]
    found: Makers = {
        name: functools.partial(contestants.optimizing, rule, step)
        for name, rule in rules.items()
    }
    if optimizer == "sgd":
        found["keras global_clipnorm"] = contestants.keras_sgd
    draw = functools.partial(contestants.parameters, step, tree, dtype)
    return Race(draw, found, passes=5 if optimizer == "sgd" else 9)


def skipping(tree: Shapes, dtype: Any) -> Race:
    """AdamW alone, within what drops bad steps, and behind a clip."""
    step = OPTIMIZERS["adamw"]
    clip = contestants.OPTCLIP["clip_by_global_norm"]
    found: Makers = {
        "alone": lambda arrays: contestants.optimizing(
            lambda limit: optax.identity(), step, arrays
        ),
        "optclip skip_step": lambda arrays: contestants.within_wrapper(
            optclip.skip_step(step, 1e30), arrays
        ),
        "optax apply_if_finite": lambda arrays: contestants.within_wrapper(
            optax.apply_if_finite(step, 3), arrays
        ),
        "optclip clip_by_global_norm": functools.partial(
            contestants.optimizing, clip, step
        ),
    }
    draw = functools.partial(contestants.parameters, step, tree, dtype)
    return Race(draw, found, passes=9)


def projecting(name: str, tree: Shapes, dtype: Any) -> Race:
    """AdamW alone, and with parameters that end in a set."""
    step = OPTIMIZERS["adamw"]
    ways = constrained.ways(name)
    found: Makers = {
        key: functools.partial(constrained.stepping, way, step)
        for key, way in ways.items()
    }
    draw = functools.partial(contestants.parameters, step, tree, dtype)
    return Race(draw, found, passes=10)


# What compiles longest: many leaves in one group, and as many groups as leaves.
COMPILED = {"small": "clip_by_global_norm", "equal": "clip_by_block_rms"}
COMPILED_QUICKLY = {"perceptron": "clip_by_block_rms"}


def compiled(rule: str, tree: Shapes, dtype: Any) -> Race:
    """The seconds that a rule takes to trace and compile."""
    libraries = {"optclip": contestants.OPTCLIP, "optax": contestants.OPTAX}
    found: Makers = {
        library: lambda _, rules=rules: contestants.compiling(rules[rule], tree, dtype)
        for library, rules in libraries.items()
    }
    seconds = 4e-3 * len(tree)
    size = contestants.size_in_bytes(tree, dtype)
    return Race(lambda: Arrays(None), found, passes=seconds * BANDWIDTH / size)


def rare(name: str, tree: Shapes) -> Race:
    """A rarely used projection, or `redraw`, against a peer or the same by hand."""
    draw = functools.partial(constrained.moved, tree)
    passes = {"spectral_ball": 4000.0, "qk_clip": 4.0, "redraw": 30.0}
    return Race(draw, dict(constrained.RARE[name]), passes.get(name, 800.0))


class Entry(NamedTuple):
    """A race in the programme.

    Attributes:
      about: how it is called.
      race: the race.
      size: bytes of the tree.
      rounds, warm_up: how often all contestants take their turn.
      to_compile, of_round: guesses of seconds, for a contestant and for a round.
    """

    about: dict[str, str]
    race: Race
    size: int
    rounds: int
    warm_up: int
    to_compile: float
    of_round: float

    @property
    def seconds(self) -> float:
        """About how long the race takes."""
        rounds = self.rounds + self.warm_up
        return len(self.race.makers) * self.to_compile + rounds * self.of_round


BANDWIDTH = 1e10  # bytes a second, of two cores
ROUNDS = {"compile": 9, "sets": 9, "projections": 3}  # a share where calls take long
COMPILING = {"compile": 0.0, "adamw": 0.03, "skip": 0.03, "projections": 0.07}  # a leaf


def entry(about: dict[str, str], race: Race, scale: float, rounds: int) -> Entry:
    """The race with what follows from its context and the size of its tree."""
    tree, context = shapes.SETS[about["shapes"]](scale), about["context"]
    size = contestants.size_in_bytes(tree, about["dtype"])
    of_round = len(race.makers) * (5e-5 + race.passes * size / BANDWIDTH)
    return Entry(
        about,
        race,
        size,
        rounds=max(min(3, rounds), rounds // ROUNDS.get(context, 1)),
        warm_up=1 if context in ("compile", "sets") else timing.WARM_UP,
        to_compile=0.3 + COMPILING.get(context, 0.01) * len(tree),
        of_round=of_round,
    )


def programme(chosen: argparse.Namespace) -> list[Entry]:
    """All races, in order."""
    return [
        entry(about, race, chosen.scale, chosen.rounds) for about, race in races(chosen)
    ]


def races(chosen: argparse.Namespace) -> Iterator[tuple[dict[str, str], Race]]:
    """How each race is called, and the race."""
    if "compile" in chosen.contexts:
        rules = COMPILED_QUICKLY if chosen.quick else COMPILED
        for name, rule in rules.items():
            tree = shapes.SETS[name](chosen.scale)
            about = {"shapes": name, "dtype": "float32", "context": "compile"}
            yield about | {"rule": rule}, compiled(rule, tree, jnp.float32)
    for name in chosen.shapes:
        tree = shapes.SETS[name](chosen.scale)
        for dtype in chosen.dtypes:
            about = {"shapes": name, "dtype": dtype}
            for context, rule, race in _of_tree(chosen, tree, jnp.dtype(dtype)):
                yield about | {"context": context, "rule": rule}, race
    if "sets" in chosen.contexts:
        for rule in constrained.RARE:
            own = {"qk_clip": "attention", "redraw": chosen.shapes[0]}
            name = own.get(rule, "matrix")
            about = {"shapes": name, "dtype": "float32", "context": "sets"}
            race = rare(rule, shapes.SETS[name](chosen.scale))
            yield about | {"rule": rule}, race


def _of_tree(
    chosen: argparse.Namespace, tree: Shapes, dtype: Any
) -> Iterator[tuple[str, str, Race]]:
    """The context, the rule and the race, for each that is run on every tree."""
    if "alone" in chosen.contexts:
        for rule in chosen.rules:
            yield "alone", rule, alone(rule, tree, dtype)
    if dtype == jnp.float16:
        return  # gradients under a loss scale; nobody steps in it
    if "learned" in chosen.contexts:
        yield "learned", "-", learned(tree, dtype)
    for optimizer in OPTIMIZERS:
        if optimizer in chosen.contexts:
            yield optimizer, "-", before(optimizer, tree, dtype)
    if "skip" in chosen.contexts:
        yield "skip", "-", skipping(tree, dtype)
    if "projections" in chosen.contexts:
        for name in constrained.SETS:
            yield "projections", name, projecting(name, tree, dtype)
