"""The page on NaN: no bad checkpoint is written, and a run goes back and goes on."""

import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import optclip
from tests import pages

STEPS = 40


pytestmark = pytest.mark.usefixtures("as_a_reader_has_it")


@pytest.fixture(scope="module")
def page():
    """What the page defines at its end."""
    *_, (defined, printed) = pages.execute("docs/guides/debugging_nan.md")
    assert "step 20: not finite." in printed and "NaN first in w" in printed
    return defined


def checkpoints(folder, target):
    """Every checkpoint of a run, by its step."""
    with ocp.CheckpointManager(folder) as manager:
        return {
            step: manager.restore(step, args=ocp.args.StandardRestore(target))
            for step in manager.all_steps()
        }


def run(page, folder, optimizer, batches=None):
    start = {"w": jnp.zeros(4)}
    batches = page["batches"] if batches is None else batches
    return page["train"](optimizer, start, page["gradient"], batches, folder, STEPS)


def test_a_run_with_a_bad_batch_goes_back_and_ends_well(page, tmp_path):
    params, state, rollbacks = run(page, tmp_path / "run", page["recorded"])
    assert rollbacks == [20]
    np.testing.assert_allclose(params["w"], 1, atol=0.2)
    # Only the steps that are part of the result were counted.
    assert optclip.metrics(state)["0/steps"] == STEPS
    assert optclip.metrics(state)["0/nonfinite_steps"] == 0
    found = checkpoints(tmp_path / "run", {"params": params, "state": state})
    assert sorted(found) == [20, 30, 40]
    for saved in found.values():
        assert jnp.isfinite(optclip.global_norm(saved["params"]))
    np.testing.assert_array_equal(found[40]["params"]["w"], params["w"])


def test_without_the_look_the_checkpoint_is_bad(page, tmp_path):
    """The fault that the recipe is against: the test above can fail."""
    blind = {**page, "is_healthy": lambda params: True}
    exec(compile(source(), "blind", "exec"), blind)
    params, _, rollbacks = run(blind, tmp_path / "run", page["recorded"])
    assert not rollbacks and jnp.isnan(params["w"]).all()


def source():
    """The page's definition of `train`."""
    text = (pages.ROOT / "docs/guides/debugging_nan.md").read_text()
    start = text.index("def train(")
    return text[start : text.index("```", start)]


def test_with_skip_step_it_never_goes_back(page, tmp_path):
    guarded = optclip.skip_step(optax.adam(0.05), jnp.inf)
    params, state, rollbacks = run(page, tmp_path / "run", guarded)
    assert not rollbacks and jnp.isfinite(params["w"]).all()
    assert optclip.metrics(state)["skipped_steps"] == 1


def test_a_run_that_always_breaks_stops(page, tmp_path):
    def broken(number):
        return jnp.full((8, 4), jnp.nan)

    with pytest.raises(FloatingPointError, match="again and again"):
        run(page, tmp_path / "run", page["recorded"], broken)
