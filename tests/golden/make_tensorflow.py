"""Clips with TensorFlow's three clipping functions into `tensorflow.json`.

Run as `python tests/golden/make_tensorflow.py`, in an environment with tensorflow.
`tf.clip_by_value` and `tf.clip_by_norm` take one tensor and are mapped over the leaves;
`axes` are the axes that one norm is taken over. `tf.clip_by_global_norm` takes them all
and also returns the norm, which is kept.
"""

import numpy as np
import tensorflow as tf
from inputs import TREES, case, write

_VALUE_CASES = [
    ("moderate", -0.3, 0.3),
    ("moderate", -0.1, 0.7),
    ("moderate", 0.2, 0.5),
    ("moderate", -100.0, 100.0),
    ("mixed", -0.1, 0.7),
    ("exact", -3.0, 2.0),
    ("tiny", -1e-8, 2e-9),
    ("large", -0.1, 0.7),
]
_NORM_CASES = [
    ("moderate", 1.0, None),
    ("moderate", 100.0, None),
    ("mixed", 0.25, None),
    ("exact", 6.0, None),
    ("exact", 3.0, None),
    ("tiny", 1e-8, None),
    ("large", 1.0, None),
    ("zeros", 1.0, None),
    ("moderate", 1.0, [0]),
    ("moderate", 1.0, [-1]),
    ("exact", 3.0, [0]),
    ("tiny", 1e-8, [0]),
    ("large", 1.0, [0]),
    ("zeros", 1.0, [0]),
    ("conv", 1.0, [0]),
    ("conv", 1.0, [0, 1]),
    ("conv", 1.0, [-1]),
]
_GLOBAL_NORM_CASES = [
    ("moderate", 1.0),
    ("moderate", 100.0),
    ("moderate", 1e-8),
    ("mixed", 0.25),
    ("exact", 7.0),
    ("tiny", 1e-8),
    ("tiny", 1.0),
    ("large", 1.0),
    ("zeros", 1.0),
]


def _by_value(tree: str, low: float, high: float) -> dict:
    outputs = {
        name: tf.clip_by_value(leaf, low, high) for name, leaf in TREES[tree].items()
    }
    arguments = {"clip_value_min": low, "clip_value_max": high}
    return case("clip_by_value", tree, arguments, outputs)


def _by_norm(tree: str, clip_norm: float, axes: list[int] | None) -> dict:
    outputs = {
        name: tf.clip_by_norm(leaf, clip_norm, axes)
        for name, leaf in TREES[tree].items()
    }
    return case("clip_by_norm", tree, {"clip_norm": clip_norm, "axes": axes}, outputs)


def _by_global_norm(tree: str, clip_norm: float) -> dict:
    clipped, norm = tf.clip_by_global_norm(list(TREES[tree].values()), clip_norm)
    outputs = dict(zip(TREES[tree], clipped, strict=True))
    arguments = {"clip_norm": clip_norm}
    return case("clip_by_global_norm", tree, arguments, outputs, norm=float(norm))


def main() -> None:
    cases = [_by_value(*row) for row in _VALUE_CASES]
    cases += [_by_norm(*row) for row in _NORM_CASES]
    cases += [_by_global_norm(*row) for row in _GLOBAL_NORM_CASES]
    versions = {"tensorflow": tf.__version__, "numpy": np.__version__}
    write(__file__, versions, cases)


if __name__ == "__main__":
    main()
