"""What `redraw` goes by: the role, layout and fan-in of every parameter of a model.

    model  ──found──▶  a ParameterInfo for each parameter

A rule of the user's outranks a module's type, and that outranks names and shapes.
Parameters are told apart by their place in the tree: two whose paths are spelled alike,
as in `{"a/b": …, "a": {"b": …}}`, stay two, and each finds its own siblings.
"""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.tree_util import keystr

from optclip._core import checks, paths
from optclip._core.layouts import Layout
from optclip._core.public import error
from optclip._core.types import Shape, Shapes, Stacked, Tree
from optclip.initializers import roles
from optclip.initializers.kernel_shapes import Initializer

# Pattern -> a role's name, a preset, an initializer, or None to keep the values.
Rules: TypeAlias = Mapping[str, str | Initializer | None]
# Parameters, or a module that has them.
Model: TypeAlias = Any


class ParameterInfo(NamedTuple):
    """What is known of one parameter.

    Attributes:
      place: its number among the leaves of the tree.
      name: its path; where two are spelled alike, JAX's key path.
      path: its "/"-joined path.
      shape: its shape.
      role: what it is for, or None.
      layout: its axes.
      fan_in: that of the kernel which counts for it: a bias's, a cell's; else None.
      keep: whether its values stay.
      rule: the pattern in the user's rules that decides for it, or None.
      given: the preset or initializer that the rule gives, or None.
      ambiguous: whether its axes are unknown: the kernel of an einsum without a bias.
    """

    place: int
    name: str
    path: str
    shape: Shape
    role: str | None
    layout: Layout
    fan_in: int | None
    keep: bool
    rule: str | None
    given: Initializer | None
    ambiguous: bool


def is_nnx(value: object) -> bool:
    """Whether it is an `nnx.Module`; one can only exist where Flax is imported."""
    return "flax.nnx" in sys.modules and isinstance(
        value, sys.modules["flax.nnx"].Module
    )


def params_of(model: Model) -> Tree:
    """The parameters of an NNX module, of Linen's variables, or of any tree."""
    if is_nnx(model):
        nnx = sys.modules["flax.nnx"]
        return nnx.state(model, nnx.Param)
    # An nnx.State is a mapping too, and its "params" would be some module's name.
    if type(model).__name__ not in ("dict", "FrozenDict") or "params" not in model:
        return model
    collections = all(isinstance(each, Mapping) for each in model.values())
    return model["params"] if collections else model


def with_params(model: Model, new: Tree) -> Tree | None:
    """The model with new parameters; None for a module, which is changed in place."""
    if is_nnx(model):
        return sys.modules["flax.nnx"].update(model, new)
    return new if params_of(model) is model else type(model)({**model, "params": new})


def found(
    model: Model,
    rules: Rules | None = None,
    layouts: Mapping[str, str] | None = None,
    stacked: Stacked = None,
) -> list[ParameterInfo]:
    """What is known of each parameter, in the order of the tree's leaves."""
    tree = params_of(model)
    others = _other_variables(tree) if "flax.nnx" in sys.modules else set()
    parameters = [
        _Parameter(place, str(path), tuple(leaf.shape))
        for place, (path, leaf) in enumerate(paths.leaves(tree))
        if jnp.issubdtype(getattr(leaf, "dtype", int), jnp.inexact)
        and place not in others
    ]
    if not parameters:
        raise error("params_or_module must have parameters, got none.")
    shapes = {path: shape for _, path, shape in parameters}
    ruled = _matches("rules", rules, shapes) if rules else {}
    for pattern, given in (rules or {}).items():
        if isinstance(given, str):
            checks.known(roles.ROLES, role=given)
        elif given is not None and not callable(given):
            raise error(
                f"rules must give a role, a preset, an initializer or None, "
                f"got {given!r} for {pattern!r}."
            )
    known = _known(model, shapes, layouts, stacked)
    if len(shapes) < len(parameters):
        return _of_namesakes(tree, parameters, known, ruled)
    return [_info(each, each.path, known, ruled) for each in parameters]


def check_roles(infos: list[ParameterInfo]) -> None:
    """Raises if no parameter has a role."""
    if all(info.keep for info in infos):
        raise error(
            f"some parameter must have a role, got none in "
            f"{paths.some([info.path for info in infos])}; name them in rules."
        )


class _Parameter(NamedTuple):
    place: int
    path: str
    shape: Shape


_Ruled: TypeAlias = Mapping[str, tuple[str, Any]]  # path -> pattern, what it gives


def _other_variables(tree: Tree) -> set[int]:
    """The places of leaves in Variables that are no `nnx.Param`."""
    nnx, places, place = sys.modules["flax.nnx"], set(), 0
    for node in jax.tree.leaves(tree, is_leaf=lambda v: isinstance(v, nnx.Variable)):
        count = len(jax.tree.leaves(node))
        if isinstance(node, nnx.Variable) and not isinstance(node, nnx.Param):
            places.update(range(place, place + count))
        place += count
    return places


def _matches(
    argument: str, patterns: Mapping[str, Any], spelled: Iterable[str]
) -> _Ruled:
    """By path, the first pattern that is found in it, and what the pattern gives."""
    found: dict[str, tuple[str, Any]] = {}
    for pattern, given in patterns.items():
        at = list(filter(paths.compiled(argument, pattern).search, spelled))
        if not at:
            raise error(
                f"{argument} must be patterns found in some path, got {pattern!r}, "
                f"found in none of {paths.some(list(spelled))}."
            )
        found = dict.fromkeys(at, (pattern, given)) | found
    return found


def _known(
    model: Model, shapes: Shapes, layouts: Mapping[str, str] | None, stacked: Stacked
) -> roles.Parameters:
    """Everything by path: from the module's types, then from what the user says."""
    types, forms, stacks = {}, {}, {}
    if is_nnx(model):
        from optclip.initializers.nnx_types import known

        types, forms = known(model)
    if layouts:
        matches = _matches("layouts", layouts, shapes).items()
        # A bias follows its kernel's form.
        forms |= {path: m[1] for path, m in matches if not roles.is_vector(path)}
    if isinstance(stacked, str):
        stacks = dict.fromkeys(_matches("stacked", {stacked: 1}, shapes), 1)
    elif stacked is not None:
        stacks = dict.fromkeys(shapes, int(stacked))
    children = defaultdict(set)
    for path in shapes:
        holder, _, name = path.rpartition("/")
        while name not in children[holder]:
            children[holder].add(name)
            holder, _, name = holder.rpartition("/")
    return roles.Parameters(shapes, types, forms, stacks, children, {})


def _of_namesakes(
    tree: Tree, parameters: list[_Parameter], known: roles.Parameters, ruled: _Ruled
) -> list[ParameterInfo]:
    """The same where paths are spelled alike: siblings are the nearest in the tree."""
    keys = [keys for keys, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    counts = Counter(each.path for each in parameters)
    alike = [each for each in parameters if counts[each.path] > 1]
    infos = []
    for own in parameters:

        def distance(other: _Parameter, own: _Parameter = own) -> int:
            pairs = zip(keys[own.place], keys[other.place], strict=False)
            shared = [a == b for a, b in pairs] + [False]
            return len(keys[other.place]) - 2 * shared.index(False)

        near = {p.path: p.shape for p in sorted(alike, key=distance, reverse=True)}
        around = known._replace(shapes={**known.shapes, **near}, layouts={})
        name = keystr(keys[own.place]) if counts[own.path] > 1 else own.path
        infos.append(_info(own, name, around, ruled))
    return infos


def _info(
    parameter: _Parameter, name: str, known: roles.Parameters, ruled: _Ruled
) -> ParameterInfo:
    place, path, shape = parameter
    layout, role, fan_in = known.layout(path), roles.role_of(path, known), None
    recurrent = roles.recurrent_kernel(path, known.shapes)
    kernel = recurrent or roles.sibling_kernel(path, known.shapes)
    if kernel is not None:
        fan_in, _ = known.layout(kernel).fans(known.shapes[kernel])
    if recurrent is not None and layout.outputs:
        gates = layout.fans(shape)[1] // (fan_in or 1)  # side by side in one kernel
        layout = layout._replace(parts=max(1, gates))
    rule, given = ruled.get(path, (None, role))
    keep = given is None
    ambiguous = not keep and len(shape) > 2 and _is_ambiguous(path, layout, known)
    if isinstance(given, str):
        role, given = given, None
    return ParameterInfo(
        place, name, path, shape, role, layout, fan_in, keep, rule, given, ambiguous
    )


def _is_ambiguous(path: str, layout: Layout, known: roles.Parameters) -> bool:
    """Whether it is the kernel of an einsum whose bias does not show its outputs."""
    holder, slash, name = path.rpartition("/")
    einsum = re.search(r"(?i)einsum", f"{known.types.get(path)}/{path}")
    shape = known.shapes[path]
    if not einsum or name != "kernel" or path in known.forms:
        return False
    shown = tuple(shape[axis] for axis in sorted((*layout.stack, *layout.outputs)))
    return shown != known.shapes.get(f"{holder}{slash}bias")
