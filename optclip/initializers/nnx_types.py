"""What the types of an NNX module's layers say about its parameters.

A module keeps no initializer, but its type and its attributes say what its parameters
are for, and often the exact layout of a kernel: an Einsum has its equation, a
LinearGeneral its axes, a convolution its groups. Only modules of NNX are read here, so
Flax is imported.
"""

from __future__ import annotations

from flax import nnx


def known(module: nnx.Module) -> tuple[dict[str, str], dict[str, str]]:
    """By path: the type that holds each parameter, and the form of some kernels."""
    types: dict[str, str] = {}
    forms: dict[str, str] = {}
    for path, node in nnx.iter_graph(module):
        if not isinstance(node, nnx.Module):
            continue
        for name, value in vars(node).items():
            if isinstance(value, nnx.Variable):
                at = "/".join(map(str, (*path, name)))
                types[at] = _type_name(node)
                form = _kernel_form(node) if name == "kernel" else None
                if form is not None:
                    forms[at] = form
    return types, forms


def einsum_form(equation: str) -> str | None:
    """The form of an einsum's second operand; None if a "..." hides it.

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


def _type_name(node: nnx.Module) -> str:
    """The name of the Flax layer that a type is or extends, else its own."""
    for kind in type(node).__mro__:
        if kind.__module__.startswith("flax.nnx.nn."):
            return kind.__name__
    return type(node).__name__


def _kernel_form(node: nnx.Module) -> str | None:
    if isinstance(node, nnx.Einsum):
        return einsum_form(node.einsum_str)
    if isinstance(node, nnx.LinearGeneral):
        stack, inputs, outputs = node.batch_axis, node.in_features, node.out_features
        return "s" * len(stack) + "i" * len(inputs) + "o" * len(outputs)
    if isinstance(node, nnx.Conv):
        return "w" * len(node.kernel_size) + f"io/{node.feature_group_count}"
    if isinstance(node, nnx.ConvTranspose):
        return "w" * len(node.kernel_size) + ("oi" if node.transpose_kernel else "io")
    return None
