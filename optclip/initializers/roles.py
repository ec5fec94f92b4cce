"""Roles: what a parameter is for, found from its module's type, its path and its shape.

A role is a kind of another, and takes its parent's initializer where a preset names
only that. The role of a bias is its kernel's with `_bias` behind it, "bias" for the
plain kernel; its parent follows the kernel's.

| role | kind of | found by |
|---|---|---|
| kernel | – | the names kernel, weight, w |
| conv | kernel | a window in its layout |
| query, key, value, qkv | kernel | the layer's name, or its neighbours' names |
| residual_out | kernel | the layer's name: c_proj, out_proj, o_proj, wo, fc2, … |
| attention_out | residual_out | out, proj, … beside a query or qkv |
| head | kernel | the layer's name: head, lm_head, logits, classifier, … |
| policy_head, value_head | head | policy, actor, pi; value, critic with one output |
| recurrent, recurrent_input | kernel | cells: hi beside ii, dense_h beside dense_i, … |
| forget_bias | recurrent_bias | the gate f of an LSTM |
| embedding | – | the name embedding, or the type |
| position | embedding | pos in an embedding's name, wpe |
| token | embedding | cls, cls_token, mask_token |
| scale | – | the names scale, gamma; weight with one axis |
| residual_scale | scale | the last norm of a block with convolutions |
| bias | – | the names bias, b |
| shift | bias | a bias beside a scale: a normalization's |

A parameter with none of these names has no role, and `redraw` leaves it alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from optclip._core.layouts import Layout, layout
from optclip._core.types import Shapes

_KERNEL_KINDS = (
    *("conv", "query", "key", "value", "qkv", "residual_out", "head"),
    *("recurrent", "recurrent_input"),
)
_KINDS = {
    **dict.fromkeys(_KERNEL_KINDS, "kernel"),
    "attention_out": "residual_out",
    **dict.fromkeys(("policy_head", "value_head"), "head"),
    **dict.fromkeys(("position", "token"), "embedding"),
    "residual_scale": "scale",
    "shift": "bias",
    "forget_bias": "recurrent_bias",
}
_BIAS_KINDS = {
    f"{kind}_bias": "bias" if parent == "kernel" else f"{parent}_bias"
    for kind, parent in _KINDS.items()
    if parent in ("kernel", "residual_out", "head")
}
# Role -> the role it is a kind of.
KINDS = {**_KINDS, **_BIAS_KINDS}
ROLES = ("kernel", "bias", "embedding", "scale", *KINDS)
EMBEDDINGS = ("embedding", "position", "token")
SCALES = ("scale", "residual_scale")

_KERNELS = r"(kernel|weight|w)\d*|weight_(ih|hh)"
_BIASES = r"(bias(_n)?|b|beta|offset)\d*"
_SCALES = r"(scale|gamma)"
_TOKENS = r"(cls|mask|class)(_?token)?"
_EMBEDDINGS = r"(.*_)?embed(ding)?s?|wte|wpe"
_EMBED_TYPES = r"\w*Embed\w*"
_LAYERS = {
    "query": r"query|(q|wq)(_proj)?|query_proj",
    "key": r"key|(k|wk)(_proj)?|key_proj",
    "value": r"value|(v|wv)(_proj)?|value_proj",
    "qkv": r"(c_attn|(to_)?qkv|in_proj|Wqkv)(_proj)?",
    "residual_out": r"c_proj|(out|o|down|output)_proj|proj_out|wo|fc2|fc_out|linear2",
    "head": r"(lm_|classifier_|output_)?head|logits|classifier|unembed|readout",
}
_QUERIES = f"{_LAYERS['query']}|{_LAYERS['qkv']}"
_ATTENTION_OUT = r"out|proj|wo|c_proj|(out|o|output)_proj"
_POLICY = r"(policy|actor|pi|action)(_head|_out|_mean|_logits)?"
_VALUE = r"(value|critic|vf)(_head|_out)?"
_GATES = r"dense_[ih]|[ih][a-z]?_?"


class Parameters(NamedTuple):
    """What is known of all parameters of a model, by path.

    Attributes:
      shapes: their shapes.
      types: the name of the Flax type that holds each, such as "Linear".
      forms: the letters of the axes of some kernels, see `layouts`.
      stacks: how many leading axes count independent layers, where that is given.
      children: the names directly beneath each module's path.
      layouts: the layouts that were found so far.
    """

    shapes: Shapes
    types: Mapping[str, str]
    forms: Mapping[str, str]
    stacks: Mapping[str, int]
    children: Mapping[str, set[str]]
    layouts: dict[str, Layout]

    def layout(self, path: str) -> Layout:
        """The layout of one of them."""
        if path not in self.layouts:
            module, stacked = self.types.get(path), self.stacks.get(path)
            self.layouts[path] = layout(
                path, self.shapes, forms=self.forms, module=module, stacked=stacked
            )
        return self.layouts[path]


def role_of(path: str, known: Parameters) -> str | None:
    """The role of the parameter at `path`, or None.

    >>> fc = Parameters({"fc/bias": (3,)}, {}, {}, {}, {"fc": {"bias"}}, {})
    >>> role_of("fc/bias", fc)
    'bias'
    """
    holder, _, name = path.rpartition("/")
    rank = len(known.shapes[path])
    if re.fullmatch(_SCALES, name) or (name == "weight" and rank == 1):
        return "residual_scale" if _is_last_norm(holder, known.children) else "scale"
    if re.fullmatch(_BIASES, name):
        return _bias_role(path, known)
    if re.fullmatch(_TOKENS, name):
        return "token"
    embeds = re.fullmatch(_EMBED_TYPES, known.types.get(path, ""))
    if rank > 1 and (embeds or re.fullmatch(_EMBEDDINGS, name)):
        layer = holder if name in ("embedding", "weight") else path
        positional = re.search(r"(^|_)pos|wpe", layer.rpartition("/")[2].lower())
        return "position" if positional else "embedding"
    return _kernel_role(path, known) if re.fullmatch(_KERNELS, name) else None


def is_vector(path: str) -> bool:
    """Whether a name is that of a bias or a scale."""
    return re.fullmatch(f"{_BIASES}|{_SCALES}", path.rpartition("/")[2]) is not None


def recurrent_kernel(path: str, shapes: Shapes) -> str | None:
    """The recurrent kernel of the cell that a kernel or bias belongs to, or None.

    A cell is known by its pairs: an input gate `ii` is one if there is an `hi`.
    """
    holder = path.rpartition("/")[0]
    if f"{holder}/weight_hh".lstrip("/") in shapes:
        return f"{holder}/weight_hh".lstrip("/")
    cell, slash, gate = holder.rpartition("/")
    if not re.fullmatch(_GATES, gate):
        return None
    fused = "dense_" if gate.startswith("dense_") else ""
    rest = gate.removeprefix(fused)[1:].rstrip("_")
    # NNX calls a gate `if_`, because `if` is a keyword of Python.
    inputs, recurrents = (
        [f"{cell}{slash}{fused}{side}{rest}{end}/kernel" for end in ("", "_")]
        for side in "ih"
    )
    if not any(kernel in shapes for kernel in inputs):
        return None
    return next((kernel for kernel in recurrents if kernel in shapes), None)


def sibling_kernel(path: str, shapes: Shapes) -> str | None:
    """The kernel beside a bias, with the same number in its name."""
    holder, slash, name = path.rpartition("/")
    number = re.sub(r"\D", "", name)
    kernels = (f"{holder}{slash}{kind}{number}" for kind in ("kernel", "weight", "w"))
    return next((kernel for kernel in kernels if kernel in shapes), None)


def _kernel_role(path: str, known: Parameters) -> str:
    recurrent = recurrent_kernel(path, known.shapes)
    if recurrent is not None:
        return "recurrent" if recurrent == path else "recurrent_input"
    above, _, layer = path.rpartition("/")[0].rpartition("/")
    attends = any(re.fullmatch(_QUERIES, name) for name in known.children[above])
    if attends and re.fullmatch(_ATTENTION_OUT, layer):
        return "attention_out"
    if re.fullmatch(_POLICY, layer):
        return "policy_head"
    outputs = known.layout(path).outputs
    one_output = outputs and all(known.shapes[path][axis] == 1 for axis in outputs)
    if re.fullmatch(_VALUE, layer) and not attends and one_output:
        return "value_head"
    for role, pattern in _LAYERS.items():
        # Without a query beside it, `value` or `key` is any layer of that name.
        if re.fullmatch(pattern, layer) and (attends or role not in ("key", "value")):
            return role
    return "conv" if known.layout(path).window else "kernel"


def _bias_role(path: str, known: Parameters) -> str:
    holder = path.rpartition("/")[0]
    if any(re.fullmatch(_SCALES, name) for name in known.children[holder]):
        return "shift"
    if recurrent_kernel(path, known.shapes) is not None:
        forgets = re.fullmatch(r"[ih]f_?", holder.rpartition("/")[2])
        return "forget_bias" if forgets else "recurrent_bias"
    kernel = sibling_kernel(path, known.shapes)
    if kernel is None:
        return "bias"
    if len(known.shapes[kernel]) == len(known.shapes[path]):
        return "shift"  # a normalization whose scale is called weight
    role = role_of(kernel, known)
    return "bias" if role in ("kernel", None) else f"{role}_bias"


def _is_last_norm(holder: str, children: Mapping[str, set[str]]) -> bool:
    """Whether a norm is the last of several that a block numbers beside convolutions.

    The whole model is no block: its norm follows the first layer, not a branch.
    """
    block, _, norm = holder.rpartition("/")
    numbered = re.fullmatch(r"(\D+?)(\d+)", norm)
    if not block or numbered is None:
        return False
    alike = re.compile(re.escape(numbered[1]) + r"(\d+)")
    numbers = [int(n[1]) for n in map(alike.fullmatch, children[block]) if n]
    convolutional = any(re.match(r"(?i)conv", other) for other in children[block])
    return convolutional and len(numbers) > 1 and int(numbered[2]) == max(numbers)
