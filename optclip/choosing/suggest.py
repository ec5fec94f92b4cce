"""`suggest`: which rule, and which value, for a run whose sizes were logged.

sizes ──evidence──▶ a verdict ──limit_for_rate──▶ a limit with its interval ──▶ Advice
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import optax

from optclip._core import checks
from optclip._core.measures import Measure, l2, max_abs
from optclip._core.public import error, public
from optclip.choosing.evidence import BLOCKS, Evidence, evidence
from optclip.choosing.limit_for_rate import Interval, limit_for_rate
from optclip.choosing.logged_sizes import Sizes, combined, logged
from optclip.clipping.rules.norms import clip_by_global_norm
from optclip.clipping.rules.spike_clip import spike_clip
from optclip.clipping.rules.values import clip_by_value

Verdict: TypeAlias = Literal[
    "fixed", "drifts", "spikes", "diverges", "never binds", "always binds"
]
LEAST_STEPS, LEAST_FINITE = 50, 10


class Advice(NamedTuple):
    """What `suggest` found; `str(advice)` is its text.

    Attributes:
      limit: the fixed limit that clips the wanted share of the logged steps.
      low, high: the 95 % interval of the limit that clips this share in the long run,
        if the run goes on as it was.
      verdict: "fixed", "drifts", "spikes" or "diverges"; "never binds" or "always
        binds" of the limit in use.
      rule: an Optax transformation, ready for use.
      text: the verdict in words, with its evidence.
      code: the rule as Python.
      clip_rate: the share that was wanted.
      evidence: what the tests found.
    """

    limit: float
    low: float
    high: float
    verdict: Verdict
    rule: optax.GradientTransformationExtraArgs
    text: str
    code: str
    clip_rate: float
    evidence: Evidence

    def __str__(self) -> str:
        return self.text


@public
def suggest(
    sizes: Sizes,
    clip_rate: float = 0.05,
    *,
    limit: float | None = None,
    measure: Measure = l2,
) -> Advice:
    """Advises a rule and its limit for a run, from the sizes that it logged.

        limit = the smallest size that at most clip_rate of the steps exceed

    The verdict says whether such a limit is any good: "fixed" if the sizes keep their
    level, "drifts" if the level moves, "spikes" if single steps stand far above it,
    "diverges" if sizes grow from the start to the end, where adaptive rules would
    follow them. The tests behind it are in `Evidence`, their numbers in the text.

    Args:
      sizes: non-negative sizes before clipping, in the order of the steps: a column
        (n,), such as a logged `grad_norm`; a table (n, names) of all leaves, which is
        joined by the measure; or what `optclip.history` returns, of which it takes the
        size that the rule compared. At least 50 steps, of which 10 are finite and not
        0; NaN and infinity are counted and left out.
      clip_rate: the share of steps to clip, in (0, 1).
      limit: the fixed limit in use, if there is one: the verdict is "never binds" if no
        step exceeds it and "always binds" if 95 % of them do.
      measure: that of the sizes. With `max_abs` the advice is for `clip_by_value`: the
        share is that of steps with an element over the limit.

    Returns:
      An `Advice`. Its interval counts neighbouring steps that are alike as fewer: it
      takes the variance from blocks of at least 20 steps, as a block bootstrap does. It
      is too narrow if sizes stay alike for a tenth of the log or longer.

    Edge cases: a warm-up, a start at another level of at most a fifth of the steps, is
    left out. For a run that diverges the limit is that of the first tenth.

    Raises:
      ValueError: if sizes are negative, complex or too few, clip_rate is not between 0
        and 1, limit is negative or no number, or measure is no measure or not that of
        the history.

    >>> import numpy as np
    >>> norms = np.exp(0.2 * np.random.default_rng(0).normal(size=2000))
    >>> print(suggest(norms))
    A fixed 1.38 clips 5 % of the steps (95 % interval: 1.36 to 1.41).
    >>> norms[[500, 1500]] = 40.0
    >>> suggest(norms).verdict
    'spikes'
    """
    checks.instance(Measure, measure=measure)
    checks.between(0, 1, clip_rate=clip_rate)
    if not 0 < clip_rate < 1:
        raise error(f"clip_rate must lie between 0 and 1, got {clip_rate}.")
    if limit is not None:
        checks.scalar(limit=limit)
        checks.non_negative(limit=limit)
    column = combined(sizes, measure)
    usable = int((np.isfinite(column) & (column > 0)).sum())
    if len(column) < LEAST_STEPS or usable < LEAST_FINITE:
        raise error(
            f"sizes must have at least {LEAST_STEPS} steps, {LEAST_FINITE} of them "
            f"finite and above 0, got {len(column)} and {usable}."
        )
    found, kept = evidence(column)
    case = _Case(found, limit_for_rate(kept, clip_rate), kept, measure)
    verdict: Verdict = "spikes" if found.spiky else "fixed"
    if found.diverges or found.drifts:
        verdict = "diverges" if found.diverges else "drifts"
    rule, code = _rule(verdict, case.at.limit, measure)
    sentences = [_SENTENCES[verdict](case, code)]
    if limit is not None:
        known = column[np.isfinite(column)]
        over = float((known > limit).mean())
        if over == 0 or over >= 0.95:
            verdict = "always binds" if over else "never binds"
            sentences.insert(0, _binds(case.what, limit, over, known.max()))
    text = " ".join([*sentences, *_notes(case, sizes)])
    return Advice(*case.at, verdict, rule, text, code, clip_rate, found)


class _Case(NamedTuple):
    """What sentences are made of."""

    found: Evidence
    at: Interval
    kept: np.ndarray
    measure: Measure

    @property
    def what(self) -> str:
        return "largest element" if self.measure == max_abs else "norm"

    def share(self, sizes: np.ndarray) -> float:
        """How many of some sizes the advised limit clips."""
        return float((sizes > self.at.limit).mean())

    @property
    def clipped(self) -> str:
        return _percent(self.share(self.kept))


def _rule(
    verdict: Verdict, limit: float, measure: Measure
) -> tuple[optax.GradientTransformationExtraArgs, str]:
    """The rule, and how it is written."""
    by = "" if measure == l2 else f"measure=optclip.measures.{measure}"
    if verdict in ("drifts", "spikes"):
        return spike_clip(measure=measure), f"optclip.spike_clip({by})"
    if measure == max_abs:
        return clip_by_value(limit), f"optclip.clip_by_value({limit:.4g})"
    code = (
        f"optclip.clip_by_global_norm({', '.join(filter(None, (f'{limit:.4g}', by)))})"
    )
    return clip_by_global_norm(limit, measure=measure), code


def _fixed(case: _Case, code: str) -> str:
    at = case.at
    if not (case.kept > at.limit).any():
        return (
            f"A fixed {at.limit:.3g}, the largest {case.what}, clips nothing, and any "
            "lower limit more steps than wanted."
        )
    return (
        f"A fixed {at.limit:.3g} clips {case.clipped} of the steps (95 % interval: "
        f"{at.low:.3g} to {at.high:.3g})."
    )


def _drifts(case: _Case, code: str) -> str:
    found = case.found
    shares = list(map(case.share, np.array_split(case.kept, BLOCKS)))
    return (
        f"The {case.what} drifts {found.drift:.2g}-fold, with a noise of "
        f"{_percent(found.noise)} around its level: a fixed limit will bind always or "
        f"never. {case.at.limit:.3g}, which clips {case.clipped} of all steps, clips "
        f"{_percent(min(shares))} in one eighth of the run and {_percent(max(shares))} "
        f"in another. Use {code}, which follows the level."
    )


def _spikes(case: _Case, code: str) -> str:
    found = case.found
    return (
        f"{found.spikes:,} of {len(case.kept):,} steps are spikes, up to "
        f"{found.largest / found.median:.3g} times the median {case.what}: {code} "
        f"bounds them and leaves ordinary steps alone. {_fixed(case, code)}"
    )


def _diverges(case: _Case, code: str) -> str:
    return (
        f"The run diverges from the start: its {case.what} grows "
        f"{case.found.growth:.2g}-fold, and adaptive rules would follow it. Use a "
        f"fixed limit. {case.at.limit:.3g} clips {case.clipped} of the first "
        f"{len(case.kept):,} steps; it may take a lower one, or a lower learning rate."
    )


_SENTENCES = {
    "fixed": _fixed,
    "drifts": _drifts,
    "spikes": _spikes,
    "diverges": _diverges,
}


def _binds(what: str, limit: float, over: float, largest: float) -> str:
    """What is wrong with the limit in use, which clips none or nearly all."""
    if not over:
        return (
            f"A limit of {limit:.3g} never binds: the largest {what} is {largest:.3g}. "
            "This limit is decoration."
        )
    return (
        f"A limit of {limit:.3g} binds at {_percent(over)} of the steps: your limit is "
        "the learning rate."
    )


def _notes(case: _Case, sizes: Sizes) -> list[str]:
    found, kept, notes = case.found, case.kept, []
    if found.warmup:
        notes.append(f"The first {found.warmup:,} steps, a warm-up, are left out.")
    if found.nonfinite:
        notes.append(f"Not finite: {found.nonfinite:,} of {found.steps:,} steps.")
    if found.tail < 2 and not (found.diverges or found.drifts):
        notes.append(
            f"The tail is heavy (index {found.tail:.2g}): expect larger ones yet."
        )
    if found.memory * 20 > len(kept) and not (found.diverges or found.drifts):
        notes.append(
            f"Sizes stay alike for about {found.memory:.0f} steps, long beside the "
            "log: the interval may be too narrow."
        )
    if 0 < (kept > case.at.limit).sum() < 5:
        notes.append("Fewer than five steps lie above this limit: log more of them.")
    table = logged(sizes).sizes
    if table.shape[1] > 1:
        finite = table[np.isfinite(table)]
        share = _percent(case.share(finite))
        notes.append(
            f"Of the sizes of the {table.shape[1]} groups, {share} exceed "
            f"{case.at.limit:.3g}."
        )
    return notes


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
