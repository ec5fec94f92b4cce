"""LSUV: kernels divided, layer after layer, until every output has variance one.

    for each layer in the order of the calls:   W ← W / √Var(layer(batch))   until ≈ 1

Orthogonal first values keep the signal of linear layers; what activations, pooling and
skips do to it, one batch tells.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optclip._core import checks, paths
from optclip._core.public import error, public
from optclip.initializers import kernel_shapes as unfolding
from optclip.initializers import layer_hooks as taps
from optclip.initializers import linen, nnx
from optclip.initializers import parameter_info as planning
from optclip.initializers.isometries import orthogonal
from optclip.initializers.redraw import redraw


@public
def lsuv(
    module: Any,
    batch: Any,
    params: Any = None,
    *,
    key: jax.Array | None = None,
    tolerance: float = 0.1,
    max_iterations: int = 10,
) -> Any:
    """Layer-sequential unit variance: scales each kernel on a real batch.

        W_l ← W_l / √Var(y_l)   until |Var(y_l) - 1| < tolerance,  l in order of calls

    Args:
      module: an `nnx.Module`, or a Linen module; or a function that runs one, where
        more than the batch must be said: `(variables, batch)` or `(module, batch)`.
      batch: what the model is called with; some hundred examples will do.
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
        lacks params, nothing has a kernel, a layer's output has the variance 0 (a zero
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

    Mishkin & Matas 2015, arXiv 1511.06422.
    """
    checks.positive(tolerance=tolerance)
    checks.at_least(1, max_iterations=max_iterations)
    target = module if nnx.is_module(module) else params
    if key is not None:
        new = redraw(target, orthogonal(), key)
        target = target if new is None else new
        params = params if nnx.is_module(module) else target
    own, run = taps.opened(module, params)
    kernels = _kernels(target)
    record, called = taps.Recorder(), []

    def tap(path: str, y: jax.Array) -> jax.Array:
        if path in kernels:
            called.append(path)
            variance = jnp.var(y.astype(jnp.float32))
            jax.debug.callback(functools.partial(record, path), variance)
        return y

    forward = jax.jit(lambda factors: run(_scaled(own, kernels, factors), tap, batch))
    factors = {path: np.ones(math.prod(k.stack)) for path, k in kernels.items()}
    seen = record.during(lambda: forward(factors))
    sizes = {path: len(factor) for path, factor in factors.items()}
    for path, number in taps.in_order(called, seen, sizes):
        for scalings in range(max_iterations + 1):
            variances = [variance for (variance,) in seen[path]]
            variance = np.mean(variances) if number is None else variances[number]
            if not 0 < variance < np.inf:
                raise error(
                    f"every layer's output must have a positive finite variance, "
                    f"got {variance} from {path!r}."
                )
            if abs(variance - 1) < tolerance:
                break
            if scalings == max_iterations:
                raise error(
                    f"max_iterations must suffice for every layer, got "
                    f"{max_iterations} and still the variance {variance:.3g} from "
                    f"{path!r}; is it its bias's?"
                )
            factors[path][... if number is None else number] /= math.sqrt(variance)
            seen = record.during(lambda: forward(factors))
    new = _scaled(own, kernels, factors)
    if nnx.is_module(target):
        return nnx.update(target, new)
    return linen.with_params(target, new)


class _Kernel(NamedTuple):
    path: str
    stack: tuple[int, ...]  # its sizes
    axes: tuple[int, ...]  # where they are


def _kernels(target: Any) -> dict[str, _Kernel]:
    """The kernels by the path of their layer."""
    tree, known = planning.opened(target)
    shapes = planning.shapes_of(tree)
    plans = planning.plans(shapes, known, None, None, None)
    kernels = {}
    for path, plan in plans.items():
        layer, _, name = path.rpartition("/")
        if name == "kernel" and plan.layout.outputs:
            stack = tuple(shapes[path][axis] for axis in plan.layout.stack)
            kernels[layer] = _Kernel(path, stack, plan.layout.stack)
    if not kernels:
        raise error(f"the model must have a kernel, got {planning.listed(shapes)}.")
    return kernels


def _scaled(own: Any, kernels: dict[str, _Kernel], factors: dict[str, Any]) -> Any:
    """The parameters with each kernel times its factor, layer by layer of a stack."""
    by_path = {kernel.path: (kernel, factors[layer])
               for layer, kernel in kernels.items()}  # fmt: skip

    def times(keys: tuple[Any, ...], leaf: Any) -> Any:
        path = paths.spell(keys)
        if path not in by_path:
            return leaf
        kernel, factor = by_path[path]
        sizes = [size if axis in kernel.axes else 1
                 for axis, size in enumerate(leaf.shape)]  # fmt: skip
        factor = jnp.asarray(factor, unfolding.wide(leaf.dtype)).reshape(sizes)
        return (leaf.astype(factor.dtype) * factor).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(times, own)
