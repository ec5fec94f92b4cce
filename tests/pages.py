"""Runs the programs of a page of Markdown as its reader would, one after the other.

`run` is for pages that state what each program prints; `execute` is for those whose
output the documentation's build makes, in {code-cell} blocks.
"""

import contextlib
import io
import pathlib
import re
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
# A program, executed by the site too where it is a {code-cell}; or what one prints.
FENCE = re.compile(
    r"```(?:\{code-cell\} )?(python|text)\n(?:(?::\w[^\n]*\n)+\n)?(.*?)```", re.DOTALL
)
CELL = re.compile(r"```\{code-cell\}[^\n]*\n((?::[^\n]*\n)*)(.*?)```", re.DOTALL)


def run(page: str) -> dict[str, Any]:
    """What a page's programs define, once each has printed what the page says."""
    namespace: dict[str, Any] = {}
    blocks = FENCE.findall((ROOT / page).read_text())
    following = [*blocks[1:], ("", "")]
    programs = 0
    for (kind, text), (next_kind, expected) in zip(blocks, following, strict=True):
        if kind != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(text, page, "exec"), namespace)
        programs += 1
        expected = expected if next_kind == "text" else ""
        assert printed.getvalue() == expected, f"{text}printed\n{printed.getvalue()}"
    assert programs > 0
    return namespace


def execute(page: str) -> Iterator[tuple[dict[str, Any], str]]:
    """What is defined after each {code-cell} of a page, and what that printed."""
    namespace: dict[str, Any] = {}
    programs = CELL.findall((ROOT / page).read_text())
    assert programs, f"{page} has no code-cell"
    for _, text in programs:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(text, page, "exec"), namespace)
        yield namespace, printed.getvalue()
