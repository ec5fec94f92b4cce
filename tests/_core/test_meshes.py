"""What is known of a value's mesh, and maxima that lose no NaN on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optclip._core import meshes

NUMBERS = [[-3.0, 2.0, 2.0], [-0.0, 0.0, -1e-38], [-jnp.inf, -1.0, -jnp.inf]]


@pytest.mark.parametrize("row", [*NUMBERS, [jnp.inf, 1.0, -jnp.inf]])
def test_largest_is_the_maximum(row):
    assert meshes.largest(jnp.array(row)) == max(row)


@pytest.mark.parametrize("nan", [np.nan, -np.nan])
def test_largest_remembers_a_nan(nan):
    x = jnp.asarray(np.array([[1.0, nan, np.inf], [1.0, 2.0, 3.0]], np.float32))
    np.testing.assert_array_equal(meshes.largest(x, (1,)), [np.nan, 3.0])
    assert meshes.largest(x, (1,), keepdims=True).shape == (2, 1)


def test_largest_has_the_derivative_of_the_maximum():
    """Those that share it share its derivative."""
    x = jnp.array([[1.0, 3.0, 3.0], [0.0, 0.0, -1.0]])
    got, want = (
        jax.grad(lambda x, by=by: jnp.sum(jnp.sin(by(x, 1))))(x)
        for by in (lambda x, axis: meshes.largest(x, (axis,)), jnp.max)
    )
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_where_xla_may_split(axis_type):
    """Inside `jit` as well, and not by manual axes, nor one device."""
    devices = jax.devices("cpu")[:4]
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,), devices=devices)
    x = jnp.ones(4)
    found = []

    def note(x):
        found.append(meshes.is_split(jnp.square(x)))
        return x

    placed = jax.device_put(x, NamedSharding(mesh, P("data")))
    for value in (x, placed):
        note(value)
        jax.jit(note)(value)
    jax.shard_map(note, mesh=mesh, in_specs=P("data"), out_specs=P("data"))(placed)
    assert found == [False, False, True, True, False]
