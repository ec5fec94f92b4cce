"""Times optclip against its peers and against the bytes that have to move.

    python -m benchmarks                       GPT-2, three dtypes; 4 GB of memory
    python -m benchmarks --scale 0.1           a tenth of it, for a small machine
    python -m benchmarks --shapes small large --dtypes float16 --contexts alone
    python -m benchmarks --save                also renew benchmarks/results and README

Runs on whatever device JAX finds; PyTorch and Keras take part where they are installed.
Every number is a median over rounds in which all contestants took turns.
"""

import argparse
import datetime
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

import optclip
from benchmarks import contestants, report, shapes, timing
from benchmarks.contestants import Contestant

DTYPES = ["float32", "bfloat16", "float16"]
CONTEXTS = ["compile", "alone", "learned", "sgd", "adamw"]
Makers = dict[str, Callable[[], Contestant]]


def alone(rule: str, tree: Any, dtype: Any) -> Makers:
    """One rule by every library that has it, between the floors."""
    params = rule == "adaptive_grad_clip"
    found: Makers = {
        "floor: read": lambda: contestants.reading(tree, dtype),
        "floor: rewrite": lambda: contestants.rewriting(tree, dtype),
        "optclip": lambda: contestants.clipping(
            contestants.OPTCLIP[rule], tree, dtype, params
        ),
    }
    if rule in contestants.OPTAX:
        found["optax"] = lambda: contestants.clipping(
            contestants.OPTAX[rule], tree, dtype, params
        )
    if rule in ("clip_by_global_norm", "clip_by_value"):
        found["torch"] = lambda: contestants.pytorch(rule, tree, dtype)
    return found


def learned(tree: Any, dtype: Any) -> Makers:
    """Rules with limits of their own, and discarded metrics, against the fixed rule."""

    def fixed() -> optax.GradientTransformation:
        return optclip.clip_by_global_norm(1e30)

    found: Makers = {
        "clip_by_global_norm": lambda: contestants.within(fixed, tree, dtype),
        "without metrics": lambda: contestants.within(fixed, tree, dtype, False),
    }
    for name, make in contestants.LEARNED.items():
        found[name] = lambda make=make: contestants.within(make, tree, dtype)
    return found


def before(optimizer: str, tree: Any, dtype: Any) -> Makers:
    """The optimizer alone, and behind a clip of each library."""
    step = {"adamw": lambda: optax.adamw(1e-3), "sgd": lambda: optax.sgd(1e-3)}
    rules: dict[str, contestants.Rule] = {
        "alone": lambda limit: optax.identity(),
        "optclip clip_by_global_norm": optclip.clip_by_global_norm,
        "optax clip_by_global_norm": optax.clip_by_global_norm,
    }
    if optimizer == "adamw":
        rules["optclip adaptive_grad_clip"] = optclip.adaptive_grad_clip
        rules["optax adaptive_grad_clip"] = optax.adaptive_grad_clip
    found: Makers = {
        name: lambda rule=rule: contestants.optimizing(
            rule, step[optimizer](), tree, dtype
        )
        for name, rule in rules.items()
    }
    if optimizer == "sgd":
        found["keras global_clipnorm"] = lambda: contestants.keras_sgd(tree, dtype)
    return found


# What compiles longest: many leaves in one group, and as many groups as leaves.
COMPILED = {"small": "clip_by_global_norm", "equal": "clip_by_block_rms"}


def compiled(rule: str, tree: Any, dtype: Any) -> Makers:
    """The seconds that a rule takes to trace and compile."""
    return {
        library: lambda rules=rules: contestants.compiling(rules[rule], tree, dtype)
        for library, rules in (
            ("optclip", contestants.OPTCLIP),
            ("optax", contestants.OPTAX),
        )
    }


def races(chosen: argparse.Namespace) -> Iterator[tuple[dict[str, str], Makers]]:
    """What is compared with what, and how it is called."""
    if "compile" in chosen.contexts:
        for name, rule in COMPILED.items():
            tree = shapes.SETS[name](chosen.scale)
            about = {"shapes": name, "dtype": "float32", "context": "compile"}
            yield about | {"rule": rule}, compiled(rule, tree, jnp.float32)
    for name in chosen.shapes:
        tree = shapes.SETS[name](chosen.scale)
        for dtype in chosen.dtypes:
            about = {"shapes": name, "dtype": dtype}
            kind = jnp.dtype(dtype)
            if "alone" in chosen.contexts:
                for rule in chosen.rules:
                    yield (
                        about | {"context": "alone", "rule": rule},
                        alone(rule, tree, kind),
                    )
            if dtype == "float16":
                continue  # gradients under a loss scale; nobody steps in it
            if "learned" in chosen.contexts:
                yield about | {"context": "learned", "rule": "-"}, learned(tree, kind)
            for optimizer in ("sgd", "adamw"):
                if optimizer in chosen.contexts:
                    yield (
                        about | {"context": optimizer, "rule": "-"},
                        before(optimizer, tree, kind),
                    )


def run(about: dict[str, str], makers: Makers, scale: float, rounds: int) -> list[Any]:
    """One race: a record for each contestant."""
    entered: dict[str, Contestant] = {}
    for name, make in makers.items():
        try:
            entered[name] = make()
        except ImportError:
            continue  # a peer that is not installed
    if about["context"] == "compile":
        timed = timing.race(entered, max(3, rounds // 3), warm_up=1)
    else:
        timed = timing.race(entered, rounds)
    tree = shapes.SETS[about["shapes"]](scale)
    size = contestants.size_in_bytes(tree, about["dtype"])
    return [
        report.record(
            about, name, timed, size, reads_params="adaptive" in about["rule"]
        )
        for name in timed
    ]


def main() -> None:
    options = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument(
        "--shapes", nargs="+", default=["gpt2"], choices=list(shapes.SETS)
    )
    options.add_argument(
        "--dtypes", nargs="+", default=DTYPES, help="float16 is clipped alone only"
    )
    options.add_argument(
        "--contexts",
        nargs="+",
        default=CONTEXTS,
        choices=CONTEXTS,
    )
    options.add_argument(
        "--rules",
        nargs="+",
        default=list(contestants.OPTCLIP),
        choices=list(contestants.OPTCLIP),
    )
    options.add_argument("--scale", type=float, default=1.0, help="of the shapes")
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--json", type=pathlib.Path, help="write the numbers here")
    options.add_argument("--plot", type=pathlib.Path, help="draw the picture here")
    options.add_argument(
        "--save", action="store_true", help="renew benchmarks/results and README.md"
    )
    chosen = options.parse_args()

    found = []
    for about, makers in tqdm(list(races(chosen)), unit="race"):
        found += run(about, makers, chosen.scale, chosen.rounds)
        jax.clear_caches()
    results = {
        "device": report.device(),
        "date": datetime.date.today().isoformat(),
        "versions": contestants.about_peers(),
        "scale": chosen.scale,
        "rounds": chosen.rounds,
        "records": found,
    }
    print(report.terminal(results))
    if chosen.json:
        chosen.json.write_text(report.to_json(results))
    if chosen.plot:
        report.draw(results, chosen.plot)
    if chosen.save:
        report.save(results)


if __name__ == "__main__":
    main()
