"""The page on many devices: its programs, and its recipe for pipelines at the edges."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optclip
from tests import pages
from tests.untyped import untyped

LIMIT = 1.0
RULE = optclip.clip_by_global_norm(LIMIT)


@jax.jit
def clip(grads: Any, limit: jax.typing.ArrayLike) -> Any:
    """One clip, of all stages or of one."""
    return untyped(optclip.clip_by_global_norm(limit)).update(grads, None)


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What the page defines, when its programs have printed what it says."""
    if jax.device_count() < 8:
        pytest.skip("the page needs eight devices")
    return pages.run("docs/guides/many_devices.md")


@pytest.fixture(autouse=True)
def _standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # which AdamW needs
        yield


def on(devices: list[Any], spec: P) -> NamedSharding:
    shape, auto = (len(devices),), (AxisType.Auto,)
    mesh = jax.make_mesh(shape, ("data",), axis_types=auto, devices=devices)
    return NamedSharding(mesh, spec)


def placed(devices: list[Any], tree: Any) -> Any:
    """Kernels split over some devices, biases on each of them."""
    specs = {"kernel": P("data"), "bias": P()}
    return {k: jax.device_put(x, on(devices, specs[k])) for k, x in tree.items()}


DEVICES = jax.devices()[:8]
HALVES = DEVICES[:4], DEVICES[4:]
PARAMS = {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}


def gradients(level: float, step: int = 0) -> list[dict[str, Any]]:
    """Of both stages, the second one's ten times larger."""
    random = np.random.default_rng(step)
    drawn = [
        {k: random.normal(size=x.shape) / 100 for k, x in PARAMS.items()}
        for _ in range(2)
    ]
    scales = level, 10 * level
    return [
        {k: jnp.asarray(by * x, jnp.float32) for k, x in own.items()}
        for by, own in zip(scales, drawn, strict=True)
    ]


class Pipeline:
    """Two stages on four devices each, as the page builds them."""

    def __init__(self, page: dict[str, Any]):
        self.page = page
        self.at = [on(half, P()) for half in HALVES]

    def norms(self, grads: list[Any]) -> list[jax.Array]:
        return jax.device_put([self.page["own_norm"](x) for x in grads], self.at[0])

    def placed(self, trees: list[Any]) -> list[Any]:
        return [placed(half, tree) for half, tree in zip(HALVES, trees, strict=True)]


def both(grads: list[Any]) -> dict[str, Any]:
    """The stages' leaves as the leaves of one program on all devices."""
    return dict(zip("ab", (placed(DEVICES, tree) for tree in grads), strict=True))


def spoiled(bad: float) -> list[dict[str, Any]]:
    """Gradients with one number, in the first stage only."""
    first, second = gradients(1.0)
    return [first | {"kernel": first["kernel"].at[5, 1].set(bad)}, second]


@pytest.mark.parametrize(
    "grads",
    [
        pytest.param(gradients(100.0), id="clipped"),
        pytest.param(gradients(0.1), id="within"),
        pytest.param(gradients(0.0), id="zero"),
        pytest.param(gradients(1e25), id="large"),
        pytest.param([gradients(0.0)[0], gradients(100.0)[1]], id="one is zero"),
        pytest.param([gradients(1e-20)[0], gradients(1e20)[1]], id="one is small"),
        pytest.param(spoiled(np.nan), id="NaN in one"),
        pytest.param(spoiled(np.inf), id="infinity in one"),
    ],
)
def test_two_stages_clip_as_one_program_does(page, grads):
    want, state = clip(both(grads), LIMIT)
    pipeline = Pipeline(page)
    split = pipeline.placed(grads)
    start = RULE.init(jnp.zeros(()))
    limits, own_state = page["share"](RULE, pipeline.norms(split), start)
    for name, tree, limit, at in zip("ab", split, limits, pipeline.at, strict=True):
        out, _ = jax.device_get(clip(tree, jax.device_put(limit, at)))
        if state.metrics.clipped_fraction == 0 and np.isfinite(state.metrics.size):
            chex.assert_trees_all_equal(out, jax.device_get(tree))
        chex.assert_trees_all_close(out, jax.device_get(want[name]), rtol=1e-6)
    chex.assert_trees_all_close(
        jax.device_get(own_state.metrics), jax.device_get(state.metrics), rtol=1e-6
    )


def trained(optimizer: Any, stream: list[list[Any]]) -> tuple[Any, Any]:
    """The parameters and state of one program."""
    params = both([PARAMS, PARAMS])
    state = jax.jit(optimizer.init)(params)

    @jax.jit
    def update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for grads in stream:
        params, state = update(params, state, both(grads))
    return jax.device_get((params, state))


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(RULE, id="clip_by_global_norm"),
        pytest.param(optclip.spike_clip(), id="spike_clip"),
    ],
)
def test_two_stages_train_as_one_program_does(page, rule):
    stream = [gradients(level, n) for n, level in enumerate((1, 1.1, 300, 0.9, 20))]
    want, state = trained(optax.chain(rule, optax.adamw(1e-3)), stream)
    pipeline = Pipeline(page)
    params, rule_state = pipeline.placed([PARAMS, PARAMS]), rule.init(jnp.zeros(()))
    inner = optax.chain(optclip.clip_by_global_norm(1.0), optax.adamw(1e-3))
    states = [jax.jit(inner.init)(x) for x in params]
    for grads in stream:
        split = pipeline.placed(grads)
        limits, rule_state = page["share"](rule, pipeline.norms(split), rule_state)
        for n, at in enumerate(pipeline.at):
            limit = jax.device_put(limits[n], at)
            params[n], states[n] = page["stage_update"](
                params[n], states[n], split[n], limit
            )
    chex.assert_trees_all_close(
        dict(zip("ab", jax.device_get(params), strict=True)), want, rtol=1e-6
    )
    counts = [
        int(optclip.metrics(own, short=True)["clipped_steps"])
        for own in (state, rule_state, *states)
    ]
    assert counts[0] > 0 and len(set(counts)) == 1


def test_two_stages_skip_the_steps_that_one_program_skips(page):
    """A NaN in one stage, a spike, and more bad steps in a row than are patient."""
    levels = [1.0, 1.1, 0.9, 300.0, 1.0, *[500.0] * 12, 1.0]
    stream = [gradients(level, n) for n, level in enumerate(levels)]
    stream[2:2] = [spoiled(np.nan)] * 12
    threshold = optclip.thresholds.robust()
    want, state = trained(optclip.skip_step(optax.adamw(1e-3), threshold), stream)
    pipeline = Pipeline(page)
    judge = page["judge"]
    params, verdict_state = pipeline.placed([PARAMS, PARAMS]), judge.init(jnp.zeros(()))
    states = [jax.jit(page["stage_optimizer"](jnp.inf).init)(x) for x in params]

    @jax.jit
    def update(params: Any, state: Any, grads: Any, verdict: Any) -> Any:
        optimizer = page["stage_optimizer"](verdict)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for grads in stream:
        split = pipeline.placed(grads)
        norms = pipeline.norms(split)
        verdict, verdict_state = page["verdict"](judge, norms, verdict_state)
        for n, at in enumerate(pipeline.at):
            own = jax.device_put(verdict, at)
            params[n], states[n] = update(params[n], states[n], split[n], own)
    chex.assert_trees_all_close(
        dict(zip("ab", jax.device_get(params), strict=True)), want, rtol=1e-6
    )
    counts = [
        int(optclip.metrics(own)["skipped_steps"])
        for own in (state, verdict_state, *states)
    ]
    assert 12 < counts[0] < len(stream) - 4 and len(set(counts)) == 1
