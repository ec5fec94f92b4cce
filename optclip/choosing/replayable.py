"""What may be replayed: rules that look at nothing but the sizes of a log.

A log has one size for each leaf or for the whole tree. A rule that needs more, such as
the parameters or the elements of a leaf, would do something else to real updates, so it
is refused by name. What a rule needs is read from the clips in it, and tried on zeros.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optclip._core.groupings import by_number
from optclip._core.metrics import ClipMetrics
from optclip._core.public import error
from optclip._core.types import Tree
from optclip.clipping.engine import Clip
from optclip.insight.metrics import found

Rule = optax.GradientTransformation


def check(rules: Mapping[str, Rule]) -> None:
    """Raises unless there are rules, each of them once."""
    if not isinstance(rules, Mapping) or not rules:
        raise error(f"rules must be a dict of at least one rule, got {rules!r}.")
    seen: dict[Any, str] = {}
    for name, rule in rules.items():
        if not isinstance(rule, optax.GradientTransformation):
            raise error(
                f"rules[{name!r}] must be a gradient transformation, got {rule!r}."
            )
        if rule in seen:
            raise error(
                f"rules must be different, got one of them as {seen[rule]!r} and as "
                f"{name!r}."
            )
        seen[rule] = name


def refuse(name: str, rule: Rule, blank: Tree, measure: str | None) -> None:
    """Raises unless the sizes of the log are all that the rule looks at."""

    def wrong(got: object) -> ValueError:
        return error(
            f"rules[{name!r}] must need nothing but the size of each leaf or of the "
            f"whole tree, got {got}."
        )

    several = len(jax.tree_util.tree_leaves(blank)) > 1
    clips = _clips(rule)
    for clip in clips:
        grouping, threshold = clip.grouping, clip.threshold
        if grouping.label is None or not grouping.keeps_state:
            raise wrong(f"groups of {grouping}")
        if threshold.needs_params:
            raise wrong("limits relative to the parameters")
        if measure not in (None, repr(clip.measure)):
            raise error(
                f"rules[{name!r}] must measure as the history did, by {measure}, got "
                f"{clip.measure}."
            )
        joins = grouping.label is not by_number or threshold.needs_combined
        if several and joins and clip.measure.averages:
            raise wrong(
                f"{clip.measure} of several leaves, which counts their elements"
            )
    try:
        state = rule.init(blank)
        up, _ = rule.update(jax.tree.map(lambda x: x + jnp.inf, blank), state)
        down, _ = rule.update(jax.tree.map(lambda x: x - jnp.inf, blank), state)
    except (TypeError, ValueError) as missing:
        raise wrong(f"a rule that says: {missing}") from None
    if len(found(state, ClipMetrics)) > len(clips):
        raise wrong(
            "a rule of matrices, or one that is built anew at each step; give the rule "
            "itself"
        )
    pairs = zip(*map(jax.tree_util.tree_leaves, (up, down)), strict=True)
    if not all(np.array_equal(a, -b, equal_nan=True) for a, b in pairs):
        raise wrong("a rule that treats negative and positive numbers differently")


def _clips(rule: object) -> list[Clip]:
    """The clips within a transformation, through the functions that hold them."""
    clips, seen, waiting = [], set(), [rule]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, Clip):
            clips.append(node)
        elif isinstance(node, tuple | list):
            waiting += node
        elif isinstance(node, dict):
            waiting += node.values()
        elif isinstance(node, functools.partial):
            waiting += [node.func, node.args, node.keywords]
        elif isinstance(node, types.MethodType):
            own = node.__self__
            held = own if isinstance(own, Clip) else getattr(own, "__dict__", ())
            waiting += [held, node.__func__]
        elif isinstance(node, types.FunctionType):
            cells = node.__closure__ or ()
            waiting += [cell.cell_contents for cell in cells]
    return clips
