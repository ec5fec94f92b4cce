"""optclip draws from the laws from which PyTorch's and Keras' initializers draw.

The JSON files hold deviations, largest magnitudes and deciles of what each library drew
for its layers; `make_<library>_initializers.py` made them. Here the same layer, in
Flax's layout, is drawn with the preset that the case names.
"""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optclip import initializers

FOLDER = pathlib.Path(__file__).parent
FILES = {
    library: json.loads((FOLDER / f"{library}_initializers.json").read_text())
    for library in ("torch", "keras")
}
CASES = {
    f"{library}: {case['name']}": case
    for library, file in FILES.items()
    for case in file["cases"]
}
DIRAC = {id: case for id, case in CASES.items() if "ones" in case}


def drawn(case):
    """The parameter, drawn as part of its layer; its kin only lend their shapes."""
    preset = getattr(initializers, case["preset"])(**case["arguments"])
    tree = {
        path: jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
        for path, shape in case["shapes"].items()
    }
    others = {f"^(?!{case['path']}$)": None} if len(tree) > 1 else {}
    new = initializers.redraw(
        tree, preset, jax.random.key(0), rules=others, layouts=case.get("layouts")
    )
    return np.asarray(new[case["path"]], np.float64)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_draws_from_the_same_law(case):
    values, count, stddev = drawn(case), case["count"], case["stddev"]
    # Five standard errors of the difference of two samples, of which each has one; the
    # kurtosis is at most a normal's, times the share of those that are not zero.
    error = 5 * math.sqrt(2 / count) * stddev
    density = math.sqrt(1 - case["zeros"]) or 1
    assert abs(values.mean() - case["mean"]) <= error
    assert abs(values.std() - stddev) <= error / density
    assert abs((values == 0).mean() - case["zeros"]) <= 1e-3
    # A bound is reached to a share of its own; a normal's maximum is looser.
    bounded = case["largest"] < 2.3 * stddev and not case["zeros"]
    loose = 30 / count + 0.005 if bounded else 0.35
    assert abs(values).max() == pytest.approx(case["largest"], rel=loose, abs=1e-9)
    if not case["zeros"]:
        deciles = np.quantile(values, np.arange(1, 10) / 10)
        # At the outer deciles, where they are widest, 1.75 deviations / √count.
        np.testing.assert_allclose(deciles, case["deciles"], atol=1.75 * error, rtol=0)


@pytest.mark.parametrize("case", DIRAC.values(), ids=DIRAC)
def test_a_dirac_kernel_has_its_ones_in_the_same_places(case):
    assert np.argwhere(drawn(case) == 1).tolist() == case["ones"]


def test_gains_are_pytorchs():
    gains = dict(FILES["torch"]["gains"])
    steep = initializers.gain("leaky_relu", negative_slope=0.2)
    assert steep == pytest.approx(gains.pop("leaky_relu 0.2"), rel=1e-12)
    for name, value in gains.items():
        assert initializers.gain(name) == pytest.approx(value, rel=1e-12), name


def test_gain_knows_all_of_pytorchs_names():
    for name in ("linear", "sigmoid", *(f"conv{n}d" for n in (1, 2, 3))):
        assert initializers.gain(name) == 1
    assert all(initializers.gain(f"conv_transpose{n}d") == 1 for n in (1, 2, 3))


def test_another_law_is_told_apart():
    # Xavier's in the place of PyTorch's default: the comparison above can fail.
    case = next(case for case in CASES.values() if case["name"] == "Linear.weight")
    with pytest.raises(AssertionError):
        test_draws_from_the_same_law({**case, "preset": "xavier_uniform"})
