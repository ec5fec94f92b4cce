"""NNX: keywords for a layer that is being built, and what a finished module knows.

A module keeps no initializer, but its type and its attributes say what its parameters
are for, and often the layout of a kernel to the letter: an Einsum has its equation, a
LinearGeneral its axes, a convolution its groups.
"""

import sys
from typing import Any, NamedTuple

from optclip._core import paths
from optclip.initializers.layers import layer as layer


class Known(NamedTuple):
    """What a module's type says about one of its parameters.

    Attributes:
      type: the name of Flax's type, such as "Linear".
      form: the layout of its kernel, see `_layouts`.
      parts: how many kernels stand side by side in its outputs.
    """

    type: str | None = None
    form: str | None = None
    parts: int = 1


def is_module(value: Any) -> bool:
    """Whether it is an `nnx.Module`; without importing Flax if nobody has."""
    if "flax.nnx" not in sys.modules:
        return False
    from flax import nnx

    return isinstance(value, nnx.Module)


def params(module: Any) -> Any:
    """The state of a module's parameters."""
    from flax import nnx

    return nnx.state(module, nnx.Param)


def update(module: Any, new: Any) -> None:
    """Writes parameters into a module."""
    from flax import nnx

    nnx.update(module, new)


def other_variables(tree: Any) -> set[str]:
    """The paths of a state's Variables that are no parameters."""
    if "flax.nnx" not in sys.modules:
        return set()
    from flax import nnx
    from jax.tree_util import tree_flatten_with_path

    flat, _ = tree_flatten_with_path(
        tree, is_leaf=lambda v: isinstance(v, nnx.Variable)
    )
    return {
        paths.spell(keys)
        for keys, value in flat
        if isinstance(value, nnx.Variable) and not isinstance(value, nnx.Param)
    }


def known(module: Any) -> dict[str, Known]:
    """What the types say, by the path of each parameter."""
    from flax import nnx

    found = {}
    for path, node in nnx.iter_graph(module):
        if not isinstance(node, nnx.Module):
            continue
        holder = "/".join(str(name) for name in path)
        kind = _kind(node)
        for name, value in vars(node).items():
            if isinstance(value, nnx.Variable):
                of_kernel = _of_kernel(node) if name == "kernel" else {}
                found[f"{holder}/{name}".lstrip("/")] = Known(kind, **of_kernel)
    return found


def _kind(node: Any) -> str:
    """The name of the Flax layer that a type is or extends, else its own."""
    for kind in type(node).__mro__:
        if kind.__module__.startswith("flax.nnx.nn."):
            return kind.__name__
    return type(node).__name__


def _of_kernel(node: Any) -> dict[str, Any]:
    from flax import nnx

    if isinstance(node, nnx.Einsum):
        return {"form": einsum_form(node.einsum_str)}
    if isinstance(node, nnx.LinearGeneral):
        letters = (("s", node.batch_axis), ("i", node.in_features))
        letters += (("o", node.out_features),)
        return {"form": "".join(letter * len(axes) for letter, axes in letters)}
    if isinstance(node, nnx.Conv):
        return {"form": "w*io", "parts": node.feature_group_count}
    if isinstance(node, nnx.ConvTranspose):
        return {"form": "w*oi" if node.transpose_kernel else "w*io"}
    return {}


def einsum_form(equation: str) -> str | None:
    """The layout of an einsum's second operand; None if a "..." hides it.

    >>> einsum_form("btd,ndh->btnh"), einsum_form("bnd,ndh->bnh")
    ('oio', 'sio')
    """
    left, _, result = equation.replace(" ", "").partition("->")
    data, _, kernel = left.partition(",")
    if "." in kernel:
        return None
    return "".join(
        "i" if axis not in result else "s" if axis in data else "o" for axis in kernel
    )
