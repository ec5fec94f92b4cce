"""Clips with Keras' optimizer arguments into `keras.json`.

Run as `KERAS_BACKEND=jax python tests/golden/make_keras.py`, in an environment with
keras and jax. `clipnorm` bounds each variable on its own, `global_clipnorm` all of
them together and `clipvalue` each element. The optimizer clips before it does anything
else, so its own clipping method is called alone and no step is taken.
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
    write(__file__, versions, [_clipped(*row) for row in _CASES])


if __name__ == "__main__":
    main()
