"""Law 9: what a rule sends under `jit` on a mesh, where XLA places the collectives.

No array is gathered, and the number of all-reduces does not grow with the leaves. They
are counted in branches too: the second pass holds the sums once more.
"""

import functools

import jax
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tests.laws.collectives import Collectives, of_update
from tests.laws.table import ROWS, Row, rows

AXIS_TYPES = [
    pytest.param(AxisType.Auto, id="auto"),
    pytest.param(AxisType.Explicit, id="explicit"),
]
BY_NAME = {row.name: row for row in ROWS}
# One of each kind of group: of all leaves, inside of a leaf, elements; and a wrapper.
SAMPLE = (
    "clip_by_global_norm",
    "adaptive_grad_clip",
    "second_moment_clip",
    "skip_step",
)
SPECS = [P("data"), P(None, "model"), P(None, ("data", "model")), P()]
WIDTH = 16


@pytest.fixture(autouse=True)
def _on_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@functools.cache
def _optax(units: bool, spec: P) -> int:
    """All-reduces of Optax's rule of the kind; its AGC knows no Explicit mesh."""
    tx = optax.adaptive_grad_clip(0.01) if units else optax.clip_by_global_norm(1.0)
    return len(of_update(tx, 2, spec=spec).everywhere)


def _most(row: Row, spec: P) -> int:
    """How many all-reduces a rule may have."""
    split = [axis for axis in spec if axis is not None]
    match row.oracle["grouping"]:
        # Totals, twice; whether they are good; the furthest over, its numbers, a count.
        case "unit":
            return _optax(True, spec) + 5
        case "example":  # groups of one leading axis, else like units
            return 6
        case "element":  # flags for the counters, where there are some
            return len(split) if row.has_metrics is True else 0
    return row.sums * _optax(False, spec)


def _numbers(row: Row, leaves: int) -> int:
    """How many numbers they may send: a few for each leaf, or for each of its units."""
    each = {"unit": 2 * WIDTH, "example": WIDTH}.get(row.oracle["grouping"], 2)
    return leaves * (2 * each + 8)


def _check(row: Row, found: Collectives, leaves: int, spec: P):
    assert {sent.kind for sent in found.everywhere} <= {"all-reduce"}
    assert len(found.everywhere) <= _most(row, spec)
    assert sum(sent.numbers for sent in found.everywhere) <= _numbers(row, leaves)


@pytest.mark.parametrize("axis_type", AXIS_TYPES)
@pytest.mark.parametrize(
    "row", rows("clip", "enlarging", "adaptive", "elementwise", "measuring", "wrapper")
)
def test_collectives_do_not_grow_with_the_leaves(row, axis_type):
    spec = P("data", "model")
    few, more = (of_update(row.build(0.5), n, axis_type) for n in (2, 12))
    _check(row, few, 2, spec)
    _check(row, more, 12, spec)
    assert len(more.ordinary) == len(few.ordinary)
    assert len(more.rare) == len(few.rare)


@pytest.mark.parametrize("name", SAMPLE)
def test_nor_with_many_leaves(name):
    row, spec = BY_NAME[name], P("data", "model")
    _check(row, of_update(row.build(0.5), 64), 64, spec)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("name", SAMPLE)
def test_collectives_of_other_specs(name, spec):
    row = BY_NAME[name]
    found = of_update(row.build(0.5), 12, spec=spec)
    _check(row, found, 12, spec)
    assert (spec == P()) == (not found.everywhere)
