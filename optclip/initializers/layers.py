"""The first door: a preset as the keywords of a Flax layer that is being built.

    nnx.Linear(8, 8, **layer(he_normal()), rngs=rngs)
    nn.MultiHeadDotProductAttention(8, **layer(xavier_uniform(), "attention"))

Flax hands an initializer the flattened shape of a Dense or attention kernel, so fans
are right there. Where it hands over the raw shape (an Einsum, a grouped or transposed
kernel), `layout` says what its axes are.
"""

from typing import Any

import jax
import jax.numpy as jnp

from optclip._core import checks, layouts
from optclip._core.public import public
from optclip.initializers import kernel_shapes as unfolding
from optclip.initializers.kernel_shapes import Initializer
from optclip.initializers.presets import FromFanIn, Preset
from optclip.initializers.roles import KINDS, ROLES, lineage

_LAYERS = ("attention", "norm", "cell")


@public
def layer(
    preset: Preset,
    role: str = "kernel",
    *,
    fan_in: int | None = None,
    layout: str | None = None,
) -> dict[str, Initializer]:
    """A layer's initializers, as the keywords that Linen and NNX share.

    Args:
      preset: what each role gets.
      role: what the layer's kernel is for, or the kind of layer:
        "kernel", "head", "residual_out", "conv", …: kernel_init and bias_init;
        "embedding", "position": embedding_init;
        "norm" or "scale": scale_init and bias_init;
        "attention": kernel_init (its query's), bias_init, and the same for its output;
        "cell" or "recurrent": kernel_init, recurrent_kernel_init and bias_init.
      fan_in: of the layer (the hidden size of a cell), for presets whose biases draw by
        it, as PyTorch's do.
      layout: the letters of the kernel's axes, see `redraw`.

    Raises:
      ValueError: for an unknown role, or a layout that the kernel does not fit; for a
        preset whose biases need fan_in, without it.

    >>> from optclip.initializers import he_normal, linen
    >>> sorted(linen.layer(he_normal(), "head"))
    ['bias_init', 'kernel_init']
    """
    checks.known((*_LAYERS, *ROLES), role=role)
    if fan_in is not None:
        checks.at_least(1, fan_in=fan_in)
    if role == "attention":
        roles = {"kernel": "query", "bias": "query_bias"}
        roles |= {"out_kernel": "attention_out", "out_bias": "attention_out_bias"}
    elif role in ("cell", "recurrent"):
        roles = {"kernel": "recurrent_input", "recurrent_kernel": "recurrent"}
        roles |= {"bias": "recurrent_bias"}
    elif role == "norm" or "scale" in lineage(role):
        roles = {"scale": "scale" if role == "norm" else role, "bias": "shift"}
    elif "embedding" in lineage(role):
        roles = {"embedding": role}
    else:
        bias = f"{role}_bias" if f"{role}_bias" in KINDS else "bias"
        roles = {"kernel": role, "bias": bias}
    return {
        f"{name}_init": _told(preset[of], fan_in, layout if name == "kernel" else None)
        for name, of in roles.items()
    }


def _told(init: Initializer, fan_in: int | None, form: str | None) -> Initializer:
    """The initializer once it knows the fan-in and the layout."""
    if isinstance(init, FromFanIn):
        if fan_in is None:
            return init  # raises where it is drawn, and a layer may have no bias
        init = init.build(fan_in)
    if form is None:
        return init
    spelled, parts = unfolding.split_form(form)

    def draw(
        key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> jax.Array:
        rules = {"": spelled}
        axes = layouts.layout("kernel", {"kernel": tuple(shape)}, rules=rules)
        return unfolding.unfolded(init, key, tuple(shape), dtype, axes, parts)

    return draw
