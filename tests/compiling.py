"""How XLA compiles what tests run: in as little time as it can, or as for users.

Most of the suite's time is compilation, so every program is compiled quickly: its
kernels are made in less time, and can differ from ordinary ones in the last digits.
Where a law depends on those, its file says

    pytestmark = pytest.mark.ordinary

or one of its functions is `jax.jit(function, compiler_options=compiling.ordinary())`.
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
_quick, _always = False, False


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

    with compiled(quick=False):
        return tuple(filter(known, QUICKER))


def _quicker() -> dict[str, str | bool]:
    return {name: QUICKER[name][0] for name in _known()}


def ordinary() -> dict[str, str | bool]:
    """The options of users' programs, for `jax.jit` and `Lowered.compile`."""
    if _always:
        return {}
    llvm: dict[str, str | bool] = {"xla_backend_optimization_level": "3"}
    llvm |= {"xla_llvm_disable_expensive_passes": False}
    return llvm | {name: QUICKER[name][1] for name in _known()}


def start(always: bool) -> None:
    """Compiles quickly from now on; with `always` what asks for `ordinary` too."""
    global _quick, _always
    _quick, _always = True, always
    jax.config.update("jax_disable_most_optimizations", True)
    options = untyped(compiler.get_compile_options)

    def chosen(*args, env_options_overrides=None, **named):
        given = _quicker() if _quick else {}
        given |= dict(env_options_overrides or {})
        return options(*args, env_options_overrides=given, **named)

    compiler.get_compile_options = chosen
    # JAX makes a context of MLIR for each of twenty thousand programs, which takes
    # longer than to lower most of them; it holds no program, so one serves many.
    mlir.make_ir_context = functools.cache(mlir.make_ir_context)


@contextlib.contextmanager
def compiled(quick: bool) -> Iterator[None]:
    """Quickly or as for users, whatever is compiled here."""
    global _quick
    before = _quick
    try:
        _quick = quick
        jax.config.update("jax_disable_most_optimizations", quick)
        yield
    finally:
        _quick = before
        jax.config.update("jax_disable_most_optimizations", before)


def forget() -> None:
    """All compiled programs: those of the whole suite together are gigabytes."""
    jax.clear_caches()
    untyped(mlir.make_ir_context).cache_clear()


def environment(level: int = 0) -> dict[str, str]:
    """What makes another process compile quickly.

    A program that computes for longer than it compiles takes `level=1`, LLVM's lowest
    that makes loops fast.
    """
    flags = [f"--{name}={value}".lower() for name, value in _quicker().items()]
    if level:  # which the variable would set to 0
        flags.append(f"--xla_backend_optimization_level={level}")
    flags = " ".join([os.environ["XLA_FLAGS"], *flags])
    most = {} if level else {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return {**os.environ, "XLA_FLAGS": flags, **most}
