"""The trees that the scripts in this folder clip, and the one way to write results.

Every script gives the same trees to another library and writes what comes back to a
JSON file beside it. A tree is a dict of float32 arrays. A float32 is written as the
shortest decimal that reads back as the same float64, so nothing is lost on the way
through the file: reading it and casting to float32 gives the very same bits.
"""

import json
import pathlib

import numpy as np

_RNG = np.random.default_rng(20)


def _normal(kernel: float, bias: float, scale: float) -> dict[str, np.ndarray]:
    """Standard normal leaves, each multiplied by its own magnitude."""
    return {
        "kernel": (kernel * _RNG.standard_normal((3, 4))).astype(np.float32),
        "bias": (bias * _RNG.standard_normal(4)).astype(np.float32),
        "scale": (scale * _RNG.standard_normal(1)).astype(np.float32),
    }


TREES = {
    "moderate": _normal(1.0, 1.0, 1.0),
    "mixed": _normal(1e-3, 1.0, 1e3),
    # Squares of these stay normal float32 numbers: beyond 1e-19 and 1e19 the other
    # libraries lose the norm to underflow and overflow, and optclip does not.
    "tiny": _normal(1e-8, 1e-8, 1e-8),
    "large": _normal(1e15, 1e15, 1e15),
    # Integers whose norms are integers, so that a limit can be met exactly: l2 is 6, 3
    # and 2 by leaf and 7 over the tree, where l1 is 19 and the maximum is 3.
    "exact": {
        "kernel": np.array([[3, 0, 0, -3], [0, 3, 0, 0], [0, 0, -3, 0]], np.float32),
        "bias": np.array([2, -2, 0, 1], np.float32),
        "scale": np.array([-2], np.float32),
    },
    "zeros": {
        "kernel": np.zeros((3, 4), np.float32),
        "bias": np.zeros(4, np.float32),
        "scale": np.zeros(1, np.float32),
    },
    # Three axes, for norms over some of them; one unit is dead.
    "conv": {
        "kernel": (_RNG.standard_normal((2, 3, 4)) * [0.1, 1, 10, 0]).astype(np.float32)
    },
}


def case(function, tree, arguments, outputs, **extra) -> dict:
    """One record: what was called on which tree, and what came back."""
    words = " ".join(f"{name}={value}" for name, value in arguments.items())
    return {
        "name": f"{function} {tree} {words}",
        "function": function,
        "arguments": arguments,
        "inputs": _lists(TREES[tree]),
        "outputs": _lists(outputs),
        **extra,
    }


def draw(name, preset, arguments, values, path, shapes, **extra) -> dict:
    """One draw: its law, and which of optclip's it is to be compared with."""
    values = np.asarray(values, np.float64)
    return {
        "name": name,
        "preset": preset,
        "arguments": arguments,
        "path": path,
        "shapes": shapes,
        "count": values.size,
        "mean": values.mean(),
        "stddev": values.std(),
        "largest": np.abs(values).max(),
        "zeros": float((values == 0).mean()),
        "deciles": np.quantile(values, np.arange(1, 10) / 10).tolist(),
        **extra,
    }


def write(script: str, versions: dict[str, str], cases: list[dict], **extra) -> None:
    """Writes `make_<library>.py`'s cases to `<library>.json` beside it."""
    path = pathlib.Path(script)
    path = path.with_name(path.stem.removeprefix("make_") + ".json")
    path.write_text(_text({"versions": versions, **extra, "cases": cases}) + "\n")


def _lists(tree) -> dict[str, list]:
    """The same tree as nested lists, refusing anything that is not float32."""
    leaves = {name: np.asarray(leaf) for name, leaf in tree.items()}
    for name, leaf in leaves.items():
        if leaf.dtype != np.float32:
            raise TypeError(f"{name} has dtype {leaf.dtype}, expected float32.")
    return {name: leaf.tolist() for name, leaf in leaves.items()}


def _text(value, margin: str = "") -> str:
    """JSON with one array to a line; a NaN or an infinity raises."""
    inner = margin + " "
    if isinstance(value, dict) and any(
        isinstance(v, dict | list) for v in value.values()
    ):
        rows = [f"{inner}{json.dumps(k)}: {_text(v, inner)}" for k, v in value.items()]
        return "{\n" + ",\n".join(rows) + f"\n{margin}}}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        rows = [inner + _text(v, inner) for v in value]
        return "[\n" + ",\n".join(rows) + f"\n{margin}]"
    return json.dumps(value, allow_nan=False)
