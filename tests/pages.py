"""Runs the programs of a page of Markdown as its reader would, one after the other."""

import contextlib
import io
import pathlib
import re
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
FENCE = re.compile(r"```(python|text)\n(.*?)```", re.DOTALL)


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
