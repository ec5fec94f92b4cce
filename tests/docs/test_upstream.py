"""What docs/upstream.md says of Optax is what Optax does.

A line that differs means that Optax or optclip changed, and the page is to be mended.
Left of the bar is what Optax gives, right of it what optclip gives.
"""

import contextlib
import io

import jax
import optax
import pytest

from tests import pages

TEXT = (pages.ROOT / "docs" / "upstream.md").read_text()
EXPECTED = {
    "Large and small magnitudes (law 1)": [
        "clip_by_global_norm: 0 0 | 0.6 0.8",
        "  of float16: 0 0 float16 | 0.6001 0.7998 float16",
        "  to 1e-24: 3e-24 4e-24 | 6e-25 8e-25",
        "clip_by_block_rms: 0 0 | 0.8485 1.131",
        "adaptive_grad_clip: 0 0 | 0.008485 0.01131",
        "  below div_eps: 4.243e-11 5.657e-11 | 8.485e-11 1.131e-10",
        "per_example_global_norm_clip: 0 0 | 0.6 0.8",
        "normalize_by_update_norm: 0 0",
    ],
    "At the limit and at zero (law 2)": [
        "clip_by_global_norm(0): nan | 0",
        "clip_by_block_rms(0): nan | 0",
        "change of a gradient at its limit: 0 9.537e-07 | 0 0",
    ],
    "Limits that make no sense (law 8)": [
        "clip_by_global_norm(-1): -0.6 -0.8 | ValueError",
        "clip_by_block_rms(-1): 3 4 | ValueError",
        "adaptive_grad_clip(-0.01): -0.008485 -0.01131 | ValueError",
        "clip(-1): -1 -1 | ValueError",
        "clip(uint8 2): 2 2 | -2 0.25",
        "per_example_global_norm_clip, -1: -0.6 -0.8 | ValueError",
    ],
    "What is not finite (law 6)": [
        "clip_by_global_norm: nan; 0 | nan; nan",
        "clip_by_block_rms: nan 0 | nan nan",
        "adaptive_grad_clip: nan 0 | nan nan",
        "per_example_global_norm_clip: nan 0.8 | 0.6 0.8",
    ],
    "Derivatives through the clip (law 7)": [
        "clip_by_global_norm: nan nan | 1 1",
        "clip_by_block_rms: nan nan | 1 1",
        "adaptive_grad_clip: nan nan | 1 1",
        "per_example_global_norm_clip: nan nan | 1 1",
    ],
    "Leaves and dtypes (law 4)": [
        "clip_by_global_norm(float32): TypeError | 0.6016 0.8008 bfloat16",
        "clip_by_block_rms(float32): 0.8496 1.133 | 0.8477 1.133 bfloat16",
        "clip(float32): 1 1 | 1 1 bfloat16",
        "AGC with float32 params: 0.008485 0.01131 | 0.008484 0.01129 bfloat16",
        "clip_by_global_norm of int32: TypeError | 3 int32",
        "clip_by_block_rms of int32: 1 | 3 int32",
        "clip of int32: 1 | 3 int32",
        "clip of complex64: ValueError | 0.6+0.8j complex64",
        "clip(1000) of float8_e4m3fn: nan nan float8_e4m3fn | 3 -4 float8_e4m3fn",
        "adaptive_grad_clip of six axes: ValueError | 0.5 0.5 0.5 0.5",
    ],
    "In other transforms (law 5)": [
        "clip_by_global_norm, scheduled: TypeError | 0.6016 0.8008 bfloat16",
    ],
    "Meshes (law 9)": [
        "norm after clip_by_global_norm in shard_map: 2 | 1",
        "adaptive_grad_clip, Explicit: ShardingTypeError | 0.01 0.01",
    ],
    "State (law 10)": [
        "monitor: [] ['bfloat16']",
        "snapshot: ['float32'] ['bfloat16']",
        "norm that monitor saw in lax.scan: TypeError | 1.414",
    ],
    "Memory (law 11)": [
        "clip_by_global_norm: 2 | 0",
        "clip_by_block_rms: 2 | 0",
        "adaptive_grad_clip: 2 | 0",
    ],
    "Projections (law 12)": [
        "projection_box: ValueError | 1; -1",
        "projection_l2_ball: 0 0 | 0.6 0.8",
        "projection_l2_sphere: inf inf | 0.6 0.8",
        "projection_l1_ball: 1 1 | 0.5 0.5",
        "projection_simplex of 1000 sums to something else than 1: 1 | 0",
    ],
    "What was tried and keeps its law": [
        "0 bfloat16",
        "0.9981",
    ],
}


@pytest.fixture(scope="module")
def printed() -> dict[str, list[str]]:
    """The lines that the programs of each section print."""
    if tuple(map(int, optax.__version__.split(".")[:3])) < (0, 2, 8):
        pytest.skip("the page is about Optax 0.2.8")
    found: dict[str, list[str]] = {}
    namespace: dict[str, object] = {}
    options = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
    with options[0], options[1]:
        for section in TEXT.split("\n## "):
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                for _, program in pages.CELL.findall(section):
                    exec(compile(program, "docs/upstream.md", "exec"), namespace)
            found[section.splitlines()[0]] = out.getvalue().splitlines()
    return found


@pytest.mark.parametrize("section", EXPECTED)
def test_a_section_prints_what_is_known(section, printed):
    assert printed[section] == EXPECTED[section]


def test_every_line_of_a_fault_shows_a_difference():
    for section, lines in EXPECTED.items():
        for line in lines if "law" in section else ():
            optaxs, bar, ours = line.partition(": ")[2].partition(" | ")
            assert not bar or optaxs != ours, line


def test_the_page_has_no_program_that_is_not_compared(printed):
    assert {section for section, lines in printed.items() if lines} == EXPECTED.keys()
