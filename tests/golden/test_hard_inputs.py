"""What other libraries make of hard inputs, and what is right; optclip gives that.

`make_hard_inputs.py` recorded the others; docs/guarantees.md shows its table.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import optclip
from tests import pages
from tests.untyped import untyped

FILE = pages.ROOT / "tests/golden/hard_inputs.json"
RECORDED = json.loads(FILE.read_text())["outputs"]
LIBRARIES = {
    "torch": "PyTorch",
    "tensorflow": "TensorFlow",
    "keras": "Keras",
    "optax": "Optax",
}

# name -> (in words, dtype, leaves, limit, what is right)
NAN = ("nan", "nan")
CASES = {
    "large": ("3e20, 4e20", "float32", [[3e20, 4e20]], 1.0, ("0.6", "0.8")),
    "small": (
        "3e-25, 4e-25, limit 1e-26",
        "float32",
        [[3e-25, 4e-25]],
        1e-26,
        ("6e-27", "8e-27"),
    ),
    "float16": ("300, 400", "float16", [[300.0, 400.0]], 1.0, ("0.6", "0.8")),
    "bfloat16": (
        "1000 leaves of 1",
        "bfloat16",
        [[1.0]] * 1000,
        1.0,
        ("0.03162", "0.03162"),
    ),
    "zero": ("0, 0, limit 0", "float32", [[0.0, 0.0]], 0.0, ("0", "0")),
    "infinity": ("inf, 1", "float32", [[np.inf, 1.0]], 1.0, NAN),
}


@pytest.mark.parametrize("name", CASES)
def test_optclip_gives_what_is_right(name):
    _, dtype, leaves, limit, right = CASES[name]
    grads = [jnp.array(leaf, dtype) for leaf in leaves]
    clipped, _ = untyped(optclip.clip_by_global_norm(limit)).update(grads, None)
    first = np.concatenate([np.asarray(x, np.float64) for x in clipped[:2]])[:2]
    half = 2.0**-8 if dtype in ("bfloat16", "float16") else 1e-6
    np.testing.assert_allclose(first, np.array(right, float), rtol=half)


def table() -> str:
    """The table of docs/guarantees.md."""
    rows = [
        "| gradient | dtype | right | " + " | ".join(LIBRARIES.values()) + " |",
        "|---" * (3 + len(LIBRARIES)) + "|",
    ]
    for name, (words, dtype, _, _, right) in CASES.items():
        row = [words, dtype, ", ".join(right)]
        for library in LIBRARIES:
            found = RECORDED[name][library]
            row.append("no clip" if found is None else ", ".join(found))
        rows.append("| " + " | ".join(row) + " |")
    return "\n".join(rows)


def test_the_page_shows_what_was_recorded():
    assert table() in (pages.ROOT / "docs/guarantees.md").read_text()


def test_every_other_library_fails_one():
    """Were all of them right everywhere, the table would say nothing."""
    for library in LIBRARIES:
        wrong = [
            name
            for name, (*_, right) in CASES.items()
            if RECORDED[name][library] not in (None, list(right))
        ]
        assert wrong, library
