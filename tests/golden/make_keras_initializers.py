"""Draws with Keras' layers and initializers into `keras_initializers.json`.

Run as `KERAS_BACKEND=jax python tests/golden/make_keras_initializers.py`, in an
environment with keras and jax. What is kept of a draw is its law: mean, deviation,
largest magnitude and deciles, with the parameter's path and shapes as Flax has them.
"""

import jax
import keras
import numpy as np
from inputs import draw, write

_WIDE = {"fc/kernel": (128, 256), "fc/bias": (256,)}
_CONV = {"c/kernel": (3, 3, 32, 64), "c/bias": (64,)}
_WITHOUT_FANS = ("normal", "truncated_normal", "uniform", "zeros")


def _default(name: str, values, path: str, shapes: dict) -> dict:
    return draw(name, "keras_default", {}, np.asarray(values), path, shapes)


def _layers() -> list[dict]:
    """The layers as Keras builds them."""
    heads = {f"a/{n}/kernel": (256, 8, 32) for n in ("query", "key", "value")}
    heads |= {f"a/{n}/bias": (8, 32) for n in ("query", "key", "value")}
    heads |= {"a/out/kernel": (8, 32, 256), "a/out/bias": (256,)}
    cases = []
    for name, layer, inputs, shapes in [
        ("Dense", keras.layers.Dense(256), (1, 128), _WIDE),
        ("Conv2D", keras.layers.Conv2D(64, 3), (1, 9, 9, 32), _CONV),
        (
            "Conv1D",
            keras.layers.Conv1D(64, 5),
            (1, 9, 32),
            {"c/kernel": (5, 32, 64), "c/bias": (64,)},
        ),
    ]:
        layer.build(inputs)
        for path, values in zip(shapes, layer.weights, strict=True):
            cases.append(_default(f"{name} {path}", values, path, shapes))
    up = keras.layers.Conv2DTranspose(64, 3)
    up.build((1, 9, 9, 32))
    shapes = {"up/kernel": (3, 3, 32, 64), "up/bias": (64,)}
    cases.append(_default("Conv2DTranspose", up.kernel, "up/kernel", shapes))
    embedding = keras.layers.Embedding(1000, 64)
    embedding.build((1,))
    shapes = {"e/embedding": (1000, 64)}
    cases.append(_default("Embedding", embedding.weights[0], "e/embedding", shapes))
    attention = keras.layers.MultiHeadAttention(8, 32)
    attention.build((1, 7, 256), (1, 7, 256))
    for weight in attention.weights:
        layer, kind = weight.path.split("/")[-2:]
        layer = "out" if "output" in layer else layer
        path = f"a/{layer}/{kind}"
        cases.append(_default(f"MultiHeadAttention {path}", weight, path, heads))
    cell = keras.layers.LSTMCell(128)
    cell.build((1, 64))
    gates = {f"{x}{g}/kernel": (n, 128) for x, n in (("i", 64), ("h", 128))
             for g in "ifgo"}  # fmt: skip
    gates |= {f"h{g}/bias": (128,) for g in "ifgo"}
    # One bias of four gates there: input, forget, candidate, output.
    forget, candidate = np.split(np.asarray(cell.bias), 4)[1:3]
    cases.append(_default("LSTMCell forget bias", forget, "hf/bias", gates))
    cases.append(_default("LSTMCell candidate bias", candidate, "hg/bias", gates))
    norm = keras.layers.BatchNormalization()
    norm.build((1, 256))
    shapes = {"n/scale": (256,), "n/bias": (256,)}
    cases.append(_default("BatchNormalization gamma", norm.gamma, "n/scale", shapes))
    cases.append(_default("BatchNormalization beta", norm.beta, "n/bias", shapes))
    return cases


def _functions() -> list[dict]:
    """`keras.initializers`, which cut normals at two deviations."""
    of = keras.initializers
    truncated = {"stddev": 0.05, "corrected": False}
    cases = []
    for name, init, arguments in [
        ("xavier_uniform", of.GlorotUniform(0), {}),
        ("he_uniform", of.HeUniform(0), {}),
        ("lecun_uniform", of.LecunUniform(0), {}),
        ("lecun_normal", of.LecunNormal(0), {}),
        ("orthogonal", of.Orthogonal(2.0, 0), {"gain": 2.0}),
        ("normal", of.RandomNormal(0.0, 0.05, 0), {"stddev": 0.05}),
        ("truncated_normal", of.TruncatedNormal(0.0, 0.05, 0), truncated),
        ("uniform", of.RandomUniform(0.0, 0.05, 0), {"scale": 0.05}),
        ("zeros", of.Zeros(), {}),
    ]:
        trees = [("fc/kernel", _WIDE), ("c/kernel", _CONV)]
        for path, shapes in trees[: 1 if name in _WITHOUT_FANS else 2]:
            values = np.asarray(init(shapes[path], "float32"))
            cases.append(draw(f"{name} {path}", name, arguments, values, path, shapes))
    eye = np.asarray(of.Identity(2.0)((128, 256), "float32"))
    arguments = {"gain": 2.0}
    cases.append(draw("identity", "identity", arguments, eye, "fc/kernel", _WIDE))
    return cases


def main() -> None:
    if keras.backend.backend() != "jax":
        raise RuntimeError("the recorded values come from Keras' JAX backend.")
    keras.utils.set_random_seed(0)
    versions = {"keras": keras.__version__, "jax": jax.__version__}
    write(__file__, versions, [*_layers(), *_functions()])


if __name__ == "__main__":
    main()
