"""README: each program runs by itself and prints what README says; it stays short."""

import contextlib
import io
import re

import jax
import pytest

from tests import pages

TEXT = (pages.ROOT / "README.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```(?:\n```text\n(.*?)```)?", TEXT, re.DOTALL)


@pytest.fixture(autouse=True)
def _as_a_reader_has_it():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize(("program", "text"), PROGRAMS, ids=range(len(PROGRAMS)))
def test_a_program_runs_as_pasted_and_prints_what_the_readme_says(program, text):
    """What it says is the text that follows, or comments behind `print`."""
    expected = re.findall(r"^print\(.*\)  # (.*)", program, re.M)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(program, "README.md", "exec"), {})
    assert printed.getvalue().splitlines() == (text.splitlines() or expected)
    assert printed.getvalue()


def test_the_readme_is_read_in_minutes():
    assert len(PROGRAMS) == TEXT.count("```python") >= 4
    assert len(TEXT.splitlines()) <= 180
