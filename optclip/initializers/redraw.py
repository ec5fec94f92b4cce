"""Drawing a finished model anew: path → role → fresh values.

    leaf ──path, type, shape──▶ role, layout ──preset──▶ initializer ──key──▶ values

One walk for both Flax APIs and every other tree. The key of a parameter is the caller's
key folded with a hash of its path, so that a new layer changes no other, and the same
path draws the same numbers in Linen and in NNX. Nothing here computes a fan: the
layout unfolds the parameter (`unfolding`), and the initializer reads a plain shape.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
from jax.core import Tracer

from optclip import initializers
from optclip._core import checks, paths
from optclip._core.public import error, public
from optclip.initializers import kernel_shapes as unfolding
from optclip.initializers import linen, nnx, roles
from optclip.initializers.parameter_info import (
    Plan,
    Rules,
    listed,
    opened,
    plans,
    shapes_of,
)
from optclip.initializers.presets import FromFanIn, Preset, by_fans


@public
def redraw(
    params_or_module: Any,
    preset: Preset | unfolding.Initializer,
    key: jax.Array,
    *,
    rules: Rules | None = None,
    layouts: Mapping[str, str] | None = None,
    stacked: bool | int | str | None = None,
) -> Any:
    """Draws every parameter of a finished model anew, each by its role.

        W[path] ~ preset[role(path)],  with the key  fold_in(key, hash(path))

    Args:
      params_or_module: parameters of Linen (`{"params": …}` or what is in it, a dict or
        FrozenDict, boxed or not), an `nnx.State`, any other tree of arrays or of
        `jax.ShapeDtypeStruct`s; or an `nnx.Module`, which is changed in place.
      preset: what each role gets; a JAX initializer alone is taken for kernels.
      key: a key of `jax.random`.
      rules: regular expressions, searched in the "/"-joined path, to what decides
        there instead: a role's name, a preset (by its roles), an initializer, or None
        to keep the values. The first that is found counts.
      layouts: regular expressions to the letter of each axis, where names, types and
        biases do not tell: "io" Dense, "w*io" convolution, "ioo" attention's query,
        "oio" an einsum, `s` for independent copies; "w*io/8" for 8 groups.
      stacked: how many leading axes count independent layers, where a bias does not
        show it: a number, True for one, or a pattern for the leaves with one.

    Returns:
      A new tree; None for an `nnx.Module`. Structure, dtypes, shardings, boxes and
      Variables' metadata are kept (under `jit` with automatic axes, the compiler or
      your `out_shardings` place values). What has no role, is no floating-point array,
      belongs to another collection than `params` or to a Variable other than
      `nnx.Param`, stays: BatchNorm's statistics, random state, LoRA, a temperature.

    Edge cases: half precision is drawn in float32 and rounded. Layer i of a stack draws
    with `fold_in(·, i)`. Arrays over several devices are drawn where they lie, without
    a copy on one of them. Numbers agree between Linen and NNX wherever the layout does:
    a module's type may say more (an einsum's equation, a convolution's groups), which
    `layouts` says in Linen.

    Raises:
      ValueError: if preset, a role or a layout is unknown, a pattern is found nowhere,
        nothing has a role, the preset needs a role that nothing has, a bias whose law
        needs its kernel's fan-in has no kernel, or the layout of an einsum is
        ambiguous.

    >>> import jax, jax.numpy as jnp
    >>> from optclip.initializers import he_normal, redraw
    >>> params = {"fc": {"kernel": jnp.ones((512, 256)), "bias": jnp.ones(256)}}
    >>> params = redraw(params, he_normal(), jax.random.key(0))
    >>> print(params["fc"]["kernel"].std().round(3), params["fc"]["bias"].max())
    0.063 0.0
    """
    preset, key = _as_preset(preset), _as_key(key)
    tree, known = opened(params_or_module)
    shapes = shapes_of(tree)
    planned = plans(shapes, known, rules, layouts, stacked)
    _check_needs(preset, planned)

    def fresh(keys: tuple[Any, ...], leaf: Any) -> Any:
        path = paths.spell(keys)
        plan = planned.get(path)
        if plan is None or plan.keep:
            return leaf
        if plan.ambiguous:
            raise error(
                f"layouts must name the axes of the einsum {path!r}, of shape "
                f"{shapes[path]}, as in layouts={{{path!r}: 'oio'}}."
            )
        return _placed(_initializer(preset, path, plan), _fold(key, path), leaf, plan)

    new = jax.tree_util.tree_map_with_path(fresh, tree)
    if nnx.is_module(params_or_module):
        return nnx.update(params_or_module, new)
    return linen.with_params(params_or_module, new)


def _as_preset(preset: Any) -> Preset:
    if isinstance(preset, Preset):
        return preset
    name = getattr(preset, "__name__", preset)
    factories = [
        name
        for name, value in vars(initializers).items()
        if getattr(value, "__annotations__", {}).get("return") is Preset
    ]
    if not callable(preset) or name in factories:
        raise error(
            f"preset must be a preset, made by a call of a function such as "
            f"{checks.nearest(name, factories)}, or a JAX initializer, got {preset!r}."
        )
    init: Any = preset
    return by_fans("redraw", init)


def _initializer(preset: Preset, path: str, plan: Plan) -> unfolding.Initializer:
    """What draws the parameter, once it knows a sibling's fan-in."""
    if plan.given is not None and not isinstance(plan.given, Preset):
        return plan.given
    init = (plan.given or preset)[plan.role or "kernel"]
    if not isinstance(init, FromFanIn):
        return init
    if plan.fan_in is None:
        raise error(
            f"{init.name} draws {path!r} by its kernel's fan-in, and a kernel "
            f"must be beside it, got none; give it an initializer in rules."
        )
    return init.build(plan.fan_in)


def _check_needs(preset: Preset, planned: Mapping[str, Plan]) -> None:
    roles = {plan.role for plan in planned.values() if not plan.keep}
    if preset.needs and not roles.intersection(preset.needs):
        raise ValueError(
            f"{preset.name}: the model must have a parameter of role "
            f"{' or '.join(preset.needs)}, got only {listed(roles)}; name it, as in "
            f"rules={{'mlp/out/kernel': {preset.needs[0]!r}}}."
        )


def _as_key(key: Any) -> jax.Array:
    """A typed key, of which there can be arrays."""
    if not isinstance(key, jax.Array):
        raise error(f"key must be a key of jax.random, got {key!r}.")
    typed = jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key if typed else jax.random.wrap_key_data(key)


def _fold(key: jax.Array, path: str) -> jax.Array:
    """The key of a path; 64 bits, so that no two paths of a model share one."""
    digest = hashlib.blake2b(path.encode(), digest_size=8).digest()
    for start in (0, 4):
        key = jax.random.fold_in(key, int.from_bytes(digest[start : start + 4], "big"))
    return key


def _placed(
    init: unfolding.Initializer, key: jax.Array, leaf: Any, plan: Plan
) -> jax.Array:
    """The values, where the leaf's are."""
    layout, shape = plan.layout, tuple(leaf.shape)
    if "embedding" in roles.lineage(plan.role or "kernel"):
        # An initializer gets it as (rows, features), as Flax's Embed hands it over.
        layout = layout._replace(inputs=layout.outputs, outputs=layout.inputs)

    def draw(key: jax.Array) -> jax.Array:
        return unfolding.unfolded(init, key, shape, leaf.dtype, layout, plan.parts)

    if isinstance(leaf, Tracer):
        sharding = jax.typeof(leaf).sharding
        explicit = jax.sharding.AxisType.Explicit in sharding.mesh.axis_types
        return jax.sharding.reshard(draw(key), sharding) if explicit else draw(key)
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return draw(key)
    if len(sharding.device_set) > 1:
        return jax.jit(draw, out_shardings=sharding)(key)
    values = draw(key)
    # A traced key draws for whoever traces.
    there = isinstance(values, Tracer) or values.sharding == sharding
    return values if there else jax.device_put(values, sharding)
