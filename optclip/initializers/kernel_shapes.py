"""Drawing a parameter of any layout with an initializer that knows plain kernels only.

A JAX initializer reads fans off the last two axes: `(*window, inputs, outputs)`. So a
parameter is drawn in that shape, and reshaped and transposed to its own:

    (stack…, window…, inputs…, outputs…)  ⇄  stack × parts × (*window, ∏ in, ∏ out)

Attention's query (512, 8, 64) is a kernel (512, 512), a stacked kernel (6, 256, 512)
six of (256, 512), Equinox's weight (512, 256) a kernel (256, 512) transposed. *Parts*
are kernels side by side in the outputs that share no output and no fan: the gates of an
LSTM in one array, the groups of a convolution. So every initializer, a user's own too,
sees the right fans on every layout, and no other file reshapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from optclip._core.layouts import Layout
from optclip._core.types import Shape


class Initializer(Protocol):
    """A JAX initializer: `(key, shape, dtype) -> values`."""

    def __call__(
        self, key: jax.Array, shape: Shape, dtype: DTypeLike, /
    ) -> jax.Array: ...


def drawn(
    init: Initializer, key: jax.Array, shape: Shape, dtype: DTypeLike, layout: Layout
) -> jax.Array:
    """Draws a parameter in float32 at least, and rounds it to its dtype.

    Layer i of a stack draws with `fold_in(key, i)`, and so does part i of a kernel.
    """
    if 0 in shape:
        return jnp.zeros(shape, dtype)
    stack, inputs, outputs = (
        math.prod(shape[axis] for axis in axes)
        for axes in (layout.stack, layout.inputs, layout.outputs)
    )
    if outputs % layout.parts:
        raise ValueError(
            f"parts must divide the outputs, got {layout.parts} for shape {shape}."
        )
    plain = tuple(shape[axis] for axis in layout.window)
    plain += (inputs,) if layout.inputs or layout.outputs else ()
    plain += (outputs // layout.parts,) if layout.outputs else ()

    # A lambda, because what follows wraps it again under the same name.
    draw: _Draw = lambda key: init(key, plain, drawing_dtype(dtype))  # noqa: E731
    if layout.parts > 1:
        draw = _each(draw, layout.parts)
    if layout.stack:
        draw = _each(draw, stack)
    values = draw(key)
    if layout.parts > 1:  # from in front of the kernel to in front of its outputs
        values = jnp.moveaxis(values, -len(plain) - 1, -2)
    order = (*layout.stack, *layout.window, *layout.inputs, *layout.outputs)
    values = values.reshape([shape[axis] for axis in order])
    return values.transpose(np.argsort(order)).astype(dtype)


def drawing_dtype(dtype: DTypeLike) -> np.dtype:
    """At least float32: half precision has few random bits, and no QR decomposition."""
    # NumPy's promotion: JAX's would refuse under strict promotion.
    return np.promote_types(jnp.dtype(dtype), np.float32)


_Draw = Callable[[jax.Array], jax.Array]


def _each(draw: _Draw, copies: int) -> _Draw:
    """The same draw for each of so many copies, along a new leading axis."""

    def draws(key: jax.Array) -> jax.Array:
        numbers = jnp.arange(copies)
        return jax.vmap(draw)(jax.vmap(jax.random.fold_in, (None, 0))(key, numbers))

    return draws
