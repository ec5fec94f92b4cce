"""`hyperball`: which leaves, how far, around which optimizers, in which models."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optclip as typed
from tests.oracles import projections as oracle
from tests.untyped import untyped

# States and updates have the type of any tree, in which nothing could be read.
optclip = untyped(typed)
groupings, sets = optclip.groupings, optclip.sets
apply = untyped(optax.apply_updates)
RATE = 0.02
ULP = 2.0**-23


@pytest.fixture(autouse=True)
def _optax_promotes():
    """Adam divides by powers of its int32 counter."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def model(seed=0, dtype=jnp.float32):
    """Experts without biases, a stack of two layers, one matrix, and vectors."""
    sizes = jnp.array([0.5, 1.0, 30.0], dtype).reshape(3, 1, 1)
    return {
        "experts": {"up": sizes * normal(3, 4, 6, seed=seed, dtype=dtype)},
        "head": {"kernel": normal(6, 5, seed=seed + 1, dtype=dtype)},
        "layers": {
            "bias": normal(2, 4, seed=seed + 2, dtype=dtype),
            "kernel": normal(2, 4, 4, seed=seed + 3, dtype=dtype),
        },
        "norm": {"scale": jnp.ones(6, dtype)},
    }


def norms(x):
    """Of every matrix along the last two axes, in float64."""
    return np.sqrt(np.sum(np.asarray(x).astype(np.float64) ** 2, axis=(-2, -1)))


def matrices(tree):
    kernels = tree["layers"]["kernel"], tree["head"]["kernel"]
    return (tree["experts"]["up"], *kernels)


def test_each_matrix_of_a_stack_moves_by_the_rate_and_stays_on_its_sphere():
    params, grads = model(), model(5)
    tx = optclip.hyperball(optax.sgd(0.5), RATE)
    state = tx.init(params)
    updates, state = jax.jit(tx.update)(grads, state, params)
    after = apply(params, updates)
    for old, new, g in zip(*map(matrices, (params, after, grads)), strict=True):
        flat = [np.asarray(x, "d").reshape(-1, *x.shape[-2:]) for x in (old, g, new)]
        for w, direction, got in zip(*flat, strict=True):
            want = oracle.hyperball(w, -direction, RATE)
            np.testing.assert_allclose(got, want, rtol=0, atol=4 * ULP * abs(w).max())
        assert np.all(np.abs(norms(new) / norms(old) - 1) < 4 * ULP)
    # The rest gets what the optimizer gives: biases of a stack are no matrix.
    for part, name in (("layers", "bias"), ("norm", "scale")):
        np.testing.assert_array_equal(updates[part][name], -0.5 * grads[part][name])


@pytest.mark.parametrize("tangent", [False, True])
def test_adam_over_hundreds_of_steps_equals_numpy(tangent):
    """Adam and a schedule in float64, flat, from the paper's equations."""
    schedule = optax.cosine_decay_schedule(0.05, 200)
    inner = optax.adam(1e-3, b1=0.9, b2=0.99)
    tx = optclip.hyperball(inner, schedule, tangent=tangent)
    w = normal(6, 5)
    grads = normal(200, 6, 5, seed=1) + 0.3

    def step(carry, g):
        params, state = carry
        updates, state = tx.update({"w": g}, state, params)
        return (apply(params, updates), state), ()

    start = {"w": w}, tx.init({"w": w})
    (after, state), _ = jax.jit(lambda: jax.lax.scan(step, start, grads))()
    assert state.steps == 200
    x, m, v = np.asarray(w, "d"), np.zeros((6, 5)), np.zeros((6, 5))
    radius = float(np.linalg.norm(x))
    for t, g in enumerate(np.asarray(grads, "d")):
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        u = -m / (1 - 0.9 ** (t + 1)) / (np.sqrt(v / (1 - 0.99 ** (t + 1))) + 1e-8)
        rate = 0.05 * 0.5 * (1 + np.cos(np.pi * t / 200))
        x = oracle.hyperball(x, u, rate, tangent, radius)
    np.testing.assert_allclose(after["w"], x, rtol=0, atol=2e-5)
    assert abs(norms(after["w"]) / radius - 1) <= 4 * ULP


def test_muon_keeps_norms_and_steps():
    """MuonH: orthogonal updates for matrices, Adam for the rest."""
    params = {"w": normal(6, 5), "b": jnp.zeros(5)}
    muon = untyped(optax.contrib.muon(1e-2))
    tx = optclip.hyperball(muon, RATE, tangent=True)
    grads = {"w": normal(6, 5, seed=1), "b": jnp.ones(5)}
    updates, _ = tx.update(grads, tx.init(params), params)
    alone, _ = muon.update(grads, muon.init(params), params)
    np.testing.assert_array_equal(updates["b"], alone["b"])
    after = apply(params, updates)
    assert abs(norms(after["w"]) / norms(params["w"]) - 1) < 4 * ULP
    want = oracle.hyperball(
        np.asarray(params["w"], "d"), np.asarray(alone["w"], "d"), RATE, True
    )
    np.testing.assert_allclose(after["w"], want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_neither_learning_rate_nor_gradient_size_matters(size):
    params, grads = {"w": normal(6, 5)}, {"w": normal(6, 5, seed=1)}
    outs = []
    for lr, by in ((1.0, 1.0), (size, 1.0), (1.0, size)):
        tx = optclip.hyperball(optax.sgd(lr), RATE)
        scaled = {"w": grads["w"] * by}
        outs.append(tx.update(scaled, tx.init(params), params)[0]["w"])
    np.testing.assert_allclose(outs[0], outs[1], rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(outs[0], outs[2], rtol=1e-5, atol=1e-8)


def test_a_tangent_step_has_no_part_along_the_matrix():
    w = normal(6, 5)
    u = 5 * w + normal(6, 5, seed=1)
    along, across = (
        untyped(optclip.hyperball(optax.identity(), 0.01, tangent=tangent))
        for tangent in (False, True)
    )
    moved = [
        norms(tx.update({"w": u}, None, {"w": w})[0]["w"]) / norms(w)
        for tx in (along, across)
    ]
    # Most of the plain step is lost to the landing, all of the tangent one is kept.
    assert moved[0] < 0.005
    np.testing.assert_allclose(moved[1], 0.01, rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_has_no_direction_moves_nothing(dtype):
    """Zero, and along w up to rounding: of that no tangent part is left."""
    w = normal(6, 5, dtype=dtype)
    for tangent, u in ((False, 0 * w), (True, 0 * w), (True, -3 * w), (True, 2 * w)):
        exact = u.astype(jnp.float32) if tangent else u
        tx = untyped(optclip.hyperball(optax.identity(), RATE, tangent=tangent))
        if tangent and dtype == jnp.bfloat16:
            exact = (w.astype(jnp.float32) * 3.0) if np.any(u) else exact
        updates, _ = tx.update({"w": exact}, None, {"w": w})
        assert not np.any(updates["w"]), (tangent, dtype)


def test_a_matrix_that_starts_at_zero_is_the_optimizers_own():
    params = {"a": jnp.zeros((2, 3)), "w": normal(2, 3)}
    grads = {"a": normal(2, 3, seed=1), "w": normal(2, 3, seed=2)}
    tx = optclip.hyperball(optax.sgd(0.1), RATE)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(2):
        updates, state = update(grads, state, params)
        np.testing.assert_allclose(updates["a"], -0.1 * grads["a"], rtol=ULP)
        params = apply(params, updates)
    np.testing.assert_allclose(norms(params["w"]), norms(normal(2, 3)), rtol=4 * ULP)


def test_an_abstract_start_has_no_radius_until_a_state_is_restored():
    params = {"stack": normal(2, 3, 4), "w": normal(3, 4), "scale": jnp.ones(3)}
    tx = optclip.hyperball(optax.sgd(0.1), RATE)
    unknown = tx.init(jax.eval_shape(lambda: params))
    known, update = tx.init(params), jax.jit(tx.update)
    assert jax.tree.structure(unknown) == jax.tree.structure(known)
    assert known.sphere.apart[0].shape == (2, 1, 1)
    for radius in (unknown.sphere.memory, *unknown.sphere.apart):
        assert np.all(np.isnan(radius))
    updates, _ = update(params, unknown, params)
    assert all(np.all(np.isnan(updates[name])) for name in ("stack", "w"))
    assert not np.any(np.isnan(updates["scale"]))
    restored = unknown._replace(sphere=known.sphere)
    updates, _ = update(params, restored, params)
    assert not any(np.any(np.isnan(x)) for x in jax.tree.leaves(updates))


def test_groups_and_leaves_are_chosen():
    """One head at a time, and only there."""
    params = {"query": {"kernel": normal(8, 2, 3)}, "out": {"kernel": normal(2, 3, 8)}}
    grads = jax.tree.map(lambda x: jnp.ones_like(x).at[..., 0].set(9.0), params)
    heads = groupings.per_unit(axes={"query/kernel": (0, 2)})
    tx = optclip.hyperball(optax.sgd(1.0), RATE, grouping=heads, where="query")
    updates, state = tx.update(grads, tx.init(params), params)
    assert state.sphere.apart[0].shape == (1, 2, 1)
    np.testing.assert_array_equal(updates["out"]["kernel"], -grads["out"]["kernel"])
    w, after = (
        np.swapaxes(np.asarray(x["query"]["kernel"], "d"), 0, 1)
        for x in (params, apply(params, updates))
    )
    np.testing.assert_allclose(norms(after), norms(w), rtol=4 * ULP)
    g = np.swapaxes(np.asarray(grads["query"]["kernel"], "d"), 0, 1)
    for head in range(2):
        want = oracle.hyperball(w[head], -g[head], RATE)
        np.testing.assert_allclose(after[head], want, rtol=0, atol=1e-6)


# Models.


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(4)(nn.tanh(x)), None


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        stack = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        x, _ = untyped(nn.scan)(Layer, length=3, **stack)()(x, None)
        return nn.Dense(1)(x)


def test_a_scan_stacked_linen_model_trains_on_its_spheres():
    x = normal(16, 4)
    net = Stacked()
    params = untyped(net.init(jax.random.key(0), x))["params"]
    tx = optclip.hyperball(optax.adam(1e-2), RATE)
    state = TrainState.create(apply_fn=net.apply, params=params, tx=tx)

    def loss(params):
        return jnp.mean(
            (untyped(net.apply({"params": params}, x))[:, 0] - untyped(x).sum(1)) ** 2
        )

    step = jax.jit(lambda s: s.apply_gradients(grads=jax.grad(loss)(s.params)))
    first = loss(params)
    for _ in range(30):
        state = step(state)
    assert loss(state.params) < 0.5 * first

    def kernels(tree):
        flat = jax.tree_util.tree_flatten_with_path(tree)[0]
        return [leaf for path, leaf in flat if "kernel" in str(path[-1])]

    for old, new in zip(*map(kernels, (params, state.params)), strict=True):
        np.testing.assert_allclose(norms(new), norms(old), rtol=4 * ULP)
    assert kernels(params)[1].shape == (3, 4, 4)


@pytest.mark.parametrize("sharded", [False, True], ids=["one device", "sharded"])
def test_an_nnx_optimizer_donated(sharded):
    if sharded and jax.device_count() < 2:
        pytest.skip("one device only")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    class Net(nnx.Module):
        def __init__(self, tree):
            w = tree["w"]
            if sharded:
                w = nnx.with_partitioning(lambda: tree["w"], (None, "data"))()
            self.w, self.experts = nnx.Param(w), nnx.Param(tree["experts"])

    def tree(seed):
        return {"w": normal(4, 6, seed=seed), "experts": normal(2, 3, 4, seed=seed + 9)}

    tx = optclip.hyperball(optax.adam(1e-3), RATE, tangent=True)
    with jax.set_mesh(mesh):
        net = Net(tree(0))
        optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
        update = nnx.jit(lambda m, o, g: o.update(m, g) and None, donate_argnums=(0, 1))
        for seed in (1, 2):
            update(net, optimizer, nnx.state(Net(tree(seed))))
        got = {"w": jax.device_get(net.w[...]), "experts": net.experts[...]}
    params = tree(0)
    state = tx.init(params)
    for seed in (1, 2):
        updates, state = jax.jit(tx.update)(tree(seed), state, params)
        params = apply(params, updates)
    for name, want in untyped(params).items():
        np.testing.assert_allclose(got[name], want, rtol=1e-5, atol=1e-6)


# Meshes.

SPECS = {
    "experts": {"up": P("data", None, "model")},
    "head": {"kernel": P("model", "data")},
    "norm": {"scale": P()},
}


def experts(seed):
    return {
        "experts": {"up": normal(4, 3, 6, seed=seed)},
        "head": {"kernel": normal(6, 8, seed=seed + 1)},
        "norm": {"scale": jnp.ones(6)},
    }


def mesh_of(axis_type):
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)


def stepped(tx, params, grads):
    updates, state = tx.update(grads, tx.init(params), params)
    return updates, state.sphere


def placed(tree, mesh):
    return jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, SPECS
    )


@pytest.mark.parametrize("tangent", [False, True])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_norms_of_sharded_matrices_are_those_of_one_device(axis_type, tangent):
    """Nothing is gathered, and the radii of experts lie where the experts do."""
    tx = optclip.hyperball(optax.sgd(1.0), RATE, tangent=tangent)
    want = jax.jit(lambda p, g: stepped(tx, p, g))(experts(0), experts(5))
    mesh = mesh_of(axis_type)
    with jax.set_mesh(mesh):
        arguments = [placed(experts(seed), mesh) for seed in (0, 5)]
        program = jax.jit(lambda p, g: stepped(tx, p, g)).lower(*arguments).compile()
        got = program(*arguments)
    text = program.as_text() or ""
    assert "all-reduce" in text
    assert "all-gather" not in text and "all-to-all" not in text
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want
    )
    (radii,) = got[1].apart
    assert radii.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), 3)


@pytest.mark.parametrize("init_inside", [False, True])
def test_experts_of_each_device_in_shard_map(init_inside):
    """Experts lie whole along data, in parts along model; a dense matrix in parts."""
    names = {"experts": "model", "head": ("model", "data"), "norm": ()}
    mesh = mesh_of(AxisType.Auto)
    tx = optclip.hyperball(optax.sgd(1.0), RATE, tangent=True, axis_name=names)
    plain = optclip.hyperball(optax.sgd(1.0), RATE, tangent=True)
    params, grads = experts(0), experts(5)
    want = stepped(plain, params, grads)

    def step(params, grads, sphere):
        state = tx.init(params)
        if not init_inside:
            state = state._replace(sphere=sphere)
        updates, state = tx.update(grads, state, params)
        return updates, state.sphere

    outside = tx.init(params).sphere
    radii = outside._replace(memory=untyped(P()), apart=(P("data"),))
    got = jax.jit(
        jax.shard_map(
            step, mesh=mesh, in_specs=(SPECS, SPECS, radii), out_specs=(SPECS, radii)
        )
    )(params, grads, outside)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want
    )


# In bfloat16, for long.


@pytest.mark.parametrize("around", ["project", "hyperball"])
def test_norms_do_not_drift_in_bfloat16(around):
    """20,000 steps, experts and a matrix: never more than 4 ulp from the first norm."""
    params = {"experts": normal(3, 8, 4, dtype=jnp.bfloat16)}
    params |= {"head": normal(8, 4, seed=1, dtype=jnp.bfloat16)}
    if around == "project":
        sphere = sets.init_sphere(groupings.per_matrix())
        tx = optax.chain(optax.sgd(0.02), optclip.project(sphere))
    else:
        tx = optclip.hyperball(optax.sgd(1.0), 0.02)
    first = {name: jnp.asarray(norms(w), jnp.float32) for name, w in params.items()}

    def off(params):
        return jnp.stack(
            [
                jnp.max(jnp.abs(optclip.global_norm(w) / first - 1))
                for name, stack in params.items()
                for w, first in zip(
                    stack.reshape(-1, 8, 4), first_of[name].reshape(-1), strict=True
                )
            ]
        )

    first_of = first

    def step(carry, key):
        params, state, worst = carry
        noise = jax.tree.map(lambda w: jax.random.normal(key, w.shape, w.dtype), params)
        grads = jax.tree.map(lambda w, n: n - w, params, noise)  # outward, too
        updates, state = tx.update(grads, state, params)
        params = apply(params, updates)
        return (params, state, jnp.maximum(worst, off(params))), ()

    start = params, tx.init(params), jnp.zeros(4)
    keys = jax.random.split(jax.random.key(0), 20_000)
    (after, _, worst), _ = jax.jit(lambda: jax.lax.scan(step, start, keys))()
    assert np.all(worst <= 4 * 2.0**-7), worst / 2.0**-7
    assert any(np.any(after[name] != params[name]) for name in params)


# Nonsense.

SGD = optax.sgd(1.0)
SQUARE = {"w": jnp.ones((2, 2))}
NONSENSE = {
    "optimizer must be an optimizer, got 0.1.": (
        lambda: optclip.hyperball(untyped(0.1), 0.1)
    ),
    "rate must be a non-negative number, array or schedule, got [0.1].": (
        lambda: optclip.hyperball(SGD, untyped([0.1]))
    ),
    "grouping must lie within leaves": (
        lambda: optclip.hyperball(SGD, 0.1, grouping=groupings.whole())
    ),
    "where must select a leaf, got none of 'b'.": (
        lambda: optclip.hyperball(SGD, 0.1).init({"b": jnp.ones(3)})
    ),
    "params must be given to update, got None.": (
        lambda: optclip.hyperball(SGD, 0.1).update(SQUARE, untyped(None))
    ),
    "params must have the shapes of updates, got (2, 2) for (2, 3) at 'w'.": (
        lambda: stepped(optclip.hyperball(SGD, 0.1), SQUARE, {"w": jnp.ones((2, 3))})
    ),
}


@pytest.mark.parametrize(("says", "make"), NONSENSE.items())
def test_nonsense(says, make):
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value).startswith(f"hyperball: {says}")


def test_a_negative_end_of_a_schedule_counts_as_zero():
    params = {"w": normal(3, 4)}
    tx = optclip.hyperball(optax.sgd(1.0), lambda step: -1e-9 * (step + 1))
    updates, _ = tx.update(params, tx.init(params), params)
    assert not np.any(updates["w"])
    for bad in (None, jnp.ones(2)):
        tx = optclip.hyperball(optax.sgd(1.0), untyped(lambda step, bad=bad: bad))
        with pytest.raises(ValueError, match=r"^hyperball: rate\(step\) must be"):
            tx.update(params, tx.init(params), params)


def test_rates_that_are_injected_and_mapped_over():
    params, grads = {"w": normal(3, 4)}, {"w": normal(3, 4, seed=1)}

    def make(rate):
        return optclip.hyperball(optax.sgd(1.0), rate)

    injected = untyped(optax.inject_hyperparams(make)(rate=RATE))
    updates, _ = injected.update(grads, injected.init(params), params)

    def moved(rate):
        tx = make(rate)
        return tx.update(grads, tx.init(params), params)[0]["w"]

    np.testing.assert_allclose(updates["w"], moved(RATE), rtol=1e-6)
    both = jax.vmap(moved)(jnp.array([0.3, RATE]))
    np.testing.assert_allclose(both[1], moved(RATE), rtol=1e-5, atol=1e-7)
