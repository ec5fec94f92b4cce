"""LSUV: kernels scaled, layer after layer, until every output has variance one.

    for each layer in the order of the calls:   W ← W / std(layer(batch))   until ≈ 1

Orthogonal initialization keeps the size of the signal in linear layers only; one batch
shows what activations, pooling and skip connections do to it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optclip._core import checks, paths
from optclip._core.public import error, public
from optclip._core.types import Tree
from optclip.initializers import layer_hooks, parameter_info
from optclip.initializers.kernel_shapes import drawing_dtype
from optclip.initializers.layer_hooks import Recorder
from optclip.initializers.orthogonal import orthogonal
from optclip.initializers.parameter_info import Model, ParameterInfo, is_nnx
from optclip.initializers.redraw import redraw
from optclip.initializers.signal_report import mean_and_std


@public
def lsuv(
    module: Model,
    batch: Any,
    params: Tree = None,
    *,
    key: jax.Array | None = None,
    tolerance: float = 0.1,
    max_iterations: int = 10,
) -> Tree:
    """Layer-sequential unit variance: scales each kernel on a real batch.

        W_l ← W_l / std(y_l)   until |Var(y_l) - 1| < tolerance,  l in order of calls

    Args:
      module: an `nnx.Module`, or a Linen module; or a function that runs one, where it
        takes more than the batch: `(variables, batch)` or `(module, batch)`.
      batch: what the model is called with; some hundred examples are enough.
      params: Linen's variables, the NNX module for a function, None for a module alone.
      key: draws the model anew first, with `orthogonal()`, as the paper does; None
        keeps the kernels' directions as they are.
      tolerance: how far from 1 a variance may stay, positive.
      max_iterations: how often one layer may be scaled, at least 1.

    Returns:
      New variables of the same structure, or None for a module, changed in place. Only
      kernels are scaled: biases and normalizations are not. Each layer of a scanned
      stack is scaled by itself; a layer that is called often has the mean of its
      variances at 1.

    Edge cases: each measurement runs the whole model, compiled once: cheap for tens of
    layers, slow for thousands. A layer whose output depends on a later one's kernel (a
    decoder's feedback) ends within the tolerance only approximately.

    Raises:
      ValueError: if tolerance or max_iterations is not positive, module is neither or
        lacks params, no layer has a kernel, a layer's output has the variance 0 (a zero
        kernel: draw it first) or is not finite, or is not within the tolerance after
        max_iterations (a bias's own spread does not shrink with the kernel).

    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> module = nn.Sequential([nn.Dense(64), nn.tanh, nn.Dense(64)])
    >>> batch = 9 * jax.random.normal(jax.random.key(0), (256, 8))
    >>> params = module.init(jax.random.key(1), batch)
    >>> params = lsuv(module, batch, params, key=jax.random.key(2), tolerance=0.01)
    >>> print(module.apply(params, batch).var().round(1))
    1.0

    Mishkin & Matas 2015, https://arxiv.org/abs/1511.06422.
    """
    checks.positive(tolerance=tolerance)
    checks.at_least(1, max_iterations=max_iterations)
    target = module if is_nnx(module) else params
    if key is not None:
        new = redraw(target, orthogonal(), key)
        target = target if new is None else new
        params = params if is_nnx(module) else target
    own, run = layer_hooks.opened(module, params)
    kernels = _kernels(target)
    record, called = Recorder(), []

    def hook(path: str, y: jax.Array) -> jax.Array:
        if path in kernels:
            called.append(path)
            jax.debug.callback(functools.partial(record, path), mean_and_std(y)[1])
        return y

    @jax.jit
    def forward(factors: _Factors) -> Any:
        return run(_scaled(own, kernels, factors), hook, batch)

    stacks = {path: [k.shape[n] for n in k.layout.stack] for path, k in kernels.items()}
    factors = {path: np.ones(math.prod(sizes)) for path, sizes in stacks.items()}
    measure = lambda: record.during(lambda: forward(factors))  # noqa: E731
    records = measure()
    sizes = {path: len(factor) for path, factor in factors.items()}
    for path, number in layer_hooks.in_order(called, records, sizes):
        for scalings in range(max_iterations + 1):
            variance = _variance(path, records[path], number)
            if abs(variance - 1) < tolerance:
                break
            if scalings == max_iterations:
                raise error(
                    f"max_iterations must suffice for every layer, got "
                    f"{max_iterations} and still the variance {variance:.3g} from "
                    f"{path!r}; is it that of its bias?"
                )
            factors[path][... if number is None else number] /= math.sqrt(variance)
            records = measure()
    return parameter_info.with_params(target, _scaled(own, kernels, factors))


# By the path of a layer, what each kernel of its stack is multiplied by.
_Factors = Mapping[str, np.ndarray]


def _kernels(model: Model) -> dict[str, ParameterInfo]:
    """The kernels by the path of their layer."""
    infos = parameter_info.found(model)
    kernels = {
        info.path.rpartition("/")[0]: info
        for info in infos
        if info.path.rpartition("/")[2] == "kernel" and info.layout.outputs
    }
    if not kernels:
        found = paths.some([info.path for info in infos])
        raise error(f"the model must have a kernel, got {found}.")
    return kernels


def _variance(path: str, records: list[tuple[float, ...]], number: int | None) -> float:
    """The variance of a layer's output: of one in a stack, or the mean of all calls."""
    variances = [std**2 for (std,) in records]
    variance = float(np.mean(variances)) if number is None else variances[number]
    if not 0 < variance < math.inf:
        raise error(
            f"every layer's output must have a positive finite variance, "
            f"got {variance} from {path!r}."
        )
    return variance


def _scaled(
    params: Tree, kernels: Mapping[str, ParameterInfo], factors: _Factors
) -> Tree:
    """The parameters with each kernel times its factor, layer by layer of a stack."""
    leaves, treedef = jax.tree.flatten(params)
    for path, kernel in kernels.items():
        leaf, stack = leaves[kernel.place], kernel.layout.stack
        sizes = [n if axis in stack else 1 for axis, n in enumerate(kernel.shape)]
        factor = jnp.asarray(factors[path], drawing_dtype(leaf.dtype)).reshape(sizes)
        leaves[kernel.place] = (leaf.astype(factor.dtype) * factor).astype(leaf.dtype)
    return treedef.unflatten(leaves)
