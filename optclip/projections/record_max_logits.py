"""The largest attention logit of each head, recorded by Flax's own attention modules.

    S_h = max over batch, queries i and keys j of q_i·k_j / √d

`qk_clip` shrinks the heads whose S_h grew too large.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optclip._core.public import public

NAME = "max_logits"


@public
def record_max_logits(attention_fn: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Flax's attention that also records the largest logit of each head.

        S_h = max over batch, queries i and keys j of q_i·k_j / √d

    Args:
      attention_fn: `flax.linen.dot_product_attention`, or NNX's.

    Returns:
      A function for the `attention_fn` of Flax's attention modules. Where they are
      called with `sow_weights=True` it records "max_logits", float32 of shape (heads,),
      in the collection "intermediates" (Linen) or as `nnx.Intermediate`: the maximum
      over all calls since it was last taken out. Attention weights are not recorded.

    Edge cases: masked pairs do not count, a head that sees none has -inf. Logits are
    computed once more, in float32 and without gradient. Inside `shard_map` they are
    those of this device: see `qk_clip`.

    >>> import jax, jax.numpy as jnp, flax.linen as nn
    >>> attention = record_max_logits(nn.dot_product_attention)
    >>> layer = nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=attention)
    >>> x = jnp.ones((1, 3, 4))
    >>> params = {"params": layer.init(jax.random.key(0), x)["params"]}
    >>> _, seen = layer.apply(params, x, sow_weights=True, mutable=["intermediates"])
    >>> print(seen["intermediates"]["max_logits"].shape)
    (2,)
    """

    @functools.wraps(attention_fn)
    def attention(
        query: jax.Array, key: jax.Array, value: jax.Array, *args: Any, **options: Any
    ) -> jax.Array:
        module = options.pop("module", None)
        if module is not None:
            mask, causal = options.get("mask"), options.get("is_causal", False)
            _record(module, _largest_logits(query, key, mask, causal))
        return attention_fn(query, key, value, *args, **options)

    return attention


def _record(module: Any, largest: jax.Array) -> None:
    from flax import linen, nnx

    kind: Any = (
        "intermediates" if isinstance(module, linen.Module) else nnx.Intermediate
    )
    module.sow(
        kind,
        NAME,
        largest,
        init_fn=lambda: jnp.full_like(largest, -jnp.inf),
        reduce_fn=jnp.maximum,
    )


def _largest_logits(
    query: jax.Array, key: jax.Array, mask: jax.Array | None, causal: bool
) -> jax.Array:
    """Of (…, length, heads, depth) arrays; the keys may have fewer heads."""
    query, key = (jax.lax.stop_gradient(x).astype(jnp.float32) for x in (query, key))
    heads, key_heads = query.shape[-2], key.shape[-2]
    key = jnp.repeat(key, heads // key_heads, axis=-2)
    logits = jnp.einsum("...qhd,...khd->...hqk", query, key)
    logits = logits / jnp.sqrt(jnp.float32(query.shape[-1]))
    seen = jnp.ones((1,) * logits.ndim, bool)
    if mask is not None:
        mask = jnp.asarray(mask).astype(bool)
        seen = seen & jax.lax.expand_dims(mask, range(logits.ndim - mask.ndim))
    if causal:
        triangle = jnp.tril(jnp.ones(logits.shape[-2:], bool))
        seen = seen & jax.lax.expand_dims(triangle, range(logits.ndim - 2))
    others = [axis for axis in range(logits.ndim) if axis != logits.ndim - 3]
    return jnp.max(jnp.where(seen, logits, -jnp.inf), axis=others)
