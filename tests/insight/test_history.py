"""`history`, `explain`, and what `metrics` adds of the last step."""

import csv
import io
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip
from optclip import groupings, measures
from tests.untyped import untyped

SIZES = [(3.0, 4.0), (30.0, 4.0), (0.3, 40.0), (np.nan, 1.0), (3.0, np.inf)]


def walked(tx: Any, sizes: Any = SIZES, key: Any = None) -> Any:
    """The state after updates whose two leaves have these sizes."""
    params = {"a": jnp.zeros(1), "b": {"c": jnp.zeros(1)}}
    update, state = jax.jit(tx.update), tx.init(params)
    for a, c in sizes:
        updates = {"a": jnp.array([a]), "b": {"c": jnp.array([c])}}
        state = update(updates, state, params)[1]
    return state


def recorded(sizes: Any = SIZES, **options: Any) -> Any:
    return walked(optclip.clip_by_global_norm(6.0, record=8, **options), sizes)


def test_nonfinite_leaves_show():
    past = untyped(optclip.history(recorded()))
    np.testing.assert_array_equal(
        past.nonfinite, [[0, 0], [0, 0], [0, 0], [1, 0], [0, 1]]
    )
    np.testing.assert_array_equal(past.clipped, [0, 1, 1, 0, 0])
    assert np.isnan(past.size[3]) and past.sizes[3, 1] == 1.0


def test_as_csv(tmp_path):
    past = untyped(optclip.history(recorded()))
    text = past.to_csv(tmp_path / "past.csv")
    assert (tmp_path / "past.csv").read_text() == text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert list(rows[0]) == ["step", "size", "limit", "clipped", "size/a", "size/b/c"]
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5"]
    for column, values in (("size/a", past.sizes[:, 0]), ("size", past.size)):
        np.testing.assert_array_equal(
            np.array([row[column] for row in rows], np.float32), values
        )
    assert rows[2]["size/a"] == "0.3" and rows[1]["clipped"] == "1"


def test_as_json(tmp_path):
    past = untyped(optclip.history(recorded()))
    text = past.to_json(tmp_path / "past.json")
    assert (tmp_path / "past.json").read_text() == text

    def refused(name: str) -> None:
        raise AssertionError(name)

    found = json.loads(text, parse_constant=refused)
    assert found["sizes"][2:] == [[0.3, 40.0], [None, 1.0], [3.0, None]]
    assert found["names"] == ["a", "b/c"] and found["clipped"][1] is True
    assert found["limit"] == [6.0] * 5 and found["ratios"] is None


def test_ratios_have_columns():
    tx = untyped(optclip.monitor(record=2, ratios=True))
    params = {"w": jnp.array([2.0])}
    past = untyped(optclip.history(tx.update({"w": jnp.array([1.0])}, None, params)[1]))
    assert past.to_csv().splitlines() == [
        "step,size,limit,clipped,size/w,ratio/w",
        "1,1.0,inf,0,1.0,0.5",
    ]
    assert json.loads(past.to_json())["ratios"] == [[0.5]]


def test_several_recorders():
    tx = optax.named_chain(
        ("clip", optclip.clip_by_global_norm(6.0, record=2)),
        ("rate", optax.scale(-0.5)),
        ("seen", optclip.monitor(measures.max_abs, record=3)),
    )
    past = untyped(optclip.history(walked(tx, SIZES[:2])))
    assert list(past) == ["clip", "seen"]
    np.testing.assert_allclose(past["seen"].size, [2.0, 2.9735], rtol=1e-4)
    assert past["seen"].measure == "max_abs" and np.isinf(past["seen"].limit).all()
    text = optclip.explain(walked(tx, SIZES[:2]))
    assert text.splitlines()[0] == "clip:" and "\nseen:\n  Steps 1 to 2: 0 of" in text


def test_before_the_first_step():
    past = untyped(optclip.history(recorded(())))
    assert past.sizes.shape == (0, 2) and past.names == ("a", "b/c")
    assert past.to_csv() == "step,size,limit,clipped,size/a,size/b/c\n"
    assert optclip.explain(recorded(())) == "No step is recorded yet."


def test_names_from_the_parameters():
    """They must be those that were recorded, or more, as beside a mask."""
    state = recorded()
    more = {"a": jnp.ones(1), "b": {"c": jnp.ones(1)}, "d": jnp.ones(2)}
    assert untyped(optclip.history(state, more)).names == ("a", "b/c")
    with pytest.raises(ValueError, match=r"history: params must have .*'b/c', got 'a'"):
        optclip.history(state, {"a": jnp.ones(1)})
    labels = groupings.per_label(lambda path: "all")
    state = walked(optclip.clip_by_norm(1.0, grouping=labels, record=2))
    assert untyped(optclip.history(state, more)).names == ("all",)
    lost = recorded()
    lost = lost._replace(
        recorder=lost.recorder._replace(labels=type(lost.recorder[0])())
    )
    with pytest.raises(ValueError, match=r"explain: params must have .*2 leaves, got"):
        optclip.explain(lost, more)


def test_nothing_to_read():
    for state in (optclip.clip_by_global_norm(1.0).init(jnp.ones(2)), (), None):
        with pytest.raises(
            ValueError, match="history: opt_state must hold a rule that"
        ):
            optclip.history(state)
    with pytest.raises(
        ValueError, match="explain: opt_state must have values, got tra"
    ):
        jax.jit(lambda state: len(optclip.explain(state)))(recorded())


# In words.


def test_explain():
    lines = optclip.explain(recorded()).splitlines()
    assert lines == [
        "Steps 1 to 5: 2 of 5 clipped (40 %), 2 not finite.",
        "Step 3: norm 40 against a limit of 6; b/c made 100 % of it.",
        "Step 2: norm 30.3 against a limit of 6; a made 98 % of it.",
        "Step 4: NaN first in a.",
    ]


@pytest.mark.parametrize(
    ("tx", "line"),
    [
        (
            optclip.clip_by_global_norm(99.0, record=3),
            "norm 40 against a limit of 99; ",
        ),
        (optclip.monitor(record=3), "Step 3: norm 40; b/c made 100 % of it."),
        (
            optclip.monitor(measures.lp(3), record=3),
            "Step 3: size 40; b/c made 100 % of it.",
        ),
        (
            optclip.monitor(measures.rms, record=3),
            "Step 3: RMS 28.3; the largest is b/c, 40.",
        ),
        (
            optclip.clip_by_norm(6.0, record=3),
            "Step 2: a had norm 30 against a limit of 6.",
        ),
        (
            optclip.clip_by_norm(6.0, grouping=groupings.per_unit(), record=3),
            "Step 3: a unit of b/c had norm 40 against a limit of 6.",
        ),
    ],
    ids=["within", "unlimited", "lp", "rms", "per leaf", "per unit"],
)
def test_explain_other_rules(tx, line):
    assert line in optclip.explain(walked(tx, SIZES[:3]))


def test_explain_what_is_not_finite():
    state = recorded([(2e38, 3e38), (np.inf, np.nan)])
    assert optclip.explain(state).splitlines()[1:] == [
        "Step 1: all leaves finite, and together beyond the range of numbers."
    ]
    state = recorded([(1.0, 1.0), (np.inf, np.nan)])
    assert optclip.explain(state).endswith(
        "Step 2: infinity first in a, and in 1 more."
    )
    assert "b/c" not in optclip.explain(walked(optclip.monitor(record=2), [(1.0, 0.0)]))


# In the metrics.


def test_metrics_of_leaves_and_labels():
    """Of the last step, without reading a value."""
    state = recorded(SIZES[:3])
    found = jax.jit(lambda s: optclip.metrics(s, sizes=True))(state)
    assert {**optclip.metrics(state)}.items() <= found.items()
    assert float(found["size/b/c"]) == 40.0
    assert set(found) - set(optclip.metrics(state)) == {"size/a", "size/b/c"}
    labels = groupings.per_label(lambda path: path[:1])
    tx = optax.chain(
        optclip.monitor(grouping=labels, record=1, ratios=True), optax.scale(1.0)
    )
    found = optclip.metrics(walked(tx, SIZES[:3]), ".", sizes=True)
    assert float(found["0.size.b"]) == 40.0 and np.isinf(found["0.ratio.b"])
    short = optclip.metrics(walked(tx, SIZES[:3]), short=True, sizes=True)
    assert float(short["size/b"]) == 40.0
    with pytest.raises(ValueError, match="metrics: sizes must be False where no rule"):
        optclip.metrics(optclip.monitor().init(jnp.ones(1)), sizes=True)


def test_two_recorders_in_the_metrics():
    tx = optax.chain(optclip.monitor(record=1), optclip.monitor(record=1))
    assert {"0/size/a", "1/size/a"} <= set(optclip.metrics(walked(tx), sizes=True))
    with pytest.raises(ValueError, match="short must be False where keys of two clips"):
        optclip.metrics(walked(tx), short=True, sizes=True)


@pytest.mark.parametrize(
    ("tx", "first"),
    [
        (optclip.monitor(record=1), np.inf),
        (optclip.spike_clip(record=1), np.inf),
        (optclip.clip_by_global_norm(0.0, record=1), 100.0),
    ],
    ids=["monitor", "spike_clip", "a limit of 0"],
)
def test_an_infinite_step_is_explained_without_a_warning(tx, first):
    _, state = tx.update(jnp.array([first]), None)
    said = optclip.explain(state)
    assert "Step 1: " in said and "the only leaf" in said


def test_groups_of_one_size_are_all_named():
    """The recorder has the limit of the one that is furthest over, not which it is."""
    limits = optclip.thresholds.per_path({"a": 10.0, "b": 1.0})
    tx = untyped(optclip.clip_by(limits, grouping=groupings.per_leaf(), record=4))
    _, state = tx.update({"a": jnp.array([5.0]), "b": jnp.array([5.0])}, None)
    assert "a or b had norm 5 against a limit of 1" in optclip.explain(state)
