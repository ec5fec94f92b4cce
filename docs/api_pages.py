"""The pages of the API: one for each public name, made from `__all__` and docstrings.

    __all__ of each namespace ──▶ docs/api/<namespace>.md      its docstring, with links
                              └─▶ docs/api/<full name>.rst     one page a name

A public name without a docstring stops the build. Docstrings are Markdown of a small
kind, and autodoc reads reStructuredText, so `as_rst` translates while it reads: names
in backquotes become links, indented lines become equations, and the sections that stand
in one line (`Edge cases: …`, `Reference: …`) get headings.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pathlib
import re
import sys
from types import ModuleType
from typing import Any

import optclip

NAMESPACES = (
    "measures",
    "groupings",
    "thresholds",
    "actions",
    "sets",
    "initializers",
    "initializers.nnx",
    "initializers.linen",
    "plot",
)

# Types whose own name says more in a signature than what they stand for.
ALIASES = (
    *("ArrayLike", "AxisName", "Constraint", "DTypeLike", "Limit", "Model"),
    *("Radius", "Rules", "Tree", "Where"),
)

# What the site has no page for: all but a name of optclip or of a namespace.
ELSEWHERE = rf"(?!optclip\.(?:(?:{'|'.join(NAMESPACES)})\.)?\w+$).*"


def namespace(name: str) -> ModuleType:
    return importlib.import_module(f"optclip.{name}" if name else "optclip")


@functools.cache
def public() -> dict[str, Any]:
    """Every public function, class and value by its full name; no modules."""
    found = {}
    for place in ("", *NAMESPACES):
        module = namespace(place)
        for name in module.__all__:
            value = getattr(module, name)
            if not inspect.ismodule(value):
                found[f"{module.__name__}.{name}"] = value
    return found


@functools.cache
def page(full_name: str) -> str:
    """A page's name. `Replay` and `replay` must differ where disks ignore case."""
    others = [name for name in public() if name.lower() == full_name.lower()]
    is_type = len(others) > 1 and inspect.isclass(public()[full_name])
    return full_name + "-type" * is_type


def undocumented() -> list[str]:
    """Public names that say nothing of their own."""

    def text(name: str, value: Any) -> str:
        if not inspect.isroutine(value) and not inspect.isclass(value):
            value = type(value)  # a part such as `l2`: its table says what it is
        doc = inspect.getdoc(value) or ""
        # What NamedTuple and dataclass write where nobody wrote anything.
        return "" if doc.startswith(f"{name.rpartition('.')[2]}(") else doc

    return [name for name, value in public().items() if not text(name, value)]


def groups() -> dict[str, list[tuple[str, str]]]:
    """The groups of names in `help(optclip)`: (name, what it is) by heading."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in (optclip.__doc__ or "").splitlines():
        if heading := re.fullmatch(r"([A-Z].*):", line):
            found[heading[1]] = rows = []
        elif row := re.fullmatch(r"    (\w+) {2,}(\S.*)", line):
            rows.append((row[1], row[2]))
    return found


def table(place: str, heading: str) -> list[str]:
    """The names in the first column of one table in a namespace's docstring."""
    doc = namespace(place).__doc__ or ""
    rows = re.search(rf"^\| {heading} \|.*\n\|[-|]+\n((?:\|.*\n)+)", doc, re.MULTILINE)
    assert rows, f"optclip.{place} has no table of {heading}s"
    cells = [row.split(" | ")[0] for row in rows[1].splitlines()]
    names = [name for cell in cells for name in re.findall(r"`(\w+)", cell)]
    return [name for name in dict.fromkeys(names) if name in namespace(place).__all__]


# Writing.


def write(docs: pathlib.Path) -> None:
    """The pages, into docs/api; those of names that are gone are removed."""
    if missing := undocumented():
        raise ValueError(f"public names without a docstring: {', '.join(missing)}")
    written = {"index.md": _index()}
    for place in NAMESPACES:
        written[f"{place}.md"] = _namespace_page(place)
    for name in public():
        written[f"{page(name)}.rst"] = _symbol_page(name, docs)
    folder = docs / "api"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        if old.name not in written:
            old.unlink()
    for name, text in written.items():
        put(folder / name, text)


def put(file: pathlib.Path, text: str) -> None:
    """Writes a page that changed; Sphinx reads no other page again."""
    if not file.exists() or file.read_text() != text:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def _toctree(pages: list[str]) -> str:
    return "\n".join(["```{toctree}", ":hidden:", ":maxdepth: 1", "", *pages, "```\n"])


def _index() -> str:
    parts = ["# API", "Every public name, in the groups of `help(optclip)`."]
    for heading, rows in groups().items():
        lines = ["| name | what it is |", "|---|---|"]
        for name, text in rows:
            target = page(full) if (full := f"optclip.{name}") in public() else name
            suffix = "rst" if full in public() else "md"
            lines.append(f"| [`{name}`]({target}.{suffix}) | {text} |")
        parts += [f"## {heading}", "\n".join(lines)]
    parts += ["## Namespaces", _toctree(list(NAMESPACES))]
    parts += [
        "\n".join(f"- [`optclip.{place}`]({place}.md)" for place in NAMESPACES),
        _toctree([page(name) for name in public() if name.count(".") == 1]),
    ]
    return "\n\n".join(parts) + "\n"


def _namespace_page(place: str) -> str:
    """The namespace's docstring, which is Markdown, with links to the names' pages."""
    module, own = namespace(place), f"optclip.{place}"

    def link(match: re.Match[str]) -> str:
        name = f"{own}.{match[1]}"
        return f"[{match[0]}]({page(name)}.rst)" if name in public() else match[0]

    doc = re.sub(r"`(\w+)(?:\([^`]*)?`", link, inspect.getdoc(module) or "")
    names = [name for name in public() if name.rpartition(".")[0] == own]
    missing = [
        f"[`{n}`]({page(n)}.rst)" for n in names if f"({page(n)}.rst)" not in doc
    ]
    more = [f"Also here: {', '.join(missing)}."] if missing else []
    tree = _toctree([page(name) for name in names])
    return "\n\n".join([f"# optclip.{place}", doc, *more, tree]) + "\n"


def _symbol_page(full_name: str, docs: pathlib.Path) -> str:
    place, _, name = full_name.rpartition(".")
    value = public()[full_name]
    if inspect.isclass(value):
        directive, options = "autoclass", ["   :members:"]
    elif inspect.isroutine(value):
        directive, options = "autofunction", []
    else:  # a part such as `l2`, whose docstring is that of its type
        directive, options = "py:data", ["", f"   {_row(place, name)}"]
    lines = [
        name,
        "=" * len(name),
        "",
        f".. py:currentmodule:: {place}",
        "",
        f".. {directive}:: {name}",
        *options,
        "",
    ]
    from docs import gallery

    if (picture := gallery.page_of(full_name)) is not None:
        lines += [f"Its picture is in the :doc:`gallery </gallery/{picture}>`.", ""]
    return "\n".join(lines)


def _row(place: str, name: str) -> str:
    """What the table in a namespace's docstring says of a value."""
    doc = inspect.getdoc(namespace(place.removeprefix("optclip."))) or ""
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", doc, re.MULTILINE))
    return rows[name]  # `\|` is the same in Markdown's tables and here


# Reading docstrings.

SECTION = re.compile(r"(Edge cases|Metrics|References?): +(\S.*)")
HEADED = re.compile(r"[A-Z][\w ]*:")
CODE_OR_LINK = re.compile(r"`([^`]+)`|\[([^\[\]]+)\]\(([^)]+)\)")


def as_rst(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]):
    """Sphinx's event: a docstring, in place, from Markdown to reStructuredtext."""
    place = name.rpartition(".")[0]
    try:
        own = set(inspect.signature(obj).parameters)
    except (TypeError, ValueError):
        own = set()

    def inline(line: str) -> str:
        parts, end = [], 0
        for match in CODE_OR_LINK.finditer(line):
            parts.append(_escaped(line[end : match.start()]))
            end = match.end()
            parts.append(
                _code(match[1], place, own)
                if match[1]
                else f"`{match[2]} <{match[3]}>`__"
            )
            if line[end : end + 1].isalnum():  # as in `array`s
                parts.append("\\ ")
        return "".join([*parts, _escaped(line[end:])])

    lines[:] = _joined(lines)
    out: list[str] = []
    section, literal, example, entries = False, False, True, False
    for number, line in enumerate(lines):
        before = lines[number - 1] if number else ""
        indent = len(line) - len(line.lstrip())
        entries = entries and bool(line.strip())
        if not line.strip():
            out.append("")
        elif entries and indent == 2 and ": " in line:
            keys, _, text = line.strip().partition(": ")
            out += ["", f"* ``{keys}``: {inline(text)}"]
        elif entries:
            out.append(f"  {inline(line.strip())}")
        elif literal and indent:
            out.append(line)
        elif line.lstrip().startswith((">>>", "...")) or (
            out and _in_doctest(lines, number)
        ):
            literal, section = False, False
            if example:
                out += [".. rubric:: Example", ""]
                example = False
            out.append(line)
        elif match := SECTION.fullmatch(line):
            section = literal = False
            entries = match[1] == "Metrics"
            text = match[2][0].upper() + match[2][1:]
            out += [f".. rubric:: {match[1]}", "", inline(text)]
        elif HEADED.fullmatch(line):
            section, literal = True, False
            out.append(line)
        elif indent >= 4 and not before.strip() and not section:
            literal = True
            out += [".. code-block:: text", "", line]
        else:
            if not indent:
                section = literal = False
            out.append(inline(line))
    lines[:] = out


def _joined(lines: list[str]) -> list[str]:
    """Paragraphs at the margin in one line: a link or code may go over its end."""
    out: list[str] = []
    for number, line in enumerate(lines):
        at_margin = line[:1].strip() and not line.startswith((">>>", "..."))
        doctest = _in_doctest(lines, number)
        open_ = out and out[-1][:1].strip() and not out[-1].startswith((">>>", "..."))
        if at_margin and open_ and not doctest and not HEADED.fullmatch(out[-1]):
            out[-1] += " " + line
        else:
            out.append(line)
    return out


def _in_doctest(lines: list[str], number: int) -> bool:
    """Whether a line is what a doctest prints."""
    for line in reversed(lines[:number]):
        if not line.strip():
            return False
        if line.lstrip().startswith((">>>", "...")):
            return True
    return False


def _code(text: str, place: str, parameters: set[str]) -> str:
    bare = text.removesuffix("()").removeprefix("optclip.")
    if bare not in parameters:
        for full in (f"{place}.{bare}", f"optclip.{bare}"):
            if full in public():
                return f":py:obj:`{text} <{full}>`"
    return f"``{text}``"


def _escaped(text: str) -> str:
    return re.sub(r"([*|\\]|_(?!\w))", r"\\\1", text)


def signature(
    app: Any, what: str, name: str, obj: Any, options: Any, given: Any, back: Any
) -> tuple[Any, Any]:
    """Sphinx's event: an alias in a union is its name, not how Sphinx holds it."""

    def named(text: str | None) -> str | None:
        return text and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text)

    return named(given), named(back)


def skipped(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any):
    """Sphinx's event: fields of a NamedTuple, which say no more than their number."""
    return True if (inspect.getdoc(obj) or "").startswith("Alias for field") else None


def resolve(app: Any, env: Any, node: Any, content: Any) -> Any:
    """Sphinx's event: a type by its own file is shown by its public name."""
    target = _public_names().get(node.get("reftarget", ""))
    if node.get("refdomain") != "py" or target is None:
        return None
    domain = env.get_domain("py")
    return domain.resolve_xref(
        env, node["refdoc"], app.builder, "obj", target, node, content
    )


@functools.cache
def _public_names() -> dict[str, str]:
    found = {}
    for full, value in public().items():
        if inspect.isclass(value):
            found[f"{value.__module__}.{value.__qualname__}"] = full
            found[value.__qualname__] = full
    return found


if __name__ == "__main__":  # python -m docs.api_pages FOLDER
    write(pathlib.Path(sys.argv[1]))
