"""Runs the other libraries' loops of docs/migration into `migration.json`.

Run as `python tests/golden/make_migration.py pytorch timm keras tensorflow`, with the
pages whose libraries are installed; Keras' values are those of its JAX backend. Blocks
of a page run in one namespace, as a reader would run them. A block that makes `losses`
is kept as it stands, with the losses and norms it made, so that a page cannot change
without being recorded again.
"""

import importlib
import json
import os
import pathlib
import re
import sys

LIBRARIES = {
    "pytorch": ["torch"],
    "timm": ["timm", "torch"],
    "keras": ["keras", "jax"],
    "tensorflow": ["tensorflow", "keras"],
}
HERE = pathlib.Path(__file__).parent
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def _recorded(page: str) -> dict:
    text = (HERE.parents[1] / f"docs/migration/{page}.md").read_text()
    loops, namespace = [], {}
    for block in BLOCK.findall(text):
        if "losses" not in block:  # a fragment
            continue
        exec(block, namespace)
        values = {name: namespace.get(name, []) for name in ("losses", "norms")}
        loops.append({"program": block, **values})
    versions = {
        name: importlib.import_module(name).__version__ for name in LIBRARIES[page]
    }
    return {"versions": versions, "loops": loops}


def main() -> None:
    file = HERE / "migration.json"
    pages = json.loads(file.read_text()) if file.exists() else {}
    for page in sys.argv[1:]:
        backend = "jax" if page == "keras" else "tensorflow"
        if os.environ.setdefault("KERAS_BACKEND", backend) != backend:
            raise RuntimeError("record keras and tensorflow in two runs.")
        pages[page] = _recorded(page)
    file.write_text(json.dumps(pages, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
