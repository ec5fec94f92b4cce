"""Law 11: a jitted clip keeps no temporary copy of a leaf, and reads none too often."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import optclip
from tests import compiling
from tests.laws.table import ROWS, Constraint, Row, projections, rows
from tests.laws.trees import SAMPLE

# A slice of a transformer: every fan-in is at least 512, so that one number a unit is
# little beside the leaf.
Shapes = dict[str, tuple[int, ...]]
SHAPES: Shapes = {
    "attention/kernel": (512, 1536),
    "attention/bias": (1536,),
    "mlp/down": (2048, 512),
}


pytestmark = pytest.mark.skipif(
    jax.default_backend() == "cpu" and jax.__version_info__ < (0, 10),
    reason="XLA:CPU of jax 0.9 writes what it squares to memory",
)


KINDS = ("clip", "enlarging", "adaptive", "elementwise", "measuring")


def fitting(*kinds: str, variants: bool = True) -> pytest.MarkDecorator:
    """The rows that take these leaves, which share no leading axis of examples.

    In both dtypes, unless laws of values have one for the row.
    """
    return pytest.mark.parametrize(
        ("row", "dtype"),
        [
            pytest.param(*case.values, dtype, id=f"{case.id}-{dtype.__name__}")
            for case in rows(*kinds, variants=variants)
            for dtype in (jnp.float32, jnp.bfloat16)
            for own in [case.values[0].dtypes]
            if own is None or dtype.__name__ in own
            if not case.values[0].batched
        ],
    )


EVERY = fitting(*KINDS, "wrapper")
BEFORE_AN_OPTIMIZER = fitting(*KINDS, variants=False)
DTYPES = pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__
)


def lowered(tx: optax.GradientTransformation, dtype: jnp.dtype) -> Any:
    """One update of the slice."""
    grads = {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in SHAPES.items()}
    state = jax.eval_shape(tx.init, grads)
    return jax.jit(tx.update).lower(grads, state, grads)


def compiled(tx: optax.GradientTransformation, dtype: jnp.dtype) -> Any:
    return lowered(tx, dtype).compile()


@functools.cache
def compiled_row(name: str, dtype: jnp.dtype) -> Any:
    """The same for a row of the table."""
    (row,) = (row for row in ROWS if row.name == name)
    return compiled(row.build(1.0), dtype)


def temporary_share(program: Any, dtype: jnp.dtype, shapes: Shapes = SHAPES) -> float:
    """Its temporary bytes, relative to the gradients' bytes."""
    total = sum(math.prod(shape) for shape in shapes.values())
    temporary = program.memory_analysis().temp_size_in_bytes
    return temporary / (total * jnp.dtype(dtype).itemsize)


@pytest.mark.parametrize("name", SAMPLE)
@DTYPES
def test_quick_compiles_decide_nothing(name: str, dtype: jnp.dtype):
    """What is measured here is decided before any kernel is made."""
    (row,) = (row for row in ROWS if row.name == name)
    tx = optax.chain(row.build(1.0), optax.sgd(1e-3))
    program = lowered(tx, dtype)
    quick, ordinary = program.compile(), program.compile(compiling.ordinary())
    shares = (temporary_share(made, dtype) for made in (quick, ordinary))
    assert len(set(shares)) == 1
    for shape in SHAPES.values():
        assert kernels_that_read(quick, shape) == kernels_that_read(ordinary, shape)


@EVERY
def test_no_temporary_copy(row: Row, dtype: jnp.dtype):
    assert temporary_share(compiled_row(row.name, dtype), dtype) < 0.01


on_cpu = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="kernels are counted as XLA:CPU makes them"
)

# Once to measure and once to rescale, unless said otherwise.
KERNELS = {
    "elementwise": 1,
    "measuring": 1,
    "second_moment_clip": 3,  # its state is one more array of the leaf's size
    "clip_by_norm-max_abs": 3,  # squares beside the maximum remember a NaN
}


def kernels_that_read(program: Any, shape: tuple[int, ...]) -> list[int]:
    """For each argument of a shape: by how many kernels it is read.

    Outside the branch that measures again, which is another computation; what is handed
    on as it is, and what is copied because nothing was donated, does not count.
    """
    main = program.as_text().split("\nENTRY ")[1].splitlines()
    written = ",".join(map(str, shape))
    argument = re.compile(rf"%(\S+) = \w+\[{written}\]\S* parameter\(")
    names = [found[1] for found in map(argument.search, main) if found]
    handed_on = re.compile(r"= \(.*\) tuple\(| copy\(|^ +ROOT ")
    return [
        sum(
            bool(re.search(rf"[( ]%{re.escape(name)}[,)]", line))
            for line in main
            if not handed_on.search(line)
        )
        for name in names
    ]


@on_cpu
@EVERY
def test_passes_over_a_leaf(row: Row, dtype: jnp.dtype):
    """Gradients are read twice at most, parameters once."""
    expected = KERNELS.get(row.name, KERNELS.get(row.kind, 2))
    seen = kernels_that_read(compiled_row(row.name, dtype), SHAPES["mlp/down"])
    if row.needs_params:
        assert sorted(seen) == [1, expected]
    else:
        assert max(seen) <= expected


@on_cpu
@pytest.mark.parametrize(
    ("ours", "theirs", "times"),
    [
        (optclip.clip_by_global_norm, optax.clip_by_global_norm, 2.5),
        (optclip.clip_by_block_rms, optax.clip_by_block_rms, 5.0),
    ],
    ids=["one group", "a group a leaf"],
)
def test_what_another_leaf_costs_to_compile(ours, theirs, times):
    """In instructions of the optimized program, range-safe, over Optax's."""

    def instructions(tx: optax.GradientTransformation, count: int) -> int:
        grads = [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * count
        state = jax.eval_shape(tx.init, grads)
        program = jax.jit(tx.update, donate_argnums=0).lower(grads, state)
        compiled = program.compile(compiling.ordinary())
        return len(re.findall(r"^ +(?:ROOT )?%\S+ = ", compiled.as_text() or "", re.M))

    def each(tx: optax.GradientTransformation) -> float:
        return (instructions(tx, 40) - instructions(tx, 20)) / 20

    assert each(ours(1.0)) <= times * each(theirs(1.0))


@DTYPES
def test_no_temporary_copy_on_its_own(dtype: jnp.dtype):
    grads = [jax.ShapeDtypeStruct(shape, dtype) for shape in SHAPES.values()]
    memory = jax.jit(optclip.global_norm).lower(grads).compile().memory_analysis()
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in grads)
    assert memory is not None and memory.temp_size_in_bytes < 0.01 * total


def test_the_measure_of_memory_sees_a_copy():
    # Optax's rule widens bfloat16 leaves to memory; if this number were 0, the law
    # above would be blind.
    tx, dtype = optax.clip_by_global_norm(1.0), jnp.dtype(jnp.bfloat16)
    share = temporary_share(compiled(tx, dtype), dtype)
    if jax.default_backend() == "cpu":
        assert share > 1.0


@DTYPES
@pytest.mark.parametrize("row", projections(fuses=True))
def test_projections_keep_no_temporary_copy(row: Constraint, dtype: jnp.dtype):
    assert temporary_share(compiled(row.transform(1.0), dtype), dtype) < 0.01


def stepping(
    tx: optax.GradientTransformation,
    dtype: Any,
    shapes: Shapes = SHAPES,
    after: Callable[[Any], Any] = lambda params: params,
) -> Any:
    """A whole step and what comes after it, donated."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return after(optax.apply_updates(params, updates)), state

    grads = {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in shapes.items()}
    state = jax.eval_shape(tx.init, grads)
    with jax.numpy_dtype_promotion("standard"):  # which Optax's optimizers need
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(grads, state, grads)
    return lowered.compile()


@on_cpu
@BEFORE_AN_OPTIMIZER
def test_an_optimizer_clips_what_it_reads(row: Row, dtype: jnp.dtype):
    """AdamW's two kernels each clip a gradient themselves: it is never written."""
    shapes = {path: SHAPES[path] for path in ("mlp/down", "attention/bias")}
    program = stepping(optax.chain(row.build(1.0), optax.adamw(1e-3)), dtype, shapes)
    written = temporary_share(program, dtype, shapes)
    assert written < 0.01 if row.fuses is True else written > 0.9


def test_clipping_weights_costs_nothing_beside_the_optimizer():
    """Bytes as without the projection."""

    def temporary(tx: optax.GradientTransformation) -> int:
        return stepping(tx, jnp.float32).memory_analysis().temp_size_in_bytes

    alone = temporary(optax.rmsprop(5e-5))
    chained = optax.chain(optax.rmsprop(5e-5), optclip.clip_weights(0.01))
    assert temporary(chained) <= alone + 1024


# One leaf for each set, whose programs are compiled together.
SETS = {
    "box": optclip.sets.box(-0.01, 0.01),
    "max_norm": optclip.sets.max_norm(0.5),
    "unit_norm": optclip.sets.unit_norm(),
    "l2_ball": optclip.sets.l2_ball(10.0),
}
IN_SETS: Shapes = dict.fromkeys(SETS, (2048, 512))
ADAMW = optax.adamw(1e-3)


@on_cpu
@DTYPES
def test_boxes_behind_an_optimizer_keep_no_copy(dtype: jnp.dtype):
    shapes = {"kernel": (2048, 512), "free": (2048, 512)}
    box = optclip.project(SETS["box"], where="free")
    tx = optax.chain(ADAMW, optclip.clip_weights(0.01, where="kernel"), box)
    assert temporary_share(stepping(tx, dtype, shapes), dtype, shapes) < 0.01


@on_cpu
@DTYPES
def test_norms_behind_an_optimizer_keep_the_update(dtype: jnp.dtype):
    """And nothing else: it is written once, and measured and landed from there."""
    shapes = {name: shape for name, shape in IN_SETS.items() if name != "box"}
    tx = optax.chain(ADAMW, optclip.project({name: SETS[name] for name in shapes}))
    assert temporary_share(stepping(tx, dtype, shapes), dtype, shapes) < 1.01


@on_cpu
@DTYPES
def test_projecting_after_the_step_keeps_no_copy(dtype: jnp.dtype):
    """The step's result is measured, and written over."""

    def after(params):
        return optclip.project_params(params, SETS)

    program = stepping(ADAMW, dtype, IN_SETS, after)
    assert temporary_share(program, dtype, IN_SETS) < 0.01


@DTYPES
def test_skip_step_keeps_no_copy_of_the_state(dtype: jnp.dtype):
    """Optax's `apply_if_finite` copies what it chooses: here, both moments."""
    shapes = {"mlp/down": SHAPES["mlp/down"]}

    def written(tx: optax.GradientTransformation) -> float:
        return temporary_share(stepping(tx, dtype, shapes), dtype, shapes)

    assert written(optclip.skip_step(optax.adamw(1e-3), 1.0)) < 0.01
    if jax.default_backend() == "cpu":  # or the measure would be blind
        assert written(optax.apply_if_finite(optax.adamw(1e-3), 3)) > 0.9
