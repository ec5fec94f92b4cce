"""Sets that sort and factorise on meshes: what each device is sent, and how often.

That their numbers are those of one device is law 9, for one tree; here are stacks of
matrices and single ones, on a 4x2 mesh.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optclip
from optclip import groupings, sets

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs a mesh")

MATRICES = {
    "spectral_ball": sets.spectral_ball(),
    "spectral_ball-products": sets.spectral_ball(iterations=24),
    "orthogonal": sets.orthogonal(),
    "orthogonal-products": sets.orthogonal(iterations=24),
}
UNITS = {
    "l1_ball-units": sets.l1_ball(grouping=groupings.per_unit()),
    "simplex-units": sets.simplex(grouping=groupings.per_unit()),
}
LEAVES = {"l1_ball": sets.l1_ball(), "simplex": sets.simplex()}
SIZES = {"f32": 4, "pred": 1}


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def sent(function, *args):
    """The kind of every collective, with the bytes that it gives each device."""
    text = function.lower(*args).compile().as_text()
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = []
    for shapes, kind in re.findall(rf" = (.*?) ({kinds})(?:-start)?\(", text):
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        sizes = [SIZES[t] * np.prod([int(n) for n in s.split(",") if n])
                 for t, s in arrays]  # fmt: skip
        found.append((kind, int(sum(sizes))))
    return found


def on_devices(constraint, tree, specs, axis_type=AxisType.Explicit):
    """What a step onto the set sends; checks the numbers and where they lie."""
    tx = optclip.project(constraint)

    def step(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return tx.update(zeros, tx.init(params), params)[0]

    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        placed = jax.tree.map(
            lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs
        )
        jitted = jax.jit(step)
        updates, found = jitted(placed), sent(jitted, placed)
    for name, want in jax.jit(step)(tree).items():
        np.testing.assert_allclose(updates[name], want, rtol=1e-5, atol=1e-5)
        if axis_type == AxisType.Explicit:
            assert_lies_like(updates[name], placed[name])
    return found


def assert_lies_like(one, other):
    assert one.sharding.is_equivalent_to(other.sharding, one.ndim), one.sharding


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", MATRICES | UNITS)
def test_points_that_are_whole_on_their_devices_move_nothing(name, axis_type):
    """A stack of layers split over the layers."""
    tree = {"kernel": 3 * normal(8, 6, 4), "bias": normal(8, 4)}
    specs = {"kernel": P(("data", "model")), "bias": P("data")}
    assert on_devices((MATRICES | UNITS)[name], tree, specs, axis_type) == []


@pytest.mark.parametrize("name", ["spectral_ball", "orthogonal-products", *UNITS])
def test_points_in_parts_are_shared_out(name):
    """Each device gets an eighth of the stack: one all-to-all a mesh axis, and back."""
    tree = {"kernel": 3 * normal(8, 8, 4), "bias": normal(8, 4)}
    specs = {"kernel": P(None, "data", "model"), "bias": P("data")}
    found = on_devices((MATRICES | UNITS)[name], tree, specs)
    # The units are whole along the model axis: only the other one moves.
    axes = 2 if name in MATRICES else 1
    own = tree["kernel"].nbytes // 8
    assert found == [("all-to-all", own)] * 2 * axes


@pytest.mark.parametrize("name", ["spectral_ball-products", "orthogonal", *LEAVES])
def test_one_point_is_gathered_on_every_device(name):
    """By one all-gather a mesh axis; each device keeps its part of what it finds."""
    tree = {"kernel": 3 * normal(16, 6), "bias": normal(6)}
    specs = {"kernel": P("data", "model"), "bias": P()}
    found = on_devices((MATRICES | LEAVES)[name], tree, specs)
    whole = tree["kernel"].nbytes
    assert sorted(size for _, size in found) in (
        [whole // 4, whole],
        [whole // 2, whole],
    )
    assert {kind for kind, _ in found} == {"all-gather"}


@pytest.mark.parametrize("name", ["orthogonal", "simplex-units", "l1_ball"])
def test_eager(name):
    """Outside of `jit`, and of the mesh; what was projected lies in the set."""
    constraint = (MATRICES | UNITS | LEAVES)[name]
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    tree = {"kernel": 3 * normal(3, 8, 4)}
    placed = jax.device_put(tree, NamedSharding(mesh, P(None, "data", "model")))
    found = optclip.project_params(placed, constraint)
    want = optclip.project_params(tree, constraint)["kernel"]
    np.testing.assert_allclose(found["kernel"], want, rtol=1e-5, atol=1e-5)
    assert_lies_like(found["kernel"], placed["kernel"])
    optclip.project_params(found, constraint, strict=True)


@pytest.mark.parametrize("name", ["spectral_ball", "orthogonal-products", "simplex"])
def test_derivatives(name):
    constraint = (MATRICES | LEAVES)[name]
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)

    @jax.jit
    @jax.grad
    def slope(kernel):
        found = optclip.project_params({"kernel": kernel}, constraint)
        return jnp.sum(jnp.sin(3 * found["kernel"]))

    x = normal(8, 8, 4)
    placed = jax.device_put(x, NamedSharding(mesh, P(None, "data", "model")))
    np.testing.assert_allclose(slope(placed), slope(x), rtol=1e-3, atol=1e-4)
