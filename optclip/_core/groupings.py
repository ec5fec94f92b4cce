"""Of what: which elements are measured, and clipped, together.

A grouping answers two questions about every leaf: over which axes it is reduced, and
with which other leaves it shares a group. Groups of *joint* groupings are whole leaves
or several of them; they form one vector, the block that a threshold sees. Other groups
lie inside one leaf: one block a leaf, with reduced axes kept at size 1.

| grouping | a group is | block |
|---|---|---|
| `whole()` | the whole tree | one vector, one entry |
| `per_leaf()` | one leaf | one vector |
| `per_label(labels)` | the leaves that share a label | one vector |
| `per_example()` | one index of the leading axis, across leaves | one vector |
| `per_matrix()` | one matrix of a stack: a layer's, an expert's | one array a leaf |
| `per_unit()` | one output unit of one parameter | one array a leaf |
| `per_element()` | one number | one array a leaf |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import Protocol

from optclip._core import checks, layouts, paths
from optclip._core.public import Part, caller, error, naming, public
from optclip._core.types import Axes, Shape, Shapes, Stacked, Tree, Where


class Place(Protocol):
    """What a label may go by: a leaf's number in its tree, and its path."""

    @property
    def number(self) -> int: ...
    @property
    def path(self) -> str: ...


AxesOf = Callable[[str, Shape, Shapes], tuple[int, ...]]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Grouping(Part):
    """Which elements form a group; see this module's docstring.

    Attributes:
      axes: (path, shape, shapes of all leaves by path) to the axes reduced, or None for
        all axes; the shape is at least that on all devices, the shapes are those on
        this one.
      label: a leaf's place (its `number` in the tree and its `path`) to what leaves of
        one group share, or None for groups within a leaf.
      sums: whether groups extend over the mesh axes that a leaf varies over; None if a
        leaf's type cannot say (units and examples: which dimension is sharded is not in
        a type).
      named: whether groups have names that limits can refer to: their labels, or the
        paths of their leaves where labels are numbers.
      keeps_state: whether a group means the same at every step.
      integers: whether integer leaves may pass, which are not measured.
      measured: (path, leaf) to whether the leaf counts in its group; None for all.
      applied: whether it is scaled with its group; None for all.
    """

    axes: AxesOf | None
    label: Callable[[Place], Hashable] | None
    sums: bool | None = True
    named: bool = False
    keeps_state: bool = True
    integers: bool = True
    measured: paths.Select | None = None
    applied: paths.Select | None = None

    @property
    def elementwise(self) -> bool:
        """Whether every element is its own group."""
        return self.label is None and self.sums is False


@public
def whole(measured: Where | None = None, applied: Where | None = None) -> Grouping:
    """The whole tree is one group: the global norm.

    With `measured` and `applied` the norm of some leaves scales some leaves, the same
    or others: the matrices that Muon trains are left out of the norm, or experts are
    clipped apart.

    Args:
      measured: whose norm it is: a regular expression searched in the "/"-joined path,
        a predicate `(path, leaf) -> bool`, or a tree of booleans that may be a prefix
        of the parameters; None for all leaves.
      applied: which leaves are scaled, in the same forms; None for all.

    Returns:
      The grouping. Leaves that are not applied keep their bits. A recorder of leaves
      keeps those that are measured.

    Edge cases: NaN in a leaf that is measured makes all applied leaves NaN (or zero, as
    `nonfinite` says), whether or not they were measured; NaN in one that is not
    measured stays where it is, and is not counted. While what is measured has size 0
    nothing is scaled, at a limit of 0 or NaN either: such a norm gives no factor.

    Raises:
      ValueError: if one of them is no pattern, predicate or tree of booleans; at init
        and update, if it selects nothing in a tree that has leaves.

    >>> import jax.numpy as jnp, optclip
    >>> tx = optclip.clip_by(1.0, grouping=whole())
    >>> updates, _ = tx.update({"a": jnp.array([3.0]), "b": jnp.array([4.0])}, None)
    >>> print(updates["a"], updates["b"])
    [0.6] [0.8]
    >>> biases = whole(measured="bias", applied="bias")
    >>> grads = {"kernel": jnp.array([30.0]), "bias": jnp.array([4.0])}
    >>> updates, _ = optclip.clip_by(1.0, grouping=biases).update(grads, None)
    >>> print(updates["kernel"], updates["bias"])
    [30.] [1.]
    """
    return Grouping(
        None,
        lambda leaf: "",
        measured=None if measured is None else paths.selector(measured, "measured"),
        applied=None if applied is None else paths.selector(applied, "applied"),
    )


@public
def per_leaf() -> Grouping:
    """Each leaf is a group, named by its path.

    Returns:
      The grouping.

    >>> import jax.numpy as jnp, optclip
    >>> tx = optclip.clip_by(1.0, grouping=per_leaf())
    >>> updates, _ = tx.update({"a": jnp.array([3.0]), "b": jnp.array([0.5])}, None)
    >>> print(updates["a"], updates["b"])
    [1.] [0.5]
    """
    return Grouping(None, by_number, named=True)


def by_number(leaf: Place) -> int:
    """The label of a leaf that is a group by itself."""
    return leaf.number


@public
def per_label(labels: Callable[[str], str] | Tree) -> Grouping:
    """Leaves that share a label are one group, named by the label.

    Args:
      labels: a function from a "/"-joined path to a label, or a tree of labels that
        may be a prefix of the parameters, such as `{"encoder": "enc", "head": "head"}`.

    Returns:
      The grouping.

    Raises:
      ValueError: at init or update, if a tree of labels has none for some leaf, or a
        label is None.

    >>> import jax.numpy as jnp, optclip
    >>> first_name = per_label(lambda path: path.split("/")[0])
    >>> tx = optclip.clip_by(5.0, grouping=first_name)
    >>> grads = {"enc": {"a": jnp.array([6.0]), "b": jnp.array([8.0])}}
    >>> updates, _ = tx.update(grads, None)
    >>> print(updates["enc"]["a"], updates["enc"]["b"])
    [3.] [4.]
    """
    lookup = labels if callable(labels) else paths.prefix_lookup("labels", labels)

    @naming(caller())
    def label(leaf: Place) -> str:
        name = lookup(leaf.path)
        if name is None:
            raise error(
                f"labels must name every leaf, got None for {str(leaf.path)!r}."
            )
        return str(name)

    return Grouping(None, label, named=True)


@public
def per_example() -> Grouping:
    """Each index of the leading axis, across all leaves, is a group.

    For gradients of single examples, shape (batch, *parameter.shape). Only thresholds
    without state go with it: example 3 of this batch is not example 3 of the next.
    Inside `shard_map`, `axis_name` names the mesh axes that one example is split over,
    as those of its parameters; an axis that splits the batch is none, and `()` says
    that every device has whole examples.

    Returns:
      The grouping.

    Raises:
      ValueError: at update, if a leaf has no leading axis, is of integers, or leaves
        differ in their leading axis; inside `shard_map`, if a leaf varies over a mesh
        axis and `axis_name` does not say whether examples do; in `clip_by`, if the
        threshold has state.

    >>> import jax.numpy as jnp, optclip
    >>> tx = optclip.clip_by(1.0, grouping=per_example())
    >>> updates, _ = tx.update(jnp.array([[3.0, 4.0], [0.3, 0.4]]), None)
    >>> print(updates)
    [[0.6 0.8]
     [0.3 0.4]]
    """

    @naming(caller())
    def axes(path: str, shape: Shape, shapes: Shapes) -> tuple[int, ...]:
        batches = {other[0] for other in shapes.values() if other}
        if not shape or len(batches) > 1:
            raise error(
                f"leaves must share a leading batch axis, got shape "
                f"{shape} at {str(path)!r} and batch sizes {sorted(batches)}."
            )
        return tuple(range(1, len(shape)))

    return Grouping(axes, lambda leaf: "", None, keeps_state=False, integers=False)


@public
def per_matrix(stacked: Stacked = None) -> Grouping:
    """Each matrix is a group: a kernel, or one layer's or expert's of a stack.

    A kernel is one matrix with the window of a convolution and the heads of attention,
    where its name or its bias's shape tells these. Otherwise all axes before the last
    two count matrices, so that a stack of layers or experts without biases is never
    joined. A bias or scale is one group, or one a stacked layer.

    Args:
      stacked: how many leading axes count matrices, where names and biases cannot tell:
        False (none), True (one) or a number for every leaf, or a regular expression
        searched in the path for the leaves with one.

    Returns:
      The grouping.

    Raises:
      ValueError: if stacked is negative or no regular expression; inside `shard_map`,
        if a leaf varies over a mesh axis and `axis_name` does not say whether matrices
        do.

    >>> import jax.numpy as jnp, optclip
    >>> experts = {"experts": jnp.array([[[3.0], [4.0]], [[0.3], [0.4]]])}
    >>> tx = optclip.clip_by(1.0, grouping=per_matrix())
    >>> updates, _ = tx.update(experts, None)
    >>> print(updates["experts"].squeeze())
    [[0.6 0.8]
     [0.3 0.4]]
    """
    count = stack_of(stacked)

    def reduced(path: str, shape: Shape, shapes: Shapes) -> tuple[int, ...]:
        stack = layouts.layout(path, shapes, stacked=count(path), unnamed="io").stack
        return tuple(axis for axis in range(len(shape)) if axis not in stack)

    return Grouping(reduced, None, sums=None)


@public
def per_unit(
    axes: Axes | Mapping[str, Axes] | None = None, stacked: Stacked = None
) -> Grouping:
    """Each output unit of a parameter is a group: a column of a Dense kernel.

    Without `axes` the units come from the parameter's layout, found from its name, its
    sibling bias's shape and its rank: the inputs of a Dense or convolution kernel, one
    row of an embedding, one head's dimension of an attention kernel, the whole of a
    bias or scale, each apart for every layer of a scan-stacked model.

    Args:
      axes: the axes to reduce, for every leaf; or a dict from a regular expression to
        the axes of the leaves whose path it is found in, the layout deciding for
        others.
      stacked: how many leading axes count independent layers, where the layout cannot
        see it: True (one) or a number for every leaf, or a regular expression searched
        in the path for the leaves with one. A scan-stacked kernel without a bias, whose
        name says nothing, is otherwise read as a convolution.

    Returns:
      The grouping.

    Raises:
      ValueError: if axes are no integers, or stacked is negative or no regular
        expression; at init or update, if an axis is out of range for a leaf (the
        message names its path); inside `shard_map`, if a leaf varies over a mesh axis
        and `axis_name` does not say whether units do.

    >>> import jax.numpy as jnp, optclip
    >>> tx = optclip.clip_by(1.0, grouping=per_unit())
    >>> updates, _ = tx.update({"kernel": jnp.array([[3.0, 0.3], [4.0, 0.4]])}, None)
    >>> print(updates["kernel"])
    [[0.6 0.3]
     [0.8 0.4]]
    """
    for own in axes.values() if isinstance(axes, Mapping) else (axes,):
        checks.axes(axes=own)
    count = stack_of(stacked)

    @naming(caller())
    def reduced(path: str, shape: Shape, shapes: Shapes) -> tuple[int, ...]:
        chosen = (
            paths.first_match(axes, path, None) if isinstance(axes, Mapping) else axes
        )
        if chosen is not None:
            return in_range("axes", path, shapes[path], chosen)
        layout = layouts.layout(path, shapes, stacked=count(path))
        return layout.unit_axes(shape)

    return Grouping(reduced, None, sums=None)


@public
def per_element() -> Grouping:
    """Each number is a group.

    The sizes are as large as the leaves, so `ClipMetrics` has counters only.

    Returns:
      The grouping.

    >>> import jax.numpy as jnp, optclip
    >>> tx = optclip.clip_by(1.0, grouping=per_element())
    >>> updates, _ = tx.update(jnp.array([-3.0, 0.5]), None)
    >>> print(updates)
    [-1.   0.5]
    """
    return Grouping(lambda path, shape, shapes: (), None, sums=False)


def stack_of(stacked: Stacked) -> Callable[[str], int | None]:
    """How many leading axes of a leaf count independent layers; None to find out."""
    if isinstance(stacked, str):
        pattern = paths.compiled("stacked", stacked)
        return lambda path: 1 if pattern.search(path) else None
    count = None if stacked is None else int(stacked)
    if count is not None:
        checks.at_least(0, stacked=count)
    return lambda path: count


def in_range(name: str, path: str, shape: Shape, axes: Axes) -> tuple[int, ...]:
    """The axes as sorted non-negative numbers; raises if a leaf lacks one."""
    axes = tuple(axes) if isinstance(axes, (tuple, list)) else (axes,)
    rank = len(shape)
    for axis in axes:
        if not -rank <= axis < rank:
            raise error(
                f"{name} must exist in every leaf, got {axis} for {str(path)!r} of "
                f"shape {shape}."
            )
    return tuple(sorted({axis % rank for axis in axes}))
