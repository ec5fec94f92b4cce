"""What every test runs under: strict promotion, and host devices for the meshes.

The suite runs on whatever platform JAX finds; only the mesh tests use the eight host
devices, which cost nothing elsewhere.
"""

import functools
import os
import re
from collections.abc import Callable

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile(
    "optclip", deadline=None, max_examples=25, derandomize=True, print_blob=False
)
# For a longer search of every property: `--hypothesis-profile thorough`.
hypothesis.settings.register_profile(
    "thorough", deadline=None, max_examples=200, derandomize=True, print_blob=False
)
hypothesis.settings.load_profile("optclip")


def pytest_addoption(parser):
    parser.addoption(
        "--quick",
        action="store_true",
        help="laws 1 to 4, 6 and 8 for one row of each kind of block, in float32",
    )

    parser.addoption(
        "--branch-free",
        action="store_true",
        help="the programs that GPUs get, on the platform that is here",
    )


def pytest_configure(config):
    """A core for each worker: JAX's threads would wait for those of the others."""
    if config.getoption("--quick"):  # most of the time is XLA's
        jax.config.update("jax_disable_most_optimizations", True)
    if config.getoption("--branch-free"):
        from optclip._core import numerics

        numerics.backend = lambda: "gpu"
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


@pytest.fixture(autouse=True)
def _one_device(request, monkeypatch):
    """`--branch-free` outside of meshes: programs for a single GPU."""
    if request.config.getoption("--branch-free") and "test_9" not in request.path.name:
        from optclip._core import numerics

        monkeypatch.setattr(numerics, "devices", lambda: 1)


# Laws that run the same compiled functions (`tests.laws.trees`).
SHARED = re.compile(r"laws/test_[12346]_")


# Marks of groups would do, but xdist 3.8 does not see them under pytest 9.2.
@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """One worker for each file, and one for the laws that share compiled functions."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0]
            whole = not config.getoption("--quick")  # which compiles little
            return "values" if whole and SHARED.search(file) else file

    config.option.loadscopereorder = False
    return ByFile(config, log)


QUICK = re.compile(r"laws/test_[123468]_")


def is_quick(item):
    """Whether `--quick` runs the test: by its file, its row and its dtype."""
    from tests.laws.table import QUICK_ROWS

    given = item.callspec.params if hasattr(item, "callspec") else {}
    row, dtype = given.get("row"), given.get("dtype", "float32")
    return (
        QUICK.search(item.path.as_posix()) is not None
        and (row is None or row.name in QUICK_ROWS)
        and dtype == "float32"
    )


def pytest_collection_modifyitems(config, items):
    """What takes longest comes first, so that no worker waits at the end."""
    if config.getoption("--quick"):
        left = [item for item in items if not is_quick(item)]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if is_quick(item)]
    longest = ("tests/examples/", "tests/laws/", "tests/clipping/")

    def rank(item):
        found = (folder in item.path.as_posix() for folder in longest)
        return next((n for n, here in enumerate(found) if here), len(longest))

    items.sort(key=rank)


@pytest.fixture(autouse=True, scope="module")
def _compiled(request):
    """Forgets what a file compiled: all of it together is gigabytes."""
    yield
    if not SHARED.search(request.path.as_posix()):
        jax.clear_caches()


@pytest.fixture(autouse=True)
def _strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


# Options of XLA:CPU that divide its work by three, and what they are otherwise: kernels
# from a simpler compiler, and all of a program's in one module of LLVM's.
QUICKER: dict[str, tuple[str | bool, str | bool]] = {
    "xla_cpu_use_fusion_emitters": (False, True),  # there is none from 0.12 on
    "xla_cpu_parallel_codegen_split_count": ("1", "32"),
}


@functools.cache
def _known() -> tuple[str, ...]:
    """Those that this release has."""

    def known(name: str) -> bool:
        trivial = jax.jit(lambda x: x).lower(1.0)
        try:
            trivial.compile(compiler_options={name: QUICKER[name][0]})
        except jax.errors.JaxRuntimeError:  # no such option
            return False
        return True

    return tuple(filter(known, QUICKER))


def _quicker() -> dict[str, str | bool]:
    return {name: QUICKER[name][0] for name in _known()}


@pytest.fixture(scope="module")
def quick_compiles():
    """For tests that compile a lot and compute little: XLA optimizes less."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def quickest_compiles(quick_compiles):
    """For those of them whose tolerance is some units in the last place or more.

    XLA's passes over a program's graph stay; only the kernels are made in less time,
    and can differ in an output's last digits.
    """
    from jax._src import compiler  # no public option reaches programs made elsewhere

    from tests.untyped import untyped

    ordinary, quicker = untyped(compiler.get_compile_options), _quicker()

    def options(*args, env_options_overrides=None, **named):
        given = quicker | dict(env_options_overrides or {})
        return ordinary(*args, env_options_overrides=given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", options)
        yield


@pytest.fixture(scope="session")
def ordinary_options() -> dict[str, str | bool]:
    """For `Lowered.compile`, where a test compares with what quick compiles make."""
    llvm: dict[str, str | bool] = {"xla_backend_optimization_level": "3"}
    llvm |= {"xla_llvm_disable_expensive_passes": False}
    return llvm | {name: QUICKER[name][1] for name in _known()}


@pytest.fixture(scope="session")
def quickest_environment() -> Callable[..., dict[str, str]]:
    """What makes another process compile as `quickest_compiles` does.

    A program that computes for longer than it compiles takes `level=1`, LLVM's lowest
    that makes loops fast.
    """

    def environment(level: int = 0) -> dict[str, str]:
        flags = [f"--{name}={value}".lower() for name, value in _quicker().items()]
        if level:  # which the variable would set to 0
            flags.append(f"--xla_backend_optimization_level={level}")
        flags = " ".join([os.environ["XLA_FLAGS"], *flags])
        most = {} if level else {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        return {**os.environ, "XLA_FLAGS": flags, **most}

    return environment
