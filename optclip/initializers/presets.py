"""Presets: which initializer a parameter gets, by its role.

A preset is a mapping from role (see `roles`) to a JAX initializer. A role that it does
not name takes the initializer of the role it is a kind of: a head is a kernel unless
the preset says more. Called as `(key, shape, dtype)` it is the initializer of its
kernel role, so `kernel_init=he_normal()` works wherever Flax takes one, and
`redraw` reads the whole mapping.

    he_normal() | {"head": zeros(), "bias": normal(0.01)}     a preset with other roles
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optclip._core.public import error
from optclip.initializers.kernel_shapes import Initializer, wide
from optclip.initializers.roles import checked_role, lineage


# Compared and hashed by identity: Flax's modules, which hold it, must be hashable.
@dataclasses.dataclass(frozen=True, eq=False)
class Preset:
    """Role → JAX initializer, and itself the initializer of its kernel role.

    Attributes:
      name: the factory that made it, for messages.
      draws: role to initializer, `(key, shape, dtype) -> values`.
      needs: roles without which the preset would say nothing; `redraw` refuses a model
        that has none of them rather than drop what the preset is for.

    >>> import jax, jax.numpy as jnp
    >>> from optclip.initializers import he_normal, zeros
    >>> preset = he_normal() | {"head": zeros()}
    >>> preset["head"](jax.random.key(0), (2, 2), jnp.float32).tolist()
    [[0.0, 0.0], [0.0, 0.0]]
    """

    name: str
    draws: Mapping[str, Initializer]
    needs: tuple[str, ...] = ()

    def __getitem__(self, role: str) -> Initializer:
        """The initializer of a role, or of the nearest role it is a kind of."""
        checked_role(role)
        for kind in lineage(role):
            if kind in self.draws:
                return self.draws[kind]
        raise ValueError(f"{self.name}: draws must name the role {role!r}, got none.")

    def __call__(
        self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> jax.Array:
        """Draws a kernel."""
        return self["kernel"](key, shape, dtype)

    def __or__(self, draws: "Mapping[str, Initializer] | Preset") -> "Preset":
        """The same preset with the initializers of some roles replaced."""
        other = draws.draws if isinstance(draws, Preset) else draws
        for role in other:
            checked_role(role)
        return dataclasses.replace(self, draws={**self.draws, **other})


@dataclasses.dataclass(frozen=True)
class FromFanIn:
    """An initializer that needs to be told a fan-in: a bias has none of its own.

    Attributes:
      name: the preset's name, for messages.
      build: fan-in to initializer.
    """

    name: str
    build: Callable[[int], Initializer]

    def __call__(
        self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> jax.Array:
        raise ValueError(
            f"{self.name}: fan_in must be given for a parameter that draws by another "
            f"one's, got shape {shape} alone; use layer(..., fan_in=...), or draw the "
            f"finished model with redraw, which sees the kernel."
        )


def initializer(rule: str, init: Initializer, least_rank: int = 0) -> Initializer:
    """A JAX initializer that draws in float32 at least and refuses too few axes."""

    def draw(
        key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> jax.Array:
        if len(shape) < least_rank:
            raise error(
                f"shape must have at least {least_rank} axes, inputs and "
                f"outputs, got {tuple(shape)}; a vector has no fans of its own."
            )
        if 0 in shape:
            return jnp.zeros(shape, dtype)
        return init(key, tuple(shape), wide(dtype)).astype(dtype)

    return draw


def constant(value: float) -> Initializer:
    """All elements equal; the value is checked by whoever asks."""
    return initializer("constant", jax.nn.initializers.constant(value))


# A lookup adds up nothing, so that it has no fan-in: rows (of shape (rows, features))
# of unit length, as Flax draws them.
UNIT_ROWS = initializer(
    "embedding",
    jax.nn.initializers.variance_scaling(1.0, "fan_out", "normal"),
    least_rank=2,
)


def by_fans(rule: str, init: Initializer, **draws: Initializer) -> Preset:
    """A preset whose kernels draw by their fans; embeddings as Flax draws them."""
    kernel = initializer(rule, init, least_rank=2)
    whole = {"embedding": UNIT_ROWS, "bias": constant(0.0), "scale": constant(1.0)}
    return Preset(rule, {"kernel": kernel, **whole, **draws})


def of_any_shape(rule: str, init: Initializer, **draws: Initializer) -> Preset:
    """A preset whose kernels and embeddings share a law that reads no fans."""
    kernel = initializer(rule, init)
    whole = {"embedding": kernel, "bias": constant(0.0), "scale": constant(1.0)}
    return Preset(rule, {"kernel": kernel, **whole, **draws})


def renamed(
    name: str, base: Preset, needs: tuple[str, ...] = (), /, **draws: Any
) -> Preset:
    """The base under another name, with the laws of some roles replaced."""
    laws = {r: p["kernel"] if isinstance(p, Preset) else p for r, p in draws.items()}
    return Preset(name, (base | laws).draws, needs)
