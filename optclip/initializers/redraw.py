"""Drawing a finished model anew: every parameter by its role.

    leaf ──path, type, shape──▶ role, layout ──preset──▶ initializer ──key──▶ values

`parameter_info` finds role and layout, the preset has an initializer for the role, and
`kernel_shapes` draws with it in the parameter's layout. The key of a parameter is the
caller's key folded with a hash of its path, so that a new layer changes no other, and
the same path draws the same numbers in Linen and in NNX.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Mapping

import jax
from jax.core import Tracer

from optclip._core import checks, paths
from optclip._core.public import error, public
from optclip._core.types import Stacked, Tree
from optclip.initializers import kernel_shapes, parameter_info
from optclip.initializers.draw_table import law_of, table
from optclip.initializers.kernel_shapes import Initializer
from optclip.initializers.parameter_info import Model, ParameterInfo, Rules
from optclip.initializers.presets import FromFanIn, Preset, by_fans, initializer
from optclip.initializers.roles import EMBEDDINGS


@public
def redraw(
    params_or_module: Model,
    preset: Preset | Initializer,
    key: jax.Array,
    *,
    rules: Rules | None = None,
    layouts: Mapping[str, str] | None = None,
    stacked: Stacked = None,
    explain: bool = False,
) -> Tree:
    """Draws every parameter of a finished model anew, each by its role.

        W[path] ~ preset[role(path)],  with the key  fold_in(key, hash(path))

    Args:
      params_or_module: parameters of Linen (`{"params": …}` or what is in it, a dict or
        FrozenDict, boxed or not), an `nnx.State`, any other tree of arrays or of
        `jax.ShapeDtypeStruct`s; or an `nnx.Module`, which is changed in place.
      preset: gives each role its initializer; a JAX initializer alone draws kernels.
      key: a key of `jax.random`.
      rules: regular expressions, searched in the "/"-joined path, to what decides
        there instead: a role's name, a preset (by its roles), an initializer, or None
        to keep the values. The first that is found counts.
      layouts: regular expressions to the letter of each axis, where names, types and
        biases do not show it: "io" Dense, "w*io" convolution, "ioo" attention's query,
        "oio" an einsum, `s` for independent copies; "w*io/8" for 8 groups.
      stacked: how many leading axes count independent layers, where a bias does not
        show it: a number, True for one, or a pattern for the leaves with one.
      explain: whether to print what each parameter got: its path, role and shape, the
        law that it was drawn from, and the standard deviation of its values. What kept
        its values has the law "kept". Not under `jit`.

    Returns:
      A new tree; None for an `nnx.Module`. Structure, dtypes, shardings, boxes and
      Variables' metadata are kept (under `jit` with automatic axes, the compiler or
      your `out_shardings` place values). These stay as they are: parameters without a
      role, arrays that are not of floating point, other collections than `params` and
      Variables other than `nnx.Param` (BatchNorm's statistics, random state, LoRA).

    Edge cases: half precision is drawn in float32 and rounded. Layer i of a stack draws
    with `fold_in(·, i)`. Arrays over several devices are drawn in place, without a copy
    on one of them. Linen and NNX draw the same numbers wherever the layout is the same:
    a module's type may say more (an einsum's equation, a convolution's groups), which
    `layouts` says in Linen. Where two paths are spelled alike (`{"a/b": …, "a": {"b":
    …}}`), rules match both, and JAX's key path takes the path's place in the hash.

    Raises:
      ValueError: if preset, a role or a layout is unknown, a pattern is found nowhere,
        no parameter has a role, the preset needs a role that no parameter has, a bias
        that depends on its kernel's fan-in has no kernel, an initializer refuses the
        shape or dtype, the layout of an einsum is ambiguous, or explain is no bool or
        used under `jit`. Messages name the parameter, and the rule that decided for it.

    >>> import jax, jax.numpy as jnp
    >>> from optclip.initializers import he_normal, redraw
    >>> params = {"fc": {"kernel": jnp.ones((512, 256)), "bias": jnp.ones(256)}}
    >>> params = redraw(params, he_normal(), jax.random.key(0))
    >>> print(params["fc"]["kernel"].std().round(3), params["fc"]["bias"].max())
    0.063 0.0
    >>> params = redraw(params, he_normal(), jax.random.key(0), explain=True)
    path       role    shape      law          std
    fc/bias    bias    256        zeros          0
    fc/kernel  kernel  512 × 256  normal    0.0625
    """
    if not isinstance(preset, Preset):
        preset = _for_kernels(preset)
    if not isinstance(key, jax.Array):
        raise error(f"key must be a key of jax.random, got {key!r}.")
    if not jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if not isinstance(explain, bool):
        raise error(f"explain must be True or False, got {explain!r}.")
    infos = parameter_info.found(params_or_module, rules, layouts, stacked)
    parameter_info.check_roles(infos)
    if preset.needs:
        _check_needs(preset, infos)
    leaves, treedef = jax.tree.flatten(parameter_info.params_of(params_or_module))
    for info in infos:
        if not info.keep:
            leaves[info.place] = _redrawn(preset, info, key, leaves[info.place])
    if explain:
        laws = [None if i.keep else law_of(_initializer(preset, i)) for i in infos]
        print(table(infos, laws, leaves))
    return parameter_info.with_params(params_or_module, treedef.unflatten(leaves))


def _for_kernels(init: Initializer) -> Preset:
    """A preset that draws kernels with a JAX initializer."""
    package = sys.modules["optclip.initializers"]  # an import would be a cycle
    names = package.__all__
    if not callable(init) or init in [getattr(package, name) for name in names]:
        name = getattr(init, "__name__", init)
        near = checks.nearest(name, names) if isinstance(name, str) else "'he_normal'"
        raise error(
            f"preset must be a preset, made by a call of a function such as {near}, or "
            f"a JAX initializer, got {init!r}."
        )
    return by_fans(initializer(init, law_of(init), least_rank=2))


def _check_needs(preset: Preset, infos: list[ParameterInfo]) -> None:
    found = {str(info.role) for info in infos if not info.keep}
    if not found.intersection(preset.needs):
        raise error(
            f"the model must have a parameter of role {' or '.join(preset.needs)} for "
            f"{preset!r}, got only {paths.some(sorted(found))}; name it, as in "
            f"rules={{'mlp/out/kernel': {preset.needs[0]!r}}}."
        )


def _redrawn(
    preset: Preset, info: ParameterInfo, key: jax.Array, leaf: jax.Array
) -> jax.Array:
    """New values for one parameter; errors name it, and the rule that decided."""
    try:
        init = _initializer(preset, info)
        return _placed(init, _key_of(info.name, key), leaf, info)
    except (TypeError, ValueError) as wrong:
        rule = "" if info.rule is None else f", for which rules[{info.rule!r}] decides"
        raise error(
            f"cannot draw {info.name!r} of shape {info.shape}, role {info.role!r}"
            f"{rule}: {wrong}"
        ) from wrong


def _initializer(preset: Preset, info: ParameterInfo) -> Initializer:
    if info.ambiguous:
        raise ValueError(
            f"layouts must name the axes of the einsum, as in "
            f"layouts={{{info.path!r}: 'oio'}}."
        )
    if info.given is not None and not isinstance(info.given, Preset):
        return info.given
    init = (info.given or preset)[info.role or "kernel"]
    if not isinstance(init, FromFanIn):
        return init
    if info.fan_in is None:
        raise ValueError(
            f"{init.name} needs the fan-in of its kernel, and a kernel must be beside "
            f"it, got none; give it an initializer in rules."
        )
    return init.build(info.fan_in)


def _key_of(name: str, key: jax.Array) -> jax.Array:
    """The key of a name; 64 bits, so that no two names of a model share one."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    for start in (0, 4):
        key = jax.random.fold_in(key, int.from_bytes(digest[start : start + 4], "big"))
    return key


def _placed(
    init: Initializer, key: jax.Array, leaf: jax.Array, info: ParameterInfo
) -> jax.Array:
    """The values, with the sharding of the leaf."""
    layout = info.layout
    if info.role in EMBEDDINGS:
        # An initializer gets the shape (rows, features), as from Flax's Embed.
        layout = layout._replace(inputs=layout.outputs, outputs=layout.inputs)

    draw = functools.partial(
        kernel_shapes.drawn, init, shape=info.shape, dtype=leaf.dtype, layout=layout
    )
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
    # Under a trace of the key there is nothing to move yet.
    there = isinstance(values, Tracer) or values.sharding == sharding
    return values if there else jax.device_put(values, sharding)
