"""Small arrays as one vector, for programs for a GPU.

    leaves of a group   (64, 64), (64,), (64, 64), ...  ──vectors──▶ a few vectors
    sizes of blocks     (1, 768), (1,), (3072, 1), ...  ──in_one_block──▶ one vector

To start a kernel for a leaf of 256 KB keeps the host for longer than the device needs
to copy it. A vector is summed in one kernel, and XLA:GPU scales the leaves of one shape
that are slices of one vector in one kernel too. Metrics and
range checks over all groups take one reduction instead of one for each block. Where
there are more devices than one, arrays stay what they are, for XLA would gather what a
vector is made of; and on CPU, where a kernel costs next to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optclip._core import numerics
from optclip._core.types import Shape

T = TypeVar("T")
SMALL = 2**16  # elements
# Leaves in one vector: XLA:GPU gives no kernel more than 96 operands and results.
MOST = 45


def on_one_device(leaf: jax.Array) -> bool:
    """Whether a program for a GPU may rearrange an array: it is not sharded."""
    if numerics.backend() != "gpu" or numerics.devices() != 1:
        return False
    mesh = jax.typeof(leaf).sharding.mesh
    return not (mesh.manual_axes or mesh.explicit_axes)


def chunks(items: list[T]) -> list[list[T]]:
    """As many at a time as one kernel takes."""
    return [items[start : start + MOST] for start in range(0, len(items), MOST)]


def vectors(
    indices: Sequence[int], leaves: list[jax.Array]
) -> list[tuple[tuple[int, ...], jax.Array]]:
    """The leaves with these numbers, small ones of one dtype as vectors, by size."""
    found, small = [], {}
    for index in indices:
        leaf = leaves[index]
        if leaf.size <= SMALL and on_one_device(leaf):
            small.setdefault(leaf.dtype, []).append(index)
        else:
            found.append(((index,), leaf))
    for alike in small.values():
        alike.sort(key=lambda index: leaves[index].shape)
        for own in map(tuple, chunks(alike)):
            vector = leaves[own[0]]
            if len(own) > 1:
                parts = [leaves[index].reshape(-1) for index in own]
                # Without a barrier XLA would undo this, and slice the leaves instead.
                vector = jax.lax.optimization_barrier(jnp.concatenate(parts))
            found.append((own, vector))
    return found


def in_one_block(
    blocks: list[jax.Array], *beside: Sequence[ArrayLike]
) -> list[list[Any]]:
    """Small blocks of groups as one vector, where a program may rearrange them.

    What is computed of every group then takes a few kernels, not two or three for each
    block.

    Args:
      blocks: a number for each group, one array a block.
      *beside: lists of as many numbers or arrays, which broadcast to the blocks.

    Returns:
      The lists; the vector is the first, if there is one.
    """
    dtype, numbers = blocks[0].dtype, range(len(blocks))
    fits = [x.size <= SMALL and x.dtype == dtype and on_one_device(x) for x in blocks]
    if sum(fits) < 2:
        return [blocks, *map(list, beside)]
    found = []
    for own in (blocks, *beside):
        flat = [
            jnp.broadcast_to(jnp.asarray(own[n], dtype), blocks[n].shape).reshape(-1)
            for n in numbers
            if fits[n]
        ]
        # Without barriers XLA would reduce every block by itself again; and with more
        # in one kernel than it takes, it would compute each of them in its own.
        whole = map(jnp.concatenate, chunks(flat))
        joined = list(map(jax.lax.optimization_barrier, whole))
        found.append(
            [jnp.concatenate(joined), *(own[n] for n in numbers if not fits[n])]
        )
    return found


def apart(
    vector: jax.Array, scaled: jax.Array, kept: jax.Array, shapes: list[Shape]
) -> list[jax.Array]:
    """Leaves of these shapes, one after the other, from a vector where it is kept.

    XLA:GPU makes one kernel of slices of a choice, but one each of slices of an array
    that is there, or that takes more to compute. Hence the second choice.
    """
    chosen = numerics.choose(kept, vector, jax.lax.optimization_barrier(scaled))
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    parts = jnp.split(chosen, ends[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
