"""`roles_of`: what `redraw` would take each parameter for, without drawing anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from optclip._core.public import public
from optclip._core.types import Stacked
from optclip.initializers import parameter_info
from optclip.initializers.parameter_info import Model, Rules


class Role(NamedTuple):
    """What a parameter is for, and its fans.

    Attributes:
      role: its name, or None for a parameter that `redraw` leaves alone.
      fan_in: inputs of one output, in one layer of a stack and one gate of a cell;
        None for what has no outputs, or where the axes are unknown.
      fan_out: outputs of one input.
    """

    role: str | None
    fan_in: int | None = None
    fan_out: int | None = None


@public
def roles_of(
    params_or_module: Model,
    *,
    rules: Rules | None = None,
    layouts: Mapping[str, str] | None = None,
    stacked: Stacked = None,
) -> dict[str, Role]:
    """The role and the fans that `redraw` finds for each parameter.

    Args:
      params_or_module: a tree of parameters or an `nnx.Module`, as for `redraw`.
      rules: patterns to a role, preset, initializer or None, as for `redraw`.
      layouts: patterns to the letters of a kernel's axes, as for `redraw`.
      stacked: which leading axes count independent layers, as for `redraw`.

    Returns:
      A dict from path to `Role`; where two paths are spelled alike, from JAX's key
      path.

    Raises:
      ValueError: if a pattern is found in no path, a role or layout is unknown, or no
        parameter has a role.

    >>> import jax.numpy as jnp
    >>> roles_of({"fc": {"kernel": jnp.ones((8, 3)), "bias": jnp.ones(3)}})["fc/kernel"]
    Role(role='kernel', fan_in=8, fan_out=3)
    """
    infos = parameter_info.found(params_or_module, rules, layouts, stacked)
    parameter_info.check_roles(infos)
    found = {}
    for info in infos:
        known = info.layout.outputs and not info.ambiguous
        fans = info.layout.fans(info.shape) if known else (None, None)
        found[info.name] = Role(None if info.keep else info.role, *fans)
    return found
