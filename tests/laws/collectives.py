"""What a compiled program sends between devices, and a table of it for every rule.

`python -m tests.laws.collectives` prints the table of the documentation.
"""

from __future__ import annotations

import functools
import math
import operator
import os
import re
from typing import Any, NamedTuple

if __name__ == "__main__":  # before JAX looks for devices
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optclip
from optclip import groupings, thresholds
from tests.laws.table import ROWS
from tests.untyped import untyped

KINDS = (
    "all-reduce", "all-gather", "all-to-all", "collective", "reduce-scatter",
    "ragged-all-to-all", "send", "recv",
)  # fmt: skip


SPEC = P("data", "model")


class Sent(NamedTuple):
    """One collective: its kind, how many numbers each device gives, and their bytes."""

    kind: str
    numbers: int
    bytes: int


class Collectives(NamedTuple):
    """Those of an ordinary step, and those of branches that are rarely taken."""

    ordinary: list[Sent]
    rare: list[Sent]

    @property
    def everywhere(self) -> list[Sent]:
        return self.ordinary + self.rare


def collectives(text: str) -> Collectives:
    """The collectives of an optimized program, a tuple of arrays sent as one."""
    called: dict[str, set[str]] = {}
    sent: dict[str, list[Sent]] = {}
    entry = name = ""
    for line in text.splitlines():
        start = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if start:
            name = start[2]
            entry = name if start[1] else entry
            called[name], sent[name] = set(), []
        elif name:
            found = re.search(rf" = (.*?) ({'|'.join(KINDS)})[\w-]*\(", line)
            if found and "-done(" not in line:
                arrays = re.findall(r"(\w+)\[([\d,]*)\]", found[1])
                sizes = [math.prod(map(int, re.findall(r"\d+", s))) for _, s in arrays]
                bits = [int(re.sub(r"\D", "", dtype) or 8) for dtype, _ in arrays]
                total = sum(map(operator.mul, sizes, bits)) // 8
                sent[name].append(Sent(found[2], sum(sizes), total))
            if " conditional(" not in line:
                keys = r"(?:to_apply|calls|body|condition)=%?([\w.-]+)"
                called[name].update(re.findall(keys, line))
    reached, todo = set(), [entry]
    while todo:
        current = todo.pop()
        if current not in reached:
            reached.add(current)
            todo.extend(called.get(current, ()))
    ordinary = [one for name in reached for one in sent.get(name, [])]
    rare = [one for name in sent if name not in reached for one in sent[name]]
    return Collectives(ordinary, rare)


@functools.cache
def mesh_of(axis_type: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh(
        (4, 2),
        ("data", "model"),
        axis_types=(axis_type,) * 2,
        devices=jax.devices("cpu")[:8],
    )


def of_update(
    tx: optax.GradientTransformation,
    leaves: int,
    axis_type: AxisType = AxisType.Auto,
    spec: P = SPEC,
    shape: tuple[int, int] = (16, 16),
    options: dict[str, Any] | None = None,
) -> Collectives:
    """Of one jitted update of equal kernels, whose state lies as they do.

    The options are XLA's.
    """
    mesh = mesh_of(axis_type)

    def placed(leaf: Any) -> Any:
        # Units lie along the last axis. What is no kernel's or unit's is everywhere.
        own = spec if leaf.shape == shape else P()
        if leaf.shape == (1, shape[1]):
            own = P(None, *spec[1:])
        sharding = NamedSharding(mesh, own)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    with jax.set_mesh(mesh):
        kernel = jax.ShapeDtypeStruct(shape, jnp.float32)
        tree = {f"{n:02}": {"kernel": placed(kernel)} for n in range(leaves)}
        state = jax.tree.map(placed, jax.eval_shape(tx.init, tree))
        update = jax.jit(untyped(tx.update))
        program = update.lower(tree, state, tree).compile(options)
        return collectives(program.as_text() or "")


RULES = [
    *((row.name, row.build(1.0)) for row in ROWS if not row.variant),
    ("adagc, per_unit", optclip.adagc(grouping=groupings.per_unit())),
    (
        "adaptive_grad_clip, per_leaf",
        optclip.adaptive_grad_clip(grouping=groupings.per_leaf()),
    ),
    (
        "monitor, per_unit",
        optclip.clip_by(thresholds.unlimited(), grouping=groupings.per_unit()),
    ),
    ("optax.clip_by_global_norm", optax.clip_by_global_norm(1.0)),
    ("optax.adaptive_grad_clip", optax.adaptive_grad_clip(0.01)),
]


def table(leaves: int = 12, shape: tuple[int, int] = (1024, 1024)) -> str:
    """A row a rule: collectives and bytes of a step, and of the rare branch."""
    lines = [
        "| rule | collectives | bytes | more in the rare branch | bytes |",
        "|---|---|---|---|---|",
    ]
    for name, tx in RULES:
        cells = [f"`{name}`"]
        for part in of_update(tx, leaves, shape=shape):
            cells += [str(len(part)), f"{sum(one.bytes for one in part):,}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
