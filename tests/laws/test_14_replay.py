"""Law 14: what replay says of sizes is what the rule does to updates of those sizes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip
from optclip import measures
from tests.choosing.histories import recorded
from tests.laws.table import ROWS, Row, rows

SHAPES = {"dense": {"bias": (4,), "kernel": (3, 4)}, "head": (5,)}
NAMES = ("head", "dense/kernel", "dense/bias")  # in another order than the tree's
STEPS = 60
KINDS = (
    *("clip", "enlarging", "adaptive", "elementwise", "wrapper", "measuring"),
    "matrix",
)
REFUSED = {
    "unit": r"groups of per_unit\(",
    "element": r"groups of per_element\(",
    "example": r"groups of per_example\(",
    "matrix": r"(a rule of matrices|groups of per_matrix\()",
}


def stream() -> Any:
    """Gradients of steps that vary, with a spike, an idle step and two that are bad."""
    rng = np.random.default_rng(14)
    scale = np.exp(0.7 * rng.normal(size=STEPS)).astype(np.float32)
    scale[[25, 40]] = 300.0, 0.0

    def leaf(shape: tuple[int, ...]) -> jax.Array:
        noise = rng.normal(size=(STEPS, *shape)).astype(np.float32)
        return jnp.asarray(noise * scale.reshape(-1, *(1,) * len(shape)))

    grads = jax.tree.map(leaf, SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    grads["head"] = grads["head"].at[30, 2].set(jnp.nan)
    grads["dense"]["bias"] = grads["dense"]["bias"].at[33, 0].set(jnp.inf)
    return grads


def measure_of(row: Row) -> measures.Measure:
    given = row.oracle.get("measure", "l2")
    if row.kind == "elementwise":
        return measures.max_abs
    return (
        measures.lp(given)
        if isinstance(given, int | float)
        else getattr(measures, given)
    )


def really(rule: optax.GradientTransformation, grads: Any, measure: Any) -> Any:
    """Sizes of the leaves before and after, limits, and clipped or dropped steps."""

    def sizes(tree: Any) -> jax.Array:
        found = optclip.leaf_norms(tree, measure=measure)
        return jnp.stack([found[name] for name in NAMES])

    def step(state: Any, updates: Any) -> Any:
        out, state = rule.update(updates, state)
        numbers = optclip.metrics(state)
        last = {key.rpartition("/")[2]: value for key, value in numbers.items()}
        return state, (sizes(updates), sizes(out), last)

    first = jax.tree.map(lambda x: x[0], grads)
    _, found = jax.lax.scan(step, rule.init(first), grads)
    return jax.tree.map(np.asarray, found)


def is_refused(row: Row) -> bool:
    by_parts = row.oracle.get("grouping") in REFUSED and row.kind != "elementwise"
    return by_parts or row.needs_params or row.kind == "matrix"


@pytest.mark.parametrize("row", rows(*KINDS))
def test_replay_is_what_the_rule_does(row: Row):
    rule, measure = row.build(2.0), measure_of(row)
    if is_refused(row):
        got = REFUSED["matrix" if row.kind == "matrix" else row.oracle["grouping"]]
        with pytest.raises(ValueError, match=rf"replay: rules\['rule'\] must .*{got}"):
            optclip.replay(np.ones((STEPS, 3)), {"rule": rule})
        return
    size, out, metrics = really(rule, stream(), measure)
    history = recorded(NAMES, size, size.max(1), repr(measure))
    found = optclip.replay(history, {"rule": rule})["rule"]
    np.testing.assert_array_equal(found.size, size)
    np.testing.assert_allclose(found.out, out, rtol=3e-5)
    assert found.nonfinite == 2
    known = np.isfinite(size) & (size > 0)
    kept = out[known] / size[known]
    np.testing.assert_allclose(found.kept, kept.mean(), rtol=1e-5)
    np.testing.assert_allclose(
        found.worst, out[np.isfinite(size) & np.isfinite(out)].max(), rtol=3e-5
    )
    counter = "skipped_steps" if row.kind == "wrapper" else "clipped_steps"
    if counter in metrics:
        np.testing.assert_array_equal(
            found.clipped, np.diff(metrics[counter], prepend=0) > 0
        )
    else:
        touched = np.isfinite(size) & (size > 2.0)
        np.testing.assert_array_equal(found.clipped, touched.any(1))
        np.testing.assert_allclose(found.limit, 2.0)
    if "limit" in metrics:
        limit = metrics["limit"]
        limit = np.where(limit == np.finfo(limit.dtype).max, np.inf, limit)
        np.testing.assert_allclose(found.limit, limit, rtol=3e-5)
    if row.kind != "enlarging":  # a floor clips nothing
        assert found.clipped.any() == (row.kind != "measuring")


def test_every_row_is_replayed_or_refused():
    assert {row.kind for row in ROWS} <= set(KINDS)
    assert sum(map(is_refused, ROWS)) < len(ROWS) / 3


def test_a_column_is_one_group():
    """A logged norm of the whole tree, for a rule of the whole tree."""
    rule = optclip.spike_clip(window=8)
    size, out, metrics = really(rule, stream(), measures.l2)
    with np.errstate(invalid="ignore"):
        whole, whole_out = (
            np.sqrt(np.square(x.astype(np.float64)).sum(1)) for x in (size, out)
        )
    whole[~np.isfinite(size).all(1)] = np.nan
    found = optclip.replay(whole.astype(np.float32), {"rule": rule})["rule"]
    assert found.out.shape == (STEPS,)
    np.testing.assert_allclose(found.out, whole_out, rtol=1e-5)
    np.testing.assert_array_equal(
        found.clipped, np.diff(metrics["clipped_steps"], prepend=0) > 0
    )
