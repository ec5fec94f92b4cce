"""`adopt_state`: old runs go on under a new chain, and nothing is lost silently."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import optclip
from optclip import adopt_state
from tests.untyped import untyped

PARAMS = {"b": jnp.ones(2), "w": jnp.arange(1.0, 4.0)}
# Of rules that only shrink: the others have counts of what they change, too.
METRICS = tuple(f for f in optclip.ClipMetrics._fields if "changed" not in f)
MASK = {"b": False, "w": True}


@pytest.fixture(autouse=True)
def _optax_promotes():
    """Adam divides by powers of its int32 counter."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def clip():
    # The measure makes no difference here, but l1 compiles in half the time of l2.
    return optclip.clip_by_global_norm(1.0, measure=optclip.measures.l1)


def adam():
    return optax.adam(0.1)


def trained(tx, params=PARAMS, steps=2):
    """A state that differs from the initial one in every leaf."""
    state = tx.init(params)
    for step in range(steps):
        grads = jax.tree.map(lambda x, s=step: (s + 1) * x, params)
        _, state = tx.update(grads, state, params)
    return untyped(state)


def metrics_at(*prefix):
    return tuple("/".join([*prefix, "metrics", field]) for field in METRICS)


def part(state, path):
    """The subtree at a path of fields, names and indices."""
    for name in filter(None, path.split("/")):
        if isinstance(state, dict):
            state = state[name]
        elif hasattr(state, name):
            state = getattr(state, name)
        else:
            state = state[int(name)]
    return state


def chained(*before):
    return optax.chain(*before, adam())


# new chain, old chain, {path in new: path in old} of what is kept, fresh, unused.
CASES = {
    "clip in front of a bare adam": (
        chained(clip()), adam(), {"1/0": "0"}, metrics_at("0"), (),
    ),
    "clip in front of adam in a chain": (
        chained(clip()), chained(), {"1/0": "0/0"}, metrics_at("0"), (),
    ),
    "clip after adam": (
        optax.chain(adam(), clip()), adam(), {"0/0": "0"}, metrics_at("1"), (),
    ),
    "ours for Optax's stateless clip": (
        chained(clip()), chained(optax.clip_by_global_norm(1.0)),
        {"1/0": "1/0"}, metrics_at("0"), (),
    ),
    "nothing changed": (
        chained(clip()), chained(clip()), {"0": "0", "1/0": "1/0"}, (), (),
    ),
    "another limit, which is no state": (
        chained(optclip.clip_by_norm(9.0)), chained(clip()),
        {"0": "0", "1/0": "1/0"}, (), (),
    ),
    "clip removed, to a bare adam": (
        adam(), chained(clip()), {"0": "1/0"}, (), metrics_at("0"),
    ),
    "clip removed, Optax's instead": (
        chained(optax.clip_by_global_norm(1.0)), chained(clip()),
        {"1/0": "1/0"}, (), metrics_at("0"),
    ),
    "a second clip": (
        optax.chain(clip(), adam(), clip()), chained(clip()),
        {"0": "0", "1/0": "1/0"}, metrics_at("2"), (),
    ),
    "named chain": (
        optax.named_chain(("clip", clip()), ("adam", adam())),
        optax.named_chain(("adam", adam())),
        {"adam/0": "adam/0"}, metrics_at("clip"), (),
    ),
    "from a chain to a named chain": (
        optax.named_chain(("clip", clip()), ("adam", adam())), chained(),
        {"adam/0": "0/0"}, metrics_at("clip"), (),
    ),
    "names tell alike states apart": (
        optax.named_chain(("clip", clip()), ("adam", adam()), ("seen", clip())),
        optax.named_chain(("adam", adam()), ("seen", clip())),
        {"adam/0": "adam/0", "seen": "seen"}, metrics_at("clip"), (),
    ),
    "masked clip": (
        chained(optax.masked(clip(), MASK)), adam(),
        {"1/0": "0"}, metrics_at("0", "inner_state"), (),
    ),
    "inside masked": (
        optax.masked(chained(clip()), MASK), optax.masked(adam(), MASK),
        {"inner_state/1/0": "inner_state/0"}, metrics_at("inner_state", "0"), (),
    ),
    "inside MultiSteps": (
        optax.MultiSteps(chained(clip()), 2).gradient_transformation(),
        optax.MultiSteps(adam(), 2).gradient_transformation(),
        {name: name for name in ("mini_step", "gradient_step", "acc_grads")}
        | {"inner_opt_state/1/0": "inner_opt_state/0"},
        metrics_at("inner_opt_state", "0"), (),
    ),
    "inside inject_hyperparams": (
        optax.inject_hyperparams(lambda rate: chained(clip(), optax.scale(rate)))(1.0),
        optax.inject_hyperparams(lambda rate: chained(optax.scale(rate)))(1.0),
        {"count": "count", "hyperparams": "hyperparams", "inner_state/2/0":
         "inner_state/1/0"}, metrics_at("inner_state", "0"), (),
    ),
    "inside a partition": (
        optax.partition({"x": chained(clip()), "y": adam()}, {"b": "x", "w": "y"}),
        optax.partition({"x": adam(), "y": adam()}, {"b": "x", "w": "y"}),
        {"inner_states/x/inner_state/1/0": "inner_states/x/inner_state/0",
         "inner_states/y/inner_state/0": "inner_states/y/inner_state/0"},
        metrics_at("inner_states", "x", "inner_state", "0"), (),
    ),
    "nested chains": (
        optax.chain(chained(clip()), optax.scale_by_schedule(lambda count: 1.0)),
        optax.chain(chained(), optax.scale_by_schedule(lambda count: 1.0)),
        {"0/1/0": "0/0/0", "1": "1"}, metrics_at("0", "0"), (),
    ),
    "two alike optimizers keep their order": (
        optax.chain(clip(), adam(), optax.scale(2.0), adam()),
        optax.chain(adam(), optax.scale(2.0), adam()),
        {"1/0": "0/0", "3/0": "2/0"}, metrics_at("0"), (),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("new", "old", "kept", "fresh", "unused"), CASES.values(), ids=CASES
)
def test_what_fits_is_kept(new, old, kept, fresh, unused):
    start, state = new.init(PARAMS), trained(old)
    adopted = adopt_state(start, state)
    assert set(adopted.kept) == set(kept)
    assert (adopted.fresh, adopted.unused) == (fresh, unused)
    chex.assert_trees_all_equal_structs(adopted.state, start)
    chex.assert_trees_all_equal_shapes_and_dtypes(adopted.state, start)
    for new_path, old_path in kept.items():
        chex.assert_trees_all_equal(
            part(adopted.state, new_path), part(state, old_path)
        )
    for path in fresh:
        chex.assert_trees_all_equal(part(adopted.state, path), part(start, path))
    # And the run goes on: the new chain takes the state as its own.
    jax.eval_shape(new.update, PARAMS, adopted.state, PARAMS)


def test_a_clip_in_front_is_not_given_the_numbers_of_a_later_one():
    """Alike states keep their order relative to the others: the last stays the last."""
    new = optax.chain(clip(), adam(), clip())
    adopted = adopt_state(new.init(PARAMS), trained(optax.chain(adam(), clip())))
    assert (adopted.kept, adopted.fresh) == (("1/0", "2"), metrics_at("0"))


def test_names_decide_before_the_order():
    new = optax.named_chain(("a", clip()), ("b", clip()))
    adopted = adopt_state(new.init(PARAMS), trained(optax.named_chain(("b", clip()))))
    assert (adopted.kept, adopted.fresh) == (("b",), metrics_at("a"))


def test_the_longer_of_two_names_decides_first():
    inner = untyped(optax.named_chain(("k", clip())))
    tx = untyped(optax.named_chain(("g", inner), ("k", clip())))
    old = trained(tx, steps=1)
    old["k"] = trained(clip(), steps=3)
    adopted = untyped(adopt_state(tx.init(PARAMS), old))
    assert adopted.kept == ("g/k", "k")
    chex.assert_trees_all_equal(adopted.state, old)


def plain(node, with_none=False):
    """As checkpoints come back that were restored without a target."""
    if hasattr(node, "_fields"):
        node = dict(zip(node._fields, node, strict=True)) or None
        node = {} if node is None and not with_none else node
    if isinstance(node, dict):
        return {name: plain(child, with_none) for name, child in node.items()}
    if isinstance(node, (list, tuple)):
        return [plain(x, with_none) for x in node]
    return node


@pytest.mark.parametrize("with_none", [False, True], ids=["state", "None for empty"])
def test_dicts_and_lists_fit_too(with_none):
    new, old = chained(clip()), chained(optax.clip_by_global_norm(1.0))
    state = trained(old)
    adopted = untyped(adopt_state(new.init(PARAMS), plain(state, with_none)))
    assert (adopted.kept, adopted.fresh) == (("1/0",), metrics_at("0"))
    assert adopted.unused == ()
    chex.assert_trees_all_equal(adopted.state[1], state[1])


def test_an_orbax_checkpoint_without_its_target(tmp_path):
    new, old = chained(clip()), chained(optax.clip_by_global_norm(1.0))
    state = trained(old)
    restored = saved_and_restored(state, tmp_path)
    assert isinstance(restored, (list, dict))
    adopted = untyped(adopt_state(new.init(PARAMS), restored))
    assert (adopted.kept, adopted.fresh) == (("1/0",), metrics_at("0"))
    chex.assert_trees_all_equal(adopted.state[1], state[1])


def linear(tx, steps=2):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(steps):
        optimizer.update(model, linear_gradient(model))
    return model, optimizer


def linear_gradient(model):
    return nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 2))) ** 2))(model)


def saved_and_restored(tree, path):
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(path / "old", tree)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(path / "old")
    checkpointer.close()
    return restored


NNX_OLD = {
    "opt_state": (lambda old, path: old.opt_state, ()),
    "nnx.state": (lambda old, path: nnx.state(old), ("step",)),
    "nnx.state, restored": (
        lambda old, path: saved_and_restored(nnx.state(old), path), ("step",),
    ),
    "pure dict, restored": (
        lambda old, path: saved_and_restored(nnx.to_pure_dict(nnx.state(old)), path),
        ("step",),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("saved", "unused"), NNX_OLD.values(), ids=NNX_OLD)
def test_an_nnx_optimizer(saved, unused, tmp_path):
    """Moments with their count: the next step is that of the old run."""
    model, old = linear(adam())
    other, new = linear(chained(optclip.clip_by_global_norm(jnp.inf)), steps=0)
    adopted = adopt_state(new.opt_state, saved(old, tmp_path))
    assert adopted.kept == ("1/0",)
    assert adopted.fresh == metrics_at("0")
    assert adopted.unused == unused
    chex.assert_trees_all_equal_structs(adopted.state, new.opt_state)
    new.opt_state = adopted.state
    nnx.update(other, nnx.state(model))
    for _ in range(2):
        old.update(model, linear_gradient(model))
        new.update(other, linear_gradient(other))
        chex.assert_trees_all_equal(nnx.state(model), nnx.state(other))


def test_an_nnx_optimizer_of_another_shape_keeps_no_count_alone(tmp_path):
    _, old = linear(adam())
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    new = nnx.Optimizer(model, chained(clip()), wrt=nnx.Param)
    with pytest.raises(ValueError, match="none that fits among opt_state/0/count"):
        adopt_state(new.opt_state, saved_and_restored(nnx.state(old), tmp_path))


@pytest.mark.parametrize("name", ["nnx.State", "nnx.Optimizer"])
def test_an_nnx_state_says_which_call_is_right(name):
    _, new = linear(chained(clip()), steps=0)
    given = nnx.state(new) if name == "nnx.State" else new
    with pytest.raises(
        ValueError, match=r"call adopt_state\(optimizer.opt_state, "
    ) as e:
        adopt_state(given, new.opt_state)
    assert (
        f"new_state must be the state of a gradient transformation, got an {name};"
        in str(e.value)
    )
    with pytest.raises(ValueError, match="adopt_state: old_state must be the state"):
        adopt_state(new.opt_state, new)


def watching(threshold, grouping=None):
    grouping = optclip.groupings.whole() if grouping is None else grouping
    return optclip.clip_by(threshold, grouping=grouping)


def largest(init):
    return optclip.thresholds.Threshold(
        limit=lambda state, seen: jnp.full_like(seen.size, jnp.inf),
        init=init,
        observe=lambda state, seen, limit: jax.tree.map(
            lambda x: jnp.maximum(x, seen.size), state
        ),
    )


def test_a_learned_threshold_is_kept_where_its_groups_are_the_same():
    learned = largest(lambda seen: {"largest": jnp.zeros_like(seen.size)})

    def by_leaf():
        return watching(learned, optclip.groupings.per_leaf())

    old = trained(optax.chain(by_leaf(), adam()))
    adopted = untyped(
        adopt_state(untyped(optax.chain(adam(), by_leaf())).init(PARAMS), old)
    )
    assert set(adopted.kept) == {"0/0", "1"}
    chex.assert_trees_all_equal(adopted.state, old[::-1])

    whole = untyped(optax.chain(watching(learned), adam()))
    adopted = untyped(adopt_state(whole.init(PARAMS), old))
    assert adopted.kept == ("1/0",)
    assert adopted.fresh == ("0/threshold/largest", *metrics_at("0"))
    assert adopted.unused == ("0/threshold/largest", *metrics_at("0"))


class LargestState(NamedTuple):
    number: jax.Array


class SmallestState(NamedTuple):
    number: jax.Array


def test_what_one_threshold_learned_never_fits_another():
    """By the names of its numbers, and by its type where both states have one."""

    def rule(make):
        return optax.chain(watching(largest(lambda seen: make(seen.size))), adam())

    def named(name):
        return lambda size: {name: size}

    old = trained(rule(LargestState))
    assert adopt_state(rule(LargestState).init(PARAMS), old).kept == ("0", "1/0")
    for other in (SmallestState, named("center")):
        fresh = untyped(rule(other).init(PARAMS))
        adopted = untyped(adopt_state(fresh, old))
        assert adopted.kept == ("1/0",)
        chex.assert_trees_all_equal(adopted.state[0], fresh[0])
    # A restored dict tells by its names only.
    assert adopt_state(rule(LargestState).init(PARAMS), plain(old)).kept == ("0", "1/0")


RULES = {
    "second_moment": lambda: optclip.clip_by(optclip.thresholds.second_moment(9.0)),
    "quantile_clip": optclip.quantile_clip,
    "norm_growth_clip": optclip.norm_growth_clip,
    "spike_clip": optclip.spike_clip,
    "zclip": optclip.zclip,
    "adagc": lambda: optclip.adagc(grouping=optclip.groupings.whole()),
    "autoclip": lambda: optclip.autoclip(window=4),
    "no state": clip,
}


@pytest.mark.parametrize("restored", [False, True], ids=["state", "dicts"])
@pytest.mark.parametrize("old", RULES)
def test_no_rule_goes_on_with_what_another_learned(old, restored):
    params = {"w": jnp.arange(1.0, 4.0)}
    state = trained(optax.chain(RULES[old](), adam()), params, steps=3)
    state = plain(state) if restored else state
    for name, rule in RULES.items():
        fresh = untyped(optax.chain(rule(), adam())).init(params)
        adopted = untyped(adopt_state(fresh, state))
        assert adopted.kept == (("0", "1/0") if name == old else ("1/0",)), name
        if name != old:
            chex.assert_trees_all_equal(adopted.state[0], fresh[0])


@pytest.mark.parametrize("grouping", ["whole", "per_unit"])
def test_a_history_of_another_length_starts_fresh_with_its_counts(grouping):
    """A warmup that counts steps would be over before anything was learned."""

    def rule(window):
        parts = optclip.thresholds.percentile(50.0, window)
        return optclip.clip_by(parts, grouping=getattr(optclip.groupings, grouping)())

    old = trained(optax.chain(rule(4), adam()), steps=6)
    fresh = untyped(optax.chain(rule(8), adam())).init(PARAMS)
    adopted = untyped(adopt_state(fresh, old))
    assert adopted.kept == ("1/0",)
    chex.assert_trees_all_equal(adopted.state[0], fresh[0])


WIDER = {"b": jnp.ones(5), "w": PARAMS["w"]}


def test_moments_and_their_count_are_taken_together_or_not_at_all():
    """With one moment fresh, the count alone would make its first step 3.15 times."""
    schedule = optax.scale_by_schedule(lambda count: 1.0)
    new = untyped(optax.chain(clip(), adam(), schedule)).init(WIDER)
    adopted = untyped(adopt_state(new, trained(optax.chain(adam(), schedule))))
    assert adopted.kept == ("2",)
    chex.assert_trees_all_equal(adopted.state[:2], new[:2])
    assert adopted.unused == tuple(
        f"0/0/{name}" for name in ("count", "mu/b", "mu/w", "nu/b", "nu/w")
    )
    with pytest.raises(ValueError, match="none that fits among 0/count, 0/mu/b"):
        adopt_state(chained(clip()).init(WIDER), trained(adam()))


def test_what_multi_steps_gathered_belongs_together():
    every = 3
    new = optax.MultiSteps(chained(clip()), every).gradient_transformation()
    old = optax.MultiSteps(adam(), every).gradient_transformation()
    state = trained(old, WIDER, steps=4)
    state = state._replace(inner_opt_state=trained(adam()))
    adopted = untyped(adopt_state(new.init(PARAMS), state))
    assert adopted.kept == ("inner_opt_state/1/0",)
    assert {"mini_step", "gradient_step", "acc_grads/w"} <= set(adopted.fresh)


def test_optimizers_with_fields_of_the_same_names_are_told_apart_by_their_type():
    belief = optax.scale_by_belief()
    new = optax.chain(clip(), belief).init(PARAMS)
    with pytest.raises(ValueError, match="none that fits"):
        adopt_state(new, trained(adam()))
    assert adopt_state(new, trained(belief)).kept == ("1",)


class Attention(NamedTuple):
    query: jax.Array
    value: jax.Array


@pytest.mark.parametrize("restored", [False, True], ids=["state", "dicts"])
def test_parameters_in_a_named_tuple(restored):
    """They are part of a moment, whole or not; a field named value is no box."""
    params = {"attn": Attention(jnp.ones(2), jnp.ones(3)), "value": jnp.ones(1)}
    old = trained(adam(), params)
    adopted = untyped(
        adopt_state(chained(clip()).init(params), plain(old) if restored else old)
    )
    assert (adopted.kept, adopted.fresh) == (("1/0",), metrics_at("0"))
    chex.assert_trees_all_equal(adopted.state[1][0], old[0])
    longer = {**params, "attn": Attention(jnp.ones(2), jnp.ones(4))}
    with pytest.raises(ValueError, match="none that fits"):
        adopt_state(chained(clip()).init(longer), old)


def test_a_linen_train_state_restored_whole():
    """What is beside the optimizer state is listed as unused."""
    state = {
        "step": jnp.int32(2),
        "params": PARAMS,
        "opt_state": plain(trained(adam())),
    }
    adopted = adopt_state(chained(clip()).init(PARAMS), state)
    assert adopted.kept == ("1/0",)
    assert adopted.unused == ("params/b", "params/w", "step")


@pytest.mark.parametrize(
    "old",
    [
        pytest.param(optax.sgd(0.1, momentum=0.9), id="a trace is no mu"),
        pytest.param(optax.lion(0.1), id="one moment are not two"),
        pytest.param(optax.scale_by_schedule(lambda count: 1.0), id="a lone count"),
    ],
)
def test_the_state_of_another_optimizer_is_refused(old):
    with pytest.raises(ValueError, match=r"adopt_state: old_state must share a part"):
        adopt_state(chained(clip()).init(PARAMS), trained(old))


@pytest.mark.parametrize("name", ["mu", "trace", "count"])
def test_a_bare_leaf_lands_under_no_other_name(name):
    """One array of a shape looks like another: alone, or inside someone's state."""
    bare = {"w": jnp.ones(3)} if name != "count" else jnp.zeros((), jnp.int32)
    new = optax.chain(clip(), optax.trace(0.9), adam()).init({"w": jnp.ones(3)})
    with pytest.raises(ValueError, match="none that fits"):
        adopt_state(new, {"other": bare})
    schedule = optax.scale_by_schedule(lambda count: 1.0)
    with pytest.raises(ValueError, match="none that fits"):
        adopt_state(optax.chain(clip(), schedule).init(PARAMS), trained(adam()))


def test_a_state_that_is_one_array():
    """It has no name to go by but its place."""
    counter = optax.GradientTransformation(
        lambda params: jnp.zeros((), jnp.int32),
        lambda updates, state, params=None: (updates, state + 1),
    )
    new = optax.chain(clip(), counter).init(PARAMS)
    assert adopt_state(new, trained(optax.chain(counter))).kept == ("1",)
    with pytest.raises(ValueError, match="none that fits"):
        adopt_state(new, trained(adam()))


def test_a_restored_state_with_more_fields_is_another():
    """Lion's fields are among Adam's."""
    with pytest.raises(ValueError, match="none that fits"):
        adopt_state(optax.chain(clip(), optax.lion(0.1)).init(PARAMS),
                    plain(trained(adam())))  # fmt: skip


def test_another_model_entirely():
    other = {"kernel": jnp.ones((2, 2))}
    moments = optax.chain(clip(), optax.trace(0.9))
    with pytest.raises(ValueError, match="none that fits among trace/b, trace/w"):
        adopt_state(moments.init(other), trained(optax.trace(0.9)))
    # Adam's counter is the same for any model: alone it is worse than none.
    with pytest.raises(ValueError, match="none that fits among 0/count"):
        adopt_state(chained(clip()).init(other), trained(adam()))


def test_other_dtypes_do_not_fit():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    with pytest.raises(ValueError, match="none that fits among 0/count"):
        adopt_state(chained(clip()).init(half), trained(adam()))


@pytest.mark.parametrize("old", [(), optax.EmptyState(), None, {}], ids=repr)
def test_a_state_without_leaves_leaves_all_fresh(old):
    new = chained(clip()).init(PARAMS)
    adopted = adopt_state(new, old)
    assert (adopted.kept, adopted.unused) == ((), ())
    assert len(adopted.fresh) == len(jax.tree.leaves(new))
    chex.assert_trees_all_equal(adopted.state, new)


# Recorders.


def test_a_recorder_comes_and_goes():
    """What a rule learned is kept, and what it recorded if it is of the same leaves."""
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}

    def after(record, params=params):
        tx = untyped(optclip.spike_clip(record=record))
        return tx.init(params), tx.update(params, tx.init(params))[1]

    (plain, old), (fresh, recorded) = after(0), after(4)
    adopted = adopt_state(fresh, old)
    assert adopted.kept == ("threshold", "metrics") and not adopted.unused
    assert all(name.startswith("recorder/") for name in adopted.fresh)
    assert adopted.state.metrics.steps == 1 and adopted.state.recorder.steps.sum() == 0
    adopted = adopt_state(plain, recorded)
    assert not adopted.fresh and adopted.state.metrics.steps == 1
    assert all(name.startswith("recorder/") for name in adopted.unused)
    adopted = adopt_state(fresh, recorded)
    assert not adopted.fresh and not adopted.unused
    assert adopted.state.recorder.steps.tolist() == [1, 0, 0, 0]
    for other, _ in (after(5), after(4, {"a": jnp.ones(2), "c": jnp.ones(3)})):
        adopted = adopt_state(other, recorded)
        assert adopted.kept == ("threshold", "metrics")
        assert adopted.state.recorder.steps.sum() == 0


def test_recorded_steps_of_another_count_are_left():
    """Where the rule's counter starts anew, old steps would mix with new ones."""
    grads, adam = jnp.array([3.0, 4.0]), optax.scale_by_adam()
    old = optax.chain(optclip.spike_clip(record=4), adam)
    state = old.init(grads)
    for _ in range(6):
        _, state = old.update(grads, state)
    tx = optax.chain(optclip.clip_by_global_norm(1.0, record=4), adam)
    adopted = untyped(optclip.adopt_state(tx.init(grads), state))
    _, adopted = tx.update(grads, adopted.state)
    assert untyped(optclip.history(adopted)).steps.tolist() == [1]
