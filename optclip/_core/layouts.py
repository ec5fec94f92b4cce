"""Which axes of a parameter are stack, window, inputs and outputs.

Clipping units, Keras' constraint axes and an initializer's fans are one question: a
kernel adds its *inputs* (over the *window* of a convolution) into each of its
*outputs*, and there may be a *stack* of independent copies: scan-stacked layers or an
ensemble. A unit's norm is taken over all but stack and outputs, so that one bad layer
never shrinks its neighbours.

A form spells the answer with one letter per axis: `s`tack, `w`indow, `i`nput,
`o`utput. A letter before `*` repeats as often as the rank needs, none included, and
axes left over in front are stack. A Dense kernel is `io`, a convolution `w*io`,
attention's query `ioo` and its output `iio`, an embedding `oi` (one unit per row).

The evidence, in this order: a rule of the user's; the module's type, where known; the
name; the sibling bias, whose shape must be stack plus outputs (a kernel (6, 256, 256)
is a stack with the bias (6, 256), a convolution with (256,), a query with (256, 256));
the rank. A name that contradicts the bias is passed over. Where shapes alone leave a
choice (all sizes equal), a stack is preferred to several output axes: it is far
likelier, and it keeps layers apart. Without name and bias, rank 2 is `io` and higher
ranks are convolutions: say `stacked` or give a rule where that is wrong. A bias or
scale has no outputs, it is one unit per layer, and takes its stack from the kernel;
alone, all but its last axis are stack.
"""

import functools
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from optclip._core import paths
from optclip._core.public import error

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """The axes of a parameter by role: each ascending, together all axes."""

    stack: tuple[int, ...]
    window: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def unit_axes(self, shape: Shape) -> tuple[int, ...]:
        """The axes over which one unit's norm is taken.

        >>> layout("kernel", {"kernel": (3, 3, 16, 32)}).unit_axes((3, 3, 16, 32))
        (0, 1, 2)
        """
        one_layer = {*self.window, *self.inputs, *self.outputs}
        if sum(shape[axis] > 1 for axis in one_layer) <= 1:
            return tuple(sorted(one_layer))  # a vector in disguise, as in AGC's code
        return tuple(sorted(one_layer.difference(self.outputs)))

    def fans(self, shape: Shape) -> tuple[int, int]:
        """How many inputs reach one output, and how many outputs one input reaches.

        >>> layout("kernel", {"kernel": (3, 3, 16, 32)}).fans((3, 3, 16, 32))
        (144, 288)
        """
        window = math.prod(shape[axis] for axis in self.window)
        inputs = math.prod(shape[axis] for axis in self.inputs)
        outputs = math.prod(shape[axis] for axis in self.outputs)
        return window * inputs, window * outputs


def layout(
    path: str,
    shapes: Mapping[str, Shape],
    *,
    rules: Mapping[str, str] | None = None,
    module: str | None = None,
    stacked: int | None = None,
) -> Layout:
    """The layout of the parameter at `path`.

    Args:
      path: its "/"-joined path.
      shapes: the shapes of all parameters by path; only those of this one and of its
        siblings (a kernel's bias, a bias's kernel) are read.
      rules: regular expressions to forms; the first one found in the path decides.
      module: the name of the type that holds the parameter, such as "Linear".
      stacked: how many leading axes are stack (True is 1), None to find out.

    Raises:
      ValueError: if a rule is no form or does not fit the parameter's rank.

    >>> layout("mlp/kernel", {"mlp/kernel": (6, 256, 512), "mlp/bias": (6, 512)})
    Layout(stack=(0,), window=(), inputs=(1,), outputs=(2,))
    >>> layout("q/w", {"q/w": (8, 512, 64)}, rules={"q/w$": "oio"}).outputs
    (0, 2)
    """
    word = _spell(path, shapes, rules or {}, module, stacked)
    stack, window, inputs, outputs = (
        tuple(axis for axis, letter in enumerate(word) if letter == role)
        for role in "swio"
    )
    return Layout(stack, window, inputs, outputs)


# What a type says, read off the module's type or the name that Flax derives from it.
# Flax calls a kernel `kernel`, Haiku `w`, Equinox (outputs first) `weight`.
_TYPES = {
    r"(?i:dense|linear)(_\w+|\d+)?/(kernel|w)$": "io",
    r"(?i:conv)\w*/kernel$": "w*io",
    r"(?i:transpose)\w*/w$": "w*oi",
    r"(?i:linear|embed)\w*/weight$": "oi",
    # An einsum has no window. Which of the two, its bias tells.
    r"(?i:einsum)\w*/kernel$": "oio",
    r"(?i:einsum)(_\w+|\d+)?/kernel$": "iio",
}
# What a name says, taken at its word: a bias-free convolution called `out` is read as
# stacked attention, whose units are finer; the reverse mistake would join layers.
_NAMES = {
    r"(^|/)(query|key|value)/kernel$": "ioo",
    r"(^|/)out/kernel$": "iio",
    r"(^|/)[ih][fgiorz]?_?/kernel$": "io",  # LSTM and GRU gates: half have no bias
    r"(^|/)lora_[ab]$": "io",
    r"(^|[/_])embed(ding)?s?$": "oi",
    r"(^|/)weight_(ih|hh)$": "oi",
    r"(^|/)(query|key|value|output)_proj/weight$": "oi",
    r"(^|/)weight$": "oiw*",
}
# What a bias's shape can tell; without one, the first.
_BY_SHAPE = ("w*io", "ii*oo", "ii*ooo", "w*oi")
_VECTORS = ("bias", "b", "scale", "offset", "gamma", "beta", "layer_scale", "bias_n")
_SIBLINGS = {
    "kernel": ("bias",),
    "weight": ("bias",),
    "w": ("b",),
    "bias": ("kernel", "weight", "scale"),
    "b": ("w",),
}


def _spell(
    path: str,
    shapes: Mapping[str, Shape],
    rules: Mapping[str, str],
    module: str | None,
    stacked: int | None,
) -> str:
    """One letter per axis."""
    shape, rank, name = shapes[path], len(shapes[path]), path.rpartition("/")[2]
    sibling = _sibling(path, shapes)
    rule = paths.first_match(rules, path, None)
    if rule is not None:
        return _agreeing([_from_rule(rule, path, shape, stacked)], shape, sibling)
    like_norm = sibling is not None and len(sibling.shape) == rank
    if name in _VECTORS or like_norm or rank - (stacked or 0) < 2:
        count = rank - 1
        if stacked is not None:
            count = min(stacked, rank)
        elif sibling is not None and len(sibling.shape) > rank:
            kernel = _spell(sibling.path, shapes, rules, module, None)
            count = min(kernel.count("s"), rank - 1)
        return ("s" * count).ljust(rank, "i")
    texts = ((_TYPES, f"{module}/{name}"), (_TYPES, path), (_NAMES, path))
    forms = [
        form
        for table, text in texts
        for pattern, form in table.items()
        if re.search(pattern, text)
    ]
    words = [_expand(form, rank, stacked) for form in (*forms, *_BY_SHAPE)]
    return _agreeing(words, shape, sibling)


class _Sibling(NamedTuple):
    path: str
    shape: Shape


def _sibling(path: str, shapes: Mapping[str, Shape]) -> _Sibling | None:
    name = path.rpartition("/")[2]
    for other in _SIBLINGS.get(name, ()):
        other_path = path.removesuffix(name) + other
        if other_path in shapes:
            return _Sibling(other_path, shapes[other_path])
    return None


def _from_rule(
    rule: str, path: str, shape: Shape, stacked: int | None
) -> tuple[str, ...]:
    # A rule that spells the stack itself needs no word from `stacked`.
    words = _expand(rule, len(shape), None if "s" in rule else stacked)
    if not re.fullmatch(r"([swio]\*?)+", rule) or not words:
        raise error(
            f"a rule must spell the axes of {path!r}, of shape {shape}, with "
            f"the letters s, w, i, o and *, got {rule!r}."
        )
    return words


@functools.cache
def _expand(form: str, rank: int, stacked: int | None) -> tuple[str, ...]:
    """What a form can mean at a rank, the smallest stack first."""
    fixed = len(re.sub(r".\*", "", form))

    def word(count: int) -> str:
        spare = rank - count - fixed
        return "s" * count + re.sub(r"(.)\*", lambda found: found[1] * spare, form)

    counts = range(rank + 1) if stacked is None else (stacked,)
    return tuple(word(count) for count in counts if len(word(count)) == rank)


def _agreeing(words: list[tuple[str, ...]], shape: Shape, bias: _Sibling | None) -> str:
    """The first word whose stack and outputs are the bias's shape, else the first."""
    if bias is not None:
        # A channels-first convolution's bias is (out, 1, 1), ready to broadcast.
        trimmed = bias.shape
        while trimmed and trimmed[-1] == 1:
            trimmed = trimmed[:-1]
        for alternatives in words:
            for expected in (bias.shape, trimmed):
                for word in alternatives:
                    kept = zip(word, shape, strict=True)
                    if tuple(n for letter, n in kept if letter in "so") == expected:
                        return word
    return next(word for alternatives in words for word in alternatives)
