"""Fixed rules, flat, in NumPy float64: what a clip should give, without its tricks.

A tree is a dict from path to array. A group is a list of (path, index) pairs, where an
index selects the group's elements in that leaf.
"""

import numpy as np

Tree = dict[str, np.ndarray]
Group = list[tuple[str, tuple]]


def size(values: np.ndarray, measure: str | float) -> float:
    """The size of some numbers, scaled by the largest so that nothing overflows."""
    x = np.abs(np.asarray(values).ravel().astype(np.complex128))
    largest = x.max(initial=0.0)
    if not np.isfinite(largest):
        return float(largest)
    if largest == 0:
        return 0.0
    y = x / largest
    if measure == "l2":
        return float(largest * np.sqrt(np.sum(y**2)))
    if measure == "rms":
        return float(largest * np.sqrt(np.mean(y**2)))
    if measure == "l1":
        return float(largest * np.sum(y))
    if measure == "max_abs":
        return float(largest)
    measure = float(measure)
    return float(largest * np.sum(y**measure) ** (1 / measure))


def groups(tree: Tree, grouping: str) -> list[Group]:
    """The groups of a tree; labels are first letters, units the columns.

    Matrices are leaves, but for a stack of two under "b".
    """
    everything = [(path, ()) for path in tree]
    if grouping == "whole":
        return [everything]
    if grouping == "leaf":
        return [[entry] for entry in everything]
    if grouping == "matrix":
        layers = [("b/kernel", (n,)) for n in range(len(tree["b/kernel"]))]
        leaves = [entry for entry in everything if entry[0] != "b/kernel"]
        return [[entry] for entry in [*leaves, *layers]]
    if grouping == "label":
        labels = sorted({path[0] for path in tree})
        return [[e for e in everything if e[0][0] == label] for label in labels]
    if grouping == "example":
        batch = next(iter(tree.values())).shape[0]
        return [[(path, (i,)) for path in tree] for i in range(batch)]
    if grouping == "kernels":  # measured; everything is scaled with them
        return [[(path, ()) for path in tree if "kernel" in path]]
    if grouping == "element":
        return [[(p, index)] for p, x in tree.items() for index in np.ndindex(x.shape)]
    if grouping == "unit":  # columns of matrices, whole vectors
        out: list[Group] = []
        for path, x in tree.items():
            if x.ndim < 2 or min(x.shape) == 1:
                out.append([(path, ())])
            else:
                out += [[(path, (..., j))] for j in range(x.shape[-1])]
        return out
    raise ValueError(grouping)


def target(size: float, limit: float, action: str) -> float:
    """The size a group should have afterwards."""
    if action == "rescale":
        return min(size, limit)
    if action == "smooth":
        # By the ratio of the smaller to the larger, which never overflows.
        small, large = sorted((size, limit))
        return small if large in (0, np.inf) else small / (1 + small / large)
    if action == "normalize":
        return size if np.isinf(limit) else limit
    if action == "floor":
        return size if np.isinf(limit) else max(size, limit)
    if action == "torch":
        return size * min(1.0, limit / (size + 1e-6))
    raise ValueError(action)


def clip(
    tree: Tree,
    limit: float,
    measure: str | float = "l2",
    grouping: str = "whole",
    action: str = "rescale",
    nonfinite: str = "propagate",
) -> tuple[Tree, list[float]]:
    """The clipped tree in float64 (complex128), and the sizes before, by group."""
    wide = {
        path: np.asarray(x).astype(np.complex128 if np.iscomplexobj(x) else np.float64)
        for path, x in tree.items()
    }
    out = {path: x.copy() for path, x in wide.items()}
    sizes = []
    for group in groups(wide, grouping):
        values = [np.ravel(wide[path][index]) for path, index in group]
        before = size(np.concatenate(values), measure)
        sizes.append(before)
        for path, index in [(p, ()) for p in wide] if grouping == "kernels" else group:
            if not np.isfinite(before):
                out[path][index] = np.nan if nonfinite == "propagate" else 0.0
            elif before > 0:
                after = target(before, limit, action)
                out[path][index] = wide[path][index] / before * after
    return out, sizes
