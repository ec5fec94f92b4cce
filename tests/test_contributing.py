"""The worked examples of CONTRIBUTING.md run as pasted, and its files exist."""

import doctest
import pathlib
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import optclip
from tests.untyped import untyped

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S))


def example(section: str) -> Any:
    """The module that the section's program makes, its doctests run."""
    (program,) = re.findall(r"```python\n(.*?)```", SECTIONS[section], re.S)
    assert len(program.splitlines()) <= 40
    module = types.ModuleType(section)
    exec(compile(program, f"CONTRIBUTING.md, {section}", "exec"), vars(module))
    found = doctest.testmod(module, globs=vars(module).copy())
    assert found.failed == 0
    return module


def test_a_rule():
    tx = untyped(optax.chain(example("A rule").mean_clip(2.0), optax.sgd(1.0)))
    params = {"w": jnp.zeros(1)}
    state, norms = tx.init(params), []
    for size in (1.0, 3.0, 100.0, jnp.nan, 1.0):
        updates, state = tx.update({"w": jnp.array([size])}, state, params)
        norms.append(float(-updates["w"][0]))
    assert norms[:3] == [1.0, 2.0, 3.0]
    assert norms[4] == 1.0  # the NaN taught nothing
    with pytest.raises(ValueError, match=r"^mean_clip: multiple must be positive"):
        example("A rule").mean_clip(0.0)
    assert repr(example("A rule").mean_multiple(3.0)) == "mean_multiple(3.0)"


def test_a_set():
    stay = untyped(optclip.project(example("A set").grid(0.25)))
    params = jnp.array([0.5, -1.0, 0.25])
    updates = jnp.array([0.1, 0.3, 7.9])
    updates, _ = stay.update(updates, stay.init(params), params)
    assert untyped(optax.apply_updates(params, updates)).tolist() == [0.5, -0.75, 8.25]
    with pytest.raises(ValueError, match=r"^grid: step must be positive, got -1\.0"):
        example("A set").grid(-1.0)


def test_a_preset():
    model = {"params": {"Dense_0": {"kernel": jnp.ones((8, 3)), "bias": jnp.ones(3)}}}
    fixup = example("A preset").fixup(4)
    rules = {"Dense_0/kernel": "residual_out"}
    drawn = untyped(
        optclip.initializers.redraw(model, fixup, jax.random.key(0), rules=rules)
    )
    assert not jnp.any(drawn["params"]["Dense_0"]["kernel"])
    with pytest.raises(ValueError, match=r"^fixup: num_layers must be"):
        example("A preset").fixup(0)


def test_every_file_that_it_names_exists():
    named = set(re.findall(r"`((?:optclip|tests)/[\w/.]+)`", TEXT))
    assert len(named) > 15
    for path in named:
        assert (ROOT / path).exists(), path


def test_each_answer_names_one_file_at_most():
    answers = re.split(r"^\*\*", SECTIONS["Questions"], flags=re.M)[1:]
    assert len(answers) == 8
    for answer in answers:
        assert len(re.findall(r"`[\w/]+\.py`", answer)) <= 1, answer
