"""README's programs run, and print what README says."""

import contextlib
import io
import pathlib
import re

README = pathlib.Path(__file__).parent.parent / "README.md"
FENCE = re.compile(r"```(python|text)\n(.*?)```", re.DOTALL)


def test_programs_print_what_the_readme_says():
    namespace: dict[str, object] = {}
    blocks = FENCE.findall(README.read_text())
    following = [*blocks[1:], ("", "")]
    programs = 0
    for (kind, text), (next_kind, expected) in zip(blocks, following, strict=True):
        if kind != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(text, str(README), "exec"), namespace)
        programs += 1
        if next_kind == "text":
            assert printed.getvalue() == expected
        else:
            assert printed.getvalue() == ""
    assert programs > 0
