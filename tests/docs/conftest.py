"""What tests of pages share."""

import jax
import pytest


@pytest.fixture
def as_a_reader_has_it():
    """JAX's own promotion of dtypes and ranks, which other tests make strict."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
