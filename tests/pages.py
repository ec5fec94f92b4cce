"""Runs the programs of a page of Markdown as its reader would, one after the other.

`run` is for pages that state what each program prints; `cells` and `execute` are for
pages whose output the documentation's build makes, in {code-cell} blocks.
"""

import contextlib
import io
import pathlib
import re
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
FENCE = re.compile(r"```(python|text)\n(.*?)```", re.DOTALL)
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


def cells(page: str) -> list[str]:
    """The programs of a page's {code-cell} blocks, without the lines of options."""
    return [text for _, text in CELL.findall((ROOT / page).read_text())]


def execute(page: str) -> tuple[dict[str, Any], str]:
    """What a page's cells define, run as one program, and what they print."""
    namespace: dict[str, Any] = {}
    printed = io.StringIO()
    programs = cells(page)
    assert programs, f"{page} has no code-cell"
    with contextlib.redirect_stdout(printed):
        for text in programs:
            exec(compile(text, page, "exec"), namespace)
    return namespace, printed.getvalue()
