"""`optclip advise FILE`: the replay table and the advice for a log, in the terminal.

file ──read_column──▶ sizes ──replay──▶ table,  sizes ──suggest──▶ advice
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import csv
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

import numpy as np
import optax

from optclip import plot
from optclip._core import checks
from optclip._core.measures import Measure, l2, max_abs
from optclip._core.public import error, naming
from optclip.choosing.logs import Column, read_column
from optclip.choosing.replay import Replay, replay
from optclip.choosing.replay_table import limits, replay_table
from optclip.choosing.suggest import LEAST_STEPS, Advice, suggest
from optclip.clipping.rules.adagc import adagc
from optclip.clipping.rules.autoclip import autoclip
from optclip.clipping.rules.norm_growth_clip import norm_growth_clip
from optclip.clipping.rules.norms import (
    clip_by_block_rms,
    clip_by_global_norm,
    clip_by_norm,
)
from optclip.clipping.rules.quantile_clip import quantile_clip
from optclip.clipping.rules.spike_clip import spike_clip
from optclip.clipping.rules.values import clip, clip_by_value
from optclip.clipping.rules.zclip import zclip

NAME = "optclip advise"
REPLAYED = 50_000  # the last steps of a longer log; of these a rule forgets the first
PROGRESS = 250_000  # rows between two lines that say how far it is
MEASURES = {"l2": l2, "max_abs": max_abs}
RULES: dict[str, Callable[..., optax.GradientTransformation]] = {
    rule.__name__: rule
    for rule in (
        adagc,
        autoclip,
        clip,
        clip_by_block_rms,
        clip_by_global_norm,
        clip_by_norm,
        clip_by_value,
        norm_growth_clip,
        quantile_clip,
        spike_clip,
        zclip,
    )
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script; returns its exit status, 2 for what is wrong with the input.

    >>> main(["advise", "no-such-file.csv"])
    2
    """
    options = _parser().parse_args(arguments)
    try:
        with naming(NAME, makes=True):
            print(_answer(options))
    except (OSError, ImportError, ValueError, csv.Error) as wrong:
        print(f"{NAME}: {str(wrong).removeprefix(f'{NAME}: ')}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("optclip")
    commands = parser.add_subparsers(required=True, metavar="advise")
    advise = commands.add_parser(
        "advise",
        help="which clip, and which limit, for a run that logged its gradient norms",
        description="Reads a log (CSV, JSONL, trainer_state.json, a bare column) and "
        "prints what rules would have done to it, and which one to use.",
    )
    add = advise.add_argument
    add("file", help="the log, or - for standard input")
    add("--column", help="its name, if it is not found by itself")
    add("--clip-rate", type=float, default=0.05, help="share of steps to clip (0.05)")
    add("--limit", type=float, help="the fixed limit in use, if there is one")
    add(
        "--rules",
        metavar="RULES",
        help='to replay instead of the usual ones: "spike_clip, zclip(z_threshold=3)"',
    )
    add(
        "--measure",
        choices=MEASURES,
        default="l2",
        help="max_abs: the column has largest elements, for a clip by value",
    )
    add("--plot", metavar="FILE.png", help="draws the advice (needs matplotlib)")
    add("--json", action="store_true", help="prints one JSON object instead of text")
    return parser


def _answer(options: argparse.Namespace) -> str:
    measure = MEASURES[options.measure]
    with _opened(options.file) as file:
        column = read_column(_watched(file), options.column)
    _check(column)
    sizes, name = column.values, column.name
    advice = suggest(sizes, options.clip_rate, limit=options.limit, measure=measure)
    if options.rules is None:
        rules = _usual(advice.limit, options.limit, measure)
    else:
        rules = _parsed(options.rules)
    last = sizes[-REPLAYED:]
    _say(
        f"replaying {len(last):,} of {len(sizes):,} steps under {len(rules)} rules",
        sizes,
    )
    found = replay(last, rules)
    torch = _torch(advice.limit, measure)
    if options.plot:
        figure: Any = plot.advice(advice, sizes, measure=measure).figure
        figure.savefig(options.plot, dpi=150, bbox_inches="tight")
    if options.json:
        answer = _as_json(name, advice, torch, found, len(last))
        return json.dumps(_valid(answer), indent=2)
    shown = f"{options.file}: {name!r}, {len(sizes):,} steps"
    if len(last) < len(sizes):
        shown += f"; the table is of the last {len(last):,}"
    lines = [shown, "", replay_table(found), "", str(advice), ""]
    return "\n".join([*lines, f"In JAX:     {advice.code}", f"In PyTorch: {torch}"])


@contextlib.contextmanager
def _opened(path: str) -> Iterator[TextIO]:
    if path == "-":
        yield sys.stdin
    else:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield file


def _watched(file: TextIO) -> Iterator[str]:
    """The lines of a file; of a long one it says how many were read."""
    for number, line in enumerate(file, 1):
        if number % PROGRESS == 0:
            print(f"{NAME}: {number:,} lines read", file=sys.stderr)
        yield line


def _say(message: str, sizes: np.ndarray) -> None:
    if len(sizes) >= PROGRESS:
        print(f"{NAME}: {message}", file=sys.stderr)


def _check(column: Column) -> None:
    steps, name = len(column.values), column.name
    if steps < LEAST_STEPS:
        raise error(
            f"column {name!r} must have at least {LEAST_STEPS} steps, got {steps}."
        )
    if not np.isfinite(column.values).any():
        raise error(
            f"column {name!r} must have finite numbers, got none in {steps:,} steps."
        )


def _usual(
    advised: float, in_use: float | None, measure: Measure
) -> dict[str, optax.GradientTransformation]:
    """The advised limit, the one in use or 1, and rules that find theirs."""
    fixed = clip_by_value if measure == max_abs else clip_by_global_norm
    fixed_limits = [advised, 1.0 if in_use is None else in_use]
    return {
        **{f"{fixed.__name__}({x:.4g})": fixed(x) for x in fixed_limits},
        "spike_clip()": spike_clip(measure=measure),
        "zclip()": zclip(measure=measure),
        "quantile_clip(0.95)": quantile_clip(0.95, measure=measure),
    }


def _parsed(text: str) -> dict[str, optax.GradientTransformation]:
    """Rules as a user writes them: names, or calls with numbers."""
    try:
        found = ast.parse(f"[{text}]", mode="eval").body
    except SyntaxError:
        found = None
    if not isinstance(found, ast.List):
        raise error(f"--rules must be names or calls of rules, got {text!r}.")
    names = list(map(ast.unparse, found.elts))
    if len(set(names)) < len(names):
        raise error(f"--rules must be different, got {text!r}.")
    return dict(zip(names, map(_rule, found.elts), strict=True))


def _rule(node: ast.expr) -> optax.GradientTransformation:
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    name = ast.unparse(call.func)
    checks.known(RULES, **{"--rules": name})
    try:
        args = list(map(ast.literal_eval, call.args))
        words = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except ValueError:
        raise error(
            "--rules must have numbers or texts as arguments, "
            f"got {ast.unparse(node)!r}."
        ) from None
    try:
        return RULES[name](*args, **words)
    except TypeError as wrong:
        raise error(f"--rules must be calls that rules take, got {wrong}.") from None


def _torch(limit: float, measure: Measure) -> str:
    """What comes nearest in PyTorch, which has fixed limits only."""
    name = "clip_grad_value_" if measure == max_abs else "clip_grad_norm_"
    return f"torch.nn.utils.{name}(model.parameters(), {limit:.4g})"


def _as_json(
    name: str, advice: Advice, torch: str, found: dict[str, Replay], replayed: int
) -> dict[str, Any]:
    fields = {k: v for k, v in advice._asdict().items() if k != "code"}
    return {
        "column": name,
        **fields,
        "rule": advice.code,
        "pytorch": torch,
        "evidence": advice.evidence._asdict(),
        "replayed_steps": replayed,
        "replay": {name: _numbers(own) for name, own in found.items()},
    }


def _numbers(found: Replay) -> dict[str, Any]:
    ends = zip(("limit", "limit_lowest", "limit_highest"), limits(found), strict=True)
    return {
        "clip_rate": found.clip_rate,
        "kept": found.kept,
        "worst": found.worst,
        "nonfinite": found.nonfinite,
        **dict(ends),
    }


def _valid(value: object) -> object:
    """With null in the place of what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _valid(inner) for key, inner in value.items()}
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value
