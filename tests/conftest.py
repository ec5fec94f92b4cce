"""What every test runs under: strict promotion, and host devices for the meshes.

The suite runs on whatever platform JAX finds; only the mesh tests use the eight host
devices, which cost nothing elsewhere.
"""

import itertools
import os
import re

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

import hypothesis
import jax
import pytest

from tests import compiling

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
    config.addinivalue_line("markers", "ordinary: compiled as for users")
    compiling.start(always=config.getoption("--quick"))
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


FILES = itertools.count(1)
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
    """As the file says, and forgotten from time to time: all of it is gigabytes."""
    ordinary = request.node.get_closest_marker("ordinary") is not None
    if ordinary:  # what other files compiled quickly would be used here
        compiling.forget()
    with compiling.compiled(quick=not ordinary):
        yield
    if not SHARED.search(request.path.as_posix()) and next(FILES) % 8 == 0:
        compiling.forget()


@pytest.fixture(autouse=True)
def _strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
