"""What every test runs under: strict promotion, and host devices for the meshes.

The suite runs on whatever platform JAX finds; only the mesh tests use the eight host
devices, which cost nothing elsewhere.
"""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile(
    "optclip", deadline=None, max_examples=15, derandomize=True, print_blob=False
)
hypothesis.settings.load_profile("optclip")


# Laws that run the same compiled functions (`tests.laws.trees.run`).
SHARED = ("test_1_bound", "test_2_identity", "test_3_direction", "test_6_nonfinite")


def pytest_collection_modifyitems(items):
    """One worker for each file, and one for the laws that share compiled functions."""
    for item in items:
        group = "values" if item.path.stem in SHARED else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(autouse=True, scope="module")
def _compiled(request):
    """Forgets what a file compiled: all of it together is gigabytes."""
    yield
    if request.path.stem not in SHARED:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def _strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="module")
def quick_compiles():
    """For tests that compile a lot and compute little: XLA optimizes less."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
