"""One spelling of paths for every library, and what is selected by it."""

import dataclasses
import functools
import re

import flax.core
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx

import optclip
from optclip import groupings
from optclip._core import paths as _paths
from tests.untyped import untyped

MODEL = {"encoder/bias", "encoder/kernel", "head/kernel"}


def arrays():
    return {
        "encoder": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
        "head": {"kernel": jnp.ones((3, 1))},
    }


class Linen(nn.Module):
    boxed: bool = False

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.ones
        if self.boxed:
            init = nn.with_partitioning(init, ("in", "out"))
        x = nn.Dense(3, kernel_init=init, name="encoder")(x)
        return nn.Dense(1, use_bias=False, kernel_init=init, name="head")(x)


def linen(boxed=False):
    return Linen(boxed).init(jax.random.key(0), jnp.ones((1, 2)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.encoder = nnx.Linear(2, 3, rngs=rngs)
        self.head = nnx.Linear(3, 1, use_bias=False, rngs=rngs)


def nnx_state():
    return nnx.state(Nnx(nnx.Rngs(0)), nnx.Param)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Part:
    kernel: jax.Array
    bias: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Whole:
    encoder: Part
    head: Part


def dataclass():
    return Whole(Part(jnp.ones((2, 3)), jnp.ones(3)), Part(jnp.ones((3, 1))))


def equinox_module():
    eqx = pytest.importorskip("equinox")

    class Layer(eqx.Module):
        kernel: jax.Array
        bias: jax.Array | None = None

    class Module(eqx.Module):
        encoder: Layer
        head: Layer

    return Module(Layer(jnp.ones((2, 3)), jnp.ones(3)), Layer(jnp.ones((3, 1))))


TREES = {
    "dict": arrays,
    "Linen's collections": linen,
    "Linen's params": lambda: linen()["params"],
    "Linen, frozen": lambda: flax.core.freeze(linen()),
    "Linen, boxed": lambda: linen(boxed=True),
    "NNX with Variables": nnx_state,
    "NNX without": lambda: nnx.to_pure_dict(nnx_state()),
    # What `nnx.Optimizer` hands on, where it strips the Variables.
    "NNX as the optimizer sees it": lambda: getattr(
        nnx, "as_pure", lambda state: state
    )(nnx_state()),
    "NNX module": lambda: Nnx(nnx.Rngs(0)),
    "dataclass": dataclass,
    "Equinox": equinox_module,
}


@pytest.mark.parametrize("make", TREES.values(), ids=TREES)
def test_one_spelling(make):
    leaves = _paths.leaves(make())
    paths = [
        leaf.path for leaf in leaves if jnp.issubdtype(leaf.value.dtype, jnp.floating)
    ]
    assert set(paths) == MODEL and len(paths) == len(MODEL)


@pytest.mark.parametrize("make", TREES.values(), ids=TREES)
def test_a_pattern_selects_alike(make):
    chosen = optclip.mask(r"^encoder/")(make())
    chosen_paths = {leaf.path for leaf in _paths.leaves(chosen) if leaf.value is True}
    assert chosen_paths == {"encoder/kernel", "encoder/bias"}


@pytest.mark.parametrize("make", TREES.values(), ids=TREES)
def test_everything_that_is_given_by_path_agrees(make):
    """Per-leaf limits, labels and norms, through the public doors."""
    tree = make()
    # The largest element: norms take a second look at tiny ones, which costs compiling.
    largest = optclip.measures.max_abs
    leaf_norms = functools.partial(optclip.leaf_norms, measure=largest)
    norms = leaf_norms(tree)
    assert set(norms) == MODEL
    limits = {"encoder": {"kernel": 0.5, "bias": 1.0}, "head": 0.25}
    tx = optclip.clip_by(
        optclip.thresholds.per_path(limits),
        grouping=groupings.per_leaf(),
        measure=largest,
    )
    clipped, _ = tx.update(tree, tx.init(tree))
    after = leaf_norms(clipped)
    for path, limit in (("encoder/kernel", 0.5), ("head/kernel", 0.25)):
        assert after[path] == pytest.approx(min(limit, norms[path]))

    labels = {"encoder": "body", "head": "head"}
    tx = optclip.clip_by(
        optclip.thresholds.per_path({"body": 1.0, "head": float("inf")}),
        grouping=groupings.per_label(labels),
        measure=largest,
    )
    clipped, _ = tx.update(tree, tx.init(tree))
    assert leaf_norms(clipped)["head/kernel"] == norms["head/kernel"]


def test_lists_and_tuples_are_numbered():
    tree = {"layers": [(jnp.ones(1), jnp.ones(1)), {"w": jnp.ones(1)}]}
    paths = [leaf.path for leaf in _paths.leaves(tree)]
    assert paths == ["layers/0/0", "layers/0/1", "layers/1/w"]


def test_nnx_lists_are_spelled_like_plain_ones():
    class Stack(nnx.Module):
        def __init__(self):
            made = [nnx.Linear(1, 1, use_bias=False, rngs=nnx.Rngs(0))] * 1
            self.layers = nnx.List(made) if hasattr(nnx, "List") else made

    state = nnx.state(Stack(), nnx.Param)
    want = ["layers/0/kernel"]
    assert [leaf.path for leaf in _paths.leaves(state)] == want
    assert [leaf.path for leaf in _paths.leaves(nnx.to_pure_dict(state))] == want


@pytest.mark.parametrize("make", [lambda: jnp.ones(2), lambda: nnx.Param(jnp.ones(2))],
                         ids=["array", "Variable"])  # fmt: skip
def test_a_tree_that_is_one_leaf(make):
    """Nothing to name it by; a lone Variable is its array."""
    ((path, _),) = _paths.leaves(make())
    assert path in ("", "value")


def test_a_module_called_value_keeps_its_name():
    """Attention has query, key and value; only a wrapper's `.value` is dropped."""
    attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0))
    state = nnx.state(attention, nnx.Param)
    nnx_paths = {str(leaf.path) for leaf in _paths.leaves(state)}
    pure_paths = {str(leaf.path) for leaf in _paths.leaves(nnx.to_pure_dict(state))}
    variables = nn.MultiHeadAttention(2).init(jax.random.key(0), jnp.ones((1, 3, 4)))
    linen_paths = {str(leaf.path) for leaf in _paths.leaves(variables)}
    assert nnx_paths == pure_paths == linen_paths
    assert {"value/kernel", "value/bias", "query/kernel"} <= nnx_paths
    chosen = _paths.leaves(optclip.mask(r"^value/")(state))
    assert {x.path for x in chosen if x.value is True} == {"value/kernel", "value/bias"}


def test_a_parameter_called_value_keeps_its_name():
    """In a dict it is a key; in NNX the Variable's own `.value` follows it."""

    class Holder(nnx.Module):
        def __init__(self):
            self.value = nnx.Param(jnp.ones(1))

    holder = {"head": Holder()}
    for tree in (
        {"head": {"value": jnp.ones(1)}},
        {"params": {"head": {"value": jnp.ones(1)}}},
        {"head": nnx.state(holder["head"])},
        holder,
    ):
        assert [leaf.path for leaf in _paths.leaves(tree)] == ["head/value"]


def test_a_field_called_value_keeps_its_name_as_a_module():
    """A dataclass may call a submodule `value`; what is below it is the leaf."""
    tree = Whole(encoder=Part(jnp.ones(1)), head=Part(jnp.ones(1)))

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Attention:
        value: Whole

    paths = {leaf.path for leaf in _paths.leaves(Attention(tree))}
    assert paths == {"value/encoder/kernel", "value/head/kernel"}


def test_only_the_collection_is_left_out():
    assert str(_paths.Path(("params",))) == "params"
    tree = {"params": {"params": {"w": jnp.ones(1)}}}
    assert [leaf.path for leaf in _paths.leaves(tree)] == ["params/w"]


# mask


def selected(where, tree=None):
    tree = arrays() if tree is None else tree
    chosen = optclip.mask(where)(tree)
    assert jax.tree.structure(chosen) == jax.tree.structure(tree)
    assert {type(leaf) for leaf in jax.tree.leaves(chosen)} == {bool}
    return {leaf.path for leaf in _paths.leaves(chosen) if leaf.value}


WHERES = {
    "pattern": (r"kernel$", {"encoder/kernel", "head/kernel"}),
    "compiled": (re.compile(r"KERNEL$", re.I), {"encoder/kernel", "head/kernel"}),
    "searched, not matched": (r"d/k", {"head/kernel"}),
    "path": (lambda path, leaf: path.startswith("head"), {"head/kernel"}),
    "leaf": (lambda path, leaf: leaf.ndim == 1, {"encoder/bias"}),
    "truthy": (lambda path, leaf: "bias" in path and 1, {"encoder/bias"}),
    "full tree": (
        {"encoder": {"kernel": False, "bias": True}, "head": {"kernel": True}},
        {"encoder/bias", "head/kernel"},
    ),
    "prefix": (
        {"encoder": True, "head": False}, {"encoder/kernel", "encoder/bias"},
    ),
    "mixed depth": (
        {"encoder": {"kernel": True, "bias": False}, "head": False},
        {"encoder/kernel"},
    ),
    "one for all": (True, MODEL),
}  # fmt: skip


@pytest.mark.parametrize(("where", "want"), WHERES.values(), ids=WHERES)
def test_where(where, want):
    assert selected(where) == want


@pytest.mark.parametrize(("where", "want"), WHERES.values(), ids=WHERES)
def test_where_on_nnx(where, want):
    """A tree of plain dicts selects in an NNX state too: paths count, not types."""
    chosen = optclip.mask(where)(nnx_state())
    assert {leaf.path for leaf in _paths.leaves(chosen) if leaf.value is True} == want


@pytest.mark.parametrize(
    "where",
    ["nothing like this", lambda path, leaf: False, False,
     {"encoder": False, "head": False}],
    ids=["pattern", "predicate", "one for all", "tree"],
)  # fmt: skip
def test_nothing_selected_is_an_error(where):
    with pytest.raises(ValueError, match=r"^mask: where=.* selects no leaf of 'enc"):
        optclip.mask(where)(arrays())


def test_the_error_shows_the_paths_and_the_pattern():
    with pytest.raises(ValueError, match=r"where='weight\$'.*'head/kernel'"):
        optclip.mask("weight$")(arrays())
    many = {f"layer_{i}": jnp.ones(1) for i in range(50)}
    with pytest.raises(ValueError, match=r"… \(50 leaves\)"):
        optclip.mask("weight$")(many)


def test_a_tree_without_leaves_has_nothing_to_select():
    assert optclip.mask("kernel")({}) == {}


def test_a_tree_that_leaves_some_out_is_an_error():
    with pytest.raises(ValueError, match=r"^mask: where must cover every leaf"):
        optclip.mask({"encoder": True})(arrays())


def test_the_mask_goes_into_optax():
    tx = optax.masked(optclip.clip_by_norm(1.0), optclip.mask("kernel$"))
    grads = jax.tree.map(lambda x: 10 * x, arrays())
    clipped, _ = tx.update(grads, tx.init(grads))
    norms = optclip.leaf_norms(clipped)
    assert norms["encoder/kernel"] == pytest.approx(1.0)
    assert norms["encoder/bias"] == optclip.leaf_norms(grads)["encoder/bias"]


def test_the_mask_goes_into_an_nnx_optimizer():
    """Where `init` is given Variables and `update` arrays."""
    model = untyped(Nnx(nnx.Rngs(0)))
    tx = optax.masked(optclip.clip_by_norm(1.0), optclip.mask("kernel$"))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = model.encoder.bias[...]
    grads = jax.tree.map(lambda x: jnp.full_like(x, 10.0), nnx.state(model, nnx.Param))
    kernel = model.encoder.kernel[...]
    optimizer.update(model, grads)
    moved = jnp.linalg.norm(model.encoder.kernel[...] - kernel)
    assert moved == pytest.approx(1.0, rel=1e-5)
    assert jnp.all(model.encoder.bias[...] - before == 10.0)
