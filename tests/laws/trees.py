"""The fixed trees that laws run on, and how hypothesis fills them.

Shapes never change, so that a row compiles once for each dtype and serves every law:
`run` keeps one jitted function for each row, with the limit as a traced argument.
Hypothesis draws what is in the trees: values, magnitudes, zeros, and the limit.
"""

import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.experimental
import ml_dtypes
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st

from tests import compiling
from tests.laws.table import QUICK_ROWS, ROWS, Row
from tests.oracles import fixed

# Two labels (the first letter), a matrix beside its bias, one alone, and a scalar.
SHAPES = {"a/bias": (3,), "a/kernel": (4, 3), "b/kernel": (2, 5), "b/temperature": ()}
BATCHED = {"a/bias": (4, 3), "a/kernel": (4, 2, 2), "b/kernel": (4,)}

# Powers of ten between which the largest element is drawn. The upper ends leave room
# for the largest sum of 26 elements; float16's sizes are float32, which is room enough.
MAGNITUDES = {
    "float32": (-36, 36),
    "bfloat16": (-36, 36),
    "float16": (-7, 4),
    "float64": (-300, 305),
    "complex64": (-36, 36),
}
DTYPES = tuple(MAGNITUDES)

# One row of each kind of block, for what depends on little else and compiles slowly.
SAMPLE = ("clip_by_global_norm", "clip_by_norm-per_unit", "clip_by_value", "monitor")


def at_most(count: int) -> settings:
    """So many examples of a slow property in the suite; a longer search has its own."""
    profile, suite = settings.default, settings.get_profile("optclip")
    longer = profile is not None and profile.max_examples > suite.max_examples
    return settings() if longer else settings(max_examples=count)


class Case(NamedTuple):
    """A drawn tree, and a limit for it, a NumPy scalar in the dtype of sizes."""

    tree: fixed.Tree
    limit: Any


def combinations(*kinds: str, dtypes: tuple[str, ...] = DTYPES) -> list[Any]:
    """(row, dtype) for the rows of some kinds in the dtypes that they take."""
    return [
        pytest.param(row, dtype, id=f"{row.name}-{dtype}")
        for row in ROWS
        for dtype in dtypes
        if row.kind in kinds and (dtype != "complex64" or row.complex is True)
        if row.dtypes is None or dtype in row.dtypes
    ]


def info(dtype: Any) -> Any:
    """The limits of a dtype, of its real part if it is complex."""
    return ml_dtypes.finfo(np.zeros((), dtype).real.dtype)


def wide_dtype(dtype: Any) -> type:
    """The dtype in which sizes of such leaves are kept."""
    return np.float64 if np.dtype(dtype) == np.float64 else np.float32


def in_x64(dtype: Any) -> contextlib.AbstractContextManager:
    """Enables float64 for float64 leaves, and nothing for others."""
    if np.dtype(dtype) != np.float64:
        return contextlib.nullcontext()
    return jax.enable_x64(True)


@functools.cache
def _jitted(name: str, options: tuple[tuple[str, Any], ...]) -> Any:
    (row,) = [row for row in ROWS if row.name == name]

    def update(tree: Any, limit: Any) -> Any:
        # As its own parameters, for the row that needs some.
        return row.build(limit, **dict(options)).update(tree, None, tree)

    return jax.jit(update, compiler_options=compiler_options(name))


def compiler_options(name: str) -> dict[str, Any] | None:
    """One row of each kind of block is compiled as users compile it."""
    return compiling.ordinary() if name in QUICK_ROWS else None


def run(row: Row, case: Case, **options: Any) -> tuple[fixed.Tree, Any]:
    """The row's update and next state, jitted, as NumPy arrays."""
    with in_x64(np.asarray(case.limit).dtype):
        updates, state = _jitted(row.name, tuple(options.items()))(*case)
        return jax.device_get(updates), jax.device_get(state)


@functools.cache
def _stepping(name: str, options: tuple[tuple[str, Any], ...]) -> Any:
    (row,) = [row for row in ROWS if row.name == name]
    tx = row.build(1.0, **dict(options))
    return tx.init, jax.jit(tx.update, compiler_options=compiler_options(name))


def walk(row: Row, stream: list[fixed.Tree], **options: Any) -> list[Any]:
    """The row's updates and state after each step of a stream, as NumPy arrays.

    The first tree stands for the parameters as well.
    """
    init, update = _stepping(row.name, tuple(options.items()))
    with in_x64(next(iter(stream[0].values())).dtype):
        state, seen = init(stream[0]), []
        for tree in stream:
            out, state = update(tree, state, stream[0])
            seen.append(jax.device_get((out, state)))
    return seen


def wide(x: np.ndarray) -> np.ndarray:
    """An array in float64 or complex128."""
    x = np.asarray(x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def values(tree: fixed.Tree, group: fixed.Group) -> np.ndarray:
    """The elements of a group, in float64 or complex128."""
    return np.concatenate([wide(tree[path][index]).ravel() for path, index in group])


def groups_of(row: Row, tree: fixed.Tree) -> list[fixed.Group]:
    """The groups that the row measures in the tree."""
    return fixed.groups(tree, row.oracle["grouping"])


def sizes_of(row: Row, tree: fixed.Tree) -> list[float]:
    """Their sizes, in float64."""
    measure = row.oracle.get("measure", "l2")
    return [fixed.size(values(tree, group), measure) for group in groups_of(row, tree)]


def bits(tree: fixed.Tree, group: fixed.Group) -> bytes:
    """The elements of a group, bit for bit."""
    return b"".join(np.ascontiguousarray(tree[p][i]).tobytes() for p, i in group)


@st.composite
def trees(draw: Any, row: Row, dtype: str, zeros: bool = True) -> fixed.Tree:
    """A tree of finite values, whose leaves can differ by forty orders of magnitude.

    Elements below the smallest normal number are zero: XLA flushes them as it likes.
    """
    low, high = MAGNITUDES[dtype]
    top = draw(st.integers(low, high), label="power of ten")
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    tree = {}
    for path, shape in (BATCHED if row.batched else SHAPES).items():
        below = draw(st.sampled_from((0, 0, 0, 1, 3, 9, 20, 40)), label=f"{path} below")
        fills = ("dense", "dense", "equal", "sparse", "one", "zeros")
        fill = draw(st.sampled_from(fills if zeros else fills[:3]), label=path)
        x = _filled(fill, shape, rng)
        if np.dtype(dtype).kind == "c":
            x = x * np.exp(2j * np.pi * rng.uniform(size=shape))
            # Either part can be zero, and either negative zero.
            x = np.where(rng.uniform(size=shape) < 0.2, x.real * (1 - 0j), x)
        # In two factors: the power of ten itself can lie below the dtype's range.
        x = x * 10.0 ** max(top - below, low)
        tree[path] = _normal(x, dtype)
    return tree


def _normal(x: np.ndarray, dtype: str) -> np.ndarray:
    """In a dtype, with a zero for what is below its smallest normal number."""
    tiny = float(info(dtype).smallest_normal)
    if dtype == "float16":  # widened, its subnormals are ordinary numbers
        tiny = float(info(dtype).smallest_subnormal)
    if np.iscomplexobj(x):
        real, imag = (
            np.where(np.abs(p) < tiny, 0, p) for p in (np.real(x), np.imag(x))
        )
        return (real + 1j * imag).astype(dtype)
    return np.where(np.abs(x) < tiny, np.copysign(0.0, x), x).astype(dtype)


def _filled(fill: str, shape: tuple[int, ...], rng: Any) -> np.ndarray:
    x = rng.uniform(0.1, 1.0, shape) * rng.choice([-1.0, 1.0], shape)
    if fill == "equal":
        x = np.full(shape, 0.7)
    if fill == "sparse":
        x = np.where(rng.uniform(size=shape) < 0.7, np.copysign(0.0, x), x)
    if fill == "one":
        chosen = np.arange(x.size).reshape(shape) == rng.integers(x.size)
        x = np.where(chosen, x, 0.0)
    if fill == "zeros":
        x = np.copysign(np.zeros(shape), x)
    return x


def limits(row: Row, tree: fixed.Tree) -> st.SearchStrategy:
    """Limits that mean something for a tree, and limits that are merely extreme."""
    dtype = wide_dtype(next(iter(tree.values())).dtype)
    size_list = [size for size in sizes_of(row, tree) if size > 0] or [1.0]
    least = float(np.finfo(dtype).tiny)
    largest = float(np.finfo(dtype).max)

    def near(pair: tuple[float, float]) -> float:
        size, power = pair
        return min(max(size * 10.0**power, least), largest)

    relative = st.tuples(st.sampled_from(size_list), st.floats(-9.0, 1.0)).map(near)
    extreme = st.sampled_from((0.0, np.inf, 1e-30, 1e-3, 1.0, 1e37))
    return st.one_of(relative, relative, st.sampled_from(size_list), extreme).map(dtype)


@st.composite
def streams(draw: Any, row: Row, dtype: str) -> list[fixed.Tree]:
    """One tree at the levels of a few steps: spikes, falls, and empty ones."""
    tree = draw(trees(row, dtype))
    powers = st.lists(st.sampled_from((0, 1, 2, 3, 9, None)), min_size=3, max_size=5)
    levels = [0.0 if p is None else 2.0**-p for p in draw(powers, label="levels")]
    return [
        {p: _normal(wide(x) * level, dtype) for p, x in tree.items()}
        for level in levels
    ]


@st.composite
def cases(draw: Any, row: Row, dtype: str) -> Case:
    """A tree and a limit."""
    tree = draw(trees(row, dtype))
    return Case(tree, draw(limits(row, tree), label="limit"))
