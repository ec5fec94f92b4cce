"""Of what: which elements are measured, and clipped, together.

| grouping | a group is |
|---|---|
| `whole()` | the whole tree: the global norm |
| `whole(measured, applied)` | the leaves chosen: one norm over some, applied to some |
| `per_leaf()` | one leaf |
| `per_label(labels)` | the leaves that share a label |
| `per_example()` | one index of the leading axis, across leaves |
| `per_matrix()` | one matrix, of a layer or an expert of a stack |
| `per_unit(axes)` | one output unit of one parameter: a column of a Dense kernel |
| `per_element()` | one number |

`Grouping` is what they make.
"""

from optclip._core.groupings import (
    Grouping,
    per_element,
    per_example,
    per_label,
    per_leaf,
    per_matrix,
    per_unit,
    whole,
)

__all__ = [
    "Grouping",
    "per_element",
    "per_example",
    "per_label",
    "per_leaf",
    "per_matrix",
    "per_unit",
    "whole",
]
