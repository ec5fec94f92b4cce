"""A preset as the keywords of a Flax layer that is being built: `linen.layer`.

    nnx.Linear(8, 8, **layer(he_normal()), rngs=rngs)
    nn.MultiHeadDotProductAttention(8, **layer(xavier_uniform(), "attention"))

Flax passes an initializer the flattened shape of a Dense or attention kernel, so fans
are right there. Where it passes the raw shape (an Einsum, a grouped or transposed
kernel), `layout` says what its axes are.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from optclip._core import checks, layouts
from optclip._core.public import caller, naming, public
from optclip._core.types import Shape
from optclip.initializers.kernel_shapes import Initializer, drawn
from optclip.initializers.presets import FromFanIn, Preset
from optclip.initializers.roles import EMBEDDINGS, KINDS, ROLES, SCALES


@public
def layer(
    preset: Preset,
    role: str = "kernel",
    *,
    fan_in: int | None = None,
    layout: str | None = None,
) -> dict[str, Any]:
    """A layer's initializers, as the keywords that Linen and NNX share.

    Args:
      preset: gives each role its initializer.
      role: what the layer's kernel is for, or the kind of layer:
        "kernel", "head", "residual_out", "conv", …: kernel_init and bias_init;
        "embedding", "position": embedding_init;
        "norm" or "scale": scale_init and bias_init;
        "attention": kernel_init (its query's), bias_init, and the same for its output;
        "cell" or "recurrent": kernel_init, recurrent_kernel_init and bias_init.
      fan_in: of the layer (the hidden size of a cell), for presets whose biases depend
        on it, as PyTorch's do.
      layout: the letters of the kernel's axes, such as "oio" or "w*io/8"; see the
        argument `layouts` of `redraw`.

    Returns:
      A dict of initializers, for `**` in the layer's constructor.

    Raises:
      ValueError: for an unknown role, or a layout that the kernel does not fit; for a
        preset whose biases need fan_in, without it, when the bias is drawn.

    >>> from optclip.initializers import he_normal, linen
    >>> sorted(linen.layer(he_normal(), "head"))
    ['bias_init', 'kernel_init']
    """
    checks.instance(Preset, preset=preset)
    checks.known(("attention", "norm", "cell", *ROLES), role=role)
    if fan_in is not None:
        checks.at_least(1, fan_in=fan_in)
    inits = {}
    for keyword, of in _roles_by_keyword(role).items():
        init = preset[of]
        # Without a fan-in it raises when it is drawn: the layer may have no bias.
        if isinstance(init, FromFanIn) and fan_in is not None:
            init = init.build(fan_in)
        if layout is not None and keyword == "kernel":
            init = _with_layout(init, layout)
        inits[f"{keyword}_init"] = init
    return inits


def _roles_by_keyword(role: str) -> dict[str, str]:
    if role == "attention":
        roles = {"kernel": "query", "bias": "query_bias"}
        return roles | {"out_kernel": "attention_out", "out_bias": "attention_out_bias"}
    if role in ("cell", "recurrent"):
        roles = {"kernel": "recurrent_input", "recurrent_kernel": "recurrent"}
        return roles | {"bias": "recurrent_bias"}
    if role == "norm" or role in SCALES:
        return {"scale": "scale" if role == "norm" else role, "bias": "shift"}
    if role in EMBEDDINGS:
        return {"embedding": role}
    bias = f"{role}_bias" if f"{role}_bias" in KINDS else "bias"
    return {"kernel": role, "bias": bias}


def _with_layout(init: Initializer, form: str) -> Initializer:
    """The initializer for a kernel whose axes have these letters."""
    layouts.split_form(form)  # raises here rather than where it is drawn
    name = caller()

    def draw(key: jax.Array, shape: Shape, dtype: DTypeLike = jnp.float32) -> jax.Array:
        shape = tuple(shape)
        with naming(name):
            axes = layouts.layout("kernel", {"kernel": shape}, forms={"kernel": form})
        return drawn(init, key, shape, dtype, axes)

    return draw
