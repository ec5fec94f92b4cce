"""Which axes of a parameter are stack, window, inputs and outputs.

Clipping units, Keras' constraint axes and an initializer's fans are one question: a
kernel adds its *inputs* (over the *window* of a convolution) into each of its
*outputs*, and there may be a *stack* of independent copies: scan-stacked layers or an
ensemble. The norm of a unit is taken over all axes but stack and outputs, so that one
bad layer never shrinks its neighbours.

A form spells the answer with one letter per axis: `s`tack, `w`indow, `i`nput,
`o`utput. A letter before `*` repeats as often as the rank needs, possibly zero times,
and axes left over in front are stack. A Dense kernel is `io`, a convolution `w*io`,
attention's query `ioo` and its output `iio`, an embedding `oi` (one unit per row). A
number behind a slash says how many separate kernels share the outputs: `w*io/8` is a
convolution with 8 groups.

A layout is found from, in this order: a form that the user gives; the type of the
module, where known; the name; the shape of the bias beside it, which must be stack plus
outputs (a kernel (6, 256, 256) is a stack with the bias (6, 256), a convolution with
(256,), a query with (256, 256)); the rank. A name that contradicts the bias is passed
over. Where shapes alone leave a choice (all sizes equal), a stack is preferred to
several output axes: it is far likelier, and it keeps layers apart. Without name and
bias, rank 2 is `io` and higher ranks are convolutions: say `stacked` or give a form
where that is wrong. A bias or scale has no outputs: it is one unit per layer, and takes
its stack from the kernel; without one, all but its last axis are stack.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from optclip._core.public import error
from optclip._core.types import Shape, Shapes


class Layout(NamedTuple):
    """The axes of a parameter by role: each ascending, together all axes.

    Attributes:
      stack: axes that count independent copies, such as scanned layers.
      window: axes of a convolution's window.
      inputs: axes that one output sums over.
      outputs: axes of the outputs; none for a bias or scale.
      parts: how many separate kernels share the outputs: groups, or a cell's gates.
    """

    stack: tuple[int, ...]
    window: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    parts: int = 1

    def unit_axes(self, shape: Shape) -> tuple[int, ...]:
        """The axes over which one unit's norm is taken.

        >>> layout("kernel", {"kernel": (3, 3, 16, 32)}).unit_axes((3, 3, 16, 32))
        (0, 1, 2)
        """
        one_layer = {*self.window, *self.inputs, *self.outputs}
        if sum(shape[axis] > 1 for axis in one_layer) <= 1:
            # A kernel of shape (1, n) or (n, 1) is one unit, as in AGC's own code.
            return tuple(sorted(one_layer))
        return tuple(sorted(one_layer.difference(self.outputs)))

    def fans(self, shape: Shape) -> tuple[int, int]:
        """How many inputs reach one output, and how many outputs one input reaches.

        >>> layout("kernel", {"kernel": (3, 3, 16, 32)}).fans((3, 3, 16, 32))
        (144, 288)
        """
        window, inputs, outputs = (
            math.prod(shape[axis] for axis in axes)
            for axes in (self.window, self.inputs, self.outputs)
        )
        return window * inputs, window * outputs // self.parts


def layout(
    path: str,
    shapes: Shapes,
    *,
    forms: Mapping[str, str] | None = None,
    module: str | None = None,
    stacked: int | None = None,
    unnamed: str = "w*io",
) -> Layout:
    """The layout of the parameter at `path`.

    Args:
      path: its "/"-joined path.
      shapes: the shapes of all parameters by path; only those of this one and of its
        siblings (a kernel's bias, a bias's kernel) are read.
      forms: the letters of the axes of some kernels, by path.
      module: the name of the type that holds the parameter, such as "Linear".
      stacked: how many leading axes are stack (True is 1), None to find out.
      unnamed: the form of a kernel of which neither name nor bias says anything.

    Returns:
      The axes by role, as indices into the parameter's shape.

    Raises:
      ValueError: if a form has other letters or does not fit the parameter's rank.

    >>> layout("mlp/kernel", {"mlp/kernel": (6, 256, 512), "mlp/bias": (6, 512)})
    Layout(stack=(0,), window=(), inputs=(1,), outputs=(2,), parts=1)
    >>> layout("q/w", {"q/w": (8, 512, 64)}, forms={"q/w": "oio"}).outputs
    (0, 2)
    """
    forms = forms or {}
    word = _word(path, shapes, forms, module, stacked, unnamed)
    axes = (
        tuple(axis for axis, letter in enumerate(word) if letter == role)
        for role in "swio"
    )
    return Layout(*axes, parts=split_form(forms[path])[1] if path in forms else 1)


def split_form(form: str) -> tuple[str, int]:
    """The letters of a form, and its number of parts.

    >>> split_form("w*io/8"), split_form("io")
    (('w*io', 8), ('io', 1))
    """
    if not isinstance(form, str):
        raise error(f"layouts must be strings such as 'w*io', got {form!r}.")
    letters, slash, count = form.partition("/")
    if slash and not (count.isdecimal() and int(count) > 0):
        raise error(f"layouts must end in a number of parts, if in '/', got {form!r}.")
    return letters, int(count or 1)


# What a type says, read off the module's type or the name that Flax derives from it.
# Flax calls a kernel `kernel`, Haiku `w`, Equinox (outputs first) `weight`.
_TYPES = {
    r"(?i:dense|linear)(_\w+|\d+)?/(kernel|w)$": "io",
    r"(?i:conv)\w*/kernel$": "w*io",
    r"(?i:transpose)\w*/w$": "w*oi",
    r"(?i:linear|embed)\w*/weight$": "oi",
    r"Embed\w*/(?!kernel|bias|scale|w$)\w+$": "oi",
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
    r"(^|[/_])embed(ding)?s?$|(^|/)(wte|wpe)$": "oi",  # a row for each token
    r"(^|/)(cls|mask|class)(_?token)?$": "oi",
    r"(^|/)weight_(ih|hh)$": "oi",
    r"(^|/)(query|key|value|output)_proj/weight$": "oi",
    r"(^|/)weight$": "oiw*",
}
# What a bias's shape can tell.
_BY_SHAPE = ("w*io", "ii*oo", "ii*ooo", "w*oi")
_VECTORS = ("bias", "b", "scale", "offset", "gamma", "beta", "layer_scale", "bias_n")
_SIBLINGS = {
    "kernel": ("bias",),
    "weight": ("bias",),
    "w": ("b",),
    "bias": ("kernel", "weight", "scale"),
    "b": ("w",),
}


def _word(
    path: str,
    shapes: Shapes,
    forms: Mapping[str, str],
    module: str | None,
    stacked: int | None,
    unnamed: str,
) -> str:
    """The form written out: one letter per axis."""
    shape, rank, (holder, slash, name) = (
        shapes[path],
        len(shapes[path]),
        path.rpartition("/"),
    )
    kin = (f"{holder}{slash}{other}" for other in _SIBLINGS.get(name, ()))
    sibling = next((other for other in kin if other in shapes), None)
    beside = None if sibling is None else shapes[sibling]
    if path in forms:
        return _agreeing([_of_form(path, shape, forms[path], stacked)], shape, beside)
    like_norm = beside is not None and len(beside) == rank
    if name in _VECTORS or like_norm or rank - (stacked or 0) < 2:
        count = rank - 1
        if stacked is not None:
            count = min(stacked, rank)
        elif sibling is not None and len(shapes[sibling]) > rank:
            kernel = _word(sibling, shapes, forms, module, None, unnamed)
            count = min(kernel.count("s"), rank - 1)
        return ("s" * count).ljust(rank, "i")
    texts = ((_TYPES, f"{module}/{name}"), (_TYPES, path), (_NAMES, path))
    found = [
        form
        for table, text in texts
        for pattern, form in table.items()
        if re.search(pattern, text)
    ]
    words = [_expand(form, rank, stacked) for form in (*found, unnamed, *_BY_SHAPE)]
    return _agreeing(words, shape, beside)


def _of_form(
    path: str, shape: Shape, form: str, stacked: int | None
) -> tuple[str, ...]:
    """What a form that the user gave can mean for a shape."""
    letters, _ = split_form(form)
    # A form that spells the stack itself says more than `stacked`.
    words = _expand(letters, len(shape), None if "s" in letters else stacked)
    if not re.fullmatch(r"([swio]\*?)+", letters) or not words:
        raise error(
            f"layouts must spell the axes of {path!r}, of shape {shape}, with "
            f"the letters s, w, i, o and *, got {form!r}."
        )
    return words


@functools.cache
def _expand(form: str, rank: int, stacked: int | None) -> tuple[str, ...]:
    """What a form can mean at a rank, the smallest stack first."""
    fixed, words = len(re.sub(r".\*", "", form)), []
    for count in range(rank + 1) if stacked is None else (stacked,):
        spare = rank - count - fixed
        word = "s" * count + re.sub(r"(.)\*", r"\1" * spare, form)
        if len(word) == rank:
            words.append(word)
    return tuple(words)


def _agreeing(words: list[tuple[str, ...]], shape: Shape, bias: Shape | None) -> str:
    """The first word whose stack and outputs are the bias's shape, else the first."""
    if bias is not None:
        # A channels-first convolution's bias is (out, 1, 1), ready to broadcast.
        trimmed = bias
        while trimmed and trimmed[-1] == 1:
            trimmed = trimmed[:-1]
        for alternatives in words:
            for expected in (bias, trimmed):
                for word in alternatives:
                    kept = zip(word, shape, strict=True)
                    if tuple(n for letter, n in kept if letter in "so") == expected:
                        return word
    return next(word for alternatives in words for word in alternatives)
