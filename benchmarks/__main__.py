"""Times optclip against its peers and against the bytes that have to move.

    python -m benchmarks --quick               a minute, to see what it does
    python -m benchmarks                       GPT-2: 4 GB, half an hour on two cores
    python -m benchmarks --scale 0.1           a tenth of it, for a small machine
    python -m benchmarks --shapes small large --dtypes float16 --contexts alone
    python -m benchmarks --save                also renew benchmarks/results
    python -m benchmarks --save --contexts skip projections      only these in there
    python -m benchmarks --accelerator --out results      a GPU, in six minutes

Runs on whatever device JAX finds; PyTorch and Keras take part where they are installed.
Times are medians over rounds in which all contestants took turns; the output says what
its columns mean, and a bar what is compiled or timed, and about how long it will take.
"""

import argparse
import datetime
import pathlib
import sys
from typing import Any

import jax

from benchmarks import (
    accelerator,
    contestants,
    contexts,
    report,
    shapes,
    timing,
)
from benchmarks.contestants import Contestant
from benchmarks.contexts import CONTEXTS, Entry
from benchmarks.progress import Progress

DTYPES = ["float32", "bfloat16", "float16"]
QUICK: dict[str, Any] = {
    "shapes": ["perceptron"],
    "dtypes": ["float32"],
    "rules": ["clip_by_global_norm", "adaptive_grad_clip"],
    "scale": 0.05,
    "rounds": 5,
}


def run(entry: Entry, progress: Progress) -> list[dict[str, Any]]:
    """One race: a record for each contestant."""
    about, race = entry.about, entry.race
    arrays = race.draw()
    entered: dict[str, Contestant] = {}
    for name, make in race.makers.items():
        progress.says(f"compiling {name}")
        try:
            entered[name] = make(arrays)
        except ImportError:
            continue  # a peer that is not installed
        progress.passes(entry.to_compile)
    progress.says("in turns")
    timed = timing.race(
        entered,
        arrays,
        entry.rounds,
        entry.warm_up,
        after_round=lambda: progress.passes(entry.of_round),
    )
    return [report.record(about, name, timed, entry.size) for name in timed]


def arguments() -> argparse.ArgumentParser:
    """What the command takes."""
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
        help="what is timed: see benchmarks/contexts.py",
    )
    options.add_argument(
        "--rules",
        nargs="+",
        default=list(contestants.OPTCLIP),
        choices=list(contestants.OPTCLIP),
    )
    options.add_argument(
        "--quick",
        action="store_true",
        help="every context on a small model, in a minute: other defaults of --shapes "
        "--dtypes --rules --scale --rounds",
    )
    options.add_argument("--scale", type=float, default=1.0, help="of the shapes")
    options.add_argument(
        "--rounds",
        type=int,
        default=45,
        metavar="1..100",
        help="limits fall at every call; of these a third in projections, a ninth in "
        "compile and sets, and at least 3 (default 45)",
    )
    options.add_argument("--json", type=pathlib.Path, help="write the numbers here")
    options.add_argument("--plot", type=pathlib.Path, help="draw the picture here")
    options.add_argument(
        "--save",
        action="store_true",
        help="renew benchmarks/results; with --contexts only their numbers",
    )
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
    return options


def choose(words: list[str]) -> argparse.Namespace:
    """The arguments, or an error that says which of them does not fit."""
    options = arguments()
    whole = ("quick", "shapes", "dtypes", "rules", "scale")
    usual = {name: options.get_default(name) for name in whole}
    chosen = options.parse_args(words)
    if chosen.quick:
        options.set_defaults(**QUICK)
        chosen = options.parse_args(words)
    if not 1 <= chosen.rounds <= 100:
        options.error(f"--rounds must be in 1..100, got {chosen.rounds}")
    if chosen.scale <= 0:
        options.error(f"--scale must be positive, got {chosen.scale}")
    if chosen.accelerator and chosen.out is None:
        options.error("--accelerator needs --out, the folder for its results")
    changed = [name for name in whole if getattr(chosen, name) != usual[name]]
    if chosen.save and changed:
        options.error(f"--save takes the whole benchmark, got another --{changed[0]}")
    if chosen.plot and "alone" not in chosen.contexts:
        options.error("--plot draws rules alone, got --contexts without `alone`")
    return chosen


def main() -> None:
    chosen = choose(sys.argv[1:])
    if chosen.accelerator:
        left = accelerator.run(chosen.out, chosen.minutes, chosen.scale, chosen.races)
        sys.exit(left)
    programme, found = contexts.programme(chosen), []
    seconds = sum(entry.seconds for entry in programme)
    with Progress(len(programme), seconds) as progress:
        for entry in programme:
            with progress.race(entry):
                found += run(entry, progress)
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
