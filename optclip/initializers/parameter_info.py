"""Which role, layout and number of parts each parameter has: what `redraw` goes by.

    path, shape, siblings, module's type, rules  ──▶  role, layout, parts

A rule of the user's outranks a module's type, and that outranks names and shapes.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from optclip._core import layouts, paths
from optclip._core.layouts import Layout
from optclip._core.public import error, public
from optclip.initializers import kernel_shapes as unfolding
from optclip.initializers import linen, nnx
from optclip.initializers import roles as _roles

Rules = Mapping[str, Any]  # pattern -> role, preset, initializer or None
Shape = tuple[int, ...]


class Plan(NamedTuple):
    """How one parameter is drawn.

    Attributes:
      role: what it is for, or None.
      layout: its axes.
      parts: how many kernels stand side by side in its outputs.
      given: the preset or initializer that a rule gives it.
      keep: whether its values stay.
      fan_in: that of the kernel whose fan-in counts for it: a bias's, a cell's.
      ambiguous: whether nothing tells its axes: the kernel of an einsum alone.
    """

    role: str | None
    layout: Layout
    parts: int
    given: Any
    keep: bool
    fan_in: int | None
    ambiguous: bool


class Role(NamedTuple):
    """What a parameter is for, and its fans.

    Attributes:
      role: its name, or None for a parameter that `redraw` leaves alone.
      fan_in: inputs of one output, in one layer of a stack and one gate of a cell;
        None for what has no outputs, or axes that nothing tells.
      fan_out: outputs of one input.
    """

    role: str | None
    fan_in: int | None = None
    fan_out: int | None = None


@public
def roles_of(
    params_or_module: Any,
    *,
    rules: Rules | None = None,
    layouts: Mapping[str, str] | None = None,
    stacked: bool | int | str | None = None,
) -> dict[str, Role]:
    """What `redraw` takes each parameter for: look before you draw.

    Args:
      params_or_module: as for `redraw`, and so are the others.

    Returns:
      The role and the fans of every parameter by path.

    Raises:
      ValueError: for rules and layouts as `redraw`.

    >>> import jax.numpy as jnp
    >>> roles_of({"fc": {"kernel": jnp.ones((8, 3)), "bias": jnp.ones(3)}})["fc/kernel"]
    Role(role='kernel', fan_in=8, fan_out=3)
    """
    tree, known = opened(params_or_module)
    shapes = shapes_of(tree)
    found = {}
    for path, plan in plans(shapes, known, rules, layouts, stacked).items():
        name = None if plan.keep else plan.role
        if plan.layout.outputs and not plan.ambiguous:
            fan_in, fan_out = plan.layout.fans(shapes[path])
            found[path] = Role(name, fan_in, fan_out // plan.parts)
        else:
            found[path] = Role(name)
    return found


def opened(params_or_module: Any) -> tuple[Any, dict[str, nnx.Known]]:
    """The tree of parameters, and what modules' types say, by path."""
    if nnx.is_module(params_or_module):
        return nnx.params(params_or_module), nnx.known(params_or_module)
    return linen.params(params_or_module), {}


def shapes_of(tree: Any) -> dict[str, Shape]:
    """The shapes of the leaves that can be drawn, by path."""
    others = nnx.other_variables(tree)
    shapes = {
        path: tuple(leaf.shape)
        for path, leaf in paths.leaves(tree)
        if hasattr(leaf, "shape")
        and jnp.issubdtype(leaf.dtype, jnp.inexact)
        and path not in others
    }
    if not shapes:
        raise error("params_or_module must have parameters, got none.")
    return shapes


def plans(
    shapes: Mapping[str, Shape],
    known: Mapping[str, nnx.Known],
    rules: Rules | None,
    layouts: Mapping[str, str] | None,
    stacked: bool | int | str | None,
) -> dict[str, Plan]:
    """How each parameter is drawn, by path."""
    rules, layouts = rules or {}, layouts or {}
    patterns = {"rules": rules, "layouts": layouts}
    if isinstance(stacked, str):
        patterns["stacked"] = {stacked: None}
    for name, given in patterns.items():
        _check_found(name, given, shapes)
    _check_rules(rules)

    axes = _Axes(shapes, known, layouts, stacked)
    found = {}
    for path in shapes:
        given = paths.first_match(rules, path, False)
        kind = known.get(path, nnx.Known()).type
        role = _roles.role_of(path, shapes, kind, axes.convolves)
        if isinstance(given, str):
            role, given = given, False
        keep = given is None or (given is False and role is None)
        layout, parts = axes.of(path), axes.parts(path)
        recurrent = _roles.recurrent_kernel(path, shapes)
        if recurrent is not None and layout.outputs:
            hidden = axes.of(recurrent).fans(shapes[recurrent])[0]
            parts = max(1, layout.fans(shapes[path])[1] // hidden)
        kernel = recurrent or _roles.sibling_kernel(path, shapes)
        fan_in = axes.of(kernel).fans(shapes[kernel])[0] if kernel else None
        ambiguous = not keep and axes.ambiguous(path)
        found[path] = Plan(role, layout, parts, given or None, keep, fan_in, ambiguous)
    if all(plan.keep for plan in found.values()):
        raise error(
            f"some parameter must have a role, got none in {listed(shapes)}; "
            f"name them in rules."
        )
    return found


class _Axes:
    """The layouts of a tree's parameters, from forms where they are known."""

    def __init__(
        self,
        shapes: Mapping[str, Shape],
        known: Mapping[str, nnx.Known],
        layouts: Mapping[str, str],
        stacked: bool | int | str | None,
    ):
        self._shapes, self._known = shapes, known
        self._stacked, self._found = stacked, {}
        self._forms = {p: (k.form, k.parts) for p, k in known.items() if k.form}
        for path in shapes:
            form = paths.first_match(layouts, path, None)
            if form is not None and not _roles.is_vector(path):
                # Biases take their stack from the kernel's form.
                self._forms[path] = unfolding.split_form(form)

    def of(self, path: str) -> Layout:
        if path not in self._found:
            kernel = _roles.sibling_kernel(path, self._shapes)
            rules = {
                f"^{re.escape(p)}$": self._forms[p][0]
                for p in (path, kernel)
                if p in self._forms
            }
            self._found[path] = layouts.layout(
                path,
                self._shapes,
                rules=rules,
                module=self._known.get(path, nnx.Known()).type,
                stacked=self._stack(path),
            )
        return self._found[path]

    def parts(self, path: str) -> int:
        return self._forms.get(path, (None, 1))[1]

    def convolves(self, path: str) -> bool:
        return bool(self.of(path).window)

    def ambiguous(self, path: str) -> bool:
        """Nobody can tell the axes of an einsum's kernel, but its bias."""
        kind, name = self._known.get(path, nnx.Known()).type, path.rpartition("/")[2]
        einsum = re.search(r"(?i)einsum", f"{kind}/{path}") and name == "kernel"
        shape, bias = self._shapes[path], f"{path.removesuffix(name)}bias"
        if not einsum or path in self._forms or len(shape) < 3:
            return False
        layout = self.of(path)
        told = [shape[axis] for axis in sorted((*layout.stack, *layout.outputs))]
        return tuple(told) != self._shapes.get(bias)

    def _stack(self, path: str) -> int | None:
        if isinstance(self._stacked, str):
            return 1 if re.search(self._stacked, path) else None
        return None if self._stacked is None else int(self._stacked)


def listed(names: Iterable[Any]) -> str:
    """Some of the names, for a message."""
    shown = sorted(str(name) for name in names)
    return ", ".join(shown[:6]) + (f", … ({len(shown)})" if len(shown) > 6 else "")


def _check_found(name: str, patterns: Iterable[str], shapes: Iterable[str]) -> None:
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in shapes):
            raise error(
                f"{name} must be patterns found in some path, got {pattern!r}, "
                f"found in none of {listed(shapes)}."
            )


def _check_rules(rules: Rules) -> None:
    for given in rules.values():
        if isinstance(given, str):
            _roles.checked_role(given)
        elif given is not None and not callable(given):
            raise error(
                f"rules must give a role, a preset, an initializer or None, "
                f"got {given!r}."
            )
