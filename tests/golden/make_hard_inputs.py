"""Clips by a global norm on hard inputs with four libraries, into `hard_inputs.json`.

Run as `KERAS_BACKEND=jax python tests/golden/make_hard_inputs.py`, in an environment
with torch, tensorflow, keras and optax. What is kept is the first two elements of what
came out, as text, so that NaN and infinity can be told.
"""

import importlib
import json
import pathlib

import jax.numpy as jnp
import keras
import numpy as np
import optax
import tensorflow as tf
import torch

# name -> dtype, the leaves, the limit
CASES = {
    "large": ("float32", [[3e20, 4e20]], 1.0),
    "small": ("float32", [[3e-25, 4e-25]], 1e-26),
    "float16": ("float16", [[300.0, 400.0]], 1.0),
    "bfloat16": ("bfloat16", [[1.0]] * 1000, 1.0),
    "zero": ("float32", [[0.0, 0.0]], 0.0),
    "infinity": ("float32", [[np.inf, 1.0]], 1.0),
}


def _torch(dtype, leaves, limit):
    parameters = []
    for leaf in leaves:
        grad = torch.tensor(leaf, dtype=getattr(torch, dtype))
        parameters.append(torch.nn.Parameter(torch.zeros_like(grad)))
        parameters[-1].grad = grad
    torch.nn.utils.clip_grad_norm_(parameters, limit)
    return [x.grad.float().numpy() for x in parameters]


def _tensorflow(dtype, leaves, limit):
    clipped, _ = tf.clip_by_global_norm([tf.constant(x, dtype) for x in leaves], limit)
    return [tf.cast(x, "float32").numpy() for x in clipped]


def _keras(dtype, leaves, limit):
    if limit == 0:  # which Keras takes as no clip
        return None
    optimizer = keras.optimizers.SGD(global_clipnorm=limit)
    return optimizer._clip_gradients([jnp.array(x, dtype) for x in leaves])


def _optax(dtype, leaves, limit):
    tx = optax.clip_by_global_norm(limit)
    return tx.update([jnp.array(x, dtype) for x in leaves], tx.init(None))[0]


def _text(outputs) -> list[str] | None:
    if outputs is None:
        return None
    first = np.concatenate([np.asarray(x, np.float32) for x in outputs[:2]])[:2]
    return [f"{x:.3g}" for x in first.tolist()]


def main() -> None:
    libraries = {
        "torch": _torch,
        "tensorflow": _tensorflow,
        "keras": _keras,
        "optax": _optax,
    }
    found = {
        name: {library: _text(clip(*case)) for library, clip in libraries.items()}
        for name, case in CASES.items()
    }
    versions = {n: importlib.import_module(n).__version__ for n in libraries}
    file = pathlib.Path(__file__).with_name("hard_inputs.json")
    lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in found.items()]
    cases = ",\n".join(lines)
    file.write_text(
        f'{{\n "versions": {json.dumps(versions)},\n "outputs": {{\n{cases}\n }}\n}}\n'
    )


if __name__ == "__main__":
    main()
