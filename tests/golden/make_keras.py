"""Clips with Keras' optimizer arguments, and its constraints, into `keras.json`.

Run as `KERAS_BACKEND=jax python tests/golden/make_keras.py`, in an environment with
keras and jax. `clipnorm` bounds each variable on its own, `global_clipnorm` all of
them together and `clipvalue` each element. The optimizer clips before it does anything
else, so its own clipping method is called alone and no step is taken. A constraint is
called on each variable.
"""

import jax
import keras
import numpy as np
from inputs import TREES, case, write

_CASES = [
    ("moderate", {"clipnorm": 1.0}),
    ("moderate", {"clipnorm": 100.0}),
    ("moderate", {"clipnorm": 1e-8}),
    ("mixed", {"clipnorm": 0.25}),
    ("exact", {"clipnorm": 6.0}),
    ("exact", {"clipnorm": 3.0}),
    ("tiny", {"clipnorm": 1e-8}),
    ("tiny", {"clipnorm": 1.0}),
    ("large", {"clipnorm": 1.0}),
    ("zeros", {"clipnorm": 1.0}),
    ("moderate", {"global_clipnorm": 1.0}),
    ("moderate", {"global_clipnorm": 100.0}),
    ("moderate", {"global_clipnorm": 1e-8}),
    ("mixed", {"global_clipnorm": 0.25}),
    ("exact", {"global_clipnorm": 7.0}),
    ("tiny", {"global_clipnorm": 1e-8}),
    ("tiny", {"global_clipnorm": 1.0}),
    ("large", {"global_clipnorm": 1.0}),
    ("zeros", {"global_clipnorm": 1.0}),
    ("moderate", {"clipvalue": 0.3}),
    ("moderate", {"clipvalue": 100.0}),
    ("mixed", {"clipvalue": 0.3}),
    ("exact", {"clipvalue": 2.0}),
    ("tiny", {"clipvalue": 1e-8}),
    ("large", {"clipvalue": 0.3}),
]

_CONSTRAINTS = {
    "MaxNorm": keras.constraints.MaxNorm,
    "UnitNorm": keras.constraints.UnitNorm,
    "MinMaxNorm": keras.constraints.MinMaxNorm,
    "NonNeg": keras.constraints.NonNeg,
}
_CONSTRAINED = [
    ("MaxNorm", "moderate", {"max_value": 1.0, "axis": [0]}),
    ("MaxNorm", "exact", {"max_value": 2.0, "axis": [0]}),
    ("MaxNorm", "mixed", {"max_value": 0.5, "axis": [0]}),
    ("MaxNorm", "conv", {"max_value": 2.0, "axis": [0, 1]}),
    ("UnitNorm", "moderate", {"axis": [0]}),
    ("UnitNorm", "conv", {"axis": [0, 1]}),
    ("MinMaxNorm", "moderate", {"min_value": 1.0, "max_value": 1.5, "axis": [0]}),
    (
        "MinMaxNorm",
        "moderate",
        {"min_value": 1.0, "max_value": 1.5, "rate": 0.25, "axis": [0]},
    ),
    ("NonNeg", "moderate", {}),
    ("NonNeg", "exact", {}),
]


def _constrained(name: str, tree: str, arguments: dict) -> dict:
    constraint = _CONSTRAINTS[name](**arguments)
    leaves = TREES[tree].items()
    outputs = {path: np.asarray(constraint(leaf)) for path, leaf in leaves}
    return case(name, tree, arguments, outputs)


def _clipped(tree: str, arguments: dict[str, float]) -> dict:
    optimizer = keras.optimizers.SGD(**arguments)
    leaves = [keras.ops.convert_to_tensor(leaf) for leaf in TREES[tree].values()]
    outputs = optimizer._clip_gradients(leaves)
    (argument,) = arguments
    outputs = dict(zip(TREES[tree], map(np.asarray, outputs), strict=True))
    return case(argument, tree, arguments, outputs)


def main() -> None:
    if keras.backend.backend() != "jax":
        raise RuntimeError("the recorded values come from Keras' JAX backend.")
    versions = {"keras": keras.__version__, "jax": jax.__version__}
    cases = [_clipped(*row) for row in _CASES]
    cases += [_constrained(*row) for row in _CONSTRAINED]
    write(__file__, versions, cases)


if __name__ == "__main__":
    main()
