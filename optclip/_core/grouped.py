"""How the leaves of a tree fall into groups, by their numbers; no arrays."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from optclip._core import meshes
from optclip._core.types import Shape

Arrays = list[jax.Array]


class Member(NamedTuple):
    """A leaf's part in its group."""

    index: int  # among the measured leaves
    axes: tuple[int, ...]  # reduced
    mesh: meshes.MeshAxes  # summed over


class Group(NamedTuple):
    """The leaves measured together.

    Attributes:
      members: their parts in it.
      count: how many elements they have on all devices.
      shape: of its sizes: the axes that are not reduced, or, for groups within a leaf,
        the leaf's shape with 1 for those that are.
      scaled: which of the leaves are scaled by its size; others are measured only.
    """

    members: tuple[Member, ...]
    count: int
    shape: Shape
    scaled: tuple[int, ...]


class Groups(NamedTuple):
    """How a tree falls into groups. It holds no array and can be hashed.

    Attributes:
      groups: the groups, in the order of their first leaves.
      places: the numbers of the measured leaves among all leaves of the tree.
      names: the groups' names, where limits can refer to them.
      partial: in that case, whether leaves are masked or not measured.
      joint: whether all groups form one block.
      dtype: that of sizes: float32, or float64 if there are float64 leaves.
      stacked: whether they are those of `stacks`.
    """

    groups: tuple[Group, ...]
    places: tuple[int, ...]
    names: tuple[str, ...] | None
    partial: bool
    joint: bool
    dtype: np.dtype
    stacked: bool = False

    def block_shapes(self) -> list[Shape]:
        """The shape of every block. At least one joint group exists."""
        shapes = [group.shape for group in self.groups]
        if not self.joint:
            return shapes
        return [(max(len(shapes), 1), *(shapes[0] if shapes else ()))]


class Apart(NamedTuple):
    """The leaves that are measured as groups of their own, in order, for a recorder.

    Attributes:
      groups: one for each leaf.
      owners: the number of the group that each leaf belongs to.
    """

    groups: tuple[Group, ...]
    owners: tuple[int, ...]
