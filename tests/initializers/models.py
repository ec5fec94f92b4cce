"""One transformer in Linen and in NNX, with the same paths and shapes.

Attention, embeddings, blocks that are stacked and scanned over, and a tied head.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

LAYERS, WIDTH, HEADS, WORDS, CONTEXT = 3, 64, 4, 96, 16
TEXT = jax.random.randint(jax.random.key(5), (4, CONTEXT), 0, WORDS)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        attention = nn.MultiHeadDotProductAttention(HEADS, name="attention")
        x = x + attention(nn.LayerNorm(name="norm_0")(x))
        h = nn.gelu(nn.Dense(4 * WIDTH, name="fc")(nn.LayerNorm(name="norm_1")(x)))
        return x + nn.Dense(WIDTH, name="c_proj")(h), None


class Transformer(nn.Module):
    """Blocks scanned over; the head is the embedding."""

    @nn.compact
    def __call__(self, text):
        token = nn.Embed(WORDS, WIDTH, name="token")
        place = nn.Embed(CONTEXT, WIDTH, name="position")
        x = token(text) + place(jnp.arange(text.shape[1]))[None]
        split = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        blocks = nn.scan(Block, length=LAYERS, **split)(name="blocks")
        x, _ = blocks(x, None)
        return token.attend(nn.LayerNorm(name="norm")(x))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm_0 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.norm_1 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.fc = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.c_proj = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm_0(x))
        return x + self.c_proj(nnx.gelu(self.fc(self.norm_1(x))))


class NnxTransformer(nnx.Module):
    """The same; blocks are made by `vmap` and run by `scan`."""

    def __init__(self, rngs):
        self.token = nnx.Embed(WORDS, WIDTH, rngs=rngs)
        self.position = nnx.Embed(CONTEXT, WIDTH, rngs=rngs)
        self.blocks = _stacked(rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)

    def __call__(self, text):
        x = self.token(text) + self.position(jnp.arange(text.shape[1]))[None]
        return self.token.attend(self.norm(_scanned(x, self.blocks)))


@nnx.split_rngs(splits=LAYERS)
@nnx.vmap
def _stacked(rngs):
    return NnxBlock(rngs)


@nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
def _scanned(x, block):
    return block(x)
