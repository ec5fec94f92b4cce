"""QK-clip: attention heads whose logits grew too large shrink, after the step.

    γ_h = min(1, tau / S_h),  S_h the largest logit q·k/√d of head h in the batch
    W_q, W_k of head h ← √γ_h W_q, √γ_h W_k

`record_max_logits` finds S_h where attention is computed; `qk_clip` closes the chain.
With grouped queries a key head serves several query heads: it takes the smallest γ of
its group, and its query heads make up for the rest, so that every head's logits shrink
by its own γ and heads within tau stay as they are.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optclip._core import checks, meshes, numerics, paths
from optclip._core.public import error, public
from optclip._core.rounding import bound_towards, rounded
from optclip._core.types import Tree
from optclip.projections.base import bound_array
from optclip.projections.landing import applied, steered
from optclip.projections.record_max_logits import NAME


@public
def qk_clip(tau: ArrayLike = 100.0) -> optax.GradientTransformationExtraArgs:
    """MuonClip's rule: bounds attention logits by rescaling queries and keys.

        S_h > tau:  W_q, W_k of head h ← √(tau / S_h) · W_q, √(tau / S_h) · W_k

    The last transform of a chain, whatever the optimizer. `update` needs the extra
    argument `max_logits`: the largest logit of each head, by attention module. Flax's
    `MultiHeadAttention` (Linen and NNX, grouped queries too) records it:

        attention = optclip.record_max_logits(nnx.dot_product_attention)
        layer = nnx.MultiHeadAttention(…, attention_fn=attention)   # in the model
        layer(x, sow_weights=True)                                  # in its call

        forward = nnx.capture(nnx.Intermediate)(loss)               # for the gradient
        value, recorded = forward(model)                            # has_aux=True
        optimizer.update(model, grads, max_logits=recorded)

    Older releases of Flax have no `capture`: `nnx.pop(model, nnx.Intermediate)` after
    the gradient. With Linen, `apply(…, mutable=["intermediates"])` returns the same
    under "intermediates". A module that was not recorded at a step stays as it is.

    `optax.MultiSteps` passes on what it is given with the last micro-batch. Give it the
    maximum over all of them, which is that of the whole batch:

        maxima = jax.tree.map(jnp.maximum, maxima, recorded)   # at first: -inf
        updates, state = multi.update(grads, state, params, max_logits=maxima)
        stepped = multi.has_updated(state)
        maxima = jax.tree.map(lambda x: jnp.where(stepped, -jnp.inf, x), maxima)

    Inside `shard_map` a device records its own part of the batch: all have to shrink
    by the maximum, `jax.lax.pmax(recorded, "data")`. Heads that are split over an axis
    stay apart: kernels and logits then hold the heads of this device.

    Args:
      tau: the largest logit, a positive number.

    Returns:
      A gradient transformation without state. `max_logits` may be a flat dict from
      module path to an array of shape (heads,), or (layers, heads) for stacked layers,
      or a tree as recorded.

    Edge cases: kernels (…, features, heads, head_dim) and biases of the projections
    `query` and `key` are scaled. A logit that is not finite changes nothing. Heads
    within tau keep the bits of their updates. A JAX array is not checked: a tau below 0
    counts as 0.

    Raises:
      ValueError: if tau is not positive; at update, if max_logits or params are
        missing, a path has no `query` and `key`, the logits are not one number a head
        (and stacked layer) or differ between devices whose kernels are the same, or
        queries and keys are normalised (whose norm the kernels do not decide).

    Reference: Kimi Team 2025, https://arxiv.org/abs/2507.20534.

    >>> import jax.numpy as jnp, optax, optclip
    >>> params = {name: {"kernel": jnp.ones((1, 2, 1))} for name in ("query", "key")}
    >>> zeros = {name: {"kernel": jnp.zeros((1, 2, 1))} for name in ("query", "key")}
    >>> tx, logits = qk_clip(100.0), {"": jnp.array([400.0, 50.0])}
    >>> updates, _ = tx.update(zeros, tx.init(params), params, max_logits=logits)
    >>> print(optax.apply_updates(params, updates)["query"]["kernel"].ravel())
    [0.5 1. ]
    """
    limit = bound_array(checks.positive, tau=tau)
    checks.scalar(tau=tau)

    def init(params: optax.Params) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        max_logits: Tree = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        if params is None:
            raise error("params must be given to update, got None.")
        if max_logits is None:
            raise error(
                "max_logits must be given to update, got None; call "
                "update(updates, state, params, max_logits=...)."
            )
        flat, treedef = jax.tree_util.tree_flatten(updates)
        index = {path: n for n, (path, _) in enumerate(paths.leaves(updates))}
        values = {path: value for path, value in paths.leaves(params)}
        factors: dict[str, jax.Array] = {}
        for path, largest in paths.leaves(max_logits):
            factors |= _factors(_module(path), jnp.asarray(largest), values, limit)
        for path, factor in factors.items():
            # A frozen parameter has no update, or MaskedNode for one.
            if path in index and path in values:
                number, p = index[path], jnp.asarray(values[path])
                u = jnp.asarray(flat[number])
                if p.shape != u.shape:
                    raise checks.other_shape(path, p, u)
                flat[number] = _rescaled(p, u, factor)
        moved = jax.tree_util.tree_unflatten(treedef, flat)
        return moved, optax.EmptyState() if state is None else state

    return optax.GradientTransformationExtraArgs(init, update)


def _module(path: str) -> str:
    """The path of the attention module, of a key or of a recorded leaf."""
    path = path.removeprefix("intermediates/")
    return "" if path == NAME else path.removesuffix(f"/{NAME}")


def _factors(
    module: str, largest: jax.Array, values: dict[str, Any], limit: ArrayLike
) -> dict[str, jax.Array]:
    """What to multiply the projections of one attention module by."""
    inside = f"{module}/" if module else ""
    for name in ("query", "key"):
        if f"{inside}{name}/kernel" not in values:
            raise error(
                f"max_logits must name attention modules, got {module!r}, "
                f"which has no parameter {name}/kernel."
            )
    if f"{inside}query_ln/scale" in values:
        raise error(
            f"queries and keys must not be normalised, got {module!r} with "
            "normalize_qk, whose logits the kernels do not decide."
        )
    queries = values[f"{inside}query/kernel"]
    kernel = jnp.shape(queries)
    differs = {*meshes.varying_axes(largest)} - {*meshes.varying_axes(queries)}
    if differs:
        axes = tuple(sorted(differs, key=str))
        raise error(
            f"max_logits must be the same for every copy of a kernel, got some that "
            f"vary over {axes} at {module!r}; take jax.lax.pmax over it."
        )
    key = jnp.shape(values[f"{inside}key/kernel"])
    if len(kernel) < 3 or len(key) != len(kernel) or kernel[-2] % key[-2]:
        raise error(
            "query and key must have kernels (…, features, heads, head_dim) whose "
            f"numbers of heads divide, got {kernel} and {key} at {module!r}."
        )
    heads, key_heads = kernel[-2], key[-2]
    # One number a head, for each of the axes that count stacked layers.
    stack = largest.ndim - 1
    fits = 0 <= stack <= len(kernel) - 3 and largest.shape == (*kernel[:stack], heads)
    if not fits:
        raise error(
            f"max_logits must have one number a head, got shape {largest.shape} for "
            f"{heads} heads of a kernel of shape {kernel} at {module!r}."
        )
    largest = largest.astype(jnp.float32)
    tau = bound_towards(limit, jnp.float32, 0.0)
    over = jnp.isfinite(largest) & (largest > tau)
    own = jnp.where(over, tau / jnp.where(over, largest, 1), 1)
    groups = own.reshape(*own.shape[:-1], key_heads, heads // key_heads)
    of_key = jnp.sqrt(jnp.min(groups, axis=-1))
    shared = jnp.repeat(of_key, heads // key_heads, axis=-1)
    of_query = own / jnp.where(shared == 0, 1, shared)
    return {
        f"{inside}{name}/{leaf}": factor
        for name, factor in (("query", of_query), ("key", of_key))
        for leaf in ("kernel", "bias")
    }


def _rescaled(p: jax.Array, u: jax.Array, factor: jax.Array) -> jax.Array:
    """Updates that take p to (p + u) times the factor of each head."""
    u, y = applied(p, u)
    stack, between = factor.shape[:-1], p.ndim - factor.ndim - 1
    factor = factor.reshape(*stack, *(1,) * between, factor.shape[-1], 1)
    wide = numerics.accumulation_dtype(p.dtype)
    moved = y.astype(wide) * factor.astype(wide)
    moved = rounded(moved, p.dtype).astype(p.dtype)
    return steered(p, u, y, jnp.where(factor == 1, y, moved))
