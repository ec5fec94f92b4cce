"""What law 9 puts on a mesh, and how: eight devices that the host pretends to have.

One tree, whose leaves lie on the axes of a 4x2 mesh in every way: over both, over one,
over none.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optclip
from optclip import groupings, thresholds
from tests.untyped import untyped

KINDS = ("clip", "enlarging", "adaptive", "elementwise", "measuring", "wrapper")
AXIS_TYPES = [
    pytest.param(AxisType.Auto, id="auto"),
    pytest.param(AxisType.Explicit, id="explicit"),
]
LIMIT = 0.5
AXES = ("data", "model")

SPECS = {
    "a": {"bias": P("model"), "kernel": P("data", "model")},
    "b": {"kernel": P(None, "data"), "scale": P()},
    "c": {"half": P(AXES), "modulus": P("model"), "steps": P()},
}
# Examples lie on the leading axis, and only that one may be sharded without a sum.
EXAMPLE_SPECS = jax.tree.map(lambda spec: P("data"), SPECS)


def on_axes(params, sample):
    """All under Auto axes, and a sample under Explicit ones."""
    return [
        pytest.param(*p.values, axis_type, id=f"{p.id}-{axis_type.name.lower()}")
        for p in params
        for axis_type in (AxisType.Auto, AxisType.Explicit)
        if axis_type == AxisType.Auto or p.id in sample
    ]


@functools.cache
def mesh_of(shape=(4, 2), axis_type=AxisType.Auto):
    return jax.make_mesh(
        shape,
        AXES[: len(shape)],
        axis_types=(axis_type,) * len(shape),
        devices=jax.devices("cpu")[:8],
    )


@functools.cache
def mixed_leaves():
    """Leading axes of 8, so that it is a batch of examples too."""
    rng = np.random.default_rng(0)

    def normal(*shape, dtype=np.float32):
        return jnp.asarray(rng.normal(size=shape), dtype)

    return {
        "a": {"bias": normal(8), "kernel": normal(8, 8)},
        "b": {"kernel": 3 * normal(8, 8), "scale": normal(8)},
        "c": {
            "half": normal(8, 2, dtype=jnp.bfloat16),
            "modulus": jax.lax.complex(normal(8), normal(8)),
            "steps": jnp.arange(8),
        },
    }


def given_to(row):
    """Updates and parameters that the row takes."""
    tree = mixed_leaves()
    if row.complex is not True:
        tree = tree | {"c": tree["c"] | {"modulus": tree["c"]["modulus"].real}}
    if getattr(row, "integers", True) is not True:
        steps = tree["c"]["steps"].astype(jnp.float32)
        tree = tree | {"c": tree["c"] | {"steps": steps}}
    return tree, jax.tree.map(lambda x: 2 * x, tree)


def placed_on(tree, specs, mesh):
    return jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs
    )


def manual(function, in_specs, out_specs, shape=(8,), check_vma=True):
    mesh = mesh_of(shape)
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma
    )
    return jax.jit(mapped)


def last_step(tx, levels=(1,)):
    """The last of some steps, and its metrics: scalars, whatever the rule."""

    def step(updates, params):
        def body(before, level):
            scaled = jax.tree.map(lambda x: x * level.astype(x.dtype), updates)
            out, state = tx.update(scaled, before[1], params)
            return (out, state), None

        start = updates, tx.init(params)
        if len(levels) == 1:
            (out, state), _ = body(start, jnp.float32(levels[0]))
        else:
            (out, state), _ = jax.lax.scan(body, start, jnp.array(levels, jnp.float32))
        return out, optclip.metrics(state)

    return step


def last_step_of(row):
    """What a rule learns has to be right on a mesh as well: one step more for it."""
    return last_step(row.build(LIMIT), (1, 9) if row.kind == "adaptive" else (1,))


def assert_equal(actual, expected, rtol=2e-6):
    """Sums in another order move a factor by a few ulp, a bfloat16 by one."""
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)

    def check(path, one, other):
        rough = one.dtype == jnp.bfloat16
        one, other = (np.asarray(x.astype(exact_dtype(x))) for x in (one, other))
        np.testing.assert_allclose(
            one, other, rtol=2**-7 if rough else rtol, err_msg=str(path)
        )

    jax.tree_util.tree_map_with_path(check, actual, expected)


def exact_dtype(x):
    return jnp.float32 if x.dtype == jnp.bfloat16 else x.dtype


def projected(tx):
    def step(params, updates):
        updates, _ = tx.update(updates, tx.init(params), params)
        return jax.tree.map(jnp.add, params, updates)

    return step


def normal(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def unit_clip(axis_name=None, threshold=None):
    return untyped(optclip.clip_by)(
        threshold or thresholds.constant(LIMIT),
        grouping=groupings.per_unit(axes=0),
        axis_name=axis_name,
    )


def example_clip(axis_name=None):
    grouping = groupings.per_example()
    return untyped(optclip.clip_by)(LIMIT, grouping=grouping, axis_name=axis_name)


NAMED = {"r": jnp.full((4,), 2.0), "w": {"u": jnp.arange(8.0), "v": jnp.ones((8, 2))}}
NAMED_SPECS = {"r": P(), "w": P("data")}
ON_ALL = {"r": (), "w": "data"}
