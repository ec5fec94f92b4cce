"""optclip gives what PyTorch, Keras and TensorFlow give on the same inputs.

The JSON files hold what each library returned; `make_<library>.py` made them and none
of the libraries is needed here. One function of another library is one line in the
tables below: the optclip call that replaces it.
"""

import functools
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optclip

# One unit in the last place is up to 1.2e-7. Both sides sum 24 or fewer terms in
# float32, take a root, divide and multiply, each in its own order: two units each.
RTOL = 5e-7
# A cube root is a power with the exponent float32(1/3), whose rounding counts as often
# as the sum has e-folds: 5e-7 for 1e-24. PyTorch takes two, by leaf and over leaves.
RTOL_CUBE = 2e-6

MEASURES = {
    "1": optclip.measures.l1,
    "2": optclip.measures.l2,
    "3": optclip.measures.lp(3),
    "inf": optclip.measures.max_abs,
}


def torch_norm(max_norm, norm_type):
    """`clip_grad_norm_`, which adds 1e-6 to the norm and always multiplies."""
    return optclip.clip_by_global_norm(
        max_norm,
        measure=MEASURES[norm_type],
        action=optclip.actions.rescale(div_eps=1e-6),
    )


def torch_norm_without_convention(max_norm, norm_type):
    """The same with optclip's default action."""
    return optclip.clip_by_global_norm(max_norm, measure=MEASURES[norm_type])


def tensorflow_norm(clip_norm, axes):
    """`tf.clip_by_norm`, of the whole tensor or over some of its axes."""
    if axes is None:
        return optclip.clip_by_norm(clip_norm)
    return optclip.clip_by_norm(clip_norm, grouping=optclip.groupings.per_unit(axes))


RESCALING = {
    "clip_grad_norm_": torch_norm,
    "clipnorm": lambda clipnorm: optclip.clip_by_norm(clipnorm),
    "global_clipnorm": lambda global_clipnorm: optclip.clip_by_global_norm(
        global_clipnorm
    ),
    "clip_by_norm": tensorflow_norm,
    "clip_by_global_norm": lambda clip_norm: optclip.clip_by_global_norm(clip_norm),
}
CLAMPING = {
    "clip_grad_value_": lambda clip_value: optclip.clip_by_value(clip_value),
    "clipvalue": lambda clipvalue: optclip.clip_by_value(clipvalue),
    "clip_by_value": lambda clip_value_min, clip_value_max: optclip.clip_by_value(
        min_value=clip_value_min, max_value=clip_value_max
    ),
}

# Keras divides by the norm plus 1e-7, which the tolerance allows for.
CONSTRAINTS = {
    "MaxNorm": optclip.sets.max_norm,
    "UnitNorm": optclip.sets.unit_norm,
    "MinMaxNorm": optclip.sets.norm_range,
    "NonNeg": optclip.sets.nonnegative,
}
KERAS_EPSILON = 1e-7
TINY = " tiny max_norm=1e-08"

FOLDER = pathlib.Path(__file__).parent
CASES = {
    f"{library}: {case['name']}": case
    for library in ("torch", "keras", "tensorflow")
    for case in json.loads((FOLDER / f"{library}.json").read_text())["cases"]
}


def of(functions):
    return {id: case for id, case in CASES.items() if case["function"] in functions}


def each(cases):
    return pytest.mark.parametrize("case", cases.values(), ids=cases)


def rtol(case):
    return RTOL_CUBE if case["arguments"].get("norm_type") == "3" else RTOL


def tree(lists):
    return {name: jnp.asarray(leaf, jnp.float32) for name, leaf in lists.items()}


def clip(rule, case):
    limits, structure = {}, []
    for name, value in case["arguments"].items():
        if isinstance(value, float):
            limits[name] = value
        else:
            structure.append((name, tuple(value) if isinstance(value, list) else value))
    return _clip(rule, tuple(structure), limits, tree(case["inputs"]))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _clip(rule, structure, limits, updates):
    # Limits are traced, so that a rule compiles once and not for each of its cases.
    tx = rule(**dict(structure), **limits)
    clipped, _ = tx.update(updates, tx.init(updates))
    return clipped


@functools.partial(jax.jit, static_argnums=1)
def _measured(updates, measure):
    return optclip.global_norm(updates, measure=measure)


@each(of(RESCALING))
def test_rescales_as_the_other_library(case):
    clipped = clip(RESCALING[case["function"]], case)
    # No absolute tolerance: values near 1e-8 must agree to the same digits.
    chex.assert_trees_all_close(clipped, tree(case["outputs"]), rtol=rtol(case), atol=0)


@each(of(CLAMPING))
def test_clamps_as_the_other_library(case):
    clipped = clip(CLAMPING[case["function"]], case)
    # A clamp rounds nothing but its bounds, so nothing may differ.
    chex.assert_trees_all_equal(clipped, tree(case["outputs"]))


@each({id: case for id, case in CASES.items() if "norm" in case})
def test_measures_as_the_other_library(case):
    measure = MEASURES[case["arguments"].get("norm_type", "2")]
    size = _measured(tree(case["inputs"]), measure)
    np.testing.assert_allclose(size, np.float32(case["norm"]), rtol=rtol(case), atol=0)


@each(of(CONSTRAINTS))
def test_constrains_as_keras(case):
    arguments = dict(case["arguments"])
    if "axis" in arguments:
        arguments["axis"] = tuple(arguments["axis"])
    params = tree(case["inputs"])
    for path, x in params.items():  # a norm by hand, as small norms count 1e-7 for more
        norms = np.sqrt(np.sum(np.square(x), arguments.get("axis"), keepdims=True))
        least = np.min(norms[norms > 0], initial=1.0)
        constrained = optclip.project_params(
            {path: x}, CONSTRAINTS[case["function"]](**arguments)
        )
        want = jnp.asarray(case["outputs"][path], jnp.float32)
        slack = 1e-6 + 2 * KERAS_EPSILON / float(least)
        np.testing.assert_allclose(constrained[path], want, rtol=slack, atol=0)


def test_every_case_is_compared():
    compared = len(of(RESCALING)) + len(of(CLAMPING)) + len(of(CONSTRAINTS))
    assert compared == len(CASES)


@each({id: x for id, x in of(["clip_grad_norm_"]).items() if TINY in id})
def test_pytorch_differs_without_its_convention(case):
    # PyTorch's 1e-6 is far above these gradients and shrinks them tens of times. The
    # exact rescaling does not, which shows that the comparison above can fail.
    clipped = clip(torch_norm_without_convention, case)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(clipped, tree(case["outputs"]), rtol=0.9, atol=0)
