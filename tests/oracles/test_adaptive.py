"""Adaptive rules equal their papers' algorithms, over streams of 500 hard steps.

The stream has noise, spikes, a permanent shift, idle leaves, empty steps, NaN and inf;
each rule goes through it in one compiled scan, for each grouping.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optclip
from optclip import groupings
from tests.oracles import adaptive, fixed
from tests.untyped import untyped

SHAPES = {"a/bias": (3,), "a/kernel": (4, 3), "b/kernel": (2, 5)}
STEPS = 500
BAD = (7, 60, 130, 333)
EMPTY = (12, 40, 41, 299)


def stream(seed=0):
    """{path: (steps, *shape)} in float32."""
    rng = np.random.default_rng(seed)
    level = np.exp(0.25 * rng.standard_normal(STEPS))
    level[[30, 101, 220]] *= 10
    level[[55, 222, 223, 400]] *= 1000
    level[260:] *= 3
    tree = {}
    for path, shape in SHAPES.items():
        own = np.exp(0.1 * rng.standard_normal(STEPS)) * level
        x = rng.standard_normal((STEPS, *shape)) * own.reshape(-1, *(1,) * len(shape))
        tree[path] = (0.1 * x).astype(np.float32)
    tree["a/kernel"][[350, 410]] *= 50  # a spike of one leaf alone
    for x in tree.values():
        x[list(EMPTY)] = 0
    tree["a/bias"][:20] = 0  # idle from the start,
    tree["b/kernel"][150:180] = 0  # and later
    tree["b/kernel"][:, :, 2] = 0  # a dead unit
    for step, bad in zip(BAD, (np.nan, np.inf, -np.inf, np.nan), strict=True):
        tree["a/kernel"][step, 1, 2] = bad
    return tree


STREAM = stream()
GROUPINGS = {
    "whole": groupings.whole(),
    "leaf": groupings.per_leaf(),
    "unit": groupings.per_unit(),
}


def scanned(tx, tree):
    """The updates at every step."""

    @jax.jit
    def run(tree):
        start = tx.init(jax.tree.map(lambda x: x[0], tree))
        return jax.lax.scan(lambda s, u: tx.update(u, s)[::-1], start, tree)

    last, outs = run(tree)
    return jax.device_get(outs), jax.device_get(last)


def norms_by_group(tree, grouping):
    """The groups, and their norms over time, (steps, groups)."""
    one_step = {path: x[0] for path, x in tree.items()}
    groups = fixed.groups(one_step, grouping)
    norms = np.zeros((STEPS, len(groups)))
    for number, group in enumerate(groups):
        for path, index in group:
            part = tree[path].astype(np.float64)[(slice(None), *index)]
            norms[:, number] += np.sum(part.reshape(STEPS, -1) ** 2, axis=1)
    return groups, np.sqrt(norms)


def rescaled(tree, groups, norms, targets):
    """The stream with each group scaled from its norms to its targets."""
    out = {path: x.astype(np.float64) for path, x in tree.items()}
    for number, group in enumerate(groups):
        norm, target = norms[:, number], targets[:, number]
        factor = target / np.where(norm == 0, 1, norm)
        for path, index in group:
            part = out[path][(slice(None), *index)]
            scaled = part * factor.reshape(-1, *(1,) * (part.ndim - 1))
            # A NaN in a group makes all of it NaN, its other elements too.
            bad = np.isnan(target).reshape(-1, *(1,) * (part.ndim - 1))
            out[path][(slice(None), *index)] = np.where(bad, np.nan, scaled)
    return out


def one_group(oracle, **arguments):
    """An oracle of one group's norms, over all groups."""

    def over_groups(norms):
        return np.stack([oracle(n, **arguments) for n in norms.T], axis=1)

    return over_groups


RULES = {
    "autoclip": (
        lambda g: optclip.autoclip(grouping=g),
        one_group(adaptive.autoclip),
    ),
    "autoclip-windowed": (
        lambda g: optclip.autoclip(37.0, window=33, multiple=1.3, grouping=g),
        one_group(adaptive.autoclip, percentile=37.0, window=33, multiple=1.3),
    ),
    "autoclip-minimum": (
        lambda g: optclip.autoclip(0.0, window=9, grouping=g),
        one_group(adaptive.autoclip, percentile=0.0, window=9),
    ),
    "scaled_adam": (
        lambda g: optclip.autoclip(50.0, window=100, multiple=2.0, grouping=g),
        one_group(adaptive.scaled_adam),
    ),
    "spike_clip": (
        lambda g: optclip.spike_clip(grouping=g),
        one_group(adaptive.robust),
    ),
    "spike_clip-short": (
        lambda g: optclip.spike_clip(1.5, 6, 0.1, 2.0, grouping=g),
        one_group(adaptive.robust, z=1.5, window=6, prior_spread=0.1, prior_steps=2.0),
    ),
    **{
        f"zclip-{mode}": (
            lambda g, mode=mode: untyped(optclip.zclip)(mode=mode, grouping=g),
            one_group(adaptive.zclip, mode=mode),
        )
        for mode in ("reciprocal", "mean", "max")
    },
    "zclip-max_norm": (
        lambda g: optclip.zclip(2.0, 0.9, 10, max_norm=0.5, grouping=g),
        one_group(
            adaptive.zclip, z_threshold=2.0, decay=0.9, warmup_steps=10, max_norm=0.5
        ),
    ),
    "adagc": (lambda g: optclip.adagc(grouping=g), adaptive.adagc),
    "adagc-loose": (
        lambda g: optclip.adagc(2.0, 0.3, 0.9, 20, grouping=g),
        lambda norms: adaptive.adagc(norms, 2.0, 0.3, 0.9, 20),
    ),
    "quantile_clip": (
        lambda g: optclip.quantile_clip(grouping=g),
        one_group(adaptive.online_quantile),
    ),
    "quantile_clip-high": (
        lambda g: optclip.quantile_clip(0.9, 0.05, grouping=g),
        one_group(adaptive.online_quantile, quantile=0.9, learning_rate=0.05),
    ),
    "norm_growth_clip": (
        lambda g: optclip.norm_growth_clip(grouping=g),
        one_group(adaptive.norm_growth),
    ),
    "norm_growth_clip-fast": (
        lambda g: optclip.norm_growth_clip(1.5, grouping=g),
        one_group(adaptive.norm_growth, gamma=1.5),
    ),
    "second_moment_clip": (
        lambda g: optclip.second_moment_clip(9.0, 0.9, 5, grouping=g),
        one_group(adaptive.spam, theta=9.0, decay=0.9, warmup_steps=5),
    ),
}


# Defaults under every grouping; arguments under one, to keep the suite quick.
DEFAULTS = (
    "autoclip",
    "zclip-reciprocal",
    "adagc",
    "quantile_clip",
    "norm_growth_clip",
)
CASES = [(name, g) for name in DEFAULTS for g in GROUPINGS]
CASES += [(name, "leaf") for name in RULES if name not in DEFAULTS]
CASES += [("zclip-mean", "whole"), ("zclip-max", "whole"), ("scaled_adam", "whole")]


@pytest.mark.parametrize(("name", "grouping"), CASES, ids=map("-".join, CASES))
def test_rule_equals_its_paper(name, grouping):
    """Every element of every step, to float32's rounding of a long recurrence."""
    build, oracle = RULES[name]
    groups, norms = norms_by_group(STREAM, grouping)
    targets = oracle(norms)
    outs, state = scanned(build(GROUPINGS[grouping]), STREAM)
    wanted = rescaled(STREAM, groups, norms, targets)
    for path, want in wanted.items():
        np.testing.assert_allclose(outs[path], want, rtol=1e-4, err_msg=path)

    finite = np.isfinite(norms)
    clipped = finite & (np.nan_to_num(targets) < np.nan_to_num(norms) * (1 - 1e-6))
    # The stream is hard enough: most groups are clipped at some steps and not at all.
    assert np.mean(clipped.any(axis=0)) > 0.5
    assert not clipped[finite].all()
    assert state.metrics.nonfinite_steps == len(BAD)
    counted = int(state.metrics.clipped_steps)
    assert abs(counted - np.sum(clipped.any(axis=1))) <= 2  # rounding at a limit


@pytest.mark.parametrize("theta", [5000.0, 9.0])
def test_spam_equals_its_paper(theta):
    """Element by element, each with its own second moment."""
    tx = optclip.second_moment_clip(theta)
    outs, state = scanned(tx, STREAM)
    clips = 0
    for path, x in STREAM.items():
        want = adaptive.spam(x.astype(np.float64), theta)
        np.testing.assert_allclose(outs[path], want, rtol=1e-4, err_msg=path)
        clips += np.sum(np.abs(np.nan_to_num(want)) < 0.999 * np.abs(np.nan_to_num(x)))
    assert clips > 10
    assert state.metrics.nonfinite_steps == len(BAD)


def test_a_wrong_rule_is_noticed():
    """The stream tells rules apart that differ by one part of their equation."""
    _, norms = norms_by_group(STREAM, "whole")
    norms = norms[:, 0]
    good = {
        "autoclip": adaptive.autoclip(norms),
        "zclip": adaptive.zclip(norms),
        "adagc": adaptive.adagc(norms[:, None])[:, 0],
        "quantile": adaptive.online_quantile(norms),
    }
    wrong = {
        "autoclip": adaptive.autoclip(norms, window=400),
        "zclip": adaptive.zclip(norms, warmup_steps=24),
        "adagc": adaptive.adagc(norms[:, None], warmup_steps=99)[:, 0],
        "quantile": adaptive.online_quantile(norms, quantile=0.501),
    }
    for name, values in good.items():
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(wrong[name], values, rtol=1e-4)


# AGC, whose only difficulty is which axes make a unit.


def pair(shape, seed, scale=1.0):
    """A gradient and a weight; some units above their bound, some within it."""
    rng = np.random.default_rng(seed)
    spread = np.exp(2 * rng.standard_normal(shape[-1:] if shape else ()))
    g = 0.05 * rng.standard_normal(shape) * spread
    w = scale * rng.standard_normal(shape)
    return g.astype(np.float32), w.astype(np.float32)


def trees_of(shapes, seed=0):
    pairs = {path: pair(s, seed + i) for i, (path, s) in enumerate(shapes.items())}
    return {p: g for p, (g, _) in pairs.items()}, {p: w for p, (_, w) in pairs.items()}


def updated(tx, grads, params):
    """The updates of one step, jitted: a rule's many small operations take long alone.

    As arrays: Optax refuses NumPy's scalars.
    """
    step = jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params)[0])
    return jax.device_get(step(*jax.tree.map(jnp.asarray, (grads, params))))


@pytest.mark.parametrize("clipping", [0.01, 0.2])
def test_agc_equals_optax_where_optax_is_right(clipping):
    """Dense and 2-D convolution kernels, their biases, scales, a scalar."""
    shapes = {
        "dense/kernel": (7, 5),
        "dense/bias": (5,),
        "conv/kernel": (3, 3, 4, 6),
        "conv/bias": (6,),
        "norm/scale": (6,),
        "temperature": (),
        "thin/kernel": (1, 8),
        "column/kernel": (8, 1),
    }
    grads, params = trees_of(shapes)
    params["dense/kernel"][:, 2] = 0  # a unit that starts at zero: eps is its norm
    grads["conv/kernel"][..., 1] = 0  # an idle one
    out = updated(optclip.adaptive_grad_clip(clipping), grads, params)
    want = updated(optax.adaptive_grad_clip(clipping), grads, params)
    for path in shapes:
        np.testing.assert_allclose(out[path], want[path], rtol=1e-6, err_msg=path)
        changed = out[path] != grads[path]
        assert changed.any() or clipping > 0.1
    assert not (out["conv/kernel"] != grads["conv/kernel"]).all()


@pytest.mark.skipif(
    "axis" not in inspect.signature(optax.adaptive_grad_clip).parameters,
    reason="Optax 0.2.5 takes no axis",
)
@pytest.mark.parametrize("axis", [0, (0, 1), -1])
def test_agc_equals_optax_with_axes_given(axis):
    shapes = {"a": (3, 4, 5), "b": (5, 4, 3)}
    grads, params = trees_of(shapes)
    out = updated(optclip.adaptive_grad_clip(0.1, axis=axis), grads, params)
    want = updated(optax.adaptive_grad_clip(0.1, axis=axis), grads, params)
    for path in shapes:
        np.testing.assert_allclose(out[path], want[path], rtol=1e-6)


UNITS = {
    "dense": ({"dense/kernel": (7, 5), "dense/bias": (5,)}, ((1,), ())),
    "conv 1-D": ({"conv/kernel": (3, 4, 6), "conv/bias": (6,)}, ((2,), ())),
    "conv 2-D": ({"conv/kernel": (3, 3, 4, 6), "conv/bias": (6,)}, ((3,), ())),
    "query": ({"query/kernel": (6, 2, 4), "query/bias": (2, 4)}, ((1, 2), ())),
    "out": ({"out/kernel": (2, 4, 6), "out/bias": (6,)}, ((2,), ())),
    "query without bias": ({"query/kernel": (6, 2, 4)}, ((1, 2),)),
    "stacked": ({"mlp/kernel": (3, 4, 5), "mlp/bias": (3, 5)}, ((0, 2), (0,))),
    "rank 6": ({"conv/kernel": (2, 3, 2, 2, 4, 5), "conv/bias": (5,)}, ((5,), ())),
    "embedding": ({"embed/embedding": (9, 4)}, ((0,),)),
}


@pytest.mark.parametrize("name", UNITS)
def test_agc_units(name):
    """Also where Optax's fixed axes are not the units."""
    shapes, units = UNITS[name]
    grads, params = trees_of(shapes)
    out = updated(optclip.adaptive_grad_clip(0.1), grads, params)
    for path, axes in zip(shapes, units, strict=True):
        want = adaptive.agc(grads[path], params[path], axes, 0.1)
        np.testing.assert_allclose(out[path], want, rtol=2e-6, err_msg=path)
        # Other axes would have given something else.
        if axes:
            other = adaptive.agc(grads[path], params[path], (), 0.1)
            assert not np.allclose(out[path], other, rtol=1e-3)


def test_agc_per_tensor():
    """DreamerV3's form."""
    grads, params = trees_of({"a/kernel": (7, 5), "a/bias": (5,)})
    tx = optclip.adaptive_grad_clip(0.3, grouping=groupings.per_leaf())
    out = updated(tx, grads, params)
    for path in grads:
        want = adaptive.agc(grads[path], params[path], (), 0.3)
        np.testing.assert_allclose(out[path], want, rtol=2e-6)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("spec", [("data", None), (None, "data")], ids=["in", "out"])
def test_agc_on_a_mesh(kind, spec):
    """A unit's norm goes over all rows, wherever they are."""
    tx = optclip.adaptive_grad_clip(0.1)
    grads, params = trees_of({"dense/kernel": (16, 8), "dense/bias": (8,)})
    want = updated(tx, grads, params)
    types = (getattr(jax.sharding.AxisType, kind),)
    place = jax.sharding.PartitionSpec(*spec)
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=types)):
        sharded = {"dense/kernel": place, "dense/bias": jax.sharding.PartitionSpec()}
        placed = [
            {path: jax.device_put(x, sharded[path]) for path, x in tree.items()}
            for tree in (grads, params)
        ]
        out, _ = jax.jit(lambda g, p: tx.update(g, tx.init(p), p))(*placed)
        if kind == "Explicit":
            assert jax.typeof(out["dense/kernel"]).sharding.spec == place
        out = jax.device_get(out)
    for path in want:
        np.testing.assert_allclose(out[path], want[path], rtol=1e-6)
        assert not np.array_equal(out[path], grads[path])
