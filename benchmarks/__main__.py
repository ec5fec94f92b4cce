"""Times optclip against its peers and against the bytes that have to move.

    python -m benchmarks                       GPT-2: 4 GB, ten minutes on two cores
    python -m benchmarks --scale 0.1           a tenth of it, for a small machine
    python -m benchmarks --shapes small large --dtypes float16 --contexts alone
    python -m benchmarks --save                also renew benchmarks/results
    python -m benchmarks --accelerator --out results      a GPU, in six minutes

Runs on whatever device JAX finds; PyTorch and Keras take part where they are installed.
Times are medians over rounds in which all contestants took turns. The last columns tell
of the compiled program: its temporary bytes, and the seconds to trace and compile it.
"""

import argparse
import datetime
import functools
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

import optclip
from benchmarks import accelerator, contestants, report, shapes, timing
from benchmarks.contestants import Arrays, Contestant, Shapes

DTYPES = ["float32", "bfloat16", "float16"]
CONTEXTS = ["compile", "alone", "learned", "sgd", "adamw"]
Makers = dict[str, Callable[[Arrays], Contestant]]


def alone(rule: str, tree: Shapes, dtype: Any) -> tuple[Arrays, Makers]:
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
    return contestants.gradients(tree, dtype, reads_params), found


def learned(tree: Shapes, dtype: Any) -> tuple[Arrays, Makers]:
    """Rules with limits of their own, and discarded metrics, against the fixed rule."""

    def fixed() -> optax.GradientTransformation:
        return optclip.clip_by_global_norm(1e30)

    found: Makers = {
        "clip_by_global_norm": lambda arrays: contestants.within(fixed, arrays),
        "without metrics": lambda arrays: contestants.within(fixed, arrays, False),
    }
    for name, make in contestants.LEARNED.items():
        found[name] = functools.partial(contestants.within, make)
    return contestants.gradients(tree, dtype), found


BEFORE = {
    "sgd": ["clip_by_global_norm"],
    "adamw": ["clip_by_global_norm", "clip_by_block_rms", "adaptive_grad_clip"],
}


def before(optimizer: str, tree: Shapes, dtype: Any) -> tuple[Arrays, Makers]:
    """The optimizer alone, and behind a clip of each library."""
    step = {"adamw": optax.adamw(1e-3), "sgd": optax.sgd(1e-3)}[optimizer]
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
    return contestants.parameters(step, tree, dtype), found


# What compiles longest: many leaves in one group, and as many groups as leaves.
COMPILED = {"small": "clip_by_global_norm", "equal": "clip_by_block_rms"}


def compiled(rule: str, tree: Shapes, dtype: Any) -> tuple[Arrays, Makers]:
    """The seconds that a rule takes to trace and compile."""
    libraries = {"optclip": contestants.OPTCLIP, "optax": contestants.OPTAX}
    return Arrays(None), {
        library: lambda _, rules=rules: contestants.compiling(rules[rule], tree, dtype)
        for library, rules in libraries.items()
    }


def races(
    chosen: argparse.Namespace,
) -> Iterator[tuple[dict[str, str], Callable[[], tuple[Arrays, Makers]]]]:
    """How each race is called, and what makes its arrays and contestants."""
    if "compile" in chosen.contexts:
        for name, rule in COMPILED.items():
            tree = shapes.SETS[name](chosen.scale)
            about = {"shapes": name, "dtype": "float32", "context": "compile"}
            make = functools.partial(compiled, rule, tree, jnp.float32)
            yield about | {"rule": rule}, make
    for name in chosen.shapes:
        tree = shapes.SETS[name](chosen.scale)
        for dtype in chosen.dtypes:
            about = {"shapes": name, "dtype": dtype}
            kind = jnp.dtype(dtype)
            if "alone" in chosen.contexts:
                for rule in chosen.rules:
                    make = functools.partial(alone, rule, tree, kind)
                    yield about | {"context": "alone", "rule": rule}, make
            if dtype == "float16":
                continue  # gradients under a loss scale; nobody steps in it
            if "learned" in chosen.contexts:
                make = functools.partial(learned, tree, kind)
                yield about | {"context": "learned", "rule": "-"}, make
            for optimizer in ("sgd", "adamw"):
                if optimizer in chosen.contexts:
                    make = functools.partial(before, optimizer, tree, kind)
                    yield about | {"context": optimizer, "rule": "-"}, make


def run(
    about: dict[str, str], arrays: Arrays, makers: Makers, scale: float, rounds: int
) -> list[Any]:
    """One race: a record for each contestant."""
    entered: dict[str, Contestant] = {}
    for name, make in makers.items():
        try:
            entered[name] = make(arrays)
        except ImportError:
            continue  # a peer that is not installed
    if about["context"] == "compile":
        timed = timing.race(entered, arrays, max(3, rounds // 9), warm_up=1)
    else:
        timed = timing.race(entered, arrays, rounds)
    tree = shapes.SETS[about["shapes"]](scale)
    size = contestants.size_in_bytes(tree, about["dtype"])
    return [report.record(about, name, timed, size) for name in timed]


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
        "--dtypes",
        nargs="+",
        default=DTYPES,
        choices=DTYPES,
        help="float16 is clipped alone only",
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
    options.add_argument(
        "--rounds",
        type=int,
        default=45,
        metavar="1..100",
        help="limits fall at every call; a ninth of them, at least 3, where compiling "
        "is timed (default 45)",
    )
    options.add_argument("--json", type=pathlib.Path, help="write the numbers here")
    options.add_argument("--plot", type=pathlib.Path, help="draw the picture here")
    options.add_argument("--save", action="store_true", help="renew benchmarks/results")
    options.add_argument(
        "--accelerator",
        action="store_true",
        help="the races of `benchmarks/accelerator.py` instead",
    )
    options.add_argument(
        "--out", type=pathlib.Path, help="the folder for --accelerator's results"
    )
    options.add_argument(
        "--minutes", type=float, default=6.0, help="of --accelerator (default 6)"
    )
    options.add_argument(
        "--races", default="", metavar="REGEX", help="which of --accelerator's"
    )
    chosen = options.parse_args()
    if not 1 <= chosen.rounds <= 100:
        options.error(f"--rounds must be in 1..100, got {chosen.rounds}")
    if chosen.scale <= 0:
        options.error(f"--scale must be positive, got {chosen.scale}")
    if chosen.accelerator:
        if chosen.out is None:
            options.error("--accelerator needs --out, the folder for its results")
        left = accelerator.run(chosen.out, chosen.minutes, chosen.scale, chosen.races)
        sys.exit(left)
    whole = ("shapes", "dtypes", "contexts", "rules", "scale")
    changed = [x for x in whole if getattr(chosen, x) != options.get_default(x)]
    if chosen.save and changed:
        options.error(f"--save takes the whole benchmark, got another --{changed[0]}")
    if chosen.plot and "alone" not in chosen.contexts:
        options.error("--plot draws rules alone, got --contexts without `alone`")

    found = []
    for about, make in tqdm(list(races(chosen)), unit="race"):
        found += run(about, *make(), chosen.scale, chosen.rounds)
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
