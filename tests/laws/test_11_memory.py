"""Law 11: a jitted clip keeps no temporary copy of a leaf."""

import jax
import jax.numpy as jnp
import optax
import pytest

import optclip
from tests.laws.table import Constraint, Row, projections, rows

# A slice of a transformer: every fan-in is at least 512, so that one number a unit is
# little beside the leaf.
SHAPES = {
    "attention/kernel": (512, 1536),
    "attention/bias": (1536,),
    "mlp/up": (512, 2048),
    "mlp/down": (2048, 512),
    "norm/scale": (512,),
}


pytestmark = pytest.mark.skipif(
    jax.default_backend() == "cpu" and jax.__version_info__ < (0, 10),
    reason="XLA:CPU of jax 0.9 and older writes what it squares to memory",
)


def temporary_share(tx: optax.GradientTransformation, dtype: jnp.dtype) -> float:
    """Temporary bytes of one jitted update, relative to the gradients' bytes."""
    grads = {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in SHAPES.items()}
    state = jax.eval_shape(tx.init, grads)
    compiled = jax.jit(tx.update).lower(grads, state, grads).compile()
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in grads.values())
    return compiled.memory_analysis().temp_size_in_bytes / total


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize(
    "row", rows("clip", "adaptive", "elementwise", "measuring", "wrapper")
)
def test_no_temporary_copy(row: Row, dtype: jnp.dtype):
    if row.batched:
        pytest.skip("leaves of examples share a leading axis, these do not")
    assert temporary_share(row.build(1.0), dtype) < 0.01


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
def test_no_temporary_copy_on_its_own(dtype: jnp.dtype):
    grads = [jax.ShapeDtypeStruct(shape, dtype) for shape in SHAPES.values()]
    compiled = jax.jit(optclip.global_norm).lower(grads).compile()
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in grads)
    assert compiled.memory_analysis().temp_size_in_bytes < 0.01 * total


def test_the_measure_of_memory_sees_a_copy():
    # Optax's rule widens bfloat16 leaves to memory; if this number were 0, the law
    # above would be blind.
    share = temporary_share(optax.clip_by_global_norm(1.0), jnp.dtype(jnp.bfloat16))
    if jax.default_backend() == "cpu":
        assert share > 1.0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("row", projections(fuses=True))
def test_projections_keep_no_temporary_copy(row: Constraint, dtype: jnp.dtype):
    if row.points != "element" and not hasattr(jax, "set_mesh"):
        # Squares of the sum: one float32 copy for bfloat16, 2 % for float32.
        pytest.skip("XLA:CPU of jax 0.7.0 does not fuse a sum into its reduction")
    grads = {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in SHAPES.items()}
    tx = optclip.project(row.make(1.0))
    state = jax.eval_shape(tx.init, grads)
    compiled = jax.jit(tx.update).lower(grads, state, grads).compile()
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in grads.values())
    assert compiled.memory_analysis().temp_size_in_bytes < 0.01 * total


def test_clipping_weights_costs_nothing_beside_the_optimizer():
    """A whole step, donated: bytes as without the projection."""
    grads = {p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in SHAPES.items()}

    def temporary(tx: optax.GradientTransformation) -> int:
        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = jax.eval_shape(tx.init, grads)
        with jax.numpy_dtype_promotion("standard"):  # which RMSProp needs
            lowered = jax.jit(step, donate_argnums=(0, 1)).lower(grads, state, grads)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    alone = temporary(optax.rmsprop(5e-5))
    chained = optax.chain(optax.rmsprop(5e-5), optclip.clip_weights(0.01))
    assert temporary(chained) <= alone + 1024
