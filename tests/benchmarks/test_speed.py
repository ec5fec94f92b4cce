"""The benchmark runs, counts its bytes rightly, and its committed numbers are read."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import __main__ as suite
from benchmarks import contestants, report, shapes, timing

pytestmark = pytest.mark.usefixtures("quickest_compiles")

TINY = {"kernel": (8, 6), "bias": (6,)}


@pytest.mark.parametrize(
    ("name", "parameters", "leaves"),
    [
        ("gpt2", 124_439_808, 148),
        ("gpt2-xl", 1_557_611_200, 580),
        ("resnet50", 25_557_032, 161),
    ],
)
def test_shapes_are_those_of_the_models(name, parameters, leaves):
    """As the papers count them."""
    made = shapes.SETS[name]()
    assert sum(int(np.prod(shape)) for shape in made.values()) == parameters
    assert len(made) == leaves


@pytest.mark.parametrize("name", shapes.SETS)
def test_scale_is_about_proportional(name):
    count = [
        sum(np.prod(shape, dtype=float) for shape in shapes.SETS[name](scale).values())
        for scale in (1.0, 0.25)
    ]
    assert 2.5 < count[0] / count[1] < 6


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("rule", ["clip_by_global_norm", "clip_by_block_rms"])
def test_every_call_clips(rule, dtype):
    """What is timed is a rescaling, not the shorter way of what is within its limit."""
    arrays = contestants.gradients(TINY, dtype)
    entered = {
        "floor": contestants.rewriting(arrays),
        "optclip": contestants.clipping(contestants.OPTCLIP[rule], arrays),
        "optax": contestants.clipping(contestants.OPTAX[rule], arrays),
    }
    own = {name: contestant.own for name, contestant in entered.items()}
    for number in range(9):
        name = list(entered)[number % 3]
        before = np.abs(arrays.tree["kernel"])
        arrays, own[name] = entered[name].step(arrays, own[name], 0.5 * 0.99**number)
        after = np.abs(arrays.tree["kernel"])
        # The floor's factor is nearly one, and in bfloat16 one.
        assert np.all(after <= before if name == "floor" else after < before)
    assert own["optclip"].metrics.clipped_steps == 3


def test_libraries_do_the_same():
    """Ours and Optax's, without parameters and with them."""
    for params, rule in ((False, "clip_by_block_rms"), (True, "adaptive_grad_clip")):
        found = []
        for library in (contestants.OPTCLIP, contestants.OPTAX):
            arrays = contestants.gradients(TINY, jnp.float32, params)
            contestant = contestants.clipping(library[rule], arrays)
            found.append(contestant.step(arrays, contestant.own, 0.3)[0].tree)
        for path in TINY:
            np.testing.assert_allclose(found[0][path], found[1][path], rtol=1e-6)


def test_a_race_takes_turns_and_its_record_holds_the_ratios():
    arrays, makers = suite.alone("clip_by_value", TINY, jnp.float32)
    entered = {name: make(arrays) for name, make in makers.items() if name != "torch"}
    timed = timing.race(entered, arrays, rounds=3)
    about = {"shapes": "tiny", "dtype": "float32", "context": "alone"}
    line = report.record(about | {"rule": "clip_by_value"}, "optclip", timed, 54 * 4)
    assert len(timed["optclip"].seconds) == 3 and line["seconds"] > 0
    assert set(line["over"]) == {"floor: read", "floor: rewrite", "optax", "floor"}
    low, middle, high = line["over"]["optax"]
    assert low <= middle <= high
    assert line["over"]["floor"] == line["over"]["floor: rewrite"]  # it reads once
    assert line["temporary_bytes"] >= 0 and line["collectives"] == 0
    results = {"records": [line], "versions": {}, "device": "d", "scale": 1.0}
    assert "tiny float32 alone clip_by_value" in report.terminal(results)


@pytest.mark.parametrize("race", ["learned", "sgd", "adamw"])
def test_races_of_several_rules_run(race):
    """Each contestant goes on where another one stopped."""
    if race == "learned":
        arrays, makers = suite.learned(TINY, jnp.bfloat16)
    else:
        arrays, makers = suite.before(race, TINY, jnp.bfloat16)
        makers.pop("keras global_clipnorm", None)  # may not be installed
    with jax.numpy_dtype_promotion("standard"):  # which Optax's optimizers need
        entered = {name: make(arrays) for name, make in makers.items()}
    timed = timing.race(entered, arrays, rounds=2)
    assert all(len(own.seconds) == 2 for own in timed.values())


def test_compiling_is_raced_from_cold_caches():
    about = {"shapes": "tiny", "dtype": "float32", "context": "compile", "rule": "-"}
    arrays, makers = suite.compiled("clip_by_block_rms", TINY, jnp.float32)
    entered = {name: make(arrays) for name, make in makers.items()}
    timed = timing.race(entered, arrays, 2, warm_up=0)
    line = report.record(about, "optclip", timed, 54 * 4)
    assert line["seconds"] > 1e-3  # a call of what is compiled takes microseconds
    assert set(line["over"]) == {"optax"}


@pytest.mark.parametrize("path", report.committed(), ids=lambda path: path.stem)
def test_committed_numbers_can_be_read(path):
    results = json.loads(path.read_text())
    assert results["records"] and results["versions"]["jax"]
    assert report.terminal(results)


@pytest.mark.parametrize("path", report.committed(), ids=lambda path: path.stem)
def test_the_picture_is_drawn_from_the_committed_numbers(path, tmp_path):
    report.draw(json.loads(path.read_text()), tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_page_gets_a_table_of_every_device():
    heads = re.findall(r"^\| GPT-2 124M on (.*?) \|", report.tables(), re.M)
    devices = [json.loads(p.read_text())["device"] for p in report.committed()]
    assert heads == devices
    assert report.tables().count("`clip_by_global_norm` over its floor") == len(heads)
