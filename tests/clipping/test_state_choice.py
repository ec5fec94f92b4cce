"""An optimizer's step, or none: compared with `lax.cond` around the whole of it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optclip.clipping import state_choice
from tests.untyped import untyped

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "b": jnp.ones(3)}


def gradients(index):
    rng = np.random.default_rng(index)
    return jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), PARAMS
    )


def plain(tree):
    """Random keys as the numbers that they hold, which NumPy can compare."""

    def leaf(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(x) if is_key else x

    return jax.tree.map(leaf, tree)


def branching(skip, step, state):
    """What `unless` must give, in the words of its summary."""
    drop = (jax.tree.map(jnp.zeros_like, PARAMS), state)
    return jax.lax.cond(skip, lambda: drop, step)


OPTIMIZERS = {
    "adamw": optax.adamw(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=2),
    "schedule": optax.inject_hyperparams(optax.lion)(
        optax.linear_schedule(0.1, 0.0, 3)
    ),
    "micro steps": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    # The second state is computed from the updates that the first one gives.
    "averaged": optax.chain(optax.scale_by_adam(), optax.ema(0.9)),
    "noise": optax.add_noise(0.1, 0.5, jax.random.key(0)),
    "stateless": optax.sgd(0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_or_none(name):
    """Over steps of both kinds, two dropped in a row among them."""
    tx = untyped(OPTIMIZERS[name])

    @jax.jit
    def both(skip, updates, states):
        steps = [lambda s=s: tx.update(updates, s, PARAMS) for s in states]
        early = state_choice.unless(skip, steps[0], states[0])
        return early, branching(skip, steps[1], states[1])

    states = (tx.init(PARAMS), tx.init(PARAMS))
    with jax.numpy_dtype_promotion("standard"):  # which Optax needs
        for index, skip in enumerate((False, True, True, False, True, False)):
            skipped = states[0]
            got, want = both(skip, gradients(index), states)
            chex.assert_trees_all_close(plain(got), plain(want), rtol=1e-6)
            if skip:
                chex.assert_trees_all_equal(plain(got[1]), plain(skipped))
            states = (got[1], want[1])


@pytest.mark.parametrize("skip", [False, True])
def test_its_derivative(skip):
    """Zero for a dropped step, and that of the step otherwise."""
    tx = optax.adam(0.1)
    state = tx.init(PARAMS)

    def moved(choose, updates):
        def step():
            return tx.update(updates, state, PARAMS)

        out, new = choose(jnp.asarray(skip), step, state)
        return jnp.sum(out["w"]) + jnp.sum(new[0].nu["b"])

    with jax.numpy_dtype_promotion("standard"):
        got, want = (
            jax.jit(jax.grad(lambda u, choose=choose: moved(choose, u)))(gradients(0))
            for choose in (state_choice.unless, branching)
        )
    chex.assert_trees_all_close(got, want, rtol=1e-5)


@pytest.mark.parametrize("skip", [False, True])
def test_arrays_of_the_state_that_nothing_makes(skip):
    """One that came through, one that two share, a constant, and a changed dtype."""
    state = {"kept": 1.0, "one": 2.0, "other": 3.0, "constant": 4.0, "widened": 5.0}
    state = jax.tree.map(jnp.asarray, state) | {"widened": jnp.bfloat16(5.0)}

    def step():
        sum_ = state["one"] + 10.0
        wide = state["widened"].astype(jnp.float32) + 10.0
        new = {"kept": state["kept"], "one": sum_, "other": sum_, "constant": 0.0}
        return {"u": sum_ * 2.0}, new | {"widened": wide}

    with jax.numpy_dtype_promotion("standard"):
        out, new = jax.jit(lambda skip: state_choice.unless(skip, step, state))(
            jnp.asarray(skip)
        )
    assert out == {"u": 0.0 if skip else 24.0}
    made = {"kept": 1.0, "one": 12.0, "other": 12.0, "constant": 0.0, "widened": 15.0}
    assert jax.device_get(new) == jax.device_get(state if skip else made)


def test_a_callback_is_called_once(capfd):
    def step():
        new = jnp.zeros(()) + 1.0
        jax.debug.print("made {x}", x=new)
        return {"u": new}, new

    jax.jit(lambda skip: state_choice.unless(skip, step, jnp.zeros(())))(False)
    jax.effects_barrier()
    assert capfd.readouterr().out == "made 1.0\n"
