"""How XLA compiles what tests run: in as little time as it can, or as users have it.

More than half of the suite's time is XLA's and JAX's compiling. So every program is
compiled `quickest`, and a test chooses otherwise where its law depends on it: by

    pytestmark = pytest.mark.compiles("ordinary")

for a file, or for one function by `jax.jit(function, compiler_options=ordinary())`.
"""

import contextlib
import functools
import os
from collections.abc import Iterator

import jax
from jax._src import compiler  # no public option reaches programs made elsewhere
from jax._src.interpreters import mlir

from tests.untyped import untyped

# Options of XLA:CPU that divide its work by three, and what they are otherwise: kernels
# from a simpler compiler, and all of a program's in one module of LLVM's.
QUICKER: dict[str, tuple[str | bool, str | bool]] = {
    "xla_cpu_use_fusion_emitters": (False, True),  # there is none from 0.12 on
    "xla_cpu_parallel_codegen_split_count": ("1", "32"),
}
WAYS = (
    "quickest",  # kernels made in less time, which can differ in their last digits
    "quick",  # the kernels that users have, not optimized
    "ordinary",
)
_chosen, _always = "quickest", False


@functools.cache
def _known() -> tuple[str, ...]:
    """Those of the options that this release has."""

    def known(name: str) -> bool:
        trivial = jax.jit(lambda x: x).lower(1.0)
        try:
            trivial.compile(compiler_options={name: QUICKER[name][0]})
        except jax.errors.JaxRuntimeError:  # no such option
            return False
        return True

    global _chosen
    _chosen, before = "ordinary", _chosen
    found = tuple(filter(known, QUICKER))
    _chosen = before
    return found


def quicker() -> dict[str, str | bool]:
    """What `quickest` adds to `quick`."""
    return {name: QUICKER[name][0] for name in _known()}


def ordinary() -> dict[str, str | bool]:
    """The options of users, for `jax.jit` and `Lowered.compile`."""
    if _always:
        return {}
    llvm: dict[str, str | bool] = {"xla_backend_optimization_level": "3"}
    llvm |= {"xla_llvm_disable_expensive_passes": False}
    return llvm | {name: QUICKER[name][1] for name in _known()}


def start(always: bool = False) -> None:
    """Every program of this process from now on, and what it costs beside XLA.

    With `always` even those that ask for ordinary options.
    """
    global _always
    _always = always
    options = untyped(compiler.get_compile_options)

    def chosen(*args, env_options_overrides=None, **named):
        given = quicker() if _chosen == "quickest" else {}
        given |= dict(env_options_overrides or {})
        return options(*args, env_options_overrides=given, **named)

    compiler.get_compile_options = chosen
    # A context of MLIR holds no program, and to make one takes longer than to lower
    # most of the twenty thousand: each makes its own otherwise.
    mlir.make_ir_context = functools.cache(mlir.make_ir_context)
    jax.config.update("jax_disable_most_optimizations", True)


@contextlib.contextmanager
def compiled(way: str) -> Iterator[None]:
    """One of `WAYS` for what is compiled here."""
    assert way in WAYS, way
    global _chosen
    before, _chosen = _chosen, way
    jax.config.update("jax_disable_most_optimizations", _chosen != "ordinary")
    try:
        yield
    finally:
        _chosen = before
        jax.config.update("jax_disable_most_optimizations", _chosen != "ordinary")


def forget() -> None:
    """All compiled programs: those of the whole suite together are gigabytes."""
    jax.clear_caches()
    untyped(mlir.make_ir_context).cache_clear()


def environment(level: int = 0) -> dict[str, str]:
    """What makes another process compile `quickest`.

    A program that computes for longer than it compiles takes `level=1`, LLVM's lowest
    that makes loops fast.
    """
    flags = [f"--{name}={value}".lower() for name, value in quicker().items()]
    if level:  # which the variable would set to 0
        flags.append(f"--xla_backend_optimization_level={level}")
    flags = " ".join([os.environ["XLA_FLAGS"], *flags])
    most = {} if level else {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return {**os.environ, "XLA_FLAGS": flags, **most}
