"""Clips with PyTorch's `clip_grad_norm_` and `clip_grad_value_` into `torch.json`.

Run as `python tests/golden/make_torch.py`, in an environment with torch and NumPy.
The norm that `clip_grad_norm_` returns is kept with the clipped gradients.
"""

import numpy as np
import torch
from inputs import TREES, case, write

# Norm type -> the limit for the tree of integers: its norm, but below it for p = 3,
# where the norm is no float32 number.
_NORM_TYPES = {"1": 19.0, "2": 7.0, "3": 5.0, "inf": 3.0}
_NORM_CASES = [
    ("moderate", 1.0),
    ("moderate", 100.0),
    ("moderate", 1e-8),
    ("mixed", 0.25),
    # Where the 1e-6 that PyTorch adds to the norm is all that counts.
    ("tiny", 1e-8),
    ("tiny", 1.0),
    ("large", 1.0),
    ("zeros", 1.0),
]
_VALUE_CASES = [
    ("moderate", 0.3),
    ("moderate", 100.0),
    ("mixed", 0.3),
    ("exact", 2.0),
    ("tiny", 1e-8),
    ("large", 0.3),
]


def _parameters(tree: str) -> dict[str, torch.nn.Parameter]:
    """Parameters whose gradients are the tree's leaves."""
    parameters = {}
    for name, leaf in TREES[tree].items():
        parameters[name] = torch.nn.Parameter(torch.zeros(leaf.shape))
        parameters[name].grad = torch.from_numpy(leaf.copy())
    return parameters


def _gradients(parameters: dict[str, torch.nn.Parameter]) -> dict[str, np.ndarray]:
    return {name: parameter.grad.numpy() for name, parameter in parameters.items()}


def _by_norm(tree: str, max_norm: float, norm_type: str) -> dict:
    parameters = _parameters(tree)
    norm = torch.nn.utils.clip_grad_norm_(
        parameters.values(), max_norm, norm_type=float(norm_type)
    )
    arguments = {"max_norm": max_norm, "norm_type": norm_type}
    outputs = _gradients(parameters)
    return case("clip_grad_norm_", tree, arguments, outputs, norm=norm.item())


def _by_value(tree: str, clip_value: float) -> dict:
    parameters = _parameters(tree)
    torch.nn.utils.clip_grad_value_(parameters.values(), clip_value)
    arguments = {"clip_value": clip_value}
    return case("clip_grad_value_", tree, arguments, _gradients(parameters))


def main() -> None:
    cases = [
        _by_norm(tree, max_norm, norm_type)
        for norm_type, exact in _NORM_TYPES.items()
        for tree, max_norm in [*_NORM_CASES, ("exact", exact)]
        # Cubes of 1e15 overflow float32: PyTorch's norm is infinite, its result zero.
        if (tree, norm_type) != ("large", "3")
    ]
    cases += [_by_value(*row) for row in _VALUE_CASES]
    write(__file__, {"torch": torch.__version__, "numpy": np.__version__}, cases)


if __name__ == "__main__":
    main()
