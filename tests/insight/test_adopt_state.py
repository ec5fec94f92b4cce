"""`adopt_state`: old runs go on under a new chain, and nothing is lost silently."""

import chex
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import optclip
from optclip import adopt_state

PARAMS = {"b": jnp.ones(2), "w": jnp.arange(1.0, 4.0)}
METRICS = optclip.ClipMetrics._fields
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
    return state


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
        chained(clip()), adam(), {"1": ""}, metrics_at("0"), (),
    ),
    "clip in front of adam in a chain": (
        chained(clip()), chained(), {"1": "0"}, metrics_at("0"), (),
    ),
    "clip after adam": (
        optax.chain(adam(), clip()), adam(), {"0": ""}, metrics_at("1"), (),
    ),
    "ours for Optax's stateless clip": (
        chained(clip()), chained(optax.clip_by_global_norm(1.0)),
        {"1": "1"}, metrics_at("0"), (),
    ),
    "nothing changed": (
        chained(clip()), chained(clip()), {"": ""}, (), (),
    ),
    "another limit, which is no state": (
        chained(optclip.clip_by_norm(9.0)), chained(clip()), {"": ""}, (), (),
    ),
    "clip removed, to a bare adam": (
        adam(), chained(clip()), {"": "1"}, (), metrics_at("0"),
    ),
    "clip removed, Optax's instead": (
        chained(optax.clip_by_global_norm(1.0)), chained(clip()),
        {"1": "1"}, (), metrics_at("0"),
    ),
    "a second clip": (
        optax.chain(clip(), adam(), clip()), chained(clip()),
        {"0": "0", "1": "1"}, metrics_at("2"), (),
    ),
    "named chain": (
        optax.named_chain(("clip", clip()), ("adam", adam())),
        optax.named_chain(("adam", adam())),
        {"adam": "adam"}, metrics_at("clip"), (),
    ),
    "from a chain to a named chain": (
        optax.named_chain(("clip", clip()), ("adam", adam())), chained(),
        {"adam": "0"}, metrics_at("clip"), (),
    ),
    "names tell alike states apart": (
        optax.named_chain(("clip", clip()), ("adam", adam()), ("seen", clip())),
        optax.named_chain(("adam", adam()), ("seen", clip())),
        {"adam": "adam", "seen": "seen"}, metrics_at("clip"), (),
    ),
    "masked clip": (
        chained(optax.masked(clip(), MASK)), adam(),
        {"1": ""}, metrics_at("0", "inner_state"), (),
    ),
    "inside masked": (
        optax.masked(chained(clip()), MASK), optax.masked(adam(), MASK),
        {"inner_state/1": "inner_state"}, metrics_at("inner_state", "0"), (),
    ),
    "inside MultiSteps": (
        optax.MultiSteps(chained(clip()), 2).gradient_transformation(),
        optax.MultiSteps(adam(), 2).gradient_transformation(),
        {name: name for name in ("mini_step", "gradient_step", "acc_grads")}
        | {"inner_opt_state/1": "inner_opt_state"},
        metrics_at("inner_opt_state", "0"), (),
    ),
    "inside inject_hyperparams": (
        optax.inject_hyperparams(lambda rate: chained(clip(), optax.scale(rate)))(1.0),
        optax.inject_hyperparams(lambda rate: chained(optax.scale(rate)))(1.0),
        {"count": "count", "hyperparams": "hyperparams", "inner_state/2":
         "inner_state/1"}, metrics_at("inner_state", "0"), (),
    ),
    "inside a partition": (
        optax.partition({"x": chained(clip()), "y": adam()}, {"b": "x", "w": "y"}),
        optax.partition({"x": adam(), "y": adam()}, {"b": "x", "w": "y"}),
        {"inner_states/x/inner_state/1": "inner_states/x/inner_state",
         "inner_states/y": "inner_states/y"},
        metrics_at("inner_states", "x", "inner_state", "0"), (),
    ),
    "nested chains": (
        optax.chain(chained(clip()), optax.scale_by_schedule(lambda count: 1.0)),
        optax.chain(chained(), optax.scale_by_schedule(lambda count: 1.0)),
        {"0/1": "0/0", "1": "1"}, metrics_at("0", "0"), (),
    ),
    "two alike optimizers keep their order": (
        optax.chain(clip(), adam(), optax.scale(2.0), adam()),
        optax.chain(adam(), optax.scale(2.0), adam()),
        {"1": "0", "3": "2"}, metrics_at("0"), (),
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
    new = optax.chain(clip(), adam(), optclip.monitor())
    old = trained(optax.chain(adam(), optclip.monitor()))
    adopted = adopt_state(new.init(PARAMS), old)
    assert (adopted.kept, adopted.fresh) == (("1", "2"), metrics_at("0"))


@pytest.mark.parametrize("with_none", [False, True], ids=["state", "None for empty"])
def test_dicts_and_lists_fit_too(with_none):
    """As checkpoints come back that were restored without a target."""

    def plain(node):
        if hasattr(node, "_fields"):
            node = dict(zip(node._fields, node, strict=True)) or None
            node = {} if node is None and not with_none else node
        if isinstance(node, dict):
            return {name: plain(child) for name, child in node.items()}
        return [plain(x) for x in node] if isinstance(node, (list, tuple)) else node

    new, old = chained(clip()), chained(optax.clip_by_global_norm(1.0))
    state = trained(old)
    adopted = adopt_state(new.init(PARAMS), plain(state))
    assert (adopted.kept, adopted.fresh) == (("1",), metrics_at("0"))
    assert adopted.unused == ()
    chex.assert_trees_all_equal(adopted.state[1], state[1])


def test_an_orbax_checkpoint_without_its_target(tmp_path):
    new, old = chained(clip()), chained(optax.clip_by_global_norm(1.0))
    state = trained(old)
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(tmp_path / "old", state)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / "old")
    checkpointer.close()
    assert isinstance(restored, list) or isinstance(restored, dict)
    adopted = adopt_state(new.init(PARAMS), restored)
    assert (adopted.kept, adopted.fresh) == (("1",), metrics_at("0"))
    chex.assert_trees_all_equal(adopted.state[1], state[1])


def test_an_nnx_optimizer():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    old = nnx.Optimizer(model, adam(), wrt=nnx.Param)
    old.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 2)))))(model))
    new = nnx.Optimizer(model, chained(clip()), wrt=nnx.Param)
    adopted = adopt_state(new.opt_state, old.opt_state)
    assert (adopted.kept, adopted.fresh) == (("1",), metrics_at("0"))
    chex.assert_trees_all_equal(
        jax.tree.leaves(adopted.state[1]), jax.tree.leaves(old.opt_state)
    )


def test_a_learned_threshold_is_kept_where_its_groups_are_the_same():
    learned = optclip.thresholds.Threshold(
        limit=lambda largest, seen: jnp.full_like(seen.size, jnp.inf),
        init=lambda seen: {"largest": jnp.zeros_like(seen.size)},
        observe=lambda state, seen, limit: {
            "largest": jnp.maximum(state["largest"], seen.size)
        },
    )

    def by_leaf():
        return optclip.clip_by(learned, grouping=optclip.groupings.per_leaf())

    old = trained(optax.chain(by_leaf(), adam()))
    adopted = adopt_state(optax.chain(adam(), by_leaf()).init(PARAMS), old)
    assert set(adopted.kept) == {"0", "1"}
    chex.assert_trees_all_equal(adopted.state, old[::-1])

    whole = optax.chain(optclip.clip_by(learned), adam())
    adopted = adopt_state(whole.init(PARAMS), old)
    assert adopted.fresh == ("0/threshold/largest",)
    assert adopted.unused == ("0/threshold/largest",)
    chex.assert_trees_all_equal(adopted.state[0].metrics, old[0].metrics)


@pytest.mark.parametrize("grouping", ["whole", "per_unit"])
def test_a_history_of_another_length_comes_with_its_count_or_not_at_all(grouping):
    def rule(window):
        parts = optclip.thresholds.percentile(50.0, window)
        return optclip.clip_by(parts, grouping=getattr(optclip.groupings, grouping)())

    old = trained(optax.chain(rule(4), adam()), steps=6)
    fresh = optax.chain(rule(8), adam()).init(PARAMS)
    adopted = adopt_state(fresh, old)
    assert set(adopted.kept) == {"0/metrics", "1"}
    chex.assert_trees_all_equal(adopted.state[0].threshold, fresh[0].threshold)
    chex.assert_trees_all_equal(adopted.state[0].metrics, old[0].metrics)


def test_a_model_of_other_shapes_keeps_what_still_fits():
    wider = {"b": jnp.ones(5), "w": PARAMS["w"]}
    adopted = adopt_state(chained(clip()).init(wider), trained(adam()))
    assert adopted.kept == ("1/0/count", "1/0/mu/w", "1/0/nu/w")
    assert adopted.fresh == (*metrics_at("0"), "1/0/mu/b", "1/0/nu/b")
    assert adopted.unused == ("0/mu/b", "0/nu/b")


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


def test_another_model_entirely():
    other = {"kernel": jnp.ones((2, 2))}
    moments = optax.chain(clip(), optax.trace(0.9))
    with pytest.raises(ValueError, match="none that fits among trace/b, trace/w"):
        adopt_state(moments.init(other), trained(optax.trace(0.9)))
    # Adam's counter is the same for any model, and all that is.
    adopted = adopt_state(chained(clip()).init(other), trained(adam()))
    assert adopted.kept == ("1/0/count",)
    assert adopted.unused == ("0/mu/b", "0/mu/w", "0/nu/b", "0/nu/w")


def test_other_dtypes_do_not_fit():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    adopted = adopt_state(chained(clip()).init(half), trained(adam()))
    assert adopted.kept == ("1/0/count",)


@pytest.mark.parametrize("old", [(), optax.EmptyState(), None, {}], ids=repr)
def test_a_state_without_leaves_leaves_all_fresh(old):
    new = chained(clip()).init(PARAMS)
    adopted = adopt_state(new, old)
    assert (adopted.kept, adopted.unused) == ((), ())
    assert len(adopted.fresh) == len(jax.tree.leaves(new))
    chex.assert_trees_all_equal(adopted.state, new)
