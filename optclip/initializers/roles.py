"""Roles: what a parameter is for, found from its module's type, its path and its shape.

A role is a kind of another, and takes its parent's initializer where a preset names
only that. The role of a bias is its kernel's with `_bias` behind it, "bias" for the
plain kernel; its parent follows the kernel's.

| role | kind of | found by |
|---|---|---|
| kernel | – | the names kernel, weight, w |
| conv | kernel | a window in its layout |
| query, key, value, qkv | kernel | the layer's name, or its kin's |
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

Whatever has none of these names has no role, and `redraw` leaves it alone.
"""

import re
from collections.abc import Callable, Iterator, Mapping

from optclip._core import checks

Shape = tuple[int, ...]

_KINDS = {
    "conv": "kernel",
    "query": "kernel",
    "key": "kernel",
    "value": "kernel",
    "qkv": "kernel",
    "residual_out": "kernel",
    "attention_out": "residual_out",
    "head": "kernel",
    "policy_head": "head",
    "value_head": "head",
    "recurrent": "kernel",
    "recurrent_input": "kernel",
    "position": "embedding",
    "token": "embedding",
    "residual_scale": "scale",
    "shift": "bias",
    "forget_bias": "recurrent_bias",
}
_BIAS_KINDS = {
    f"{kind}_bias": "bias" if parent == "kernel" else f"{parent}_bias"
    for kind, parent in _KINDS.items()
    if parent in ("kernel", "residual_out", "head")
}
KINDS = {**_KINDS, **_BIAS_KINDS}
ROLES = ("kernel", "bias", "embedding", "scale", *KINDS)

_KERNELS = r"(kernel|weight|w)\d*"
_BIASES = r"(bias(_n)?|b|beta|offset)\d*"
_SCALES = r"(scale|gamma)"
_LAYERS = {
    "query": r"query|(q|wq)(_proj)?|query_proj",
    "key": r"key|(k|wk)(_proj)?|key_proj",
    "value": r"value|(v|wv)(_proj)?|value_proj",
    "qkv": r"(c_attn|(to_)?qkv|in_proj|Wqkv)(_proj)?",
    "residual_out": r"c_proj|(out|o|down|output)_proj|proj_out|wo|fc2|fc_out|linear2",
    "head": r"(lm_|classifier_|output_)?head|logits|classifier|unembed|readout",
}
_ATTENTION_OUT = r"out|proj|wo|c_proj|(out|o|output)_proj"
_POLICY = r"(policy|actor|pi|action)(_head|_out|_mean|_logits)?"
_VALUE = r"(value|critic|vf)(_head|_out)?"
_EMBED_TYPES = r"\w*Embed\w*"
_GATES = r"dense_[ih]|[ih][a-z]?_?"


def lineage(role: str) -> Iterator[str]:
    """A role, the role it is a kind of, and so on."""
    while True:
        yield role
        if role not in KINDS:
            return
        role = KINDS[role]


def checked_role(role: object) -> None:
    """Raises for a word that is no role, with the nearest ones."""
    checks.known(ROLES, role=role)


def role_of(
    path: str,
    shapes: Mapping[str, Shape],
    module: str | None,
    convolves: Callable[[str], bool],
) -> str | None:
    """The role of the parameter at `path`, or None.

    Args:
      path: its "/"-joined path.
      shapes: the shapes of all parameters by path.
      module: the name of the type that holds it, if known, such as "Linear".
      convolves: path to whether the layout there has a window.

    >>> role_of("fc/bias", {"fc/bias": (3,)}, None, lambda path: False)
    'bias'
    """
    holder, _, name = path.rpartition("/")
    if re.fullmatch(_SCALES, name) or (name == "weight" and len(shapes[path]) == 1):
        last = _is_last_norm(holder, shapes)
        return "residual_scale" if last else "scale"
    if re.fullmatch(_BIASES, name):
        return _bias_role(path, shapes, module, convolves)
    if re.fullmatch(r"(cls|mask|class)(_?token)?", name):
        return "token"
    embeds = re.search(r"(^|_)embed(ding)?s?$", name) or name in ("wte", "wpe")
    embeds = embeds or (module is not None and re.fullmatch(_EMBED_TYPES, module))
    if embeds and len(shapes[path]) > 1:
        layer = path if name not in ("embedding", "weight") else holder
        positional = re.search(r"(^|[/_])pos|wpe", layer.split("/")[-1].lower())
        return "position" if positional else "embedding"
    if re.fullmatch(_KERNELS, name) or re.fullmatch(r"weight_(ih|hh)", name):
        return _kernel_role(holder, name, shapes, convolves)
    return None


def is_vector(path: str) -> bool:
    """Whether a name is that of a bias or a scale."""
    return re.fullmatch(f"{_BIASES}|{_SCALES}", path.rpartition("/")[2]) is not None


def recurrent_kernel(path: str, shapes: Mapping[str, Shape]) -> str | None:
    """The recurrent kernel of the cell that a kernel or bias belongs to, or None.

    A cell is known by its pairs: an input gate `ii` is one if there is an `hi`.
    """
    holder = path.rpartition("/")[0]
    if f"{holder}/weight_hh".lstrip("/") in shapes:
        return f"{holder}/weight_hh".lstrip("/")
    cell, _, gate = holder.rpartition("/")
    if not re.fullmatch(_GATES, gate):
        return None
    fused = "dense_" if gate.startswith("dense_") else ""
    rest = gate.removeprefix(fused)[1:].rstrip("_")
    # NNX calls the gate that Python has no name for `if_`.
    inputs, recurrents = (
        [f"{cell}/{fused}{side}{rest}{end}/kernel".lstrip("/") for end in ("", "_")]
        for side in "ih"
    )
    if not any(kernel in shapes for kernel in inputs):
        return None
    return next((kernel for kernel in recurrents if kernel in shapes), None)


def _kernel_role(
    holder: str,
    name: str,
    shapes: Mapping[str, Shape],
    convolves: Callable[[str], bool],
) -> str:
    path = f"{holder}/{name}".lstrip("/")
    recurrent = recurrent_kernel(path, shapes)
    if recurrent is not None:
        return "recurrent" if recurrent == path else "recurrent_input"
    above, _, layer = holder.rpartition("/")
    kin = _children(above, shapes)
    attends = any(
        re.fullmatch(_LAYERS[role], other) for other in kin for role in ("query", "qkv")
    )
    if attends and re.fullmatch(_ATTENTION_OUT, layer):
        return "attention_out"
    if re.fullmatch(_POLICY, layer):
        return "policy_head"
    if re.fullmatch(_VALUE, layer) and not attends and shapes[path][-1] == 1:
        return "value_head"
    for role, pattern in _LAYERS.items():
        # Without its kin a lone `value` or `key` is some layer of that name.
        if re.fullmatch(pattern, layer) and (attends or role not in ("key", "value")):
            return role
    return "conv" if convolves(path) else "kernel"


def _bias_role(
    path: str,
    shapes: Mapping[str, Shape],
    module: str | None,
    convolves: Callable[[str], bool],
) -> str:
    holder = path.rpartition("/")[0]
    if any(re.fullmatch(_SCALES, name) for name in _children(holder, shapes)):
        return "shift"
    kernel = sibling_kernel(path, shapes)
    recurrent = recurrent_kernel(path, shapes)
    if recurrent is not None:
        forgets = re.fullmatch(r"[ih]f_?", holder.rpartition("/")[2])
        return "forget_bias" if forgets else "recurrent_bias"
    if kernel is None:
        return "bias"
    if len(shapes[kernel]) == len(shapes[path]):
        return "shift"  # a normalization whose scale is called weight
    role = role_of(kernel, shapes, module, convolves)
    return "bias" if role in ("kernel", None) else f"{role}_bias"


def sibling_kernel(path: str, shapes: Mapping[str, Shape]) -> str | None:
    """The kernel that a bias is added behind, if there is exactly one beside it."""
    holder, _, name = path.rpartition("/")
    prefix = f"{holder}/" if holder else ""
    number = re.sub(r"\D", "", name)
    for kernel in ("kernel", "weight", "w"):
        if f"{prefix}{kernel}{number}" in shapes:
            return f"{prefix}{kernel}{number}"
    return None


def _is_last_norm(holder: str, shapes: Mapping[str, Shape]) -> bool:
    """Whether a norm is the last of several that a block numbers beside convolutions.

    The block is no model: those have a norm behind their stem, not at a branch's end.
    """
    block, _, norm = holder.rpartition("/")
    numbered = re.fullmatch(r"(\D+?)(\d+)", norm)
    if not block or numbered is None:
        return False
    beside = _children(block, shapes)
    alike = re.compile(re.escape(numbered[1]) + r"(\d+)")
    numbers = [int(found[1]) for found in map(alike.fullmatch, beside) if found]
    convolutional = any(re.match(r"(?i)conv", other) for other in beside)
    return convolutional and len(numbers) > 1 and int(numbered[2]) == max(numbers)


def _children(holder: str, shapes: Mapping[str, Shape]) -> set[str]:
    """The names directly beneath a module's path."""
    prefix = f"{holder}/" if holder else ""
    below = (path for path in shapes if path.startswith(prefix))
    return {path.removeprefix(prefix).split("/")[0] for path in below}
