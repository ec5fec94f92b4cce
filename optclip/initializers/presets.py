"""Presets: which initializer a parameter gets, by its role.

A preset is a mapping from role (see `roles`) to a JAX initializer. A role that it does
not name takes the initializer of the role it is a kind of: a head is a kernel unless
the preset says more. Called as `(key, shape, dtype)` it is the initializer of its
kernel role, so `kernel_init=he_normal()` works wherever Flax takes an initializer, and
`redraw` reads the whole mapping.

    he_normal() | {"head": zeros(), "bias": normal(0.01)}     a preset with other roles

The functions below the class build presets: `by_fans` for kernels whose spread depends
on their fans, `of_any_shape` for all others.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jax.nn import initializers as jax_initializers
from jax.typing import DTypeLike

from optclip._core import checks
from optclip._core.public import Part, caller, naming
from optclip._core.types import Shape
from optclip.initializers.kernel_shapes import Initializer, drawing_dtype
from optclip.initializers.roles import KINDS, ROLES

Mode = Literal["fan_in", "fan_out", "fan_avg"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Preset(Part):
    """Role → JAX initializer, and itself the initializer of its kernel role.

    Presets made by equal calls are equal. They can be hashed, and pickled if what they
    were made from can.

    Attributes:
      draws: role to initializer, `(key, shape, dtype) -> values`.
      needs: roles of which a model must have one; `redraw` refuses a model without
        them, because the preset would have no effect there.

    Raises:
      ValueError: from `preset[role]` and `preset | {role: …}`, for an unknown role.

    >>> import jax, jax.numpy as jnp
    >>> from optclip.initializers import he_normal, zeros
    >>> preset = he_normal() | {"head": zeros()}
    >>> preset
    he_normal() | {'head': zeros()}
    >>> preset["head"](jax.random.key(0), (2, 2), jnp.float32).tolist()
    [[0.0, 0.0], [0.0, 0.0]]
    """

    draws: Mapping[str, Initializer]
    needs: tuple[str, ...] = ()

    def __getitem__(self, role: str) -> Initializer:
        """The initializer of a role, or of the nearest role it is a kind of."""
        kind = role
        while kind not in self.draws:
            if kind not in KINDS:
                self._check_roles([role])
                raise ValueError(f"{self!r}: draws must name {role!r}, got none.")
            kind = KINDS[kind]
        return self.draws[kind]

    def __call__(
        self, key: jax.Array, shape: Shape, dtype: DTypeLike = jnp.float32
    ) -> jax.Array:
        """Draws a kernel."""
        return self["kernel"](key, shape, dtype)

    def __or__(self, draws: Mapping[str, Initializer] | Preset) -> Preset:
        """The same preset with the initializers of some roles replaced."""
        other = draws.draws if isinstance(draws, Preset) else draws
        self._check_roles(other)
        joined = dataclasses.replace(self, draws={**self.draws, **other})
        joined._remember(operator.or_, (self, draws), {})
        return joined

    def __repr__(self) -> str:
        if self._call is not None and self._call[0] is operator.or_:
            return " | ".join(map(repr, self._call[1]))
        return super().__repr__()

    def _check_roles(self, roles: Mapping[str, Initializer] | list[str]) -> None:
        with naming(repr(self)):
            for role in roles:
                checks.known(ROLES, role=role)


@dataclasses.dataclass(frozen=True)
class FromFanIn:
    """An initializer of biases, whose spread depends on the fan-in of their kernel.

    Attributes:
      name: the preset's name, for messages.
      build: fan-in to initializer.
    """

    name: str
    build: Callable[[int], Initializer]

    def __call__(
        self, key: jax.Array, shape: Shape, dtype: DTypeLike = jnp.float32
    ) -> jax.Array:
        raise ValueError(
            f"{self.name}: fan_in must be given for a parameter whose initializer "
            f"depends on its kernel's, got shape {shape} alone; use "
            f"layer(..., fan_in=...), or redraw for the finished model."
        )


def initializer(init: Initializer, law: str, least_rank: int = 0) -> Initializer:
    """The initializer, drawn in float32 at least; its errors name the preset.

    It is called by its law, as `redraw(…, explain=True)` shows it.
    """
    name = caller()

    def draw(key: jax.Array, shape: Shape, dtype: DTypeLike = jnp.float32) -> jax.Array:
        if 0 in shape:
            return jnp.zeros(shape, dtype)
        try:
            if len(shape) < least_rank:
                raise ValueError(
                    f"shape must have at least {least_rank} axes, inputs and outputs, "
                    f"got {tuple(shape)}; a vector has no fans of its own."
                )
            return init(key, tuple(shape), drawing_dtype(dtype)).astype(dtype)
        except (TypeError, ValueError) as wrong:
            raise ValueError(f"{name}: {wrong}") from wrong

    draw.__qualname__ = law
    return draw


ZERO = initializer(jax_initializers.zeros, "zeros")
ONE = initializer(jax_initializers.ones, "ones")
# A lookup sums over nothing, so it has no fan-in: rows (of shape (rows, features)) of
# length 1 on average, as Flax draws them.
_UNIT_ROWS = initializer(
    jax_initializers.variance_scaling(1.0, "fan_out", "normal"), "normal", 2
)


def by_fans(kernel: Initializer) -> Preset:
    """A preset whose kernels depend on their fans; embeddings as Flax draws them."""
    draws = {"kernel": kernel, "embedding": _UNIT_ROWS, "bias": ZERO, "scale": ONE}
    return Preset(draws)


def of_any_shape(kernel: Initializer) -> Preset:
    """A preset that draws kernels and embeddings alike, whatever their shape."""
    return Preset({"kernel": kernel, "embedding": kernel, "bias": ZERO, "scale": ONE})


def scaled(
    scale: float,
    mode: Mode,
    distribution: Literal["normal", "uniform", "truncated_normal"],
) -> Initializer:
    """JAX's `variance_scaling`, which also takes a scale of 0."""
    if scale == 0:
        return initializer(jax_initializers.zeros, "zeros", least_rank=2)
    init = jax_initializers.variance_scaling(scale, mode, distribution)
    return initializer(init, distribution.replace("_", " "), least_rank=2)
