"""The soak, shorter, and what its committed run found."""

import pytest

from benchmarks import soak
from tests.laws.table import PROJECTIONS, QUICK_ROWS, ROWS


@pytest.fixture(scope="module")
def found() -> soak.Soaked:
    """500 steps of one row of each kind of block."""
    rows = [row for row in ROWS if row.name in QUICK_ROWS]
    constraints = [row for row in PROJECTIONS if row.name in QUICK_ROWS]
    return soak.Soak(rows, constraints).run(500)


def test_500_steps_leak_nothing_compile_once_and_count_exactly(found):
    assert soak.faults(found) == []
    assert len(found.rows) == len(QUICK_ROWS)
    assert min(found.drawn.values()) >= 10


def test_a_wrong_count_would_be_noticed(found):
    for name, row in found.rows.items():
        for field in row.keys() - {"over"}:
            wrong = found.rows | {name: row | {field: row[field] + 1}}
            assert soak.faults(found._replace(rows=wrong)), (name, field)
    assert soak.faults(found._replace(traces=2))
    assert soak.faults(found._replace(lowerings=1))
    assert soak.faults(found._replace(alive=[*found.alive, found.alive[0] + 1]))


def test_what_is_saved_is_what_was_found(found, tmp_path):
    path = tmp_path / "soak.json"
    other = found._replace(rows={"clip": found.rows["clip_by_value"]})
    soak.save([found, other], path)
    assert soak.load(path) == [found, other]


def test_the_committed_runs_were_long_and_found_no_fault():
    committed = soak.load()
    for run in committed:
        assert run.steps >= 20_000
        assert soak.faults(run) == []
    # Of a new row: python -m benchmarks.soak --new --save
    assert soak.left_out(committed) == ([], [])
