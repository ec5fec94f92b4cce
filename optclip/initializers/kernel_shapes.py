"""One parameter as the plain kernels that a JAX initializer understands.

A JAX initializer reads fans off the last two axes: `(*window, inputs, outputs)`. A
parameter is drawn by unfolding it to that shape and folding the result back:

    (stack…, window…, inputs…, outputs…)  ⇄  stack × parts × (*window, ∏ in, ∏ out)

Attention's query (512, 8, 64) is a kernel (512, 512), a stacked kernel (6, 256, 512)
six of (256, 512), Equinox's weight (512, 256) a kernel (256, 512) transposed. *Parts*
are kernels side by side in the outputs that share no output and no fan: the gates of an
LSTM in one array, the groups of a convolution. So every initializer, a user's own too,
is right on every layout, and only this file folds.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optclip._core.layouts import Layout
from optclip._core.public import error

Initializer = Callable[..., jax.Array]  # (key, shape, dtype) -> values
_Draw = Callable[[jax.Array], jax.Array]


def plain_shape(
    shape: tuple[int, ...], layout: Layout, parts: int = 1
) -> tuple[int, ...]:
    """The shape of one plain kernel, or of one vector where there are no outputs."""
    window = tuple(shape[axis] for axis in layout.window)
    inputs = math.prod(shape[axis] for axis in layout.inputs)
    if not layout.outputs:
        return (*window, inputs) if layout.inputs else window
    outputs, rest = divmod(math.prod(shape[axis] for axis in layout.outputs), parts)
    if rest:
        raise error(f"parts must divide the outputs, got {parts} for shape {shape}.")
    return (*window, inputs, outputs)


def split_form(form: str) -> tuple[str, int]:
    """The letters of a layout, and its number of parts: "w*io/8" has eight.

    >>> split_form("w*io/8"), split_form()
    (('w*io', 8), ('io', 1))
    """
    letters, slash, count = form.partition("/")
    if slash and not (count.isdecimal() and int(count) > 0):
        raise error(f"layouts must end in a number of parts, if in '/', got {form!r}.")
    return letters, int(count or 1)


def unfolded(
    init: Initializer,
    key: jax.Array,
    shape: tuple[int, ...],
    dtype: Any,
    layout: Layout,
    parts: int = 1,
) -> jax.Array:
    """Draws a parameter: in float32 at least, then rounded to its dtype.

    Layer i of a stack draws with `fold_in(key, i)`, and so does part i of a kernel.
    """
    if 0 in shape:
        return jnp.zeros(shape, dtype)
    plain = plain_shape(shape, layout, parts)

    draw: _Draw = lambda key: init(key, plain, wide(dtype))  # noqa: E731
    if parts > 1:
        draw = _each(draw, parts)
    if layout.stack:
        draw = _each(draw, math.prod(shape[axis] for axis in layout.stack))
    values = draw(key)
    if parts > 1:  # from in front of the kernel to in front of its outputs
        values = jnp.moveaxis(values, -len(plain) - 1, -2)
    order = (*layout.stack, *layout.window, *layout.inputs, *layout.outputs)
    values = values.reshape([shape[axis] for axis in order])
    return values.transpose(np.argsort(order)).astype(dtype)


def wide(dtype: Any) -> Any:
    """The dtype in which values are drawn: half precision has few bits, and no QR."""
    # NumPy's promotion: JAX's would refuse under strict promotion.
    return np.promote_types(jnp.dtype(dtype), np.float32)


def _each(draw: _Draw, copies: int) -> _Draw:
    """The same draw for each of so many copies, along a new leading axis."""

    def draws(key: jax.Array) -> jax.Array:
        numbers = jnp.arange(copies)
        return jax.vmap(draw)(jax.vmap(jax.random.fold_in, (None, 0))(key, numbers))

    return draws
